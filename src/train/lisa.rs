//! Lisa's two states (Huang et al., arXiv 2405.18641): steps on alignment data and steps on the task's take turns, each held
//! near where the other ended.
//!
//! With f the loss of the alignment data, h that of the task, and θ̄ the weights at the last switch:
//!
//! - alignment: K₁ steps on f(θ) + ρ/2 ‖θ − θ̄‖²;
//! - task: K₂ steps on h(θ) + ρ/2 ‖θ − θ̄‖².
//!
//! θ̄ ← θ at each switch. ρ is that of the proximal term ([`super::TuneOptions::prox`]); without it the states alternate
//! alone, which the paper calls bi-state optimization. Alignment data are the examples that are mixed in.

use crate::data::Alternation;
use crate::options::serde_as_text;
use std::fmt;
use std::str::FromStr;

/// Most steps of a state: an epoch is laid out with all its turns.
const MAX_STEPS: usize = 10_000;

/// Steps of both states, written `K1:K2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lisa {
    /// Optimizer steps on alignment data.
    pub alignment: usize,
    /// Optimizer steps on the task's data.
    pub task: usize,
}

impl Lisa {
    /// The states in micro-batches.
    pub(super) fn alternation(self, grad_accum: usize) -> Alternation {
        Alternation { alignment: self.alignment * grad_accum, task: self.task * grad_accum }
    }
}

impl FromStr for Lisa {
    /// What was expected.
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let steps = |text: &str| text.trim().parse().ok().filter(|steps| (1..=MAX_STEPS).contains(steps));
        let both = text.split_once(':').and_then(|(alignment, task)| Some((steps(alignment)?, steps(task)?)));
        let (alignment, task) = both.ok_or_else(|| {
            format!("K1:K2, steps on alignment data and on the task's, such as 10:90, each from 1 to {MAX_STEPS}")
        })?;
        Ok(Self { alignment, task })
    }
}

impl fmt::Display for Lisa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.alignment, self.task)
    }
}

serde_as_text!(Lisa);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_two_counts() {
        let lisa: Lisa = "10:90".parse().unwrap();
        assert_eq!((lisa.alignment, lisa.task, lisa.to_string()), (10, 90, "10:90".to_owned()));
        assert_eq!(lisa.alternation(4), Alternation { alignment: 40, task: 360 });
        for wrong in ["", "10", "0:1", "1:0", "-1:2", "1:2:3", "a:b", "99999999999:1", "10001:1"] {
            assert!(wrong.parse::<Lisa>().unwrap_err().contains("K1:K2"), "{wrong}");
        }
    }
}
