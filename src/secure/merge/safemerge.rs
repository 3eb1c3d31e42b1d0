//! SafeMERGE: ΔW ← λ ΔW + (1 − λ) ΔW_safe in each module where cos(ΔW, C·ΔW) < τ.
//!
//! Source: Djuhera et al. (arXiv 2503.17239); C as in [`super::projection`], ΔW = W_T − W₀, and ΔW_safe = W_safe − W₀ of
//! a model that was tuned from the same base on refusals. Without such a model W_safe is W₀: the modules that fail the
//! test go back to the base by the factor λ, and the others stay.

use super::projection::project;
use super::{Test, each};
use crate::error::Result;

/// τ and λ.
#[derive(Clone, Copy)]
pub(super) struct Weights {
    pub(super) tau: f64,
    pub(super) lambda: f64,
}

/// Replaces the values of the tuned module, [outputs, inputs], where its update is not aligned.
///
/// `v` is W_aligned − W_unaligned; `safe` reads W_safe, and is called for such modules alone.
pub(super) fn safemerge(
    base: &[f32],
    tuned: &mut [f32],
    v: Vec<f32>,
    shape: (usize, usize),
    Weights { tau, lambda }: Weights,
    safe: impl FnOnce() -> Result<Vec<f32>>,
) -> Result<Option<Test>> {
    let mut update = tuned.to_vec();
    each(&mut update, [base], |tuned, [base]| tuned - base);
    let Some(projected) = project(v, &update, shape)? else { return Ok(None) };
    let changed = projected.cosine < tau;
    if changed {
        let merged = |tuned, [base, safe]: [f64; 2]| base + lambda * (tuned - base) + (1.0 - lambda) * (safe - base);
        each(tuned, [base, &safe()?], merged);
    }
    Ok(Some(Test { cosine: projected.cosine, changed }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;

    #[test]
    fn an_update_that_is_not_aligned_is_mixed_with_the_safe_one() {
        // ΔW = (1, −0.5), cosine 0.1789 (as in the tests of the projection); ΔW_safe = (0, 2).
        let mut tuned = [2.0, 0.5];
        let weights = |tau| Weights { tau, lambda: 0.75 };
        let v = || vec![3.0, 4.0];
        let test = safemerge(&[1.0, 1.0], &mut tuned, v(), (2, 1), weights(0.2), || Ok(vec![1.0, 3.0]));
        assert!(test.unwrap().unwrap().changed);
        // 1 + 0.75·1 + 0.25·0, 1 + 0.75·(−0.5) + 0.25·2.
        assert_eq!(tuned, [1.75, 1.125]);

        let mut tuned = [2.0, 0.5];
        let unread = || Err(Error::failed("read", "an aligned module needs no safe one"));
        let test = safemerge(&[1.0, 1.0], &mut tuned, v(), (2, 1), weights(0.17), unread);
        assert!(!test.unwrap().unwrap().changed);
        assert_eq!(tuned, [2.0, 0.5]);
    }
}
