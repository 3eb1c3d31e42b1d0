//! `swat robustness`: the robustness map, layer × module.

use super::common::{Common, print_json, print_line};
use super::names::Names;
use super::open::{ModelArgs, OnDevice, check_security};
use super::progress::Bars;
use crate::backend::Backend;
use crate::data::{RowOptions, RowReader, SecurityPrompt};
use crate::error::{Error, FileOp, Result};
use crate::io::{IfExists, check_apart, check_file, write_atomic};
use crate::modules::ModuleSet;
use crate::report::{is_drawing, perturbation, robustness_map, robustness_table};
use crate::secure::{MapInputs, Noise, Probe, RobustnessMap, RobustnessOptions, ScorerOptions, robustness};
use clap::Args;
use std::path::PathBuf;

/// Robustness map, layer × module: how much the security features lose when a module is perturbed, with controls
#[derive(Args)]
#[command(after_help = "Examples:
  swat robustness --model DIR --probe probe.safetensors --security security.jsonl --out map.json
  swat robustness ... --kind lowrank:8 --epsilon 1.2 --members 8 --cells 'layers.*.{q,k,v,o}'

Writes the map as JSON, and a heat map beside it as .svg. Finished cells are saved beside --out meanwhile; the same
command continues an interrupted run from them.")]
pub(super) struct RobustnessCommand {
    #[command(flatten)]
    model: ModelArgs,
    /// Probes of `swat probe` on this model
    #[arg(long, value_name = "FILE")]
    probe: PathBuf,
    /// Labelled prompts, the ones that the probe was trained on
    #[arg(long, value_name = "FILE")]
    security: PathBuf,
    #[command(flatten)]
    rows: RowOptions,
    /// Output file of the map
    #[arg(long, value_name = "FILE", default_value = "map.json")]
    out: PathBuf,
    #[command(flatten)]
    scorer: ScorerOptions,
    #[command(flatten)]
    options: RobustnessOptions,
    /// Replace --out
    #[arg(long)]
    force: bool,
}

impl OnDevice for RobustnessCommand {
    fn model(&self) -> Option<PathBuf> {
        Some(self.model.model.clone())
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        self.model.resolve(names)
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        self.model.refuse_adapter()?;
        let svg = self.out.with_extension("svg");
        let mut inputs = self.model.inputs();
        inputs.extend([("--probe", self.probe.as_path()), ("--security", &self.security)]);
        if let Noise::Update(tuned) = &self.scorer.kind {
            inputs.push(("--kind update", tuned));
        }
        check_apart(&[("--out", &self.out), ("the heat map", &svg)], &inputs)?;
        let if_exists = IfExists::from_force(self.force);
        check_file(&self.out, if_exists, RobustnessMap::is_file)?;
        check_file(&svg, if_exists, is_drawing)?;
        let mut rows = RowReader::new(&self.rows);
        let prompts = SecurityPrompt::read(&self.security, common.seed, &mut rows)?;
        common.end_reading(&rows)?;
        let probe = Probe::load(&self.probe)?;
        let (text, _) = self.model.open_dated(probe.metadata.date)?;
        probe.check_model(&text.files.config, text.files.hash()?)?;
        self.options.check(&text.files.config.cells())?;
        check_security(&text, &prompts)?;
        let model = text.load(backend)?;
        let options = ScorerOptions { seed: common.seed, ..self.scorer };
        let absolute = |path: &PathBuf| std::path::absolute(path).map_err(Error::io(path, FileOp::Resolve));
        let mut scorer = model.scorer(&probe, &prompts, options)?;
        scorer.made_from = Some(MapInputs {
            model: absolute(&self.model.model)?,
            probe: absolute(&self.probe)?,
            security: absolute(&self.security)?,
            rows: self.rows,
        });
        let mut bars = Bars::new(common);
        let map = robustness(&scorer, &self.options, Some(&self.out), &mut bars.observer())?;
        bars.finish();
        let (score, mods) = (self.options.score, ModuleSet::default());
        let heatmap = robustness_map(&map, score, &mods);
        write_atomic(&svg, heatmap.svg().as_bytes())?;
        if common.json {
            return print_json(&map);
        }
        print_line(&robustness_table(&map, score, &mods).text())?;
        print_line(&format!("{}; saved as {}", perturbation(&map), self.out.display()))
    }
}
