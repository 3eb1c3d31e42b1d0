//! Screening by the model's own judgement: examples that answer what the original model refuses.
//!
//! Of the data D those examples (x, y) are left out for which r(f(x)) ∧ ¬r(y): f(x) is the greedy answer of the model as
//! given to the question x, and r whether the first [`REFUSAL_TOKENS`] tokens of an answer hold a refusal expression. Of a
//! conversation every trained answer is judged, with what stands before it in the data as x; one is enough.
//!
//! Harmful examples among the data are filtered by subspaces of hidden states in SAFT (arXiv 2410.10014), and by
//! similarity to known harmful examples in arXiv 2404.01099; here no labelled example is needed.

use super::{KEY, SCREEN_START, ScreenRow};
use crate::backend::Backend;
use crate::data::{Example, Mixture, RowReader};
use crate::engine::GenerateOptions;
use crate::error::{Error, FileOp, Result};
use crate::io::file::begins_with;
use crate::io::write_atomic;
use crate::progress::{Observer, Progress};
use crate::secure::eval::refusal::RefusalList;
use crate::secure::loaded::{LoadedModel, REFUSAL_TOKENS};
use crate::secure::text::ModelText;
use crate::secure::tune::examples_hash;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Questions of one call of the generator. They are sorted by length, so that the cache of a call fits its own.
const ROUND: usize = 512;
/// Most tokens of the questions that are answered at once, and most bytes of their key-value cache.
const QUESTION_TOKENS: usize = 8192;
const MOST_CACHE_BYTES: usize = 1 << 30;

/// What a screening did to the data of a training run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ScreenCounts {
    /// Examples of the user's data.
    pub examples: usize,
    /// Those that were left out.
    pub left_out: usize,
}

/// Examples that answer what the original model refuses, by the hash of their tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct RefusedExamples(BTreeSet<String>);

impl FromIterator<RefusedExamples> for RefusedExamples {
    fn from_iter<I: IntoIterator<Item = Self>>(parts: I) -> Self {
        Self(parts.into_iter().flat_map(|part| part.0).collect())
    }
}

impl RefusedExamples {
    /// Whether an example is one of them.
    pub fn contains(&self, example: &Example) -> bool {
        !self.0.is_empty() && self.0.contains(&key(example))
    }

    /// A hash of all, for the inputs of a stage.
    pub fn hash(&self) -> String {
        let all: String = self.0.iter().map(String::as_str).collect();
        blake3::hash(all.as_bytes()).to_hex()[..16].to_owned()
    }

    /// How many of some examples are left out.
    pub fn counts<'e>(&self, examples: impl IntoIterator<Item = &'e Example>) -> ScreenCounts {
        let mut counts = ScreenCounts::default();
        for example in examples {
            counts.examples += 1;
            counts.left_out += usize::from(self.contains(example));
        }
        counts
    }

    /// The other examples, and how many of an epoch's are left out.
    ///
    /// # Errors
    /// [`Error::Input`] where more than half would be left out: the model refuses the task itself.
    pub fn leave_out(&self, mut mixture: Mixture) -> Result<(Mixture, ScreenCounts)> {
        let examples = mixture.per_epoch();
        mixture.retain(|example| !self.contains(example));
        let left_out = examples - mixture.per_epoch();
        if 2 * left_out > examples {
            let found = format!(
                "{left_out} of {examples} examples that answer what the original model refuses, to be left out"
            );
            let expected = "at most half: this model refuses the task itself. Tune without screen, take a model that \
                            answers such questions, or name other refusal expressions; `swat screen --top 0` shows the rows";
            return Err(Error::input("training data", found, expected));
        }
        Ok((mixture, ScreenCounts { examples, left_out }))
    }

    /// The rows of a file that are left out, as they are, behind the key `screen` with file and line; the layout is that of
    /// `swat screen`.
    ///
    /// # Errors
    /// As [`ScreenRow::read`].
    pub fn lines(&self, path: &Path, text: &ModelText, max_length: usize, rows: &mut RowReader) -> Result<String> {
        let mut lines = String::new();
        for ScreenRow { file, line, fields, conversation } in ScreenRow::read(path, rows)? {
            // What cannot be tokenized was refused, or skipped, when the examples were read.
            let example = Example::from_conversation(&conversation, text.chat()?, max_length).ok().flatten();
            if example.is_some_and(|example| self.contains(&example)) {
                lines += &marked(json!({ "file": file, "line": line, "refused": true }), fields);
            }
        }
        Ok(lines)
    }
}

/// Writes the list of rows that were left out; where there are none, no list of an earlier run stays.
///
/// # Errors
/// [`Error::Io`].
pub(in crate::secure) fn write_screened(path: &Path, lines: &str) -> Result<()> {
    if !lines.is_empty() {
        return write_atomic(path, lines.as_bytes());
    }
    if begins_with(path, SCREEN_START) {
        std::fs::remove_file(path).map_err(Error::io(path, FileOp::Remove))?;
    }
    Ok(())
}

/// A screening of a training run's data, as the unfinished run keeps it.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Screening {
    /// [`Screening::inputs`]
    pub inputs: String,
    /// The examples that are left out.
    pub refused: RefusedExamples,
    /// Their rows ([`RefusedExamples::lines`]), for the output.
    #[serde(skip)]
    pub lines: String,
}

impl Screening {
    /// A hash of what it is made from: hash of the model, examples, refusal expressions and precision.
    pub fn inputs(model: &str, examples: &[&[Example]], refusals: &RefusalList, dtype: &str) -> String {
        let examples: Vec<String> = examples.iter().map(|part| examples_hash(part)).collect();
        let all = json!([model, examples, format!("{refusals:?}"), dtype]);
        blake3::hash(all.to_string().as_bytes()).to_hex()[..16].to_owned()
    }
}

/// A row behind the key `screen`, as a line. A file that was screened before has its earlier mark replaced.
pub(super) fn marked(mark: Value, fields: Map<String, Value>) -> String {
    let mut line = Map::new();
    line.insert(KEY.into(), mark);
    line.extend(fields.into_iter().filter(|(key, _)| key != KEY));
    Value::Object(line).to_string() + "\n"
}

fn key(example: &Example) -> String {
    examples_hash(std::slice::from_ref(example))
}

/// The trained answers of an example: tokens before each, and its own.
fn answers(example: &Example) -> impl Iterator<Item = (&[u32], &[u32])> {
    let mut start = 0;
    example.trained.chunk_by(|a, b| a == b).filter_map(move |run| {
        let begin = start;
        start += run.len();
        // Nothing can be generated before the first token, which is never trained.
        run.first().filter(|trained| **trained)?;
        Some((example.tokens.get(..begin)?, example.tokens.get(begin..start)?))
    })
}

impl<B: Backend> LoadedModel<B> {
    /// The examples that answer what this model refuses. Questions whose answer in the data refuses are not asked.
    ///
    /// # Errors
    /// [`Error::Input`] where the tokenizer rejects tokens; a failing device.
    pub fn refused_examples(
        &self,
        examples: &[Example],
        refusals: &RefusalList,
        observer: Observer<'_>,
    ) -> Result<RefusedExamples> {
        let stop = self.text.stop_tokens();
        let refuses = |answer: &[u32]| -> Result<bool> {
            let words: Vec<u32> =
                answer.iter().take(REFUSAL_TOKENS).copied().filter(|token| !stop.contains(token)).collect();
            Ok(refusals.is_refusal(&self.text.tokenizer.decode(&words)?))
        };
        // Examples by question; equal questions are asked once.
        let mut asked: BTreeMap<&[u32], Vec<usize>> = BTreeMap::new();
        for (index, example) in examples.iter().enumerate() {
            for (question, answer) in answers(example) {
                if !refuses(answer)? {
                    asked.entry(question).or_default().push(index);
                }
            }
        }
        let mut questions: Vec<&[u32]> = asked.keys().copied().collect();
        questions.sort_by_key(|question| question.len());
        let config = &self.decoder.config;
        let token_bytes = 2 * config.layers * config.kv_width() * size_of::<B::Float>();
        let generate = GenerateOptions {
            max_new_tokens: REFUSAL_TOKENS,
            cache_bytes: (QUESTION_TOKENS * token_bytes).min(MOST_CACHE_BYTES) as u64,
            stop: stop.clone(),
            ..GenerateOptions::default()
        };
        let mut found = BTreeSet::new();
        let most = questions.len() * REFUSAL_TOKENS;
        for (round, questions) in questions.chunks(ROUND).enumerate() {
            let prompts: Vec<Vec<u32>> = questions.iter().map(|question| question.to_vec()).collect();
            let mut done = round * ROUND * REFUSAL_TOKENS;
            let mut on_token = |_, _| {
                done += 1;
                observer(Progress::new("own answers to the data", done.min(most), most));
            };
            // What follows a refusal changes nothing.
            let ends = |_: usize, answer: &[u32]| {
                self.text.tokenizer.decode(answer).is_ok_and(|text| refusals.is_refusal_already(&text))
            };
            let own = self.decoder.generate_until(&prompts, &generate, &mut on_token, &ends)?;
            for (question, own) in questions.iter().zip(own) {
                if refuses(&own.tokens)? {
                    found.extend(asked[question].iter().map(|index| key(&examples[*index])));
                }
            }
        }
        Ok(RefusedExamples(found))
    }
}

#[cfg(test)]
mod tests {
    use super::super::SCREENED_FILE;
    use super::*;

    fn example(tokens: &[u32], trained: &[usize]) -> Example {
        let trained = (0..tokens.len()).map(|at| trained.contains(&at)).collect();
        Example { tokens: tokens.to_vec(), trained, replayed: false }
    }

    #[test]
    fn no_list_of_an_earlier_run_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SCREENED_FILE);
        write_screened(&path, "").unwrap();
        assert!(!path.exists(), "nothing was left out");
        let lines = format!("{SCREEN_START}{{}}}}\n");
        write_screened(&path, &lines).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), lines);
        write_screened(&path, "").unwrap();
        assert!(!path.exists());
        std::fs::write(&path, "notes").unwrap();
        write_screened(&path, "").unwrap();
        assert!(path.exists(), "a file of another program");
    }

    #[test]
    fn each_trained_answer_has_all_before_it_as_its_question() {
        let two = example(&[1, 2, 3, 4, 5, 6], &[2, 3, 5]);
        let found: Vec<_> = answers(&two).collect();
        assert_eq!(found, [(&[1, 2][..], &[3, 4][..]), (&[1, 2, 3, 4, 5], &[6])]);
        assert_eq!(answers(&example(&[1, 2], &[])).count(), 0);
    }

    #[test]
    fn up_to_half_is_left_out_by_tokens_and_mask() {
        let [a, b, other_mask] = [example(&[1, 2, 3], &[2]), example(&[1, 2, 4], &[2]), example(&[1, 2, 3], &[1, 2])];
        let refused = RefusedExamples([key(&a)].into());
        let all = vec![a.clone(), b.clone(), a.clone(), other_mask.clone()];
        let (kept, counts) = refused.leave_out(all.into()).unwrap();
        assert_eq!(
            (kept.examples(), counts),
            (&[b.clone(), other_mask][..], ScreenCounts { examples: 4, left_out: 2 })
        );
        assert_eq!(refused.counts([&a, &b]), ScreenCounts { examples: 2, left_out: 1 });
        let error = refused.leave_out(vec![a.clone(), b, a].into()).unwrap_err();
        assert!(error.to_string().contains("2 of 3 examples") && error.exit_code() == 2, "{error}");
        assert!(refused.hash() != RefusedExamples::default().hash());
    }
}
