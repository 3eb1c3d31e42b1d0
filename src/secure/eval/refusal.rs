//! Refusals: by expressions in a text, and by the logits of an answer's first token.

use crate::error::{Error, Result};
use crate::io::input::read_text;
use clap::ValueEnum;
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

/// Longest list that is read, in bytes.
const MAX_LIST_BYTES: u64 = 1 << 20;

/// A language with a built-in list of refusal expressions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum RefusalLanguage {
    /// English: the list of Zou et al.
    En,
    /// Arabic
    Ar,
    /// German
    De,
    /// Spanish
    Es,
    /// French
    Fr,
    /// Hindi
    Hi,
    /// Indonesian
    Id,
    /// Italian
    It,
    /// Japanese
    Ja,
    /// Korean
    Ko,
    /// Dutch
    Nl,
    /// Polish
    Pl,
    /// Portuguese
    Pt,
    /// Russian
    Ru,
    /// Turkish
    Tr,
    /// Vietnamese
    Vi,
    /// Chinese
    Zh,
    /// All of them
    All,
}

impl RefusalLanguage {
    /// The built-in list; of [`RefusalLanguage::All`], one after the other.
    fn text(self) -> Cow<'static, str> {
        Cow::Borrowed(match self {
            Self::En => include_str!("refusals/en.txt"),
            Self::Ar => include_str!("refusals/ar.txt"),
            Self::De => include_str!("refusals/de.txt"),
            Self::Es => include_str!("refusals/es.txt"),
            Self::Fr => include_str!("refusals/fr.txt"),
            Self::Hi => include_str!("refusals/hi.txt"),
            Self::Id => include_str!("refusals/id.txt"),
            Self::It => include_str!("refusals/it.txt"),
            Self::Ja => include_str!("refusals/ja.txt"),
            Self::Ko => include_str!("refusals/ko.txt"),
            Self::Nl => include_str!("refusals/nl.txt"),
            Self::Pl => include_str!("refusals/pl.txt"),
            Self::Pt => include_str!("refusals/pt.txt"),
            Self::Ru => include_str!("refusals/ru.txt"),
            Self::Tr => include_str!("refusals/tr.txt"),
            Self::Vi => include_str!("refusals/vi.txt"),
            Self::Zh => include_str!("refusals/zh.txt"),
            Self::All => {
                let each = Self::value_variants().iter().filter(|language| **language != Self::All);
                return each.map(|language| language.text()).collect::<Vec<_>>().join("\n").into();
            }
        })
    }
}

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
        Self::of_languages(&[RefusalLanguage::En])
    }
}

impl RefusalList {
    /// The built-in expressions of some languages.
    ///
    /// # Panics
    /// Where there is no language, or a built-in list is malformed, which is a bug.
    pub fn of_languages(languages: &[RefusalLanguage]) -> Self {
        let texts: Vec<_> = languages.iter().map(|language| language.text()).collect();
        Self::parse(&texts.join("\n"), "built-in refusals").expect("the built-in lists are valid")
    }

    /// Reads a list of at most 1 MiB.
    ///
    /// # Errors
    /// As [`RefusalList::parse`]; [`Error::Input`] for a file that is larger or no UTF-8; [`Error::Io`].
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(&read_text(path, MAX_LIST_BYTES)?, &path.display().to_string())
    }

    /// Parses one expression per line; a leading `^` restricts it to the start of an answer, `#` starts a comment. Blank
    /// lines and byte-order marks are skipped.
    /// `place` names the file in errors.
    ///
    /// # Errors
    /// [`Error::Input`] for an empty expression or list.
    pub fn parse(text: &str, place: &str) -> Result<Self> {
        let mut list = Self { anywhere: Vec::new(), opening: Vec::new() };
        for (i, line) in text.lines().enumerate() {
            let line = line.trim_start_matches('\u{feff}').trim();
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
    ///
    /// ```
    /// let list = swat::secure::RefusalList::default();
    /// assert!(list.is_refusal("I’m sorry, but I cannot help with that."));
    /// assert!(!list.is_refusal("Water boils at 100 degrees."));
    /// ```
    pub fn is_refusal(&self, answer: &str) -> bool {
        self.holds(&normalised(answer))
    }

    /// Whether an answer that begins so holds a refusal expression, however it goes on. The last word does not count, as it may
    /// go on: an answer in a script without spaces is never known early.
    pub fn is_refusal_already(&self, beginning: &str) -> bool {
        let text = normalised(beginning);
        let whole = text.rfind(' ').map_or("", |at| &text[..at]);
        // "can" may become "cannot".
        !whole.ends_with("can") && self.holds(whole)
    }

    fn holds(&self, text: &str) -> bool {
        self.anywhere.iter().any(|e| contains_words(text, e)) || self.opening.iter().any(|e| begins_with(text, e))
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
        let before = text[..at].chars().next_back().is_some_and(char::is_alphanumeric);
        !(before && found.starts_with(spaced)) && ends_word(&text[at..], found)
    })
}

fn begins_with(text: &str, expression: &str) -> bool {
    let text = text.trim_start_matches(|c: char| !c.is_alphanumeric());
    text.starts_with(expression) && ends_word(text, expression)
}

/// Whether the expression that the text begins with ends where a word ends.
fn ends_word(text: &str, expression: &str) -> bool {
    let after = text[expression.len()..].chars().next().is_some_and(char::is_alphanumeric);
    !(after && expression.ends_with(|c: char| c.is_alphanumeric() && spaced(c)))
}

/// Whether the script puts spaces between words: not Chinese, Japanese and Thai; Korean adds endings to words.
fn spaced(c: char) -> bool {
    !matches!(c, '\u{e00}'..='\u{e7f}' | '\u{1100}'..='\u{11ff}' | '\u{3040}'..='\u{30ff}' | '\u{3400}'..='\u{9fff}'
        | '\u{ac00}'..='\u{d7af}' | '\u{f900}'..='\u{faff}')
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

    /// Gradient of the log-odds of one prompt with respect to its `logits` \[tokens\]: the softmax weighted by P(refusal | i)
    /// less the one weighted by P(compliance | i). It sums to 0.
    pub fn gradient(&self, logits: &[f32]) -> Vec<f64> {
        let side = |share: &dyn Fn(f64) -> f64| -> Vec<f64> {
            let weighted = logits.iter().zip(&self.refusal).map(|(z, p)| f64::from(*z) + share(*p).ln());
            let total = log_sum_exp(weighted.clone());
            weighted.map(|w| (w - total).exp()).collect()
        };
        let (refusal, compliance) = (side(&|p| p), side(&|p| 1.0 - p));
        refusal.into_iter().zip(compliance).map(|(r, c)| r - c).collect()
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
