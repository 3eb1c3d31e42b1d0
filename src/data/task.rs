//! Questions with known answers.

use super::answer::{UNLISTED_CHOICES, choice, final_answers, last_number, named_option, normalise, options};
use super::rows::{Row, RowReader, short};
use super::security::NOT_ASKED;
use crate::error::Result;
use std::path::Path;

/// Largest relative difference between numbers that count as equal.
const NUMBER_TOLERANCE: f64 = 1e-6;

/// How a model's answer is compared with the expected one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Match {
    /// The whole answer, its last line, or the text after the last "answer is" or "answer:" (to the end of the line or
    /// of the sentence) is the expected text, ignoring case, white space, and surrounding punctuation and markup.
    Exact,
    /// The last number of the answer equals the expected one within a relative 1e-6. Numbers may have commas between
    /// groups of three, decimals, an exponent, a fraction's bar, `-` or `−`.
    Number,
    /// The answer chooses the expected option of those that the prompt lists line by line (`A) …`, `A. …`, `(A) …`), by
    /// letter or by text; the text after the last "answer is" or "answer:" is searched first.
    Choice,
}

/// A question and its expected answer.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Task {
    /// The user's message.
    pub prompt: String,
    /// Expected text, number or option.
    pub answer: String,
    /// `match` in the file.
    #[serde(rename = "match")]
    pub matching: Match,
    /// Group of the question in reports.
    pub category: Option<String>,
    /// File and line that it was read from; empty where there is none.
    #[serde(skip)]
    pub place: String,
}

impl Task {
    /// Reads a file of rows `{"prompt", "answer", "match": "exact" | "number" | "choice", "category"?}`; an answer may
    /// be a number.
    ///
    /// # Errors
    /// As [`RowReader::read`]; [`crate::error::Error::Input`] for an answer that nothing could match: no number in it, or
    /// neither a letter nor an option's text.
    pub fn read(path: &Path, rows: &mut RowReader) -> Result<Vec<Self>> {
        rows.read(path, Self::from_row)
    }

    fn from_row(row: &Row) -> Result<Self> {
        row.refuse(&NOT_ASKED, "tasks of one user message each")?;
        row.refuse(&["choices", "options"], "the options in `prompt`, line by line as `A) …`: it alone is asked")?;
        let answer = match row.get("answer") {
            Some(serde_json::Value::Number(number)) => number.to_string(),
            _ => row.text("answer")?.to_string(),
        };
        let matching = match row.word("match", "how answers are compared: exact, number or choice")? {
            "exact" => Match::Exact,
            "number" => Match::Number,
            "choice" => Match::Choice,
            other => return Err(row.error(format!("`match` is \"{}\"", short(other)), "exact, number or choice")),
        };
        let prompt = row.text("prompt")?.to_string();
        let task =
            Self { prompt, answer, matching, category: row.optional_name("category")?, place: row.place.clone() };
        let found = || format!("`answer` is \"{}\"", short(&task.answer));
        match matching {
            Match::Number if last_number(&task.answer).is_none() => Err(row.error(found(), "a number")),
            Match::Choice if task.option().is_none() => {
                Err(row.error(found(), "a letter, or the text of an option that the prompt lists as `A) …`"))
            }
            _ => Ok(task),
        }
    }

    /// Index of the expected option, if an answer can choose it.
    fn option(&self) -> Option<usize> {
        let options = options(&self.prompt);
        let letters = if options.is_empty() { UNLISTED_CHOICES } else { options.len() };
        named_option(&self.answer, &options).filter(|option| *option < letters)
    }

    /// Whether a model's answer is right.
    pub fn matches(&self, text: &str) -> bool {
        match self.matching {
            Match::Exact => final_answers(text).contains(&normalise(&self.answer)),
            Match::Number => match (last_number(text), last_number(&self.answer)) {
                (Some(given), Some(expected)) => (given - expected).abs() <= NUMBER_TOLERANCE * expected.abs(),
                _ => false,
            },
            Match::Choice => self.option().is_some_and(|o| choice(text, &options(&self.prompt)) == Some(o)),
        }
    }
}
