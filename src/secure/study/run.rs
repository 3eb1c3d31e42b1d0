//! The stages of a study, in order.

mod evaluated;
mod mods;
mod tuned;

use super::RunConfig;
use super::check::{check_model, check_overlap};
use super::claims::claims;
use super::data::StudyData;
use super::folder::{claim_folder, clock, lock, lock_shared};
use super::lease::{Leases, Worker};
use super::outcome::{MapOutcome, Outcome, RunOutcome, SettingOutcome, SettingSummary};
use super::stage::Stages;
use super::verdict::Conclusion;
use crate::backend::{Backend, Element, Roofline};
use crate::data::RowReader;
use crate::error::{Error, Result};
use crate::io::check_not_in;
use crate::io::input::check_rereadable;
use crate::model::{Clock, ModelDir};
use crate::progress::Observer;
use crate::secure::eval::guard::LazyGuard;
use crate::secure::eval::judge::Judge;
use crate::secure::eval::refusal::RefusalList;
use crate::secure::loaded::LoadedModel;
use crate::secure::probe::Probe;
use crate::secure::probe::features::Snapshot;
use crate::secure::recipe::{Base, Mix, Recipe};
use crate::secure::robustness::By;
use crate::secure::robustness::sets::{cell_parameters, share};
use crate::secure::text::ModelText;
use crate::secure::tune::TuneJob;
use mods::Mods;
use serde_json::{Value, json};
use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Runs a study, without the stages that are cached.
///
/// # Errors
/// [`Error::InUse`] where another process runs the study; errors of its stages.
pub fn run<B: Backend>(
    config: &RunConfig,
    backend: &B,
    refusals: &RefusalList,
    observer: Observer<'_>,
) -> Result<Outcome> {
    let start = Instant::now();
    claim(config)?;
    let _lock = lock(&config.out)?;
    let study = Study::open(config, backend, refusals, None)?;
    let seconds = || start.elapsed().as_secs_f64();
    let in_use = || Error::InUse { path: config.out.clone() };
    study.outcome(&[], seconds, observer)?.ok_or_else(in_use)
}

/// Runs a study together with other processes, on one directory that all see: each takes the stages that no other has.
/// It ends when the whole study is done, or the `runs` of [`run_names`] if there are any, with `None`.
///
/// # Errors
/// [`Error::InUse`] where a process runs the study alone; [`Error::Input`] for an unknown run; errors of the stages that
/// this process takes.
pub fn work<B: Backend>(
    config: &RunConfig,
    (backend, refusals): (&B, &RefusalList),
    worker: Worker,
    runs: &[String],
    observer: Observer<'_>,
) -> Result<Option<Outcome>> {
    let start = Instant::now();
    let known = run_names(config);
    if let Some(unknown) = runs.iter().find(|run| !known.contains(run)) {
        return Err(Error::input("--job", format!("`{unknown}`"), format!("one of {}", known.join(", "))));
    }
    claim(config)?;
    let _lock = lock_shared(&config.out)?;
    let leases = Leases::new(worker);
    let pause = leases.pause();
    let study = Study::open(config, backend, refusals, Some(leases))?;
    loop {
        match study.outcome(runs, || start.elapsed().as_secs_f64(), observer) {
            // Of another worker; its result comes, or its lease runs out.
            Err(Error::InUse { .. }) => std::thread::sleep(pause),
            done => {
                // Each stage is finished: what is left is of a process that was killed after it had written its result.
                if matches!(done, Ok(Some(_))) {
                    study.stages.remove_leases();
                }
                return done;
            }
        }
    }
}

/// Names of the runs of a study, each a setting with a training seed, in their order.
pub fn run_names(config: &RunConfig) -> Vec<String> {
    let first = config.tune.recipe.shared.seed;
    let names = |spec: &Recipe| -> Vec<String> {
        seeds(config, spec).into_iter().map(|seed| spec.run_stem(seed, first)).collect()
    };
    config.settings.iter().flat_map(names).collect()
}

/// Training seeds of a setting; the original model has no randomness.
fn seeds(config: &RunConfig, spec: &Recipe) -> Vec<u64> {
    let first = config.tune.recipe.shared.seed;
    if spec.is_given() { vec![first] } else { spec.seeds(&config.training_seeds(), first) }
}

/// Creates and marks the study's directory.
fn claim(config: &RunConfig) -> Result<()> {
    check_not_in(&[("out", &config.out)], &[("model", &config.model)])?;
    claim_folder(&config.out, &[])
}

/// A setting with one training seed.
struct Run<'a> {
    spec: &'a Recipe,
    job: TuneJob,
    /// Name in progress reports.
    name: String,
    /// Name of its files.
    stem: String,
    /// Name of the files of its tuning run, which settings that differ in what follows share.
    tuned_stem: String,
}

struct Study<'a, B: Backend> {
    config: &'a RunConfig,
    backend: &'a B,
    refusals: &'a RefusalList,
    stages: Stages,
    clock: Clock,
    data: StudyData,
    rows: RefCell<RowReader>,
    model_hash: String,
    /// Rows of the tuning data with prompts of the evaluation.
    overlapping_rows: usize,
    /// Measured by the first run that trains.
    roofline: OnceCell<Option<Roofline>>,
    /// Of the original model, from the first run that is evaluated on.
    base: OnceCell<Snapshot>,
    judge: Option<Judge>,
    guard: LazyGuard<B>,
}

impl<'a, B: Backend> Study<'a, B> {
    /// Checks a study in its claimed directory.
    fn open(config: &'a RunConfig, backend: &'a B, refusals: &'a RefusalList, leases: Option<Leases>) -> Result<Self> {
        let mixed = [(Mix::Attack, "data.attack"), (Mix::Refusals, "data.refusals"), (Mix::Replay, "data.replay")];
        let mixed = mixed.map(|(what, key)| Some((key, config.data.mixed(what)?)));
        let train = config.data.train.iter().map(|path| ("data.train", path.as_path()));
        check_rereadable(&train.chain(mixed.into_iter().flatten()).collect::<Vec<_>>())?;
        let mut rows = RowReader::new(&config.data.row_options());
        let data = StudyData::read(config, &mut rows)?;
        let mut text = ModelText::open(&config.model, config.chat_template.as_deref())?;
        let clock = clock(&config.out, config.date)?;
        let date = text.set_clock(clock);
        check_model(config, &text, &data, &mut rows)?;
        let guard = LazyGuard::open(config.evaluate.guard.as_ref())?;
        let overlapping_rows = check_overlap(config, &data, &mut rows)?;
        let model_hash = text.files.hash()?.to_owned();
        let mut stages =
            Stages::new(&config.out.join("stages"), B::Float::NAME, date, &text.chat()?.template().sources());
        if let Some(leases) = leases {
            stages = stages.leased(leases);
        }
        Ok(Self {
            config,
            backend,
            refusals,
            stages,
            clock,
            data,
            rows: RefCell::new(rows),
            model_hash,
            overlapping_rows,
            roofline: OnceCell::new(),
            base: OnceCell::new(),
            judge: config.evaluate.judge.clone().map(Judge::new).transpose()?,
            guard,
        })
    }

    /// All stages; with `runs` those that they need, and no outcome. Where other processes work on some, the rest is done
    /// before [`Error::InUse`].
    fn outcome(&self, runs: &[String], seconds: impl Fn() -> f64, observer: Observer<'_>) -> Result<Option<Outcome>> {
        let config = self.config;
        let first = config.tune.recipe.shared.seed;
        let wanted = |spec: &Recipe| {
            runs.is_empty() || seeds(config, spec).into_iter().any(|seed| runs.contains(&spec.run_stem(seed, first)))
        };
        let mut busy = None;
        let probe = self.probe(observer)?;
        let by = |spec: &Recipe| spec.options.by.unwrap_or(config.robustness.by);
        let ways: BTreeSet<By> =
            config.settings.iter().filter(|spec| spec.needs_mods() && wanted(spec)).map(by).collect();
        let mut found: BTreeMap<By, Mods> = BTreeMap::new();
        for way in ways {
            let mods = self.unless_busy(self.mods(way, &probe, observer), &mut busy)?;
            found.extend(mods.map(|mods| (way, mods)));
        }
        let mut settings = Vec::new();
        let waits = |spec: &Recipe| spec.needs_mods() && !found.contains_key(&by(spec));
        for spec in config.settings.iter().filter(|spec| wanted(spec) && !waits(spec)) {
            let mods = found.get(&by(spec)).filter(|_| spec.needs_mods());
            settings.extend(self.setting(spec, &probe, mods, (runs, &mut busy), observer)?);
        }
        if let Some(path) = busy {
            return Err(Error::InUse { path });
        }
        if !runs.is_empty() {
            return Ok(None);
        }
        let screened = self.screened_files(observer)?;
        let first = found.remove(&config.robustness.by).or_else(|| found.pop_first().map(|(_, mods)| mods));
        let (map, search, mods) = match first {
            Some(Mods { map, search, set }) => (Some(map), search, Some(set)),
            None => (None, None, None),
        };
        let more_maps =
            found.into_values().map(|Mods { map, search, set: mods }| MapOutcome { map, search, mods }).collect();
        let title = match config.title.is_empty() {
            false => config.title.clone(),
            true => config.model.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        };
        let (probe, model_hash) = (probe.metadata, self.model_hash.clone());
        let (skipped_rows, seconds) = (self.rows.borrow().skipped().to_vec(), seconds());
        let Conclusion { recommended, reason, verdict } = Conclusion::new(&settings, &config.limits);
        Ok(Some(Outcome {
            title,
            model_hash,
            probe,
            map,
            search,
            mods,
            more_maps,
            recommended,
            reason,
            verdict,
            claims: claims(&settings),
            settings,
            skipped_rows,
            overlapping_rows: self.overlapping_rows,
            screened,
            seconds,
        }))
    }

    /// `None` where another worker has what was asked for, which `busy` then names.
    fn unless_busy<T>(&self, result: Result<T>, busy: &mut Option<PathBuf>) -> Result<Option<T>> {
        match result {
            Err(Error::InUse { path }) if self.stages.leases().is_some() => {
                busy.get_or_insert(path);
                Ok(None)
            }
            other => other.map(Some),
        }
    }

    fn model(&self, dir: &Path) -> Result<LoadedModel<B>> {
        self.text(dir)?.load(self.backend.clone())
    }

    fn text(&self, dir: &Path) -> Result<ModelText> {
        let mut text = ModelText::open(dir, self.config.chat_template.as_deref())?;
        text.set_clock(self.clock);
        Ok(text)
    }

    /// Adds how files are read to a stage's inputs, unless it is the default.
    fn add_row_options(&self, inputs: &mut Value) {
        let options = self.config.data.row_options();
        if !options.is_default() {
            inputs["rows"] = json!(options);
        }
    }

    /// A setting, or with `runs` those of its runs; `None` while other workers have some of it, which `busy` then names.
    fn setting(
        &self,
        spec: &Recipe,
        probe: &Probe,
        mods: Option<&Mods>,
        (only, busy): (&[String], &mut Option<PathBuf>),
        observer: Observer<'_>,
    ) -> Result<Option<SettingOutcome>> {
        let config = self.config;
        let model = ModelDir::open(&config.model)?;
        let recipe = &config.tune.recipe;
        let job = match (&spec.base, mods) {
            (Base::Rates(None), Some(mods)) => {
                let mut job =
                    Recipe { base: Base::PlainEqual, ..spec.clone() }.job(recipe, &model.config, None, None)?;
                job.recipe.set_rates(mods.map.rates(config.search.score)?, &spec.place())?;
                job
            }
            _ => spec.job(recipe, &model.config, mods.map(|mods| &mods.set), None)?,
        };
        let set = job.mods.clone();
        let parameters = cell_parameters(&model.config);
        let joint = set.as_ref().zip(mods).map(|(set, mods)| self.joint(set, probe, &mods.map, observer)).transpose();
        let joint = self.unless_busy(joint, busy)?;
        let (seeds, first) = (seeds(config, spec), config.tune.recipe.shared.seed);
        let mut runs = Vec::new();
        for seed in &seeds {
            let name = if seeds.len() > 1 { format!("{spec}, seed {seed}") } else { spec.to_string() };
            let (stem, tuned_stem) = (spec.run_stem(*seed, first), spec.tuned_stem(*seed, first));
            let mut run = Run { spec, job: job.clone(), name, stem, tuned_stem };
            run.job.recipe.shared.seed = *seed;
            if only.is_empty() || only.contains(&run.stem) {
                runs.extend(self.unless_busy(self.run(&run, probe, observer), busy)?);
            }
        }
        let (Some(joint), true) = (joint, runs.len() == seeds.len()) else { return Ok(None) };
        let mut runs = runs.into_iter();
        let first = runs.next().ok_or_else(|| Error::input("tune.seeds", "an empty list", "training seeds"))?;
        let more_seeds: Vec<RunOutcome> = runs.collect();
        Ok(Some(SettingOutcome {
            summary: SettingSummary::new(spec, std::iter::once(&first).chain(&more_seeds)),
            setting: spec.clone(),
            share: set.as_ref().map(|set| share(set, &parameters)),
            mods: set,
            joint,
            first,
            more_seeds,
        }))
    }

    fn run(&self, run: &Run<'_>, probe: &Probe, observer: Observer<'_>) -> Result<RunOutcome> {
        let (tuned, dir, inputs) = if run.spec.is_given() {
            (None, self.config.model.clone(), json!({ "model": self.model_hash }))
        } else {
            let (tuned, inputs) = self.tuned(run, probe, observer)?;
            let dir = tuned.dir.clone();
            (Some(tuned), dir, inputs)
        };
        let (evaluation, drift) = self.evaluation(run, &dir, &inputs, probe, observer)?;
        Ok(RunOutcome { tuned, evaluation, drift })
    }
}
