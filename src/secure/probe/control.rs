//! The non-security label of control (c): what a probe of the same shape reads from the same prompts that has nothing to
//! do with safety.
//!
//! Default: whether the prompt has more words than a threshold. Of the thresholds that put 30 to 70 % of the training
//! prompts above, the one with the least correlation with the harmful label is taken (twins made by word substitution
//! have the same number of words, so it is usually about 0). Where all prompts are about equally long, the first word
//! decides instead: the training prompts' first words, most frequent first, are dealt to two groups of equal size.

use super::labels::harmful;
use crate::data::{SecurityPrompt, Split};
use std::collections::{BTreeMap, BTreeSet};

/// A rule that labels a prompt by its form alone.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ControlRule {
    /// More words than this.
    WordsAbove(usize),
    /// The lower-case first word is one of these.
    FirstWordIn(BTreeSet<String>),
}

/// A rule, and how far it is from the harmful label.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlLabel {
    /// The rule.
    pub rule: ControlRule,
    /// Correlation (φ) with the harmful label over the training prompts, -1 to 1; should be near 0.
    pub correlation: f64,
}

/// Share of positives that a rule may have.
const BALANCED: std::ops::RangeInclusive<f64> = 0.3..=0.7;

impl ControlRule {
    /// The prompt's label.
    pub fn holds(&self, prompt: &str) -> bool {
        match self {
            Self::WordsAbove(words) => prompt.split_whitespace().count() > *words,
            Self::FirstWordIn(words) => words.contains(&first_word(prompt)),
        }
    }
}

impl ControlLabel {
    /// The rule for these prompts; `None` where neither kind of rule splits the training prompts 30 to 70 %.
    pub fn choose(prompts: &[SecurityPrompt]) -> Option<Self> {
        let train = prompts.iter().filter(|p| p.split == Split::Train);
        let train: Vec<(&str, bool)> = train.map(|p| (p.prompt.as_str(), harmful(p))).collect();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Label;

    /// Training prompts, harmful and benign in turn.
    fn prompts(text: impl Fn(usize) -> String) -> Vec<SecurityPrompt> {
        let label = |i: usize| if i.is_multiple_of(2) { Label::Harmful } else { Label::Benign };
        let prompt =
            |i| SecurityPrompt { prompt: text(i), label: label(i), split: Split::Train, pair: None, category: None };
        (0..40).map(prompt).collect()
    }

    #[test]
    fn length_where_it_varies() {
        let prompts = prompts(|i| vec!["w"; 3 + (i / 2) % 4].join(" "));
        let control = ControlLabel::choose(&prompts).unwrap();
        assert_eq!(control.rule, ControlRule::WordsAbove(4));
        assert!(control.correlation.abs() < 1e-12);
        assert_eq!(control.labels(&prompts)[..6], [false, false, false, false, true, true]);
    }

    #[test]
    fn a_length_that_betrays_the_label_is_passed_over() {
        // 4 words against 5 says harmful or benign; above 5 does not.
        let prompts = prompts(|i| vec!["w"; if i % 4 < 2 { 4 + i % 2 } else { 6 }].join(" "));
        let control = ControlLabel::choose(&prompts).unwrap();
        assert_eq!(control.rule, ControlRule::WordsAbove(5));
    }

    #[test]
    fn first_word_where_all_are_equally_long() {
        let different = prompts(|i| format!("{} b c", ["How", "what", "why", "tell"][(i / 2) % 4]));
        let control = ControlLabel::choose(&different).unwrap();
        assert!(matches!(&control.rule, ControlRule::FirstWordIn(words) if words.len() == 2));
        assert_eq!(control.labels(&different).iter().filter(|l| **l).count(), 20);
        assert_eq!(ControlLabel::choose(&prompts(|_| "how b c".to_owned())), None);
    }
}
