//! `swat drift`: one model against another with a frozen probe.

use super::open::{ModelArgs, OnDevice};
use super::progress::Bars;
use super::{Common, print_json, print_line};
use crate::backend::Backend;
use crate::data::SecurityPrompt;
use crate::error::Result;
use crate::report::format::{fixed, percent};
use crate::report::{Entry, Table, TextStyle};
use crate::secure::{Probe, Subject};
use clap::Args;
use std::path::PathBuf;

/// How far a tuned model's security features moved, read with the frozen probe of the model it came from
#[derive(Args)]
#[command(after_help = "Example:
  swat drift --model DIR --tuned TUNED --probe probe.safetensors --security security.jsonl")]
pub(super) struct DriftCommand {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    model: ModelArgs,
    /// The tuned model directory
    #[arg(long, value_name = "DIR")]
    tuned: PathBuf,
    /// Probes of `swat probe` on --model
    #[arg(long, value_name = "FILE")]
    probe: PathBuf,
    /// Labelled prompts
    #[arg(long, value_name = "FILE")]
    security: PathBuf,
}

impl OnDevice for DriftCommand {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run<B: Backend>(self, backend: B) -> Result<()> {
        let prompts = SecurityPrompt::read(&self.security, self.common.seed)?;
        let probe = Probe::load(&self.probe)?;
        let mut bars = Bars::new(&self.common);
        let base = {
            let subject = self.model.subject(backend.clone())?;
            probe.check_model(&subject.files.config, subject.files.hash()?)?;
            subject.snapshot(&probe, &prompts, &mut bars.observer())?
        };
        let template = self.model.chat_template.as_deref();
        let tuned = Subject::open(backend, &self.tuned, template)?;
        probe.check_shape(&tuned.files.config)?;
        let drift = tuned.drift(&probe, &prompts, &base, &mut bars.observer())?;
        bars.finish();
        if self.common.json {
            return print_json(&serde_json::to_value(&drift).unwrap_or_default());
        }
        for (split, found) in &drift.splits {
            let mut table = Table::new(format!("Drift on the {} split", split.name())).numbers("layer", "");
            for what in ["accuracy", "tuned", "AUROC", "tuned", "gap", "tuned", "output shift", "cosine"] {
                table = table.numbers(what, "");
            }
            for layer in &found.layers {
                let optional = |x: Option<f64>| x.map_or(Entry::missing(), |x| Entry::text(fixed(x, 3)));
                table.row([
                    Entry::number(layer.layer as f64, layer.layer.to_string()),
                    Entry::text(percent(layer.base.accuracy, 1)),
                    Entry::text(percent(layer.tuned.accuracy, 1)),
                    optional(layer.base.auroc),
                    optional(layer.tuned.auroc),
                    Entry::text(fixed(layer.base.gap, 2)),
                    Entry::text(fixed(layer.tuned.gap, 2)),
                    Entry::text(fixed(layer.output_shift, 3)),
                    optional(layer.direction_cosine),
                ]);
            }
            print_line(&table.text(TextStyle::Unicode))?;
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
