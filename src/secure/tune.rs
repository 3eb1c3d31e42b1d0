//! Two-phase tuning and its ablations, from model directory to model directory.

use crate::backend::{Backend, Roofline};
use crate::data::{Example, Loader};
use crate::engine::{Decoder, Lora};
use crate::error::{Error, FileOp, Result};
use crate::io::{IfExists, OutputDir, json};
use crate::model::ModelDir;
use crate::modules::{Cell, LearningRates, ModuleId, ModuleKind, ModuleSet};
use crate::options::{default_from_args, mib};
use crate::train::{Callbacks, Phase, PhaseOptions, RunDir, TuneOptions, TuneSummary, Tuner};
use clap::Args;
use std::path::PathBuf;

/// Name of the phase on Mods_Rob, in metrics and updates.
pub const MODS_PHASE: &str = "mods";
/// Name of the phase on everything.
pub const ALL_PHASE: &str = "all";

/// Trained parameters.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// All parameters.
    #[default]
    Full,
    /// LoRA adapters, merged into the weights at the end.
    Lora {
        /// Rank and scale.
        #[serde(flatten)]
        lora: Lora,
        /// The projections that have adapters.
        modules: ModuleSet,
    },
}

impl Method {
    /// Default learning rate: 2e-5 for all parameters, 2e-4 for adapters.
    pub fn default_lr(&self) -> f64 {
        match self {
            Self::Full => PhaseOptions::default().lr,
            Self::Lora { .. } => 2e-4,
        }
    }
}

/// How a model is tuned in two phases, whatever Mods_Rob is.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, Args)]
#[serde(default, deny_unknown_fields)]
pub struct TuneRecipe {
    /// Factor on the learning rate of the modules outside of --mods in their phase; 0 = frozen, bit for bit
    #[arg(long, default_value_t = 0.0)]
    pub rest_lr_factor: f32,
    /// Reverse the phases: everything first, --mods second (an ablation)
    #[arg(long)]
    pub reversed: bool,
    /// Trained parameters.
    #[arg(skip)]
    pub method: Method,
    /// Options of both phases.
    #[command(flatten)]
    pub shared: TuneOptions,
    /// The phase on Mods_Rob.
    #[arg(skip)]
    pub mods_phase: PhaseOptions,
    /// The phase on everything.
    #[command(flatten)]
    pub all_phase: PhaseOptions,
}

default_from_args!(TuneRecipe);

/// A two-phase run, or any of its ablations.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct TuneJob {
    /// Mods_Rob, trained alone in a phase of its own; `None` = plain tuning.
    pub mods: Option<ModuleSet>,
    /// Everything else.
    #[serde(flatten)]
    pub recipe: TuneRecipe,
}

impl TuneJob {
    /// The phases on a model with these cells.
    ///
    /// # Errors
    /// [`Error::Input`] where the set and the trained parameters are disjoint, or adapters are to be on other cells than
    /// projections.
    pub fn phases(&self, cells: &ModuleSet) -> Result<Vec<Phase>> {
        let trainable = match &self.recipe.method {
            Method::Full => cells.clone(),
            Method::Lora { modules, .. } => projections(modules, cells)?,
        };
        let everything = LearningRates::masked(&trainable, &trainable, 0.0);
        let all = Phase { name: ALL_PHASE.into(), rates: everything, options: self.recipe.all_phase.clone() };
        let Some(mods) = &self.mods else { return Ok(vec![all]) };
        let rates = LearningRates::masked(mods, &trainable, self.recipe.rest_lr_factor);
        if rates.iter().next().is_none() {
            return Err(Error::input(
                "mods",
                format!("{mods}, none of which the method trains"),
                "a set that shares modules with those that the method trains",
            ));
        }
        let mods = Phase { name: MODS_PHASE.into(), rates, options: self.recipe.mods_phase.clone() };
        Ok(if self.recipe.reversed { vec![all, mods] } else { vec![mods, all] })
    }
}

/// The projections of a set that is to have adapters, in a model with the cells `all`. A whole layer, and the whole
/// model, stand for the projections in them; any other cell would be left as it is, and is refused.
fn projections(set: &ModuleSet, all: &ModuleSet) -> Result<ModuleSet> {
    let whole_layer = |layer| ModuleKind::ALL.into_iter().all(|kind| set.contains(Cell::module(layer, kind)));
    let whole = all.difference(set).is_empty();
    let (modules, others): (Vec<Cell>, Vec<Cell>) = set.iter().partition(|cell| matches!(cell, Cell::Module(_)));
    let others: ModuleSet = others
        .into_iter()
        .filter(|cell| !whole && !matches!(cell, Cell::Norms(layer) if whole_layer(*layer)))
        .collect();
    if others.is_empty() && !modules.is_empty() {
        return Ok(modules.into_iter().collect());
    }
    let found = if modules.is_empty() { set.to_string() } else { others.to_string() };
    let expected = "projections, such as layers.*.{q_proj,v_proj} or all-linear: embeddings, norms and the head have no \
                    adapters; --method full trains them";
    Err(Error::input("the modules of the adapters", found, expected))
}

/// Output of a tuning run.
#[derive(Clone, Debug, Args)]
pub struct TuneOutput {
    /// Where the tuned model directory appears when it is complete
    #[arg(long = "out", value_name = "DIR")]
    pub path: PathBuf,
    /// Replace --out, and discard an unfinished run
    #[arg(long)]
    pub force: bool,
    /// Continue an unfinished run
    #[arg(long)]
    pub resume: bool,
    /// Largest safetensors shard, in MiB
    #[arg(long = "max-shard-mib", value_name = "MAX_SHARD_MIB", value_parser = mib, default_value = "4096")]
    pub max_shard_bytes: u64,
    /// Roofline of the speed of light ([`crate::train::StepMetrics::speed_of_light`]); none = not reported.
    #[arg(skip)]
    pub roofline: Option<Roofline>,
    /// The resolved configuration, for `tune.json`.
    #[arg(skip)]
    pub config: serde_json::Value,
}

impl TuneOutput {
    /// Directory of metrics and checkpoints until the run is finished: `OUT.unfinished`.
    pub fn unfinished(&self) -> PathBuf {
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(".unfinished");
        self.path.with_file_name(name)
    }
}

/// Tunes a decoder in memory. Given the `files` whose weights it holds, updates are measured against those, without a
/// copy of the trained weights.
///
/// # Errors
/// As [`Tuner::run`].
pub fn tune<B: Backend>(
    decoder: &mut Decoder<B>,
    files: Option<&ModelDir>,
    examples: Vec<Example>,
    job: &TuneJob,
    run_dir: Option<RunDir>,
    roofline: Option<Roofline>,
    callbacks: &mut dyn Callbacks<B>,
) -> Result<TuneSummary> {
    let phases = job.phases(&decoder.config.cells())?;
    if let Method::Lora { lora, modules } = &job.recipe.method {
        decoder.add_lora(modules, *lora, job.recipe.shared.seed)?;
    }
    let mut loader = Loader::new(examples, job.recipe.shared.loader())?;
    let mut tuner = Tuner::new(decoder, &mut loader, job.recipe.shared.clone(), phases)?.measure_updates();
    if let Some(files) = files {
        tuner = tuner.initial_weights(|id, shape| files.tensor(id, shape));
    }
    if let Some(run_dir) = run_dir {
        tuner = tuner.at(run_dir);
    }
    if let Some(roofline) = roofline {
        tuner = tuner.roofline(roofline);
    }
    let summary = tuner.run(callbacks)?;
    decoder.merge_lora()?;
    Ok(summary)
}

/// Tunes the model directory `files`, whose weights `decoder` holds, into another one, with `metrics.jsonl`,
/// `updates.json` and `tune.json` beside the weights. An interrupted run leaves `OUT.unfinished`, from which `resume`
/// continues bit for bit.
///
/// # Errors
/// [`Error::Exists`], [`Error::InUse`]; [`Error::Input`] where an unfinished run is neither resumed nor replaced; as
/// [`tune`].
pub fn tune_directory<B: Backend>(
    files: &ModelDir,
    decoder: &mut Decoder<B>,
    examples: Vec<Example>,
    job: &TuneJob,
    output: &TuneOutput,
    callbacks: &mut dyn Callbacks<B>,
) -> Result<TuneSummary> {
    let out = OutputDir::create(&output.path, IfExists::from_force(output.force))?;
    let unfinished = output.unfinished();
    if unfinished.exists() && !output.resume {
        if !output.force {
            return Err(Error::input(
                unfinished.display().to_string(),
                "an unfinished run",
                "--resume to continue it, or --force to start again",
            ));
        }
        std::fs::remove_dir_all(&unfinished).map_err(Error::io(&unfinished, FileOp::Remove))?;
    }
    std::fs::create_dir_all(&unfinished).map_err(Error::io(&unfinished, FileOp::Create))?;
    let run_dir = RunDir {
        dir: unfinished.clone(),
        model: files.hash()?.to_owned(),
        data: examples_hash(&examples),
        resume: output.resume,
    };
    let summary = tune(decoder, Some(files), examples, job, Some(run_dir), output.roofline, callbacks)?;
    files.write(out.dir(), |id| decoder.read(id), output.max_shard_bytes)?;
    let metrics = unfinished.join("metrics.jsonl");
    let to = out.dir().join("metrics.jsonl");
    std::fs::copy(&metrics, &to).map_err(Error::io(&to, FileOp::Write))?;
    json::write(&out.dir().join("updates.json"), &summary.updates)?;
    let record = serde_json::json!({ "config": output.config, "job": job, "summary": {
        "phases": summary.phases, "resumed_from": summary.resumed_from, "peak_bytes": summary.peak_bytes,
        "planned_bytes": summary.planned_bytes } });
    json::write(&out.dir().join("tune.json"), &record)?;
    out.commit()?;
    std::fs::remove_dir_all(&unfinished).map_err(Error::io(&unfinished, FileOp::Remove))?;
    Ok(summary)
}

/// Hash of the examples, which ties a checkpoint to them.
fn examples_hash(examples: &[Example]) -> String {
    let mut hasher = blake3::Hasher::new();
    for example in examples {
        hasher.update(&(example.tokens.len() as u64).to_le_bytes());
        hasher.update(bytemuck::cast_slice(&example.tokens));
        let trained: Vec<u8> = example.trained.iter().map(|t| u8::from(*t)).collect();
        hasher.update(&trained);
    }
    hasher.finalize().to_hex().to_string()
}

/// The attention projections q, k, v, o of every layer: the default of LoRA.
pub fn attention_projections(layers: usize) -> ModuleSet {
    let kinds = ModuleKind::ALL.into_iter().filter(|kind| kind.in_attention());
    kinds.flat_map(|kind| (0..layers).map(move |layer| Cell::Module(ModuleId { layer, kind }))).collect()
}
