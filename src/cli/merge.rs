//! `swat merge`: defences after tuning.

use super::common::{Common, print_json, print_line, say};
use super::names::Names;
use super::progress::Bars;
use crate::error::Result;
use crate::io::IfExists;
use crate::modules::ModuleKind;
use crate::report::{Entry, Table};
use crate::secure::{MergeModels, MergeOptions, MergeSummary, MergedModule, merge};
use clap::Args;
use std::path::PathBuf;

/// Merges a tuned model with those that it comes from, as a defence after tuning: path, SafeMERGE, SafeLoRA, RESTA
#[derive(Args)]
#[command(after_help = "Examples:
  swat merge --base DIR --tuned DIR --out merged --by path --alpha 0.7
  swat merge --base CHAT --tuned DIR --unaligned PRETRAINED --out merged --by safelora --tau 0.5
  swat merge --base CHAT --tuned DIR --unaligned PRETRAINED --safe DIR --out merged --by safemerge --alpha 0.8 --tau 0.7
  swat merge --base CHAT --tuned DIR --unaligned DIR --out merged --by resta --alpha 1

With V = aligned - unaligned, C = V V^T / |V| and dW = tuned - base, of each projection:
  path       base + alpha (tuned - base)
  safemerge  base + alpha dW + (1 - alpha) (safe - base), where cos(dW, C dW) < tau
  safelora   base + C dW, where cos(dW, C dW) < tau
  resta      tuned + alpha (aligned - unaligned)

path and resta merge all tensors. safemerge and safelora leave norms, biases, embedding and head as they are tuned, and
say how many of them tuning has changed. It is computed on the CPU, tensor by tensor. docs/recipes.md has the papers.")]
pub(super) struct MergeCommand {
    #[command(flatten)]
    models: MergeModels,
    #[command(flatten)]
    options: MergeOptions,
    /// Where the merged model directory appears when it is complete
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace --out. A directory that holds anything but what swat wrote is refused
    #[arg(long)]
    force: bool,
}

impl MergeCommand {
    pub(super) fn run(mut self, common: &Common) -> Result<()> {
        let mut names = Names::new(common);
        self.models.paths().try_for_each(|path| names.model(path).map(drop))?;
        let mut bars = Bars::new(common);
        let if_exists = IfExists::from_force(self.force);
        let summary = merge(&self.models, &self.options, &self.out, if_exists, &mut bars.observer())?;
        bars.finish();
        if summary.changed == 0 {
            say("note: no tensor was changed: the output is the tuned model\n");
        }
        if summary.left_tuned > 0 {
            let left = summary.left_tuned;
            say(&format!(
                "note: {left} norms, biases, embeddings or heads differ from --base and stay as they are tuned\n"
            ));
        }
        if common.json {
            return print_json(&summary);
        }
        if !summary.modules.is_empty() {
            print_line(table(&summary).text().trim_end())?;
        }
        let MergeSummary { changed, tensors, .. } = summary;
        print_line(&format!("{changed} of {tensors} tensors changed; saved as {}", self.out.display()))
    }
}

/// The tests by kind of projection.
fn table(summary: &MergeSummary) -> Table {
    let tau = summary.tau.unwrap_or_default();
    let mut table = Table::new("Cosine of each update and its projection onto the alignment")
        .column("projection")
        .numbers("tested", "")
        .numbers(format!("below {tau}"), "")
        .numbers("smallest", "")
        .numbers("mean", "")
        .numbers("largest", "");
    for kind in ModuleKind::ALL {
        let of_kind = |module: &&MergedModule| module.module.ends_with(&format!(".{kind}"));
        let modules: Vec<&MergedModule> = summary.modules.iter().filter(of_kind).collect();
        let cosines: Vec<f64> = modules.iter().filter_map(|module| module.cosine).collect();
        let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
        let extreme = |pick: fn(f64, f64) -> f64| cosines.iter().copied().reduce(pick);
        table.row([
            Entry::text(kind.name()),
            Entry::count(cosines.len() as u64),
            Entry::count(modules.iter().filter(|module| module.changed).count() as u64),
            Entry::fixed(extreme(f64::min), 3),
            Entry::fixed(mean, 3),
            Entry::fixed(extreme(f64::max), 3),
        ]);
    }
    table
}
