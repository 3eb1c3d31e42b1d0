//! Defences after tuning: a tuned model merged with the models that it comes from, tensor by tensor.
//!
//! One file per method holds its formula, its source and a test on an example computed by hand. Each value is computed
//! in f64 from tensors read as f32. In memory are one tensor of each model and, for the tests of SafeMERGE and SafeLoRA,
//! their intermediate results: never a whole model.

mod path;
mod projection;
mod resta;
mod safelora;
mod safemerge;
mod source;
mod walk;

use crate::error::{Error, Result};
use crate::io::{IfExists, OutputDir, check_apart, json};
use crate::model::StoredAs;
use crate::modules::{ModuleId, ParamId};
use crate::options::{from_zero, mib, require, share};
use crate::progress::{Observer, Progress};
use clap::{Args, ValueEnum};
use rayon::prelude::*;
use source::{Shared, Source};
use std::path::{Path, PathBuf};
use std::str::FromStr;
pub use walk::{PATH_POINTS, PathPoint, PathWalk};

/// Values computed per parallel task; sums are taken task by task, so that they do not depend on the threads.
const CHUNK: usize = 1 << 16;

/// A way to merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lower")]
pub enum MergeMethod {
    /// base + alpha (tuned - base)
    Path,
    /// Updates that are not aligned are mixed with those of a safe model
    SafeMerge,
    /// Updates that are not aligned are projected onto the alignment
    SafeLora,
    /// tuned + alpha (aligned - unaligned)
    Resta,
}

/// Options of a merge.
#[derive(Clone, Debug, PartialEq, Args)]
pub struct MergeOptions {
    /// Method (arXiv 2109.01903, 2503.17239, 2405.16833, 2402.11746)
    #[arg(long, value_enum)]
    pub by: MergeMethod,
    /// Weight: alpha of path (0 = base, 1 = tuned), lambda of safemerge (1 = tuned, 0 = safe), gamma of resta (from 0).
    /// auto: alpha of path is chosen by measures on --security
    #[arg(long, value_name = "X|auto", default_value = "0.5")]
    pub alpha: Alpha,
    /// Modules whose update has a smaller cosine with its projection onto the alignment are changed
    #[arg(long, value_parser = share::<f64>, default_value = "0.5")]
    pub tau: f64,
    /// Dtype of the saved weights: as-stored keeps those of --tuned
    #[arg(long, value_enum, default_value_t)]
    pub save_dtype: StoredAs,
    /// Largest safetensors shard, in MiB
    #[arg(long = "max-shard-mib", value_name = "MAX_SHARD_MIB", value_parser = mib, default_value = "4096")]
    pub max_shard_bytes: u64,
    /// Points of the path on which alpha was chosen, for the record.
    #[arg(skip)]
    pub points: Vec<PathPoint>,
}

/// The weight of a merge.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Alpha {
    /// A number from 0.
    At(f64),
    /// Chosen by measures of points on the path.
    Auto,
}

impl FromStr for Alpha {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.trim() {
            "auto" => Ok(Self::Auto),
            number => from_zero(number).map(Self::At).map_err(|e| format!("{e}, or auto")),
        }
    }
}

impl MergeOptions {
    /// Checks that the weight is a number in the method's range, and returns it.
    ///
    /// # Errors
    /// [`Error::Input`] names the option.
    pub fn weight(&self) -> Result<f64> {
        let bounded = matches!(self.by, MergeMethod::Path | MergeMethod::SafeMerge);
        match self.alpha {
            Alpha::At(alpha) => {
                require(!bounded || alpha <= 1.0, "--alpha", alpha, "0 to 1")?;
                Ok(alpha)
            }
            Alpha::Auto => Err(Error::input("--alpha", "auto", "--by path, whose points are measured, or a number")),
        }
    }
}

/// The models of a merge, as model directories or LoRA adapters on `base`.
#[derive(Clone, Debug, Default, Args)]
pub struct MergeModels {
    /// Model that was tuned: a directory, or a name on the hub, org/name or org/name@revision
    #[arg(long, value_name = "DIR_OR_NAME")]
    pub base: PathBuf,
    /// Tuned model: a directory, or a LoRA adapter on --base
    #[arg(long, value_name = "DIR_OR_NAME")]
    pub tuned: PathBuf,
    /// Aligned model; if not given, --base
    #[arg(long, value_name = "DIR_OR_NAME")]
    pub aligned: Option<PathBuf>,
    /// Model without alignment: the pretrained one (safemerge, safelora), or --aligned after its alignment was removed
    /// by tuning (resta)
    #[arg(long, value_name = "DIR_OR_NAME", required_if_eq_any = [("by", "safemerge"), ("by", "safelora"), ("by", "resta")])]
    pub unaligned: Option<PathBuf>,
    /// Model that was tuned from --base on refusals (safemerge); if not given, --base
    #[arg(long, value_name = "DIR_OR_NAME")]
    pub safe: Option<PathBuf>,
}

impl MergeModels {
    /// The paths that are given.
    pub fn paths(&mut self) -> impl Iterator<Item = &mut PathBuf> {
        let Self { base, tuned, aligned, unaligned, safe } = self;
        [base, tuned].into_iter().chain(aligned.iter_mut().chain(unaligned).chain(safe))
    }

    /// What is read, with its option.
    pub fn inputs(&self) -> Vec<(&'static str, &Path)> {
        let optional = [("--aligned", &self.aligned), ("--unaligned", &self.unaligned), ("--safe", &self.safe)];
        let given = optional.into_iter().filter_map(|(option, path)| Some((option, path.as_deref()?)));
        [("--base", self.base.as_path()), ("--tuned", self.tuned.as_path())].into_iter().chain(given).collect()
    }
}

/// The test of a module's update.
pub(super) struct Test {
    cosine: f64,
    changed: bool,
}

/// The test of a module.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct MergedModule {
    /// `layers.3.q_proj`
    pub module: String,
    /// Cosine of its update and the update's projection onto the alignment; none where either is zero.
    pub cosine: Option<f64>,
    /// Whether the merge changed it.
    pub changed: bool,
}

/// What a merge did, also saved as `merge.json` in the output.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct MergeSummary {
    /// `swat.merge/1`
    pub format: String,
    /// The method.
    pub by: MergeMethod,
    /// Its weight; none for SafeLoRA.
    pub alpha: Option<f64>,
    /// Its threshold; none where nothing is tested.
    pub tau: Option<f64>,
    /// Directories by option.
    pub models: serde_json::Map<String, serde_json::Value>,
    /// Tensors of the model.
    pub tensors: usize,
    /// Tensors that differ from the tuned model, before they are rounded to the saved dtype.
    pub changed: usize,
    /// Tensors that are not tested (norms, biases, embedding, head) and differ between base and tuned model: they stay
    /// tuned.
    pub left_tuned: usize,
    /// Tested projections.
    pub modules: Vec<MergedModule>,
    /// Points of the path on which alpha was chosen; none where it was given.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub points: Vec<PathPoint>,
}

/// Merges the models into `out`, a model directory with the config, tokenizer and chat template of the tuned one.
///
/// # Errors
/// [`Error::Input`] where an option is out of range, where models differ in configuration or shape, where a value is not
/// finite, or where output and inputs are not apart; [`Error::Memory`] where the disk has no room; [`Error::Exists`],
/// [`Error::InUse`]; [`Error::Io`].
pub fn merge(
    models: &MergeModels,
    options: &MergeOptions,
    out: &Path,
    if_exists: IfExists,
    observer: Observer<'_>,
) -> Result<MergeSummary> {
    let alpha = options.weight()?;
    check_apart(&[("--out", out)], &models.inputs())?;
    let opened = Opened::open(models, options.by)?;
    let output = OutputDir::create(out, if_exists)?;
    let planned_bytes = opened.tuned.files.stored_bytes(options.save_dtype)?;
    if let Ok(free_bytes) = fs4::available_space(output.dir())
        && free_bytes < planned_bytes
    {
        let what = format!("{}: the merged model on disk", out.display());
        let help = "free some disk space, or take another --out".into();
        return Err(Error::Memory { what, planned_bytes, free_bytes, help });
    }
    let summary = opened.write(models, (options, alpha), output.dir(), observer)?;
    output.commit()?;
    Ok(summary)
}

/// [`merge`] into a directory that exists, beside whatever else lies in it.
///
/// # Errors
/// As [`merge`].
pub(super) fn merge_into(
    models: &MergeModels,
    options: &MergeOptions,
    dir: &Path,
    observer: Observer<'_>,
) -> Result<MergeSummary> {
    Opened::open(models, options.by)?.write(models, (options, options.weight()?), dir, observer)
}

impl Opened {
    fn write(
        &self,
        models: &MergeModels,
        (options, alpha): (&MergeOptions, f64),
        dir: &Path,
        observer: Observer<'_>,
    ) -> Result<MergeSummary> {
        let tests = matches!(options.by, MergeMethod::SafeMerge | MergeMethod::SafeLora);
        let path =
            |(option, path): (&str, &Path)| (option.trim_start_matches('-').into(), path.display().to_string().into());
        let mut summary = MergeSummary {
            format: "swat.merge/1".into(),
            by: options.by,
            alpha: (options.by != MergeMethod::SafeLora).then_some(alpha),
            tau: tests.then_some(options.tau),
            models: models.inputs().into_iter().map(path).collect(),
            tensors: 0,
            changed: 0,
            left_tuned: 0,
            modules: Vec::new(),
            points: options.points.clone(),
        };
        let shapes = self.tuned.files.config.params();
        let mut tensor = |id: ParamId| {
            let shape = shapes.iter().find(|(other, _)| *other == id).map_or(&[][..], |(_, shape)| shape.as_slice());
            let values = self.merged(id, shape, (options, alpha), &mut summary)?;
            observer(Progress::new("tensors", summary.tensors, shapes.len()));
            Ok(values)
        };
        self.tuned.files.write_as(dir, options.save_dtype, &mut tensor, options.max_shard_bytes)?;
        if tests && summary.modules.iter().all(|module| module.cosine.is_none()) {
            let found = "no projection in which both the update and the alignment differ from zero";
            return Err(Error::input("--aligned, --unaligned, --tuned", found, "models with different weights"));
        }
        json::write(&dir.join("merge.json"), &summary)?;
        Ok(summary)
    }
}

/// The models of a merge, opened and checked against each other.
struct Opened {
    base: Source,
    tuned: Source,
    aligned: Option<Source>,
    unaligned: Option<Source>,
    safe: Option<Source>,
}

impl Opened {
    fn open(models: &MergeModels, by: MergeMethod) -> Result<Self> {
        if by != MergeMethod::Path && models.unaligned.is_none() {
            return Err(Error::input("--unaligned", "none", "the model without alignment"));
        }
        let base = Source { option: "--base", files: crate::model::ModelDir::open(&models.base)? };
        let tuned = Source::open("--tuned", &models.tuned, &models.base)?;
        let open = |option: &'static str, path: &Option<PathBuf>, shared: Shared| -> Result<Option<Source>> {
            let Some(path) = path else { return Ok(None) };
            let source = Source::open(option, path, &models.base)?;
            source.check_same_shape(&tuned, shared)?;
            Ok(Some(source))
        };
        base.check_same_shape(&tuned, Shared::All)?;
        let shared = if by == MergeMethod::Resta { Shared::All } else { Shared::Projections };
        let [aligned, unaligned, safe] = [
            open("--aligned", &models.aligned, shared)?,
            open("--unaligned", &models.unaligned, shared)?,
            open("--safe", &models.safe, Shared::Projections)?,
        ];
        Ok(Self { base, tuned, aligned, unaligned, safe })
    }

    /// W_aligned and W_unaligned.
    fn alignment(&self, id: ParamId, shape: &[usize]) -> Result<(Vec<f32>, Vec<f32>)> {
        let aligned = self.aligned.as_ref().unwrap_or(&self.base);
        let unaligned = self.unaligned.as_ref().unwrap_or(&self.base);
        Ok((aligned.tensor(id, shape)?, unaligned.tensor(id, shape)?))
    }

    /// The merged values of a tensor.
    fn merged(
        &self,
        id: ParamId,
        shape: &[usize],
        (options, alpha): (&MergeOptions, f64),
        summary: &mut MergeSummary,
    ) -> Result<Vec<f32>> {
        let mut values = self.tuned.tensor(id, shape)?;
        summary.tensors += 1;
        let changed = match (options.by, id) {
            (MergeMethod::Path, _) => {
                let base = self.base.tensor(id, shape)?;
                let differs = base != values;
                path::path(&base, &mut values, alpha);
                differs && alpha < 1.0
            }
            (MergeMethod::Resta, _) => {
                let (aligned, unaligned) = self.alignment(id, shape)?;
                resta::resta(&mut values, &aligned, &unaligned, alpha);
                alpha > 0.0 && aligned != unaligned
            }
            (MergeMethod::SafeMerge | MergeMethod::SafeLora, ParamId::Weight(module)) => {
                self.tested((module, shape), &mut values, (options, alpha), summary)?
            }
            (MergeMethod::SafeMerge | MergeMethod::SafeLora, _) => {
                summary.left_tuned += usize::from(self.base.tensor(id, shape)? != values);
                false
            }
        };
        summary.changed += usize::from(changed);
        Ok(values)
    }

    /// Changes a projection if its update is not aligned; returns whether it did.
    fn tested(
        &self,
        (module, shape): (ModuleId, &[usize]),
        values: &mut [f32],
        (options, alpha): (&MergeOptions, f64),
        summary: &mut MergeSummary,
    ) -> Result<bool> {
        let id = ParamId::Weight(module);
        let base = self.base.tensor(id, shape)?;
        let (mut v, unaligned) = self.alignment(id, shape)?;
        each(&mut v, [&unaligned], |aligned, [unaligned]| aligned - unaligned);
        drop(unaligned);
        let size = self.tuned.files.config.module_shape(module.kind);
        let test = if options.by == MergeMethod::SafeLora {
            safelora::safelora(&base, values, v, size, options.tau)?
        } else {
            let weights = safemerge::Weights { tau: options.tau, lambda: alpha };
            let safe = || self.safe.as_ref().unwrap_or(&self.base).tensor(id, shape);
            safemerge::safemerge(&base, values, v, size, weights, safe)?
        };
        let changed = test.as_ref().is_some_and(|test| test.changed);
        summary.modules.push(MergedModule {
            module: module.to_string(),
            cosine: test.map(|test| test.cosine),
            changed,
        });
        Ok(changed)
    }
}

/// Replaces each value by a function of it and of the values at its place in `others`, computed in f64.
fn each<const N: usize>(values: &mut [f32], others: [&[f32]; N], new: impl Fn(f64, [f64; N]) -> f64 + Sync) {
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        let others = others.map(|other| &other[chunk * CHUNK..][..values.len()]);
        for (i, value) in values.iter_mut().enumerate() {
            *value = new(f64::from(*value), others.map(|other| f64::from(other[i]))) as f32;
        }
    });
}

/// Σ a·b, in f64.
fn sum_of_products(a: &[f32], b: &[f32]) -> f64 {
    let product = |(a, b): (&f32, &f32)| f64::from(*a) * f64::from(*b);
    let part = |(a, b): (&[f32], &[f32])| a.iter().zip(b).map(product).sum();
    let parts: Vec<f64> = a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)).map(part).collect();
    parts.iter().sum()
}

/// The Frobenius norm.
fn norm(values: &[f32]) -> f64 {
    sum_of_products(values, values).sqrt()
}
