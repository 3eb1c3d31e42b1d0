//! Averages of the weights.
//!
//! w̄ ← η w̄ + (1 − η) w after each optimizer step, from w̄ = w before the first; the run ends with w̄ (arXiv 2508.12531).
//! The arithmetic is the training loop's ([`TuneOptions::ema_decay`]).

use super::RecipeOptions;
use crate::train::TuneOptions;

pub(super) fn apply(options: &RecipeOptions, shared: &mut TuneOptions) {
    shared.ema_decay = options.ema.or(shared.ema_decay);
}
