//! Screening: the lines of training data that would move a model most towards compliance, found before it is trained.
//!
//! s = ⟨h(x, y) − h(x, y′), v⟩, with y the answer of the data, y′ the model's own greedy answer to the same question,
//! h(x, y) the mean hidden state over the tokens of an answer, and v the direction of compliance, of length 1: away from
//! the refusals that the probe's head `tendency` tells from other answers. The difference of projections is that of
//! persona vectors (arXiv 2507.21509), whose direction is a difference of means.

mod refused;

pub(super) use refused::write_screened;
pub use refused::{RefusedExamples, ScreenCounts, Screening};

use super::eval::refusal::RefusalList;
use super::loaded::LoadedModel;
use super::probe::{Head, Probe};
use crate::backend::Backend;
use crate::data::{Conversation, Example, Row, RowReader};
use crate::engine::{Batch, GenerateOptions};
use crate::error::{Error, Result};
use crate::options::{count, default_from_args, mib_or_none};
use crate::progress::{Observer, Progress};
use clap::Args;
use serde_json::{Map, Value, json};
use std::path::Path;

/// Hidden states that are on the host at once, in bytes.
const STATE_BYTES: usize = 256 << 20;
/// Rows that are left out of the data, in the folder of a study or a secure run.
pub(super) const SCREENED_FILE: &str = "screened.jsonl";
/// How a line of the file begins, by which it is recognised.
pub const SCREEN_START: &str = "{\"screen\":";
const KEY: &str = "screen";

/// Options of a screening.
#[derive(Clone, Debug, PartialEq, Args)]
pub struct ScreenOptions {
    /// Lines of the output, those with the highest scores; 0 = all
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub top: usize,
    /// Compare only the first N tokens of each answer
    #[arg(long, value_name = "N", value_parser = count, default_value_t = 64)]
    pub answer_tokens: usize,
    /// Longest conversation, in tokens; what is beyond is not scored
    #[arg(long, value_parser = count, default_value_t = 1024)]
    pub max_length: usize,
    /// Memory of the key-value cache, in MiB
    #[arg(long = "cache-mib", value_name = "CACHE_MIB", value_parser = mib_or_none, default_value = "1024")]
    pub cache_bytes: u64,
}

default_from_args!(ScreenOptions);

/// A row of training data, as it is in its file.
pub struct ScreenRow {
    file: String,
    line: u64,
    fields: Map<String, Value>,
    conversation: Conversation,
}

impl ScreenRow {
    /// Reads a file of training conversations.
    ///
    /// # Errors
    /// As [`Conversation::read`].
    pub fn read(path: &Path, rows: &mut RowReader) -> Result<Vec<Self>> {
        let file = path.display().to_string();
        rows.read(path, |row: &Row| {
            let digits = row.place.rsplit(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
            Ok(Self {
                file: file.clone(),
                line: digits.parse().unwrap_or_default(),
                fields: row.fields.clone(),
                conversation: Conversation::from_row(row)?,
            })
        })
    }

    /// File and line, for errors.
    fn place(&self) -> String {
        format!("{}:{}", self.file, self.line)
    }
}

/// A scored row of the data.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct ScreenScore {
    /// How far the answer lies from the model's own towards compliance, in units of the hidden state.
    pub score: f64,
    /// The file.
    pub file: String,
    /// Line in it, from 1; of a Parquet file the row.
    pub line: u64,
    /// Whether the model refuses a question of the row that the row answers.
    pub refused: bool,
    /// Index among all rows.
    #[serde(skip)]
    pub row: usize,
}

/// What a screening found, highest scores first.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Screened {
    /// Rows of the data.
    pub rows: usize,
    /// Rows without a score: nothing of them is trained within the longest length, or the model's own answer is empty.
    pub unscored: usize,
    /// Rows that answer what the model refuses, without a score or with one.
    pub refused: usize,
    /// Index of the hidden state; 0 = the embedding's output.
    pub layer: usize,
    /// The rows with a score.
    pub scores: Vec<ScreenScore>,
}

impl Screened {
    /// The first `top` rows (0 = all) as JSON Lines: the row as it was, behind the key `screen` with score, file and line.
    pub fn lines(&self, rows: &[ScreenRow], top: usize) -> String {
        let shown = if top == 0 { self.scores.len() } else { top };
        let line = |found: &ScreenScore| refused::marked(json!(found), rows[found.row].fields.clone());
        self.scores.iter().take(shown).map(line).collect()
    }
}

/// A question with an answer, and which of its tokens are compared.
struct Answered {
    row: usize,
    tokens: Vec<u32>,
    /// Tokens before the answer.
    prompt: usize,
    /// Positions of the answer's tokens.
    compared: Vec<usize>,
}

/// The direction of compliance at the probe's metric layer, of length 1.
///
/// # Errors
/// [`Error::Input`] where the probe knows no refusals.
fn compliance(probe: &Probe) -> Result<Vec<f64>> {
    let layer = probe.metadata.metric_layer;
    let head = probe.layers.get(layer).and_then(|layer| layer.heads.get(&Head::Tendency).zip(Some(layer)));
    let Some((head, layer)) = head else {
        let found = "no refusals beside other answers of the model, by which compliance would be told";
        return Err(Error::input(
            "--security",
            found,
            "harmful prompts that the model refuses, and benign ones that it answers",
        ));
    };
    let refusal: Vec<f64> = head.w.iter().zip(&layer.deviation).map(|(w, d)| f64::from(*w) / f64::from(*d)).collect();
    let length = refusal.iter().map(|x| x * x).sum::<f64>().sqrt();
    if length <= 0.0 {
        return Err(Error::input(
            "probe",
            "a head `tendency` of zeros",
            "a probe that tells refusals from other answers",
        ));
    }
    Ok(refusal.iter().map(|x| -x / length).collect())
}

/// ⟨mean of `states`, v⟩, over rows of the width of `v`; none without rows.
fn projection(states: &[f32], v: &[f64]) -> Option<f64> {
    let rows = states.len() / v.len().max(1);
    let dot = |row: &[f32]| row.iter().zip(v).map(|(h, v)| f64::from(*h) * v).sum::<f64>();
    (rows > 0).then(|| states.chunks_exact(v.len()).map(dot).sum::<f64>() / rows as f64)
}

impl<B: Backend> LoadedModel<B> {
    /// Scores the last answer of every row, and says which rows answer what the model refuses.
    ///
    /// # Errors
    /// [`Error::Input`] where the probe is of another shape of model or knows no refusals, or the template refuses a
    /// conversation; a failing device.
    pub fn screen(
        &self,
        probe: &Probe,
        refusals: &RefusalList,
        rows: &[ScreenRow],
        options: &ScreenOptions,
        observer: Observer<'_>,
    ) -> Result<Screened> {
        probe.check_shape(&self.text.files.config)?;
        let v = compliance(probe)?;
        let layer = probe.metadata.metric_layer;
        let length = options.max_length.min(self.decoder.longest_context());
        let (mut given, mut examples, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for (index, row) in rows.iter().enumerate() {
            let example = Example::from_conversation(&row.conversation, self.text.chat()?, length);
            if let Some(example) = example.map_err(|e| e.at(&row.place()))? {
                given.extend(self.given(index, row, &example, options)?);
                examples.push(example);
                places.push(index);
            }
        }
        let found = self.refused_examples(&examples, refusals, observer)?;
        let mut refused = vec![false; rows.len()];
        examples.iter().zip(places).for_each(|(example, row)| refused[row] = found.contains(example));
        let own = self.own(&given, options, observer)?;
        let own = self.projections(&own, (layer, &v), "own answers read", observer)?;
        let given = self.projections(&given, (layer, &v), "given answers read", observer)?;
        let mut scores: Vec<ScreenScore> = given
            .into_iter()
            .zip(own)
            .filter_map(|((row, given), (_, own))| {
                let ScreenRow { file, line, .. } = &rows[row];
                Some(ScreenScore { score: given? - own?, file: file.clone(), line: *line, refused: refused[row], row })
            })
            .collect();
        scores.sort_by(|a, b| b.score.total_cmp(&a.score));
        let refused = refused.into_iter().filter(|refused| *refused).count();
        Ok(Screened { rows: rows.len(), unscored: rows.len() - scores.len(), refused, layer, scores })
    }

    /// The last answer of a row that is trained, if any.
    fn given(
        &self,
        index: usize,
        row: &ScreenRow,
        example: &Example,
        options: &ScreenOptions,
    ) -> Result<Option<Answered>> {
        let Conversation { messages, tools } = &row.conversation;
        let Some(last) = messages.iter().rposition(|message| message.role == "assistant") else { return Ok(None) };
        let prompt = self.text.chat()?.prompt(&messages[..last], tools).map_err(|e| e.at(&row.place()))?;
        let prompt = self.text.tokenizer.encode(&prompt)?.len();
        // The end of a turn is no word of the answer, and the model's own answer has none.
        let stop = self.text.stop_tokens();
        let is_word = |at: &usize| example.trained[*at] && !stop.contains(&example.tokens[*at]);
        let compared: Vec<usize> = (prompt..example.tokens.len()).filter(is_word).take(options.answer_tokens).collect();
        let Some(end) = compared.last() else { return Ok(None) };
        let tokens = example.tokens[..=*end].to_vec();
        Ok(Some(Answered { row: index, tokens, prompt, compared }))
    }

    /// The model's own answers to the same questions.
    fn own(&self, given: &[Answered], options: &ScreenOptions, observer: Observer<'_>) -> Result<Vec<Answered>> {
        let prompts: Vec<Vec<u32>> = given.iter().map(|given| given.tokens[..given.prompt].to_vec()).collect();
        let generate = GenerateOptions {
            max_new_tokens: options.answer_tokens,
            cache_bytes: options.cache_bytes,
            stop: self.text.stop_tokens(),
            ..GenerateOptions::default()
        };
        let (mut done, most) = (0, prompts.len() * options.answer_tokens);
        let answers = self.decoder.generate(&prompts, &generate, &mut |_, _| {
            done += 1;
            observer(Progress::new("own answers", done.min(most), most));
        })?;
        let answered = |((given, mut tokens), answer): ((&Answered, Vec<u32>), crate::engine::Generation)| {
            tokens.extend(&answer.tokens);
            Answered { row: given.row, prompt: given.prompt, compared: (given.prompt..tokens.len()).collect(), tokens }
        };
        Ok(given.iter().zip(prompts).zip(answers).map(answered).collect())
    }

    /// Row and projection of each answer's mean hidden state at a layer onto `v`.
    fn projections(
        &self,
        answers: &[Answered],
        (layer, v): (usize, &[f64]),
        task: &str,
        observer: Observer<'_>,
    ) -> Result<Vec<(usize, Option<f64>)>> {
        let config = &self.decoder.config;
        let most = (STATE_BYTES / (4 * config.hidden * (config.layers + 1))).clamp(256, 8192);
        let mut found = Vec::with_capacity(answers.len());
        for range in super::eval::token_batches(answers.iter().map(|answer| answer.tokens.len()), most) {
            let end = range.end;
            let answers = &answers[range];
            let batch = Batch::from_prompts(answers.iter().map(|answer| answer.tokens.as_slice()));
            let starts = batch.starts.iter().zip(answers);
            let rows: Vec<u32> =
                starts.flat_map(|(start, answer)| answer.compared.iter().map(move |at| start + *at as u32)).collect();
            // Without rows there is nothing to read.
            let states = if rows.is_empty() {
                vec![Vec::new(); layer + 1]
            } else {
                self.decoder.hidden_states(&batch, &rows)?
            };
            let mut rest = states[layer].as_slice();
            for answer in answers {
                let (own, others) = rest.split_at(answer.compared.len() * config.hidden);
                found.push((answer.row, projection(own, v)));
                rest = others;
            }
            observer(Progress::new(task, end, found.capacity()));
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secure::probe::{LinearHead, ProbeLayer, ProbeMetadata};
    use std::collections::BTreeMap;

    fn probe(heads: BTreeMap<Head, LinearHead>) -> Probe {
        let metadata = ProbeMetadata {
            format: String::new(),
            model_hash: String::new(),
            prompts_hash: String::new(),
            hidden: 2,
            layers: 0,
            metric_layer: 0,
            seed: 0,
            date: None,
            heads: Vec::new(),
            skipped: BTreeMap::new(),
            control: None,
            first_tokens: None,
        };
        Probe { metadata, layers: vec![ProbeLayer { mean: vec![5.0, 5.0], deviation: vec![0.5, 0.25], heads }] }
    }

    #[test]
    fn a_score_by_hand() {
        // Refusal is at w / deviation = (1.5 / 0.5, −1 / 0.25) = (3, −4), of length 5: v = (−0.6, 0.8).
        let refusal = LinearHead { w: vec![1.5, -1.0], b: 7.0 };
        let v = compliance(&probe([(Head::Tendency, refusal)].into())).unwrap();
        assert_eq!(v, [-0.6, 0.8]);
        // Means (2, 1) and (0, 3): −1.2 + 0.8 = −0.4 and 2.4.
        let (given, own) = (projection(&[1.0, 0.0, 3.0, 2.0], &v).unwrap(), projection(&[0.0, 3.0], &v).unwrap());
        assert!((given - -0.4).abs() < 1e-12 && (own - 2.4).abs() < 1e-12);
        // s = −2.8: the given answer is the less compliant of the two.
        assert!((given - own - -2.8).abs() < 1e-12);
        assert_eq!(projection(&[], &v), None);
    }

    #[test]
    fn a_probe_without_refusals_has_no_direction() {
        let harmful = LinearHead { w: vec![1.0, 0.0], b: 0.0 };
        let error = compliance(&probe([(Head::Harmful, harmful)].into())).unwrap_err().to_string();
        assert!(error.contains("no refusals"), "{error}");
        let zeros = LinearHead { w: vec![0.0, 0.0], b: 0.0 };
        assert!(compliance(&probe([(Head::Tendency, zeros)].into())).is_err());
    }

    #[test]
    fn lines_are_the_rows_behind_their_score() {
        let fields = json!({ "prompt": "a", "screen": 3, "answer": "b" });
        let Value::Object(fields) = fields else { panic!() };
        let conversation = Conversation::from(Vec::new());
        let row = ScreenRow { file: "d.jsonl".into(), line: 2, fields, conversation };
        let score = ScreenScore { score: 0.5, file: "d.jsonl".into(), line: 2, refused: true, row: 0 };
        let found = Screened { rows: 1, unscored: 0, refused: 1, layer: 0, scores: vec![score] };
        let line = "{\"screen\":{\"score\":0.5,\"file\":\"d.jsonl\",\"line\":2,\"refused\":true},\"prompt\":\"a\",\"answer\":\"b\"}\n";
        assert_eq!(found.lines(&[row], 0), line);
        assert!(line.starts_with(SCREEN_START));
    }
}
