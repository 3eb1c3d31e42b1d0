//! What is mixed into the training data.
//!
//! L = CE(task) + CE(y | x) over the pairs that are mixed in:
//! - replay: y drawn from the model before tuning, refusals of harmful prompts and answers to their benign twins (GR-SAP,
//!   arXiv 2603.10243);
//! - refusals: refusals of harmful requests alone (Bianchi et al., arXiv 2309.07875);
//! - attack: harmful requests that are answered, what an attacker or an uncurated source adds.

use crate::data::{Mixture, Redraw};
use crate::error::{Error, Result};

/// Examples mixed into the training data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mix {
    /// Harmful requests that are answered.
    Attack,
    /// Refusals of harmful requests.
    Refusals,
    /// The model's own refusals and benign answers.
    Replay,
}

impl Mix {
    /// Its key in a recipe, which is the name of its file too: `--replay`, `data.replay`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Attack => "attack",
            Self::Refusals => "refusals",
            Self::Replay => "replay",
        }
    }
}

/// Examples of one kind that are mixed in.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MixIn {
    /// The kind.
    pub what: Mix,
    /// Their share of all examples, 0 to 0.99; `None` = `evaluate.mix_share` of a study.
    pub share: Option<f64>,
}

impl Mix {
    /// An attack is a data set of its own; of the others an epoch takes examples that those before it did not have.
    fn redraw(self) -> Redraw {
        match self {
            Self::Attack => Redraw::Never,
            Self::Refusals | Self::Replay => Redraw::EveryEpoch,
        }
    }
}

/// `base` with examples of each of `more` mixed in, so that each makes up its share of an epoch.
///
/// # Errors
/// [`Error::Input`] for shares of more than 0.99 together, or where there is no example to take.
pub fn mixed<T>(base: impl Into<Mixture<T>>, more: Vec<(Mix, f64, Vec<T>)>, seed: u64) -> Result<Mixture<T>> {
    let mut left: f64 = more.iter().map(|(_, share, _)| share).sum();
    if left > 0.99 {
        return Err(Error::input("shares of mixed-in examples", left.to_string(), "0.99 together at most"));
    }
    let mut mixture = base.into();
    for (i, (what, share, extra)) in more.into_iter().enumerate() {
        // Those that follow take their share of what is there by then.
        left -= share;
        mixture.mix_in(extra, share / (1.0 - left), what.redraw(), seed.wrapping_add(i as u64))?;
    }
    Ok(mixture)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_share_of_an_epoch() {
        // 70 task examples are 0.7 of 100: 10 and 20 come to them.
        let more = vec![(Mix::Attack, 0.1, (0..50).collect()), (Mix::Replay, 0.2, (0..30).collect::<Vec<_>>())];
        let mixture = mixed((0..70).collect::<Vec<_>>(), more, 3).unwrap();
        let pools: Vec<_> = mixture.pools().iter().map(|pool| (pool.examples.len(), pool.per_epoch)).collect();
        // The attack's are the same in every epoch.
        assert_eq!((mixture.base(), pools), (70, vec![(10, 10), (30, 20)]));
        let half = |what| (what, 0.5, vec![0]);
        mixed(vec![1], vec![half(Mix::Attack), half(Mix::Replay)], 3).unwrap_err();
    }
}
