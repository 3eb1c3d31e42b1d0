//! RESTA: θ_T + γ (θ_aligned − θ_unaligned).
//!
//! Source: Bhardwaj et al., "Language Models are Homer Simpson!" (arXiv 2402.11746), without its optional DARE. The
//! safety vector is the difference between an aligned model and the same one after its alignment was removed.

use super::each;

/// Adds `gamma` times the safety vector to the values of the tuned model.
pub(super) fn resta(tuned: &mut [f32], aligned: &[f32], unaligned: &[f32], gamma: f64) {
    each(tuned, [aligned, unaligned], |tuned, [aligned, unaligned]| tuned + gamma * (aligned - unaligned));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_safety_vector_is_added() {
        let mut tuned = [1.0, 2.0, -1.0];
        resta(&mut tuned, &[0.5, 1.0, 3.0], &[0.0, 2.0, 3.0], 0.5);
        // 1 + 0.5·0.5, 2 + 0.5·(−1), −1 + 0.5·0.
        assert_eq!(tuned, [1.25, 1.5, -1.0]);
    }
}
