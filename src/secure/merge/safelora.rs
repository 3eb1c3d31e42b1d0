//! SafeLoRA: ΔW ← C·ΔW in each module where cos(ΔW, C·ΔW) < τ.
//!
//! Source: Hsu et al. (arXiv 2405.16833); C as in [`super::projection`], ΔW = W_T − W₀.

use super::projection::project;
use super::{Test, each};
use crate::error::Result;

/// Replaces the values of the tuned module, [outputs, inputs], where its update is not aligned.
///
/// `v` is W_aligned − W_unaligned.
pub(super) fn safelora(
    base: &[f32],
    tuned: &mut [f32],
    v: Vec<f32>,
    shape: (usize, usize),
    tau: f64,
) -> Result<Option<Test>> {
    let mut update = tuned.to_vec();
    each(&mut update, [base], |tuned, [base]| tuned - base);
    let Some(projected) = project(v, &update, shape)? else { return Ok(None) };
    let changed = projected.cosine < tau;
    if changed {
        each(tuned, [base, &projected.values], |_, [base, projected]| base + projected);
    }
    Ok(Some(Test { cosine: projected.cosine, changed }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_that_is_not_aligned_is_projected() {
        // ΔW = (1, −0.5), C·ΔW = (0.6, 0.8), cosine 0.1789 (as in the tests of the projection).
        let merged = |tau| {
            let mut tuned = [2.0, 0.5];
            let test = safelora(&[1.0, 1.0], &mut tuned, vec![3.0, 4.0], (2, 1), tau).unwrap().unwrap();
            (tuned, test.changed)
        };
        let (values, changed) = merged(0.2);
        assert!(changed && (values[0] - 1.6).abs() < 1e-6 && (values[1] - 1.8).abs() < 1e-6, "{values:?}");
        assert_eq!(merged(0.17), ([2.0, 0.5], false));
    }
}
