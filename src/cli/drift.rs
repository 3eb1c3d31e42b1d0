//! `swat drift`: drift of a tuned model, by the frozen probe of the original.

use super::common::{Common, print_json, print_line};
use super::names::Names;
use super::open::{ModelArgs, OnDevice, check_security};
use super::progress::Bars;
use crate::backend::Backend;
use crate::data::{RowOptions, RowReader, SecurityPrompt};
use crate::error::Result;
use crate::report::format::fixed;
use crate::report::{Entry, Table};
use crate::secure::Probe;
use clap::Args;
use std::path::PathBuf;

/// Drift of a tuned model's security features, by the frozen probe of the original model
#[derive(Args)]
#[command(after_help = "Examples:
  swat drift --model DIR --tuned TUNED --probe probe.safetensors --security security.jsonl
  swat drift --model DIR --adapter ADAPTER --probe probe.safetensors --security security.jsonl")]
pub(super) struct DriftCommand {
    #[command(flatten)]
    model: ModelArgs,
    /// The tuned model directory; with --adapter, the tuned model is --model with that adapter
    #[arg(long, value_name = "DIR", required_unless_present = "adapter", conflicts_with = "adapter")]
    tuned: Option<PathBuf>,
    /// Probes of `swat probe` on --model
    #[arg(long, value_name = "FILE")]
    probe: PathBuf,
    /// Labelled prompts
    #[arg(long, value_name = "FILE")]
    security: PathBuf,
    #[command(flatten)]
    rows: RowOptions,
}

impl OnDevice for DriftCommand {
    fn model(&self) -> Option<PathBuf> {
        Some(self.model.model.clone())
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        self.model.resolve(names)?;
        self.tuned.iter_mut().try_for_each(|tuned| names.model(tuned).map(drop))?;
        names.file("--security", &mut self.security)
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        let mut rows = RowReader::new(&self.rows);
        let prompts = SecurityPrompt::read(&self.security, common.seed, &mut rows)?;
        common.end_reading(&rows)?;
        let probe = Probe::load(&self.probe)?;
        let (text, _) = self.model.without_adapter().open_dated(probe.metadata.date)?;
        probe.check_model(&text.files.config, text.files.hash()?)?;
        check_security(&text, &prompts)?;
        let tuned =
            ModelArgs { model: self.tuned.clone().unwrap_or_else(|| self.model.model.clone()), ..self.model.clone() };
        let (tuned, _) = tuned.open_dated(probe.metadata.date)?;
        probe.check_shape(&tuned.files.config)?;
        check_security(&tuned, &prompts)?;
        let mut bars = Bars::new(common);
        let base = {
            let model = text.load(backend.clone())?;
            model.snapshot(&probe, &prompts, &mut bars.observer())?
        };
        let tuned = tuned.load(backend)?;
        let drift = tuned.drift(&probe, &prompts, &base, &mut bars.observer())?;
        bars.finish();
        if common.json {
            return print_json(&drift);
        }
        for (split, found) in &drift.splits {
            let mut table = Table::new(format!("Drift on the {} split", split.name())).numbers("layer", "");
            for what in ["accuracy", "tuned", "AUROC", "tuned", "gap", "tuned", "output shift", "cosine"] {
                table = table.numbers(what, "");
            }
            for layer in &found.layers {
                table.row([
                    Entry::count(layer.layer as u64),
                    Entry::percent(layer.base.accuracy),
                    Entry::percent(layer.tuned.accuracy),
                    Entry::fixed(layer.base.auroc, 3),
                    Entry::fixed(layer.tuned.auroc, 3),
                    Entry::fixed(layer.base.gap, 2),
                    Entry::fixed(layer.tuned.gap, 2),
                    Entry::fixed(layer.output_shift, 3),
                    Entry::fixed(layer.direction_cosine, 3),
                ]);
            }
            print_line(&table.text())?;
            if let (Some(base), Some(tuned)) = (found.base.refusal, found.tuned.refusal) {
                print_line(&format!(
                    "refusal log-odds, harmful minus benign: {} -> {}",
                    fixed(base, 2),
                    fixed(tuned, 2)
                ))?;
            }
        }
        Ok(())
    }
}
