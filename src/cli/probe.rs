//! `swat probe`: the security-feature classifiers of a model.

use super::common::{Common, print_json, print_line};
use super::names::Names;
use super::open::{ModelArgs, OnDevice, Refusals, check_security};
use super::progress::Bars;
use crate::backend::Backend;
use crate::data::{RowOptions, RowReader, SecurityPrompt, Split};
use crate::error::Result;
use crate::io::{IfExists, check_apart, check_file};
use crate::report::{Entry, Table};
use crate::secure::{Head, Probe, ProbeOptions, REFUSAL_TOKENS, check_answer_tokens};
use clap::Args;
use std::path::PathBuf;

/// Trains the security-feature classifiers of a model, one per layer: accuracy, AUROC and gap on each split
#[derive(Args)]
#[command(after_help = "Example:
  swat probe --model DIR --security security.jsonl --out probe.safetensors

A line of the security file is {\"prompt\": …, \"label\": \"harmful\"|\"benign\", \"pair\"?: …, \"category\"?: …,
\"split\"?: \"train\"|\"valid\"|\"test\"|\"ood\"}. Prompts without a split are assigned one by pair, from --seed.")]
pub(super) struct ProbeCommand {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    refusals: Refusals,
    /// Labelled prompts, harmful and benign: files, or a set on the hub such as JailbreakBench/JBB-Behaviors
    #[arg(long, value_name = "FILE_OR_NAME", required = true)]
    security: Vec<PathBuf>,
    #[command(flatten)]
    rows: RowOptions,
    /// Output file of the probes
    #[arg(long, value_name = "FILE", default_value = "probe.safetensors")]
    out: PathBuf,
    #[command(flatten)]
    options: ProbeOptions,
    /// Tokens of the model's own answers, by which its refusals are recognised
    #[arg(long, default_value_t = REFUSAL_TOKENS)]
    answer_tokens: usize,
    /// Replace --out
    #[arg(long)]
    force: bool,
}

impl OnDevice for ProbeCommand {
    fn model(&self) -> Option<PathBuf> {
        Some(self.model.model.clone())
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        self.model.resolve(names)?;
        names.security(&mut self.security)
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        let mut inputs = [self.model.inputs(), self.refusals.inputs()].concat();
        inputs.extend(self.security.iter().map(|path| ("--security", path.as_path())));
        check_apart(&[("--out", &self.out)], &inputs)?;
        check_file(&self.out, IfExists::from_force(self.force), Probe::is_file)?;
        check_answer_tokens("answer_tokens", self.answer_tokens)?;
        let mut rows = RowReader::new(&self.rows);
        let prompts = SecurityPrompt::read_all(&self.security, common.seed, &mut rows)?;
        common.end_reading(&rows)?;
        self.security.first().map_or(Ok(()), |first| SecurityPrompt::require_both_labels(&prompts, first))?;
        let refusals = self.refusals.list()?;
        let (text, date) = self.model.open_dated(None)?;
        self.options.check(text.files.config.layers)?;
        check_security(&text, &prompts)?;
        let model = text.load(backend)?;
        let options = ProbeOptions { seed: common.seed, ..self.options };
        let mut bars = Bars::new(common);
        let mut probe = model.train_probe(&prompts, &options, self.answer_tokens, &refusals, &mut bars.observer())?;
        bars.finish();
        probe.metadata.date = date;
        probe.save(&self.out)?;
        if common.json {
            return print_json(&probe.metadata);
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
            let mut row = vec![Entry::count(layer as u64)];
            for split in [Split::Valid, Split::Test, Split::Ood] {
                let metrics = metrics.and_then(|head| head.metrics.get(&split));
                row.push(Entry::percent(metrics.map(|m| m.accuracy)));
                row.push(Entry::fixed(metrics.and_then(|m| m.auroc), 3));
                row.push(Entry::fixed(metrics.map(|m| m.gap), 2));
            }
            table.row(row);
        }
        print_line(&table.text())?;
        print_line(&format!("metric layer {}; saved as {}", probe.metadata.metric_layer, self.out.display()))
    }
}
