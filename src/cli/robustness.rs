//! `swat robustness`: the layer × module map.

use super::open::{ModelArgs, OnDevice};
use super::progress::Bars;
use super::{Common, print_json, print_line};
use crate::backend::Backend;
use crate::data::{SecurityPrompt, Split};
use crate::error::{Error, Result};
use crate::io::write_atomic;
use crate::modules::ModuleSet;
use crate::report::{TextStyle, perturbation, robustness_map, robustness_table};
use crate::secure::{MadeFrom, Noise, Probe, RobustnessOptions, ScoreKind, ScorerOptions, robustness};
use clap::Args;
use std::path::PathBuf;

/// Which modules move the security features when they are perturbed: a map layer × module, with controls
#[derive(Args)]
#[command(after_help = "Examples:
  swat robustness --model DIR --probe probe.safetensors --security security.jsonl --out map.json
  swat robustness ... --kind lowrank:8 --epsilon 1.2 --members 8 --cells 'layers.*.{q,k,v,o}'

Writes the map as JSON, and a heat map beside it as .svg. Finished cells are kept beside --out while it runs; the same
command continues from them.")]
pub(super) struct RobustnessCommand {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    model: ModelArgs,
    /// Probes of `swat probe` on this model
    #[arg(long, value_name = "FILE")]
    probe: PathBuf,
    /// The labelled prompts that the probe was trained on
    #[arg(long, value_name = "FILE")]
    security: PathBuf,
    /// Where the map goes
    #[arg(long, value_name = "FILE", default_value = "map.json")]
    out: PathBuf,
    /// Relative norm of the perturbation; found by a sweep if not given
    #[arg(long)]
    epsilon: Option<f32>,
    /// Draws a cell, each with both signs
    #[arg(long, default_value_t = 4)]
    members: usize,
    /// gaussian, rademacher, lowrank:R, scale, zero, or update:DIR (towards a tuned model)
    #[arg(long, default_value = "gaussian")]
    kind: Noise,
    /// Cells to map: all, modules, or a set
    #[arg(long, default_value = "all")]
    cells: String,
    /// Score that finds epsilon and is drawn: gap, refusal, margin, auroc, accuracy
    #[arg(long, default_value = "gap")]
    score: String,
    /// Prompts that are scored: train, valid, test or ood
    #[arg(long, default_value = "test")]
    split: String,
    /// Leave out control (a), a probe trained anew on every copy: about half of the time
    #[arg(long)]
    no_retrain: bool,
    /// Working memory of the sweep, in MiB
    #[arg(long, default_value_t = 1024)]
    memory_mib: u64,
    /// Replace --out
    #[arg(long)]
    force: bool,
}

impl OnDevice for RobustnessCommand {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run<B: Backend>(self, backend: B) -> Result<()> {
        if self.out.exists() && !self.force {
            return Err(Error::Exists { path: self.out });
        }
        let score = score(&self.score)?;
        let split = Split::ALL.into_iter().find(|s| s.name() == self.split);
        let split = split.ok_or_else(|| Error::input("--split", &self.split, "train, valid, test or ood"))?;
        let prompts = SecurityPrompt::read(&self.security, self.common.seed)?;
        let probe = Probe::load(&self.probe)?;
        let subject = self.model.subject(backend)?;
        let options = ScorerOptions {
            kind: self.kind,
            members: self.members,
            seed: self.common.seed,
            split,
            retrain: !self.no_retrain,
            budget_bytes: self.memory_mib << 20,
            ..ScorerOptions::default()
        };
        let absolute = |path: &PathBuf| std::path::absolute(path).map_err(Error::io(path, "resolve"));
        let mut scorer = subject.scorer(&probe, &prompts, options)?;
        scorer.made_from = Some(MadeFrom {
            model: absolute(&self.model.model)?,
            probe: absolute(&self.probe)?,
            security: absolute(&self.security)?,
        });
        let options =
            RobustnessOptions { epsilon: self.epsilon, score, cells: self.cells, ..RobustnessOptions::default() };
        let mut bars = Bars::new(&self.common);
        let map = robustness(&scorer, &options, Some(&self.out), &mut bars.observer())?;
        bars.finish();
        let mods = ModuleSet::default();
        let heatmap = robustness_map(&map, score, &mods);
        write_atomic(&self.out.with_extension("svg"), heatmap.svg().as_bytes())?;
        if self.common.json {
            return print_json(&serde_json::to_value(&map).unwrap_or_default());
        }
        print_line(&robustness_table(&map, score, &mods).text(TextStyle::Unicode))?;
        print_line(&format!("{}; saved as {}", perturbation(&map), self.out.display()))
    }
}

pub(super) fn score(name: &str) -> Result<ScoreKind> {
    serde_json::from_value(serde_json::Value::String(name.to_owned()))
        .map_err(|_| Error::input("--score", name, "gap, refusal, margin, auroc or accuracy"))
}
