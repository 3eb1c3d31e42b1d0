//! Refusals: by expressions in a text, and by the logits of an answer's first token.

use crate::error::{Error, Result};
use std::collections::BTreeMap;

/// The default list.
const DEFAULT: &str = include_str!("refusals.txt");

/// A list of refusal expressions.
///
/// Text is compared in lower case with straight apostrophes, single spaces, no space before punctuation, and "can not"
/// as "cannot".
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RefusalList {
    anywhere: Vec<String>,
    opening: Vec<String>,
}

impl Default for RefusalList {
    fn default() -> Self {
        Self::parse(DEFAULT, "refusals.txt").expect("the default list is valid")
    }
}

impl RefusalList {
    /// Parses one expression per line; a leading `^` restricts it to the start of an answer, `#` starts a comment.
    /// `place` names the file in errors.
    ///
    /// # Errors
    /// [`Error::Input`] for an empty expression or list.
    pub fn parse(text: &str, place: &str) -> Result<Self> {
        let mut list = Self { anywhere: Vec::new(), opening: Vec::new() };
        for (i, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let (expression, into) = match line.strip_prefix('^') {
                Some(rest) => (rest, &mut list.opening),
                None => (line, &mut list.anywhere),
            };
            let expression = normalised(expression);
            if expression.is_empty() {
                return Err(Error::input(format!("{place}:{}", i + 1), "an empty expression", "words of a refusal"));
            }
            into.push(expression);
        }
        if list.anywhere.is_empty() && list.opening.is_empty() {
            return Err(Error::input(place, "no expression", "at least one refusal expression, one per line"));
        }
        Ok(list)
    }

    /// Whether an answer holds a refusal expression.
    pub fn is_refusal(&self, answer: &str) -> bool {
        let text = normalised(answer);
        self.anywhere.iter().any(|e| contains_words(&text, e)) || self.opening.iter().any(|e| begins_with(&text, e))
    }
}

/// Lower case, straight apostrophes, single spaces, no space before punctuation, "cannot" in one word.
fn normalised(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for word in text.split_whitespace() {
        let punctuation = word.starts_with(['.', ',', '!', '?', ';', ':']);
        if !out.is_empty() && !punctuation {
            out.push(' ');
        }
        for c in word.chars().flat_map(char::to_lowercase) {
            out.push(if matches!(c, '\u{2018}' | '\u{2019}' | '\u{02bc}' | '`') { '\'' } else { c });
        }
    }
    out.replace("can not", "cannot")
}

/// Whether the text holds the expression at word boundaries.
fn contains_words(text: &str, expression: &str) -> bool {
    text.match_indices(expression).any(|(at, found)| {
        let word = |c: char| c.is_alphanumeric();
        let before = text[..at].chars().next_back().is_some_and(word);
        let after = text[at + found.len()..].chars().next().is_some_and(word);
        let cut = after && found.ends_with(word);
        !(before || cut)
    })
}

fn begins_with(text: &str, expression: &str) -> bool {
    let text = text.trim_start_matches(|c: char| !c.is_alphanumeric());
    let Some(rest) = text.strip_prefix(expression) else { return false };
    !(expression.ends_with(char::is_alphanumeric) && rest.starts_with(char::is_alphanumeric))
}

/// P(refusal | first token) of an answer, estimated from the model's own greedy answers.
///
/// Both classes have equal weight. A token that begins both refusals and other answers, such as "I" (cannot … / would
/// …), counts for both in proportion.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirstTokens {
    tokens: Vec<u32>,
    /// P(refusal | token), [tokens].
    refusal: Vec<f64>,
}

impl FirstTokens {
    /// From the first token of each answer and whether the answer refuses; `None` if all or none do.
    pub fn learn(answers: impl IntoIterator<Item = (u32, bool)>) -> Option<Self> {
        let mut counts: BTreeMap<u32, [f64; 2]> = BTreeMap::new();
        let mut totals = [0.0; 2];
        for (token, refuses) in answers {
            counts.entry(token).or_default()[usize::from(refuses)] += 1.0;
            totals[usize::from(refuses)] += 1.0;
        }
        if totals[0] == 0.0 || totals[1] == 0.0 {
            return None;
        }
        let share = |c: &[f64; 2]| (c[1] / totals[1]) / (c[0] / totals[0] + c[1] / totals[1]);
        Some(Self { tokens: counts.keys().copied().collect(), refusal: counts.values().map(share).collect() })
    }

    /// Token ids whose logits [`FirstTokens::log_odds`] takes, ascending.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Refusal log-odds ln Σ pᵢ·P(refusal | i) − ln Σ pᵢ·P(compliance | i), \[prompts\], from the `logits` [prompts,
    /// tokens] at the first answer position. The softmax normaliser cancels.
    pub fn log_odds(&self, logits: &[f32]) -> Vec<f64> {
        let odds = |row: &[f32]| {
            let side = |share: &dyn Fn(f64) -> f64| {
                log_sum_exp(row.iter().zip(&self.refusal).map(|(z, p)| f64::from(*z) + share(*p).ln()))
            };
            side(&|p| p) - side(&|p| 1.0 - p)
        };
        logits.chunks_exact(self.tokens.len().max(1)).map(odds).collect()
    }

    /// Checks values from a file: tokens ascending and inside the vocabulary, shares from 0 to 1, both classes present.
    pub(crate) fn check(&self, vocab: Option<usize>, place: &str) -> Result<()> {
        let place = format!("{place}: first_tokens");
        let ascending = self.tokens.windows(2).all(|w| w[0] < w[1]);
        if self.tokens.is_empty() || !ascending || self.tokens.len() != self.refusal.len() {
            return Err(Error::input(place, format!("{} tokens", self.tokens.len()), "ascending tokens with shares"));
        }
        let sides = [self.refusal.iter().any(|p| *p > 0.0), self.refusal.iter().any(|p| *p < 1.0)];
        if sides != [true, true] || !self.refusal.iter().all(|p| (0.0..=1.0).contains(p)) {
            return Err(Error::input(place, "shares without both sides", "shares from 0 to 1 of both classes"));
        }
        match (vocab, self.tokens.last()) {
            (Some(vocab), Some(last)) if *last as usize >= vocab => {
                Err(Error::input(place, format!("token id {last}"), format!("ids below {vocab}")))
            }
            _ => Ok(()),
        }
    }
}

fn log_sum_exp(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let most = values.clone().fold(f64::NEG_INFINITY, f64::max);
    if most == f64::NEG_INFINITY { most } else { most + values.map(|v| (v - most).exp()).sum::<f64>().ln() }
}
