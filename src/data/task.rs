//! Questions whose answers can be checked.

use super::answer::{choice, final_answers, last_number, named_option, normalise, options};
use super::jsonl::{JsonLines, Line, short};
use crate::error::Result;
use std::path::Path;

/// Largest relative difference between equal numbers.
const NUMBER_TOLERANCE: f64 = 1e-6;

/// How an answer is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Match {
    /// The expected words. Compared without regard to case, runs of white space, and quotes, stars and punctuation around
    /// them, with: the whole answer; its last line; what follows the last "answer is" or "answer:", to the end of the
    /// line or of the sentence.
    Exact,
    /// The last number of the answer, within a relative 1e-6. Numbers may have commas between groups of three, decimals,
    /// an exponent, a fraction's bar, `-` or `−`.
    Number,
    /// One of the options that the prompt lists line by line (`A) …`, `A. …`, `(A) …`), by letter or by text: the first
    /// letter that stands alone behind the last "answer is" or "answer:" or else anywhere, or the first option's text.
    Choice,
}

/// A question and its answer.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Task {
    /// The user's words.
    pub prompt: String,
    /// The expected answer.
    pub answer: String,
    /// How answers are compared with it.
    #[serde(rename = "match")]
    pub matching: Match,
    /// Kind of question.
    pub category: Option<String>,
}

impl Task {
    /// Reads a JSONL file of `{"prompt", "answer", "match": "exact" | "number" | "choice", "category"?}`. An answer may be
    /// a number. One that could never be matched is an error: no number in it, or neither a letter nor an option's text.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] names the line and what is wrong with it; [`crate::error::Error::Io`].
    pub fn read(path: &Path) -> Result<Vec<Self>> {
        JsonLines::open(path)?.parse_all(Self::from_line)
    }

    fn from_line(line: &Line) -> Result<Self> {
        let answer = match line.get("answer") {
            Some(serde_json::Value::Number(number)) => number.to_string(),
            _ => line.text("answer")?.to_string(),
        };
        let matching = match line.text("match")? {
            "exact" => Match::Exact,
            "number" => Match::Number,
            "choice" => Match::Choice,
            other => return Err(line.error(format!("`match` is \"{}\"", short(other)), "exact, number or choice")),
        };
        let prompt = line.text("prompt")?.to_string();
        let task = Self { prompt, answer, matching, category: line.optional_name("category")? };
        let found = || format!("`answer` is \"{}\"", short(&task.answer));
        match matching {
            Match::Number if last_number(&task.answer).is_none() => Err(line.error(found(), "a number")),
            Match::Choice if task.option().is_none() => {
                Err(line.error(found(), "a letter, or the text of an option that the prompt lists as `A) …`"))
            }
            _ => Ok(task),
        }
    }

    /// The expected option.
    fn option(&self) -> Option<usize> {
        named_option(&self.answer, &options(&self.prompt))
    }

    /// Whether the text of a model's answer is right.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str) -> Result<Vec<Task>> {
        JsonLines::new(line.as_bytes(), "task.jsonl").parse_all(Task::from_line)
    }

    fn task(prompt: &str, answer: &str, matching: Match) -> Task {
        Task { prompt: prompt.into(), answer: answer.into(), matching, category: None }
    }

    #[test]
    fn exact_answers_may_be_announced_or_stand_last() {
        let task = task("?", "New York", Match::Exact);
        for text in [
            "new york",
            " **New  York**.\n",
            "The answer is New York.",
            "The answer is \"New York\". I hope this helps!",
            "I looked it up.\n\nAnswer: New York",
            "Final answer:\n\nNew York\n\nGood luck!",
            "The answer is Paris? No, the answer is New York!",
            "Let me think.\nNew York\n",
        ] {
            assert!(task.matches(text), "{text}");
        }
        for text in ["", "York", "New York City", "The answer is not New York.", "New York or Paris", "newyork"] {
            assert!(!task.matches(text), "{text}");
        }
        assert!(super::Task { answer: "a. b".into(), ..task }.matches("The answer is a. b."));
    }

    #[test]
    fn numbers_are_compared_relative_to_the_expected_one() {
        let million = task("?", "1,000,000", Match::Number);
        assert!(million.matches("It is 1000000.9") && !million.matches("It is 1000001.1") && !million.matches("many"));
        let zero = task("?", "0", Match::Number);
        assert!(zero.matches("0.00") && !zero.matches("1e-9"));
        assert!(
            task("?", "-61", Match::Number).matches("The answer is −61.")
                && !task("?", "-61", Match::Number).matches("61")
        );
        assert!(task("?", "3/4", Match::Number).matches("0.75"));
    }

    #[test]
    fn choices_are_given_by_letter_or_text() {
        let prompt = "Which is a colour?\nA) cat\nB) blue\nC) dog";
        for answer in ["B", "(b)", "Blue"] {
            let task = task(prompt, answer, Match::Choice);
            assert!(task.matches("The answer is B.") && task.matches("It is blue.") && task.matches("(b)"), "{answer}");
            assert!(!task.matches("C") && !task.matches("A cat") && !task.matches("no idea"), "{answer}");
        }
        assert!(task("Pick (A) or (B).", "B", Match::Choice).matches("B"));
    }

    #[test]
    fn lines_are_checked() {
        let tasks = read(r#"{"prompt":"1+1","answer":2,"match":"number","category":"sums"}"#).unwrap();
        assert_eq!((tasks[0].answer.as_str(), tasks[0].category.as_deref()), ("2", Some("sums")));
        let cases = [
            (r#"{"prompt":"?","answer":"x"}"#, "no `match`"),
            (
                r#"{"prompt":"?","answer":"x","match":"regex"}"#,
                "`match` is \"regex\"; expected exact, number or choice",
            ),
            (r#"{"prompt":"?","answer":"x","match":"number"}"#, "`answer` is \"x\"; expected a number"),
            (r#"{"prompt":"?","answer":"tea","match":"choice"}"#, "`answer` is \"tea\"; expected a letter"),
            (r#"{"prompt":"?\nA) x\nB) y","answer":"C","match":"choice"}"#, "`answer` is \"C\"; expected a letter"),
            (r#"{"prompt":"?","answer":" ","match":"exact"}"#, "an empty `answer`"),
            (r#"{"prompt":7,"answer":"x","match":"exact"}"#, "`prompt` is a number"),
        ];
        for (line, expected) in cases {
            let error = read(line).unwrap_err().to_string();
            assert!(error.starts_with("task.jsonl:1: found") && error.contains(expected), "{error}");
        }
    }
}
