//! `swat score`: log-probabilities of a given text.

use super::common::{Common, print_json, print_line};
use super::names::Names;
use super::open::{ModelArgs, OnDevice};
use crate::backend::{Backend, IGNORE};
use crate::engine::Batch;
use crate::error::{Error, Result};
use crate::io::input::read_stream;
use crate::io::safetensors::Safetensors;
use crate::io::{IfExists, check_apart, check_file, write_atomic};
use clap::Args;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use std::path::{Path, PathBuf};

/// Largest text, in bytes; the model's context holds less.
const MAX_TEXT_BYTES: u64 = 64 << 20;

/// Log-probabilities of a text's tokens, its perplexity; logits and hidden states on request
#[derive(Args)]
#[command(after_help = "Examples:
  swat score --model DIR --text-file notes.txt
  swat score --model DIR --ids 1,306,763 --json --logits-out logits.safetensors")]
pub(super) struct Score {
    #[command(flatten)]
    model: ModelArgs,
    /// Text to score, in UTF-8; the tokenizer's own special tokens are added
    #[arg(long, value_name = "FILE", required_unless_present = "ids", conflicts_with = "ids")]
    text_file: Option<PathBuf>,
    /// Token ids to score, separated by commas
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    ids: Option<Vec<u32>>,
    /// Write `logits`, f32 [tokens, vocab]
    #[arg(long, value_name = "FILE")]
    logits_out: Option<PathBuf>,
    /// Write `hidden`, f32 [layers + 1, tokens, hidden]: the embedding's output first, the last after the final norm
    #[arg(long, value_name = "FILE")]
    hidden_out: Option<PathBuf>,
}

impl OnDevice for Score {
    fn model(&self) -> Option<PathBuf> {
        Some(self.model.model.clone())
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        self.model.resolve(names)
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        let outputs = [("--logits-out", "logits", &self.logits_out), ("--hidden-out", "hidden", &self.hidden_out)];
        let outputs: Vec<(&str, &str, &Path)> =
            outputs.into_iter().filter_map(|(option, name, path)| Some((option, name, path.as_deref()?))).collect();
        let inputs = [self.model.inputs(), self.text_file.iter().map(|p| ("--text-file", p.as_path())).collect()];
        let paths: Vec<(&str, &Path)> = outputs.iter().map(|(option, _, path)| (*option, *path)).collect();
        check_apart(&paths, &inputs.concat())?;
        for (_, name, path) in &outputs {
            check_file(path, IfExists::Replace, |path| holds_only(path, name))?;
        }
        let text = self.model.open_plain_text()?;
        let (place, tokens) = match (&self.text_file, self.ids) {
            (Some(path), _) => {
                let read = read_stream(path, MAX_TEXT_BYTES)?;
                // A byte-order mark is none of the text.
                let read = read.strip_prefix('\u{feff}').unwrap_or(&read);
                (path.display().to_string(), text.tokenizer.encode_with_special_tokens(read)?)
            }
            (None, ids) => ("--ids".to_string(), ids.unwrap_or_default()),
        };
        if tokens.is_empty() {
            return Err(Error::input(place, "no tokens", "at least one"));
        }
        let (vocab, context) = (text.files.config.vocab, text.files.config.max_positions);
        if let Some(id) = tokens.iter().find(|id| **id as usize >= vocab) {
            return Err(Error::input(place, format!("token {id}"), format!("ids below {vocab}")));
        }
        if tokens.len() > context {
            let expected = format!("at most {context}, the model's context");
            return Err(Error::input(place, format!("{} tokens", tokens.len()), expected));
        }
        let model = text.load(backend)?;
        let decoder = &model.decoder;
        let mut batch = Batch::from_prompts([tokens.as_slice()]);
        batch.targets = tokens[1..].iter().copied().chain([IGNORE]).collect();
        let losses = decoder.losses(&batch)?;
        let logprobs: Vec<Option<f64>> =
            std::iter::once(None).chain(losses[..tokens.len() - 1].iter().map(|l| Some(-f64::from(*l)))).collect();
        let nll = losses.iter().map(|l| f64::from(*l)).sum::<f64>() / (tokens.len() - 1) as f64;

        let rows: Vec<u32> = (0..tokens.len() as u32).collect();
        if let Some(path) = &self.logits_out {
            let logits = decoder.logits(&batch, &rows)?;
            write_tensor(path, "logits", vec![tokens.len(), decoder.config.vocab], &logits)?;
        }
        if let Some(path) = &self.hidden_out {
            let hidden = decoder.hidden_states(&batch, &rows)?;
            let shape = vec![hidden.len(), tokens.len(), decoder.config.hidden];
            write_tensor(path, "hidden", shape, &hidden.concat())?;
        }
        if common.json {
            let (nll, perplexity) = (finite(nll), finite(nll.exp()));
            print_json(&json!({ "tokens": tokens, "logprobs": logprobs, "nll": nll, "perplexity": perplexity }))
        } else if tokens.len() == 1 {
            print_line("tokens 1, which has none before it that it could be predicted from")
        } else {
            print_line(&format!("tokens {}  nll {nll:.6}  perplexity {:.4}", tokens.len(), nll.exp()))
        }
    }
}

/// JSON has no infinity.
fn finite(x: f64) -> Option<f64> {
    x.is_finite().then_some(x)
}

/// Whether a file holds a tensor of this name and nothing else, as this command writes it.
fn holds_only(path: &Path, name: &str) -> bool {
    Safetensors::open(path).is_ok_and(|file| file.tensors().map(|(name, ..)| name).eq([name]))
}

fn write_tensor(path: &Path, name: &str, shape: Vec<usize>, values: &[f32]) -> Result<()> {
    let wrong = |e: safetensors::SafeTensorError| Error::failed(format!("{name}: {e}"), "report this");
    let view = TensorView::new(Dtype::F32, shape, bytemuck::cast_slice(values)).map_err(wrong)?;
    let bytes = safetensors::serialize([(name, view)], None).map_err(wrong)?;
    write_atomic(path, &bytes)
}
