//! The straight path from the base model to the tuned one: θ(α) = θ₀ + α (θ_T − θ₀).
//!
//! Source: WiSE-FT (Wortsman et al., arXiv 2109.01903), which mixes a fine-tuned model with the one before tuning and
//! takes α = 0.5 where there is no data to choose it on.

use super::each;

/// Replaces the values of the tuned model by those at `alpha`: 0 is the base model, 1 the tuned one.
pub(super) fn path(base: &[f32], tuned: &mut [f32], alpha: f64) {
    each(tuned, [base], |tuned, [base]| base + alpha * (tuned - base));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_point_on_the_path_by_hand() {
        let (base, tuned) = ([1.0, -2.0, 0.5], [2.0, 2.0, 0.5]);
        let at = |alpha| {
            let mut values = tuned;
            path(&base, &mut values, alpha);
            values
        };
        // 1 + 0.25·1, −2 + 0.25·4, 0.5 + 0.25·0.
        assert_eq!(at(0.25), [1.25, -1.0, 0.5]);
        assert_eq!((at(0.0), at(1.0)), (base, tuned));
    }

    #[test]
    fn the_ends_are_the_models_bit_for_bit() {
        // In f32 the difference of these two loses the smaller one's last bits.
        let (base, tuned) = ([1.0e4_f32, 0.1], [0.123_456_79_f32, 0.3]);
        let mut values = tuned;
        path(&base, &mut values, 1.0);
        assert_eq!(values, tuned);
    }
}
