//! What is mixed into the training data.
//!
//! L = CE(task) + CE(y | x) over the pairs that are mixed in:
//! - replay: y drawn from the model before tuning, refusals of harmful prompts and answers to their benign twins (GR-SAP,
//!   arXiv 2603.10243);
//! - refusals: refusals of harmful requests alone (Bianchi et al., arXiv 2309.07875);
//! - attack: harmful requests that are answered, what an attacker or an uncurated source adds;
//! - screen: of the task's data and the attack those examples are left out that answer what the original model refuses
//!   ([`crate::secure::RefusedExamples`]); refusals and replay are mixed into what remains.

use super::RecipeOptions;
use crate::data::{Mixture, Redraw};
use crate::error::{Error, Result};
use crate::secure::tune::TuneRecipe;

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

/// Sets whether the data are screened.
pub(super) fn apply(options: &RecipeOptions, recipe: &mut TuneRecipe) {
    recipe.screen |= options.screen;
}

/// `base` with examples of each of `more` mixed in, so that each makes up its share of an epoch. `screen` takes the data
/// with the attack, which comes first, and returns what remains of them; the others are mixed into that.
///
/// # Errors
/// [`Error::Input`] for shares of more than 0.99 together, or where there is no example to take; those of `screen`.
pub fn mixed<T>(
    base: impl Into<Mixture<T>>,
    more: Vec<(Mix, f64, Vec<T>)>,
    seed: u64,
    screen: impl FnOnce(Mixture<T>) -> Result<Mixture<T>>,
) -> Result<Mixture<T>> {
    let mut left: f64 = more.iter().map(|(_, share, _)| share).sum();
    if left > 0.99 {
        return Err(Error::input("shares of mixed-in examples", left.to_string(), "0.99 together at most"));
    }
    let attack = more.iter().take_while(|(what, ..)| *what == Mix::Attack).count();
    let mut more = more.into_iter().enumerate();
    let mut add = |mut mixture: Mixture<T>, (i, (what, share, extra)): (usize, (Mix, f64, Vec<T>))| -> Result<_> {
        // Those that follow take their share of what is there by then.
        left -= share;
        mixture.mix_in(extra, share / (1.0 - left), what.redraw(), seed.wrapping_add(i as u64))?;
        Ok(mixture)
    };
    let own = more.by_ref().take(attack).try_fold(base.into(), &mut add)?;
    more.try_fold(screen(own)?, add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_share_of_an_epoch() {
        // 70 task examples are 0.7 of 100: 10 and 20 come to them.
        let more =
            || vec![(Mix::Attack, 0.1, (100..150).collect()), (Mix::Replay, 0.2, (200..230).collect::<Vec<_>>())];
        let pools = |mixture: &Mixture<i32>| -> Vec<_> {
            mixture.pools().iter().map(|pool| (pool.examples.len(), pool.per_epoch)).collect()
        };
        let mixture = mixed((0..70).collect::<Vec<_>>(), more(), 3, Ok).unwrap();
        // The attack's are the same in every epoch.
        assert_eq!((mixture.base(), pools(&mixture)), (70, vec![(10, 10), (30, 20)]));
        // Screening sees the task's and the attack's. Without 4 of the attack there are 76: 19 more make a fifth of 95.
        let screened = mixed((0..70).collect::<Vec<_>>(), more(), 3, |mut own| {
            assert_eq!((own.base(), pools(&own)), (70, vec![(10, 10)]));
            let out = own.examples()[72..76].to_vec();
            own.retain(|example| !out.contains(example));
            Ok(own)
        });
        let screened = screened.unwrap();
        assert_eq!((screened.base(), pools(&screened)), (70, vec![(6, 6), (30, 19)]));
        // It is asked where nothing is mixed in, too.
        let none = mixed(vec![1, 2], Vec::new(), 3, |mut own| {
            own.retain(|example| *example > 1);
            Ok(own)
        });
        assert_eq!(none.unwrap().examples(), [2]);
        let half = |what| (what, 0.5, vec![0]);
        mixed(vec![1], vec![half(Mix::Attack), half(Mix::Replay)], 3, Ok).unwrap_err();
    }
}
