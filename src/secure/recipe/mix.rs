//! What is mixed into the training data.
//!
//! L = CE(task) + CE(y | x) over the pairs that are mixed in:
//! - replay: y drawn from the model before tuning, refusals of harmful prompts and answers to their benign twins (GR-SAP,
//!   arXiv 2603.10243);
//! - refusals: refusals of harmful requests alone (Bianchi et al., arXiv 2309.07875);
//! - attack: harmful requests that are answered, what an attacker or an uncurated source adds.

use crate::data::mix;
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

/// `base` with examples of each of `more` mixed in, so that each makes up its share of the result, as [`mix`] does.
///
/// # Errors
/// [`Error::Input`] for shares of more than 0.99 together, or where there is no example to take.
pub fn mixed<T: Clone>(base: Vec<T>, more: &[(f64, Vec<T>)], seed: u64) -> Result<Vec<T>> {
    let total: f64 = more.iter().map(|(share, _)| share).sum();
    if total > 0.99 {
        return Err(Error::input("shares of mixed-in examples", total.to_string(), "0.99 together at most"));
    }
    let mut examples = base;
    for (i, (share, extra)) in more.iter().enumerate() {
        // Those that follow take their share of what is there by then.
        let later: f64 = more.iter().skip(i + 1).map(|(share, _)| share).sum();
        examples = mix(&examples, extra, share / (1.0 - later), seed.wrapping_add(i as u64))?;
    }
    Ok(examples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_has_its_share_of_the_result() {
        // 70 task examples are 0.7 of 100: 10 and 20 come to them.
        let base: Vec<(char, usize)> = (0..70).map(|i| ('t', i)).collect();
        let more = [(0.1, vec![('a', 0)]), (0.2, (0..30).map(|i| ('r', i)).collect())];
        let all = mixed(base.clone(), &more, 3).unwrap();
        let count = |kind| all.iter().filter(|(k, _)| *k == kind).count();
        assert_eq!((all.len(), count('t'), count('a'), count('r')), (100, 70, 10, 20));
        assert!(all.iter().filter(|(k, _)| *k == 't').eq(&base), "the task's examples stay in order");
        // One kind is what it was before there were several.
        let one = (0.1, vec![('a', 0)]);
        assert_eq!(mixed(base.clone(), std::slice::from_ref(&one), 3).unwrap(), mix(&base, &one.1, 0.1, 3).unwrap());
        assert_eq!(mixed(base.clone(), &[], 3).unwrap(), base);
        assert!(mixed(base, &[(0.5, vec![('a', 0)]), (0.5, vec![('r', 0)])], 3).is_err());
    }
}
