//! `swat probe`: the security-feature classifiers of a model.

use super::open::{ModelArgs, OnDevice, Refusals};
use super::progress::Bars;
use super::{Common, print_json, print_line};
use crate::backend::Backend;
use crate::data::{SecurityPrompt, Split};
use crate::error::{Error, Result};
use crate::report::format::{fixed, percent};
use crate::report::{Entry, Table, TextStyle};
use crate::secure::{Head, ProbeOptions};
use clap::Args;
use std::path::PathBuf;

/// Trains the security-feature classifiers of a model, one a layer: accuracy, AUROC and margin on each split
#[derive(Args)]
#[command(after_help = "Example:
  swat probe --model DIR --security security.jsonl --out probe.safetensors

A line of the security file is {\"prompt\": …, \"label\": \"harmful\"|\"benign\", \"pair\"?: …, \"category\"?: …,
\"split\"?: \"train\"|\"valid\"|\"test\"|\"ood\"}. Without splits they are made by pair, from --seed.")]
pub(super) struct ProbeCommand {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    refusals: Refusals,
    /// Labelled prompts
    #[arg(long, value_name = "FILE")]
    security: PathBuf,
    /// Where the probes go
    #[arg(long, value_name = "FILE", default_value = "probe.safetensors")]
    out: PathBuf,
    /// The hidden state that drift and robustness are scored at; the last if not given
    #[arg(long)]
    metric_layer: Option<usize>,
    /// Tokens of the model's own answers, by which refusal is told
    #[arg(long, default_value_t = 24)]
    answer_tokens: usize,
    /// Replace --out
    #[arg(long)]
    force: bool,
}

impl OnDevice for ProbeCommand {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run<B: Backend>(self, backend: B) -> Result<()> {
        if self.out.exists() && !self.force {
            return Err(Error::Exists { path: self.out });
        }
        let prompts = SecurityPrompt::read(&self.security, self.common.seed)?;
        SecurityPrompt::require_both_labels(&prompts, &self.security)?;
        let subject = self.model.subject(backend)?;
        let options =
            ProbeOptions { metric_layer: self.metric_layer, seed: self.common.seed, ..ProbeOptions::default() };
        let mut bars = Bars::new(&self.common);
        let refusals = self.refusals.list()?;
        let probe = subject.probe(&prompts, &options, self.answer_tokens, &refusals, &mut bars.observer())?;
        bars.finish();
        probe.save(&self.out)?;
        if self.common.json {
            return print_json(&serde_json::to_value(&probe.about).unwrap_or_default());
        }
        let mut table =
            Table::new("Classifier of harmful against benign prompts, by hidden state").numbers("layer", "");
        for split in [Split::Valid, Split::Test, Split::Ood] {
            for what in ["accuracy", "AUROC", "gap"] {
                table = table.numbers(format!("{} {what}", split.name()), "");
            }
        }
        for layer in 0..probe.layers.len() {
            let metrics = probe.head(layer, &Head::Harmful);
            let mut row = vec![Entry::number(layer as f64, layer.to_string())];
            for split in [Split::Valid, Split::Test, Split::Ood] {
                match metrics.and_then(|h| h.metrics.get(&split)) {
                    Some(m) => row.extend([
                        Entry::text(percent(m.accuracy, 1)),
                        m.auroc.map_or(Entry::missing(), |a| Entry::text(fixed(a, 3))),
                        Entry::text(fixed(m.gap, 2)),
                    ]),
                    None => row.extend([Entry::missing(), Entry::missing(), Entry::missing()]),
                }
            }
            table.row(row);
        }
        print_line(&table.text(TextStyle::Unicode))?;
        print_line(&format!("metric layer {}; saved as {}", probe.about.metric_layer, self.out.display()))
    }
}
