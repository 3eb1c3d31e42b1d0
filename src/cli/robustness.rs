//! `swat robustness`: the robustness map, layer × module.

use super::common::{Common, print_json, print_line};
use super::names::Names;
use super::open::{ModelArgs, OnDevice, check_security};
use super::progress::Bars;
use super::ranks::{PartArgs, Work, refuse_pipes, start_processes};
use super::shard::ShardArgs;
use crate::backend::Backend;
use crate::data::{Example, RowOptions, RowReader, SecurityPrompt};
use crate::error::{Error, FileOp, Result};
use crate::group::Together;
use crate::io::{IfExists, check_apart, check_file, remove, write_atomic};
use crate::modules::ModuleSet;
use crate::report::{is_drawing, perturbation, robustness_map, robustness_table};
use crate::secure::{
    By, MapInputs, ModelText, Noise, PerturbationScorer, PlannedStep, Probe, RobustnessMap, RobustnessOptions,
    ScorerOptions, Shard, StepOptions, robustness, robustness_part,
};
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Robustness map, layer × module: how much the security features lose when a module is perturbed, with controls
#[derive(Args)]
#[command(
    mut_arg("model", |arg| arg.required(false).required_unless_present("merge")),
    after_help = "Examples:
  swat robustness --model DIR --probe probe.safetensors --security security.jsonl --out map.json
  swat robustness ... --kind lowrank:8 --epsilon 1.2 --members 8 --cells 'layers.*.{q,k,v,o}'
  swat robustness ... --by conflict --data train.jsonl    from gradients of the training data alone
  swat robustness ... --by update --data train.jsonl --lr 1e-5 --steps 300
  swat robustness ... --out map.json --gpus 8             on all GPUs of this machine, a process each
  swat robustness ... --out map.json --shard 0/8          one eighth of it, for a job array: map.shard-0-of-8.jsonl
  swat robustness ... --out map.json --shard auto         the share of this task, by the scheduler's variables
  swat robustness --merge map.shard-*.jsonl --out map.json

Writes the map as JSON, and a heat map beside it as .svg. Finished cells are saved beside --out meanwhile; the same
command continues an interrupted run from them. An --adapter is merged into the weights, which are then perturbed."
)]
pub(super) struct RobustnessCommand {
    #[command(flatten)]
    model: Option<ModelArgs>,
    /// Probes of `swat probe` on this model
    #[arg(long, value_name = "FILE", required_unless_present = "merge")]
    probe: Option<PathBuf>,
    /// Labelled prompts, the ones that the probe was trained on
    #[arg(long, value_name = "FILE", required_unless_present = "merge")]
    security: Option<PathBuf>,
    #[command(flatten)]
    rows: RowOptions,
    /// Output file of the map
    #[arg(long, value_name = "FILE", default_value = "map.json")]
    out: PathBuf,
    #[command(flatten)]
    scorer: ScorerOptions,
    #[command(flatten)]
    options: RobustnessOptions,
    /// Training conversations of the planned step, for --by conflict and --by update: a file, or a name on the hub
    #[arg(long, value_name = "FILE_OR_NAME")]
    data: Vec<PathBuf>,
    #[command(flatten)]
    step: StepOptions,
    #[command(flatten)]
    shard: ShardArgs,
    #[command(flatten)]
    parts: PartArgs,
    /// The part of this process, among those that --gpus has started.
    #[arg(skip)]
    part: Option<Shard>,
    /// Make the map of all its parts, which tasks with --shard wrote; needs neither model nor device
    #[arg(long, value_name = "PART", num_args = 1.., conflicts_with_all = ["model", "probe", "security"])]
    merge: Vec<PathBuf>,
    /// Replace --out
    #[arg(long)]
    force: bool,
}

/// What a map is made of.
struct MapFiles {
    model: ModelArgs,
    probe: PathBuf,
    security: PathBuf,
}

impl RobustnessCommand {
    pub(super) fn start(mut self, common: &Common) -> Result<()> {
        match (self.model.take(), self.probe.take(), self.security.take()) {
            (Some(model), Some(probe), Some(security)) => {
                let work = self.parts.work(common)?;
                let mut job = MapJob { inputs: MapFiles { model, probe, security }, command: self };
                match work {
                    Work::Whole => job.start(common),
                    Work::Launcher(size) => job.divide(size, common),
                    Work::Part(share, common) => {
                        job.command.part = Some(Shard::new(share.rank, share.size)?);
                        job.start(&common)
                    }
                }
            }
            _ => self.merge(common),
        }
    }

    fn merge(self, common: &Common) -> Result<()> {
        let parts: Vec<(&str, &Path)> = self.merge.iter().map(|part| ("--merge", part.as_path())).collect();
        let svg = self.check_outputs(&parts)?;
        let map = RobustnessMap::merge(&self.merge)?;
        map.save(&self.out)?;
        self.show(common, &map, &svg)
    }

    /// The part of the map to compute; none = the whole map.
    fn shard(&self) -> Result<Option<Shard>> {
        self.part.map_or_else(|| self.shard.shard(), |part| Ok(Some(part)))
    }

    /// Checks that what is given goes with --by.
    fn check_by(&self) -> Result<()> {
        let by = format!("--by {}", self.options.by.name());
        let wrong = |option: &str, found: &str, expected: &str| Err(Error::input(option, found, expected));
        match self.options.by {
            By::Noise if !self.data.is_empty() => wrong(
                "--data",
                "training data, which --by noise does not use",
                "--by conflict or --by update beside it",
            ),
            By::Noise => Ok(()),
            _ if self.data.is_empty() => {
                wrong(&by, "no --data", "--data FILE, the conversations that are to be trained")
            }
            _ if self.scorer.kind != Noise::default() => {
                wrong("--kind", &format!("{} beside {by}", self.scorer.kind), "one of them")
            }
            By::Conflict if self.shard()?.is_some() => wrong(
                "--shard",
                "a share of a conflict map, which one process makes from gradients alone",
                "no --shard",
            ),
            _ => Ok(()),
        }
    }

    /// Checks that the map and its drawing may be written; returns the path of the drawing.
    fn check_outputs(&self, inputs: &[(&str, &Path)]) -> Result<PathBuf> {
        let svg = self.out.with_extension("svg");
        check_apart(&[("--out", &self.out), ("the heat map", &svg)], inputs)?;
        let if_exists = IfExists::from_force(self.force);
        check_file(&self.out, if_exists, RobustnessMap::is_file)?;
        check_file(&svg, if_exists, is_drawing)?;
        Ok(svg)
    }

    /// Draws a map that was saved, and prints it.
    fn show(&self, common: &Common, map: &RobustnessMap, svg: &Path) -> Result<()> {
        let (score, mods) = (map.score(self.options.score), ModuleSet::default());
        let heatmap = robustness_map(map, score, &mods);
        write_atomic(svg, heatmap.svg().as_bytes())?;
        if common.json {
            return print_json(map);
        }
        print_line(&robustness_table(map, score, &mods).text())?;
        print_line(&format!("{}; saved as {}", perturbation(map), self.out.display()))
    }
}

/// A map, or a part of one, that is computed.
struct MapJob {
    inputs: MapFiles,
    command: RobustnessCommand,
}

impl MapJob {
    /// Has the map computed by processes, a shard each, and puts it together. Its parts, from which the same command
    /// continues after an interruption, are removed.
    fn divide(mut self, size: usize, common: &Common) -> Result<()> {
        refuse_pipes(&self.files())?;
        self.command.check_by()?;
        if self.command.options.by == By::Conflict {
            let found = format!("{size} processes for a conflict map, which one makes from gradients alone");
            return Err(Error::input("--gpus", found, "no --gpus"));
        }
        // So that what is named is fetched, and refused, once.
        self.resolve(&mut Names::new(common))?;
        let svg = self.command.check_outputs(&self.files())?;
        start_processes(size, Together::Apart, common)?;
        let shards = (0..size).map(|index| Shard::new(index, size).map(|shard| part_path(&self.command.out, shard)));
        let parts: Vec<PathBuf> = shards.collect::<Result<_>>()?;
        let map = RobustnessMap::merge(&parts)?;
        map.save(&self.command.out)?;
        parts.iter().try_for_each(|part| remove(part))?;
        self.command.show(common, &map, &svg)
    }

    /// Every file and directory that is read, with its option.
    fn files(&self) -> Vec<(&str, &Path)> {
        let mut files = self.inputs.model.inputs();
        files.extend([("--probe", self.inputs.probe.as_path()), ("--security", &self.inputs.security)]);
        files.extend(self.command.data.iter().map(|path| ("--data", path.as_path())));
        if let Noise::Update(tuned) = &self.command.scorer.kind {
            files.push(("--kind update", tuned));
        }
        files
    }
}

impl OnDevice for MapJob {
    fn model(&self) -> Option<PathBuf> {
        Some(self.inputs.model.model.clone())
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        self.inputs.model.resolve(names)?;
        names.data(&mut self.command.data)?;
        names.file("--security", &mut self.inputs.security)
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        let Self { inputs, command } = &self;
        command.check_by()?;
        if let (Noise::Update(_), Some(_)) = (&command.scorer.kind, &inputs.model.adapter) {
            let expected = "--model with the adapter merged (swat tune --adapter DIR --steps 0), or another --kind";
            return Err(Error::input("--kind", "update:DIR beside --adapter", expected));
        }
        let (shard, files) = (command.shard()?, self.files());
        let part = shard.map(|shard| (shard, part_path(&command.out, shard)));
        let svg = match &part {
            None => command.check_outputs(&files)?,
            Some((_, path)) => {
                check_apart(&[("--out", path)], &files)?;
                // Whether it is of this run is known only when the model is.
                check_file(path, IfExists::Replace, RobustnessMap::is_part)?;
                PathBuf::new()
            }
        };
        let mut rows = RowReader::new(&command.rows);
        let prompts = SecurityPrompt::read(&inputs.security, common.seed, &mut rows)?;
        let probe = Probe::load(&inputs.probe)?;
        let (text, _) = inputs.model.open_dated(probe.metadata.date)?;
        probe.check_model(&text.files.config, text.files.hash()?)?;
        command.options.check(&text.files.config.cells())?;
        check_security(&text, &prompts)?;
        let step = StepOptions { seed: common.seed, ..command.step.clone() };
        let examples = step_examples(&text, &command.data, &step, &mut rows, &backend)?;
        common.end_reading(&rows)?;
        let mut model = text.load(backend)?;
        model.decoder.merge_lora()?;
        let options = ScorerOptions { seed: common.seed, ..command.scorer.clone() };
        let absolute = |path: &PathBuf| std::path::absolute(path).map_err(Error::io(path, FileOp::Resolve));
        let made_from = MapInputs {
            model: absolute(&inputs.model.model)?,
            adapter: inputs.model.adapter.as_ref().map(absolute).transpose()?,
            probe: absolute(&inputs.probe)?,
            security: absolute(&inputs.security)?,
            rows: command.rows.clone(),
            data: command.data.iter().map(absolute).collect::<Result<_>>()?,
        };
        let mut bars = Bars::new(common);
        let mut scorer = match command.options.by {
            By::Noise => model.scorer(&probe, &prompts, options)?,
            By::Update => {
                let step = model.planned_step(examples, &step, &mut bars.observer())?;
                model.step_scorer(&probe, &prompts, options, step)?
            }
            By::Conflict => {
                let step = model.planned_step(examples, &step, &mut bars.observer())?;
                let (by, made_from) = ((options, &command.options), (&step, Some(made_from)));
                let map =
                    model.conflict_map((&probe, &prompts), by, made_from, Some(&command.out), &mut bars.observer());
                bars.finish();
                return command.show(common, &map?, &svg);
            }
        };
        scorer.made_from = Some(made_from);
        if let Some((shard, path)) = part {
            bars.finish();
            return map_part(command, common, &scorer, shard, &path);
        }
        let map = robustness(&scorer, &command.options, Some(&command.out), &mut bars.observer())?;
        bars.finish();
        command.show(common, &map, &svg)
    }
}

/// The examples of the planned step, none without data; checks that its gradients fit the memory.
pub(super) fn step_examples<B: Backend>(
    text: &ModelText,
    data: &[PathBuf],
    options: &StepOptions,
    rows: &mut RowReader,
    backend: &B,
) -> Result<Vec<Example>> {
    let mut examples = Vec::new();
    for path in data {
        examples.extend(text.examples(path, options.max_length.min(text.files.config.max_positions), rows)?.examples);
    }
    if !data.is_empty() {
        PlannedStep::check_memory(&text.files.config, options, backend)?;
    }
    Ok(examples)
}

/// The file of a shard of the map `out`: `map.shard-0-of-8.jsonl`.
fn part_path(out: &Path, shard: Shard) -> PathBuf {
    out.with_extension(format!("shard-{}-of-{}.jsonl", shard.index(), shard.count()))
}

fn map_part<B: Backend>(
    command: &RobustnessCommand,
    common: &Common,
    scorer: &PerturbationScorer<'_, B>,
    shard: Shard,
    path: &Path,
) -> Result<()> {
    let mut bars = Bars::new(common);
    let out = (path, IfExists::from_force(command.force));
    let cells = robustness_part(scorer, &command.options, shard, out, &mut bars.observer())?;
    bars.finish();
    if command.part.is_some() {
        return Ok(());
    }
    if common.json {
        return print_json(&json!({ "part": path, "shard": shard, "cells": cells }));
    }
    print_line(&format!("shard {shard}: {cells} cells, saved as {}", path.display()))
}
