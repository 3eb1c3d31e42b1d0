//! What changes the loss or the gradient.
//!
//! - constrain: tokens weighted by w_t = 2 (1 − σ(β_t Δ_t)), Δ_t = log π(y_t) − log π₀(y_t), so that the first tokens of an
//!   answer stay where they were (Qi et al., arXiv 2406.05946);
//! - distil: CE + α KL(π₀ ‖ π) on replayed answers (dark experience replay; arXiv 2512.10150);
//! - prox: + ρ/2 ‖θ − θ₀‖² (Lisa, arXiv 2405.18641);
//! - lisa: K₁ steps on replayed answers and K₂ on the task in turns, with θ₀ the weights at the last turn
//!   ([`crate::train::Lisa`]);
//! - vaccine: hidden states moved by ρ g / ‖g‖, two passes a step (Vaccine, arXiv 2402.01109).

use super::RecipeOptions;
use crate::train::TuneOptions;

/// Sets what the training loop has; its arithmetic is there ([`TuneOptions`]).
pub(super) fn apply(options: &RecipeOptions, shared: &mut TuneOptions) {
    shared.constrain = options.constrain.or(shared.constrain);
    shared.distil = options.distil.or(shared.distil);
    shared.prox = options.prox.or(shared.prox);
    shared.lisa = options.lisa.or(shared.lisa);
    shared.vaccine = options.vaccine.or(shared.vaccine);
}
