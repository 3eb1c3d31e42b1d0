//! The stages of a study, in order.

use super::RunConfig;
use super::check::check_model;
use super::data::StudyData;
use super::folder::{claim_folder, clock, lock, lock_shared};
use super::lease::{Leases, Worker};
use super::outcome::{Outcome, RunOutcome, SettingOutcome, TunedOutcome};
use super::record::{DriftRecorder, losses};
use super::stage::{Stages, file_hash, hash};
use crate::backend::{Backend, Element, Roofline};
use crate::data::{Example, RowReader, SecurityPrompt, Split};
use crate::error::{Error, FileOp, Result};
use crate::io::check_not_in;
use crate::model::{ChatFiles, Clock, ModelDir, StoredAs};
use crate::modules::ModuleSet;
use crate::progress::{Observer, Progress};
use crate::secure::eval::Evaluation;
use crate::secure::eval::judge::Judge;
use crate::secure::eval::refusal::RefusalList;
use crate::secure::loaded::{EvaluationInput, LoadedModel, REFUSAL_TOKENS};
use crate::secure::output::TuneOutput;
use crate::secure::probe::Probe;
use crate::secure::probe::drift::Drift;
use crate::secure::recipe::{MixIn, Recipe, mixed};
use crate::secure::robustness::map::RobustnessMap;
use crate::secure::robustness::mods::ModsRob;
use crate::secure::robustness::robustness;
use crate::secure::robustness::search::search;
use crate::secure::robustness::sets::{cell_parameters, share};
use crate::secure::save::SaveAs;
use crate::secure::text::ModelText;
use crate::secure::tune::TuneJob;
use serde_json::{Value, json};
use std::cell::{OnceCell, RefCell};
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
            done => return done,
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

/// Robustness map, search and Mods_Rob.
struct Mods {
    map: RobustnessMap,
    /// None where the configuration names the set.
    search: Option<ModsRob>,
    set: ModuleSet,
}

/// A setting with one training seed.
struct Run<'a> {
    spec: &'a Recipe,
    job: TuneJob,
    /// Name in progress reports.
    name: String,
    /// Name of its files.
    stem: String,
}

struct Study<'a, B> {
    config: &'a RunConfig,
    backend: &'a B,
    refusals: &'a RefusalList,
    stages: Stages,
    clock: Clock,
    data: StudyData,
    rows: RefCell<RowReader>,
    model_hash: String,
    /// Measured by the first run that trains.
    roofline: OnceCell<Option<Roofline>>,
    judge: Option<Judge>,
}

impl<'a, B: Backend> Study<'a, B> {
    /// Checks a study in its claimed directory.
    fn open(config: &'a RunConfig, backend: &'a B, refusals: &'a RefusalList, leases: Option<Leases>) -> Result<Self> {
        let mut rows = RowReader::new(&config.data.row_options());
        let data = StudyData::read(config, &mut rows)?;
        let mut text = ModelText::open(&config.model, config.chat_template.as_deref())?;
        let clock = clock(&config.out, config.date)?;
        let date = text.set_clock(clock);
        check_model(config, &text, &data, &mut rows)?;
        let model_hash = text.files.hash()?.to_owned();
        let mut stages = Stages::new(&config.out.join("stages"), B::Float::NAME, date);
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
            roofline: OnceCell::new(),
            judge: config.evaluate.judge.clone().map(Judge::new).transpose()?,
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
        let mut found = None;
        if config.settings.iter().any(|spec| spec.needs_mods() && wanted(spec)) {
            found = self.unless_busy(self.mods(&probe, observer), &mut busy)?;
        }
        let mut settings = Vec::new();
        let waits = |spec: &Recipe| spec.needs_mods() && found.is_none();
        for spec in config.settings.iter().filter(|spec| wanted(spec) && !waits(spec)) {
            let setting = self.setting(spec, &probe, found.as_ref(), (runs, &mut busy), observer)?;
            settings.extend(setting);
        }
        if let Some(path) = busy {
            return Err(Error::InUse { path });
        }
        if !runs.is_empty() {
            return Ok(None);
        }
        let (map, search, mods) = match found {
            Some(Mods { map, search, set }) => (Some(map), search, Some(set)),
            None => (None, None, None),
        };
        let title = match config.title.is_empty() {
            false => config.title.clone(),
            true => config.model.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        };
        let (probe, model_hash) = (probe.metadata, self.model_hash.clone());
        let (skipped_rows, seconds) = (self.rows.borrow().skipped().to_vec(), seconds());
        Ok(Some(Outcome { title, model_hash, probe, map, search, mods, settings, skipped_rows, seconds }))
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

    fn probe(&self, observer: Observer<'_>) -> Result<Probe> {
        let config = self.config;
        let path = config.out.join("probe.safetensors");
        let mut inputs = json!({ "model": self.model_hash, "security": file_hash(&config.data.security)?,
            "seed": config.seed, "options": config.probe, "refusals": format!("{:?}", self.refusals) });
        self.add_row_options(&mut inputs);
        let train = || -> Result<String> {
            let model = self.model(&config.model)?;
            let probe =
                model.train_probe(&self.data.security, &config.probe, REFUSAL_TOKENS, self.refusals, observer)?;
            probe.save(&path)?;
            file_hash(&path)
        };
        let kept = self.stages.run("probe", &inputs, train)?;
        if file_hash(&path)? != kept {
            return Err(Error::input(
                path.display().to_string(),
                "a probe that is not the one this study trained",
                "remove stages/probe.json to train it again",
            ));
        }
        Probe::load(&path)
    }

    /// Map and search, or the set that the configuration names.
    fn mods(&self, probe: &Probe, observer: Observer<'_>) -> Result<Mods> {
        let config = self.config;
        let mut inputs = json!({ "probe": probe.hash()?, "perturb": config.perturb, "robustness": config.robustness });
        let path = config.out.join("map.json");
        let map: RobustnessMap = self.stages.run("robustness", &inputs, || {
            let model = self.model(&config.model)?;
            let scorer = model.scorer(probe, &self.data.security, config.perturb.clone())?;
            robustness(&scorer, &config.robustness, Some(&path), observer)
        })?;
        let model = ModelDir::open(&config.model)?;
        if let Some(named) = &config.mods {
            let set = named.resolve(&model.config, None, Some(&self.model_hash))?;
            return Ok(Mods { map, search: None, set });
        }
        inputs["search"] = json!(config.search);
        inputs["map"] = json!(map.hash()?);
        let found: ModsRob = self.stages.run("search", &inputs, || {
            let model = self.model(&config.model)?;
            let scorer = model.scorer(probe, &self.data.security, config.perturb.clone())?;
            let score = config.search.score;
            let mut joint = |set: &ModuleSet, seeds: &[u64]| scorer.joint(set, score, map.epsilon, seeds);
            let found = search(&map, &config.search, &mut joint, observer)?;
            found.save(&config.out.join("mods.json"))?;
            Ok(found)
        })?;
        let set = found.modules(&model.config.cells())?;
        Ok(Mods { map, search: Some(found), set })
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
        let job = spec.job(&config.tune.recipe, &model.config, mods.map(|mods| &mods.set), None)?;
        let set = job.mods.clone();
        let parameters = cell_parameters(&model.config);
        let joint = set.as_ref().zip(mods).map(|(set, mods)| self.joint(set, probe, &mods.map)).transpose();
        let joint = self.unless_busy(joint, busy)?;
        let (seeds, first) = (seeds(config, spec), config.tune.recipe.shared.seed);
        let mut runs = Vec::new();
        for seed in &seeds {
            let name = if seeds.len() > 1 { format!("{spec}, seed {seed}") } else { spec.to_string() };
            let mut run = Run { spec, job: job.clone(), name, stem: spec.run_stem(*seed, first) };
            run.job.recipe.shared.seed = *seed;
            if only.is_empty() || only.contains(&run.stem) {
                runs.extend(self.unless_busy(self.run(&run, probe, observer), busy)?);
            }
        }
        let (Some(joint), true) = (joint, runs.len() == seeds.len()) else { return Ok(None) };
        let mut runs = runs.into_iter();
        let first = runs.next().ok_or_else(|| Error::input("tune.seeds", "an empty list", "training seeds"))?;
        Ok(Some(SettingOutcome {
            setting: spec.clone(),
            share: set.as_ref().map(|set| share(set, &parameters)),
            mods: set,
            joint,
            first,
            more_seeds: runs.collect(),
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

    fn joint(&self, set: &ModuleSet, probe: &Probe, map: &RobustnessMap) -> Result<f64> {
        let config = self.config;
        let inputs = json!({ "map": map.hash()?, "set": set.to_string(), "score": config.search.score });
        self.stages.run(&format!("joint/{}", hash(&inputs)), &inputs, || {
            let model = self.model(&config.model)?;
            let scorer = model.scorer(probe, &self.data.security, config.perturb.clone())?;
            scorer.joint(set, config.search.score, map.epsilon, &map.seeds)
        })
    }

    /// Share and file of what a setting mixes in.
    fn mixes(&self, spec: &Recipe) -> Result<Vec<(f64, &Path)>> {
        let missing = |name: &str| Error::input(format!("data.{name}"), "nothing", format!("a file, for {spec}"));
        let file = |mix: &MixIn| {
            let path = self.config.data.mixed(mix.what).ok_or_else(|| missing(mix.what.name()))?;
            Ok((mix.share.unwrap_or(self.config.evaluate.mix_share), path))
        };
        spec.options.mixes.iter().map(file).collect()
    }

    fn tuned(&self, run: &Run<'_>, probe: &Probe, observer: Observer<'_>) -> Result<(TunedOutcome, Value)> {
        let (config, job, shared) = (self.config, &run.job, &run.job.recipe.shared);
        let train = config.data.train.iter().map(|p| file_hash(p)).collect::<Result<Vec<_>>>()?;
        let extra = self.mixes(run.spec)?;
        let hashes = extra.iter().map(|(_, path)| file_hash(path)).collect::<Result<Vec<_>>>()?;
        let share = extra.first().map_or(config.evaluate.mix_share, |(share, _)| *share);
        let mut inputs = json!({ "model": self.model_hash, "probe": probe.hash()?, "job": job, "train": train,
            "mix": hashes.first(), "mix_share": share });
        if extra.len() > 1 {
            inputs["more_mixes"] =
                extra.iter().zip(&hashes).skip(1).map(|((share, _), hash)| json!([hash, share])).collect();
        }
        self.add_row_options(&mut inputs);
        let folder = config.out.join("tuned");
        let file = format!("{}-{}", run.stem, &hash(&inputs)[..8]);
        let dir = folder.join(&file);
        let name = format!("tune/{}", run.stem);
        let tuned = self.stages.run(&name, &inputs, || {
            std::fs::create_dir_all(&folder).map_err(Error::io(&folder, FileOp::Create))?;
            let mut text = self.text(&config.model)?;
            let output = TuneOutput {
                path: dir.clone(),
                force: true,
                resume: true,
                max_shard_bytes: 4 << 30,
                save_dtype: StoredAs::AsStored,
                clock: text.set_clock(self.clock),
                save: SaveAs::Merged,
                base: None,
                roofline: None,
                chat: ChatFiles::default(),
                config: json!({ "study": config, "setting": run.spec }),
            };
            let mut inputs: Vec<(&str, &Path)> = vec![("model", &config.model)];
            inputs.extend(config.data.train.iter().map(|path| ("data.train", path.as_path())));
            let output = output.open(&inputs)?;
            let max_length = shared.max_length;
            let mut examples: Vec<Example> = Vec::new();
            let rows = &mut self.rows.borrow_mut();
            for path in &config.data.train {
                examples.extend(text.examples(path, max_length, rows)?.examples);
            }
            let mut more = Vec::new();
            for (share, path) in &extra {
                more.push((*share, text.examples(path, max_length, rows)?.examples));
            }
            examples = mixed(examples, &more, shared.seed)?;
            let step_examples = (shared.batch_size * shared.grad_accum) as u64;
            let steps_per_epoch = (examples.len() as u64).div_ceil(step_examples);
            let watched: Vec<&SecurityPrompt> = self.data.security.iter().filter(|p| p.split == Split::Test).collect();
            let mut callbacks = DriftRecorder {
                probe,
                tokens: text.render_prompts(watched.iter().map(|p| p.prompt.as_str()))?,
                harmful: watched.iter().map(|p| p.is_harmful()).collect(),
                points: Vec::new(),
                path: folder.join(format!("{file}.drift.json")),
                observer: &mut *observer,
                name: run.name.clone(),
            };
            let prepared = output.prepare(&text.files, examples, job.clone(), self.backend)?.chat(text.chat_files());
            // Before the model is loaded, so that its buffers do not raise the run's peak memory.
            let prepared = prepared.roofline(*self.roofline.get_or_init(|| Roofline::measure(self.backend).ok()));
            let mut model = text.load(self.backend.clone())?;
            callbacks.begin(&model.decoder)?;
            let summary = prepared.run(&model.text, &mut model.decoder, &mut callbacks)?;
            let losses = losses(&dir.join("metrics.jsonl"))?;
            Ok(TunedOutcome {
                dir: dir.clone(),
                seed: shared.seed,
                steps_per_epoch,
                phases: summary.phases,
                updates: summary.updates,
                points: callbacks.points,
                losses,
                peak_bytes: summary.peak_bytes,
            })
        })?;
        Ok((tuned, inputs))
    }

    fn evaluation(
        &self,
        run: &Run<'_>,
        dir: &Path,
        model_inputs: &Value,
        probe: &Probe,
        observer: Observer<'_>,
    ) -> Result<(Evaluation, Option<Drift>)> {
        let config = self.config;
        let asked: Vec<String> = [&config.data.task, &config.data.heldout, &config.data.strict]
            .into_iter()
            .flatten()
            .chain(&config.data.evaluation)
            .map(|p| file_hash(p))
            .collect::<Result<_>>()?;
        let mut inputs = json!({ "model": model_inputs, "probe": probe.hash()?, "options": config.evaluate,
            "asked": asked, "seed": config.seed, "refusals": format!("{:?}", self.refusals) });
        self.add_row_options(&mut inputs);
        self.stages.run(&format!("evaluate/{}", run.stem), &inputs, || {
            let model = self.model(dir)?;
            let heldout = match &config.data.heldout {
                Some(path) => {
                    let (max_length, rows) = (config.tune.recipe.shared.max_length, &mut self.rows.borrow_mut());
                    model.text.examples(path, max_length, rows)?.examples
                }
                None => Vec::new(),
            };
            let input = EvaluationInput {
                prompts: &self.data.evaluation,
                strict: self.data.strict.as_ref(),
                tasks: &self.data.tasks,
                heldout: &heldout,
                judge: self.judge.as_ref(),
                probe: None,
                first_tokens: probe.metadata.first_tokens.as_ref(),
            };
            let named = format!("evaluate {}", run.name);
            let mut report = |p: Progress<'_>| observer(Progress { task: &format!("{named}: {}", p.task), ..p });
            let evaluation = model.evaluate(&input, &config.evaluate, self.refusals, &mut report)?;
            if let Some(harm) = evaluation.harmfulness.filter(|harm| harm.scored == 0 && harm.failed > 0) {
                // Not to be cached: the same command asks again.
                let reason = evaluation.judge_failure.as_deref().unwrap_or_default();
                let what = format!("{}: none of {} answers has a score: {reason}", run.name, harm.failed);
                return Err(Error::failed(what, "check evaluate.judge, or leave it out"));
            }
            let drift = match run.spec.is_given() {
                true => None,
                false => {
                    let base = self.model(&config.model)?.snapshot(probe, &self.data.security, &mut report)?;
                    Some(model.drift(probe, &self.data.security, &base, &mut report)?)
                }
            };
            Ok((evaluation, drift))
        })
    }
}
