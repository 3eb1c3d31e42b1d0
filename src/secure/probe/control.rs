//! Control (c): a label unrelated to security, read from the same prompts by a probe of the same shape.
//!
//! By default the label is whether the prompt has more words than a threshold: of the thresholds exceeded by 30 to 70 %
//! of the training prompts, the one whose label correlates least with harmfulness. (Twins made by word substitution
//! have equal length, so that the correlation is usually about 0.) Where prompts hardly differ in length, the first
//! word decides: the first words of the training prompts, most frequent first, are dealt into two groups of equal size.

use crate::data::{SecurityPrompt, Split};
use std::collections::{BTreeMap, BTreeSet};

/// A rule that labels a prompt by its form.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ControlRule {
    /// Positive: more words than this.
    WordsAbove(usize),
    /// Positive: the first word, in lower case, is one of these.
    FirstWordIn(BTreeSet<String>),
}

/// A rule and its correlation with harmfulness.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlLabel {
    /// The rule.
    pub rule: ControlRule,
    /// Correlation (φ) with the harmful label over the training prompts, −1 to 1; ideally 0.
    pub correlation: f64,
}

/// Admissible share of positives.
const BALANCED: std::ops::RangeInclusive<f64> = 0.3..=0.7;

impl ControlRule {
    /// Label of a prompt.
    pub fn holds(&self, prompt: &str) -> bool {
        match self {
            Self::WordsAbove(words) => prompt.split_whitespace().count() > *words,
            Self::FirstWordIn(words) => words.contains(&first_word(prompt)),
        }
    }
}

impl ControlLabel {
    /// Chooses the rule for these prompts; `None` if no rule labels 30 to 70 % of the training prompts positive.
    pub fn choose(prompts: &[SecurityPrompt]) -> Option<Self> {
        let train = prompts.iter().filter(|p| p.split == Split::Train);
        let train: Vec<(&str, bool)> = train.map(|p| (p.prompt.as_str(), p.is_harmful())).collect();
        let lengths: BTreeSet<usize> = train.iter().map(|(p, _)| p.split_whitespace().count()).collect();
        let by_length = lengths.into_iter().map(ControlRule::WordsAbove).filter_map(|rule| measured(rule, &train));
        let best = by_length.min_by(|a, b| a.correlation.abs().total_cmp(&b.correlation.abs()));
        best.or_else(|| measured(ControlRule::FirstWordIn(half_of_first_words(&train)), &train))
    }

    /// Labels of prompts.
    pub fn labels(&self, prompts: &[SecurityPrompt]) -> Vec<bool> {
        prompts.iter().map(|p| self.rule.holds(&p.prompt)).collect()
    }
}

fn measured(rule: ControlRule, train: &[(&str, bool)]) -> Option<ControlLabel> {
    let n = train.len() as f64;
    let (mut both, mut held, mut harmful) = (0.0, 0.0, 0.0);
    for (prompt, is_harmful) in train {
        let holds = rule.holds(prompt);
        both += f64::from(u8::from(holds && *is_harmful));
        held += f64::from(u8::from(holds));
        harmful += f64::from(u8::from(*is_harmful));
    }
    let (both, held, harmful) = (both / n, held / n, harmful / n);
    if !BALANCED.contains(&held) {
        return None;
    }
    let spread = (held * (1.0 - held) * harmful * (1.0 - harmful)).sqrt();
    let correlation = if spread > 0.0 { (both - held * harmful) / spread } else { 0.0 };
    Some(ControlLabel { rule, correlation })
}

fn first_word(prompt: &str) -> String {
    prompt.split_whitespace().next().unwrap_or_default().to_lowercase()
}

fn half_of_first_words(train: &[(&str, bool)]) -> BTreeSet<String> {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for (prompt, _) in train {
        *counts.entry(first_word(prompt)).or_default() += 1;
    }
    let mut counts: Vec<(String, usize)> = counts.into_iter().collect();
    counts.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
    let (mut inside, mut outside) = (0, 0);
    let mut words = BTreeSet::new();
    for (word, count) in counts {
        if inside <= outside {
            inside += count;
            words.insert(word);
        } else {
            outside += count;
        }
    }
    words
}
