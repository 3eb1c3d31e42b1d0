//! What changes the loss or the gradient.
//!
//! - constrain: tokens weighted by w_t = 2 (1 − σ(β_t Δ_t)), Δ_t = log π(y_t) − log π₀(y_t), so that the first tokens of an
//!   answer stay where they were (Qi et al., arXiv 2406.05946);
//! - distil: CE + α KL(π₀ ‖ π) on replayed answers (dark experience replay; arXiv 2512.10150);
//! - prox: + ρ/2 ‖θ − θ₀‖² (Lisa, arXiv 2405.18641);
//! - vaccine: hidden states moved by ρ g / ‖g‖, two passes a step (Vaccine, arXiv 2402.01109).

use super::Recipe;
use crate::error::{Error, Result};

/// Refuses what the training loop does not have.
pub(super) fn apply(recipe: &Recipe) -> Result<()> {
    let options = &recipe.options;
    let asked = [
        ("constrain", options.constrain),
        ("distil", options.distil),
        ("prox", options.prox),
        ("vaccine", options.vaccine),
    ];
    match asked.into_iter().find(|(_, value)| value.is_some()) {
        Some((key, _)) => Err(Error::unsupported(
            recipe.place(),
            format!("`{key}`"),
            "leave it out: it is not available in this version",
        )),
        None => Ok(()),
    }
}
