//! Two-phase tuning, its ablations, and the model directory that comes out.

use crate::backend::{Backend, Roofline};
use crate::data::{Example, Loader};
use crate::engine::{Decoder, Lora};
use crate::error::{Error, Result};
use crate::io::{OutputDir, json};
use crate::model::ModelDir;
use crate::modules::{Cell, LearningRates, ModuleId, ModuleSet};
use crate::train::{Callbacks, Phase, PhaseOptions, RunDir, TuneOptions, TuneSummary, Tuner};
use std::path::PathBuf;

/// Name of the phase on Mods_Rob in metrics and updates.
pub const MODS_PHASE: &str = "mods";
/// Name of the phase on everything.
pub const ALL_PHASE: &str = "all";

/// What is trained.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Every tensor.
    #[default]
    Full,
    /// Adapters beside the projections of a set; merged into the weights at the end.
    Lora {
        /// Shape of the adapters.
        #[serde(flatten)]
        lora: Lora,
        /// Which projections have one.
        modules: ModuleSet,
    },
}

/// A two-phase run, or any of its ablations.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TuneJob {
    /// Mods_Rob: what phase 1 trains; `None` = plain tuning.
    pub mods: Option<ModuleSet>,
    /// Factor on the learning rate of all other cells in phase 1; 0 = frozen.
    pub rest_lr_factor: f32,
    /// Everything first, Mods_Rob second.
    pub reversed: bool,
    /// Training seeds of a study, which makes a run with each in the run_dir of `shared.seed`; none = that one. A single run
    /// has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seeds: Option<Vec<u64>>,
    /// What is trained.
    pub method: Method,
    /// Options of both phases.
    pub shared: TuneOptions,
    /// Phase 1.
    pub mods_phase: PhaseOptions,
    /// Phase 2.
    pub all_phase: PhaseOptions,
}

impl TuneJob {
    /// The phases over a model that has `cells`.
    ///
    /// # Errors
    /// [`Error::Input`] where nothing of the set trains.
    pub fn phases(&self, cells: &ModuleSet) -> Result<Vec<Phase>> {
        let trainable = match &self.method {
            Method::Full => cells.clone(),
            Method::Lora { modules, .. } => modules.clone(),
        };
        let everything = LearningRates::masked(&trainable, &trainable, 0.0);
        let all = Phase { name: ALL_PHASE.into(), rates: everything, options: self.all_phase.clone() };
        let Some(mods) = &self.mods else { return Ok(vec![all]) };
        let rates = LearningRates::masked(mods, &trainable, self.rest_lr_factor);
        if rates.iter().next().is_none() {
            return Err(Error::input(
                "mods",
                format!("{mods}, of which nothing trains"),
                "a set that shares modules with what the method trains",
            ));
        }
        let mods = Phase { name: MODS_PHASE.into(), rates, options: self.mods_phase.clone() };
        Ok(if self.reversed { vec![all, mods] } else { vec![mods, all] })
    }
}

/// Where a tuned model goes.
#[derive(Clone, Debug)]
pub struct TuneOutput {
    /// The model directory; appears when everything is done.
    pub path: PathBuf,
    /// Replace what is there, and forget an unfinished run.
    pub force: bool,
    /// Continue an unfinished run.
    pub resume: bool,
    /// Largest shard, in bytes.
    pub max_shard_bytes: u64,
    /// What steps are measured against ([`crate::train::StepMetrics::speed_of_light`]); none = not at all.
    pub roofline: Option<Roofline>,
    /// The resolved configuration, written beside the weights.
    pub config: serde_json::Value,
}

impl TuneOutput {
    /// Metrics and checkpoints of a run until it is finished.
    pub fn unfinished(&self) -> PathBuf {
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(".unfinished");
        self.path.with_file_name(name)
    }
}

/// Tunes a decoder in memory. Where it holds the weights of `files`, updates are measured against those, and no copy of
/// what trains is kept.
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
    if let Method::Lora { lora, modules } = &job.method {
        decoder.add_lora(modules, *lora, job.shared.seed)?;
    }
    let mut loader = Loader::new(examples, job.shared.loader())?;
    let mut tuner = Tuner::new(decoder, &mut loader, job.shared.clone(), phases)?.measure_updates();
    if let Some(files) = files {
        tuner = tuner.given(|id, shape| files.tensor(id, shape));
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

/// Tunes a model directory, whose weights `decoder` holds, into another one, with `metrics.jsonl`, `updates.json` and
/// `tune.json` beside the weights.
/// An interrupted run leaves `OUT.unfinished`, from which `resume` continues bit for bit.
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
    let out = OutputDir::create(&output.path, output.force)?;
    let unfinished = output.unfinished();
    if unfinished.exists() && !output.resume {
        if !output.force {
            return Err(Error::input(
                unfinished.display().to_string(),
                "an unfinished run",
                "--resume to continue it, or --force to start again",
            ));
        }
        std::fs::remove_dir_all(&unfinished).map_err(Error::io(&unfinished, "remove"))?;
    }
    std::fs::create_dir_all(&unfinished).map_err(Error::io(&unfinished, "create"))?;
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
    std::fs::copy(&metrics, &to).map_err(Error::io(&to, "write"))?;
    json::write(&out.dir().join("updates.json"), &summary.updates)?;
    let record = serde_json::json!({ "config": output.config, "job": job, "summary": {
        "phases": summary.phases, "resumed_from": summary.resumed_from, "peak_bytes": summary.peak_bytes,
        "planned_bytes": summary.planned_bytes } });
    json::write(&out.dir().join("tune.json"), &record)?;
    out.commit()?;
    std::fs::remove_dir_all(&unfinished).map_err(Error::io(&unfinished, "remove"))?;
    Ok(summary)
}

/// Ties a checkpoint to its examples.
pub fn examples_hash(examples: &[Example]) -> String {
    let mut hasher = blake3::Hasher::new();
    for example in examples {
        hasher.update(&(example.tokens.len() as u64).to_le_bytes());
        hasher.update(bytemuck::cast_slice(&example.tokens));
        let trained: Vec<u8> = example.trained.iter().map(|t| u8::from(*t)).collect();
        hasher.update(&trained);
    }
    hasher.finalize().to_hex().to_string()
}

/// The projections of attention, in every layer: what the group's LoRA frame adapts.
pub fn attention_projections(layers: usize) -> ModuleSet {
    let kinds = crate::modules::ModuleKind::ALL.into_iter().filter(|kind| kind.in_attention());
    kinds.flat_map(|kind| (0..layers).map(move |layer| Cell::Module(ModuleId { layer, kind }))).collect()
}
