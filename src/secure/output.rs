//! The output of a tuning run: locked before anything is read, held against disk and memory before weights are.

mod room;

use self::room::Room;
use super::save::SaveAs;
use super::screen::{RefusedExamples, SCREEN_START, SCREENED_FILE, ScreenCounts, Screening, write_screened};
use super::text::ModelText;
use super::tune::{Method, TuneJob, mixture_hash};
use super::watch::Watch;
use crate::backend::{Backend, Roofline};
use crate::data::{DataSize, Loader, Mixture};
use crate::engine::Decoder;
use crate::error::{Error, FileOp, Result};
use crate::group::{Alone, Group, Place};
use crate::io::file::begins_with;
use crate::io::{IfExists, OutputDir, check_apart, check_file, json, unfinished};
use crate::model::{ChatFiles, Clock, ModelDir, StoredAs};
use crate::modules::{Cell, LearningRates, ParamId};
use crate::options::mib;
use crate::train::{Callbacks, Length, Phase, Rounding, RunDir, TuneSummary, Tuner};
use clap::Args;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Output of a tuning run.
#[derive(Clone, Debug, Args)]
pub struct TuneOutput {
    /// Where the tuned model directory appears when it is complete
    #[arg(
        long = "out",
        value_name = "DIR",
        required = false,
        required_unless_present = "preview",
        default_value_if("preview", "true", "unused"),
        hide_default_value = true
    )]
    pub path: PathBuf,
    /// Replace --out, and discard an unfinished run. A directory that holds anything but what swat wrote is refused
    #[arg(long)]
    pub force: bool,
    /// Continue an unfinished run
    #[arg(long)]
    pub resume: bool,
    /// Largest safetensors shard, in MiB
    #[arg(long = "max-shard-mib", value_name = "MAX_SHARD_MIB", value_parser = mib, default_value = "4096")]
    pub max_shard_bytes: u64,
    /// Dtype of the saved weights: as-stored keeps those of --model, whose bf16 loses small updates
    #[arg(long, value_enum, default_value_t)]
    pub save_dtype: StoredAs,
    /// What a run with adapters saves
    #[arg(long, value_enum, default_value_t)]
    pub save: SaveAs,
    /// Name and revision of the model on the hub, for the adapter's file; none = the path of its directory.
    #[arg(skip)]
    pub base: Option<(String, Option<String>)>,
    /// Roofline of the speed of light ([`crate::train::StepMetrics::speed_of_light`]); none = not reported.
    #[arg(skip)]
    pub roofline: Option<Roofline>,
    /// Chat template and end of answers of the tuned model.
    #[arg(skip)]
    pub chat: ChatFiles,
    /// The resolved configuration, for `tune.json`.
    #[arg(skip)]
    pub config: serde_json::Value,
    /// The time at which the chat template is rendered, if it writes the date: part of the run.
    #[arg(skip)]
    pub clock: Option<Clock>,
}

/// What an unfinished run remembers beside its checkpoints, in `run.json`.
#[derive(Default, serde::Serialize, serde::Deserialize)]
struct RunRecord {
    #[serde(default)]
    date: Option<Clock>,
}

const RUN_RECORD: &str = "run.json";
/// What the name of a list of rows that are left out has behind that of the output.
const SCREENED_ENDING: &str = ".screened.jsonl";
/// What the original model refuses of the data, in an unfinished run.
const SCREENING: &str = "screening.json";
/// Largest such file, in bytes.
const MAX_SCREENING_BYTES: u64 = 1 << 30;

impl TuneOutput {
    /// Directory of metrics and checkpoints until the run is finished: `OUT.unfinished`, or `OUT/.swat.unfinished`
    /// where OUT is written in place ([`crate::io::is_in_place`]).
    pub fn unfinished(&self) -> PathBuf {
        unfinished::path(&self.path)
    }

    /// Where the rows of the data are listed that screening leaves out: `OUT.screened.jsonl`, as a directory that people share
    /// should hold the model alone; in the output where it is written in place.
    pub fn screened(&self) -> PathBuf {
        unfinished::beside(&self.path, SCREENED_ENDING).unwrap_or_else(|out| out.join(SCREENED_FILE))
    }

    /// Locks the output, and checks that it may be written: it is new, empty, or what swat wrote and may be replaced,
    /// it lies apart from all `inputs` (option and path), and an unfinished run is resumed or discarded.
    ///
    /// # Errors
    /// [`Error::Exists`], [`Error::InUse`]; [`Error::Input`] names what is in the way; [`Error::Io`].
    pub fn open(self, inputs: &[(&str, &Path)]) -> Result<OpenOutput> {
        self.open_as(inputs, None)
    }

    /// [`TuneOutput::open`] as one of several ranks, of which the first alone locks and writes the output.
    ///
    /// # Errors
    /// As [`TuneOutput::open`].
    pub fn open_as(self, inputs: &[(&str, &Path)], place: Option<&Place>) -> Result<OpenOutput> {
        let left = self.unfinished();
        check_apart(&[("--out", &self.path)], inputs)?;
        let (ranks, local_ranks) = place.map_or((1, 1), |place| (place.share.size, place.local_size));
        if place.is_some_and(|place| place.share.rank > 0) {
            // `left` is not looked at before rank 0 has created it: NFS would go on for a while to say that it is missing.
            return Ok(OpenOutput { options: self, dir: None, unfinished: left, ranks, local_ranks });
        }
        check_apart(&[("--out", &left)], inputs)?;
        let dir = OutputDir::create(&self.path, IfExists::from_force(self.force))?;
        if left.exists() && !self.resume {
            if !self.force {
                return Err(Error::input(
                    left.display().to_string(),
                    "an unfinished run",
                    "--resume to continue it, or --force to start again",
                ));
            }
            unfinished::check(&left)?;
        }
        Ok(OpenOutput { options: self, dir: Some(dir), unfinished: left, ranks, local_ranks })
    }
}

/// A locked output, whose temporary directory exists.
pub struct OpenOutput {
    /// The options that it was opened with.
    pub options: TuneOutput,
    /// None of a rank that writes nothing.
    dir: Option<OutputDir>,
    unfinished: PathBuf,
    ranks: usize,
    /// Ranks that share the memory of this machine.
    local_ranks: usize,
}

impl OpenOutput {
    /// The time at which the run that is resumed rendered its chat template.
    ///
    /// # Errors
    /// [`Error::Input`] for a damaged record.
    pub fn recorded_clock(&self) -> Result<Option<Clock>> {
        let path = self.unfinished.join(RUN_RECORD);
        if self.dir.is_none() || !self.options.resume || !path.exists() {
            return Ok(None);
        }
        let record: RunRecord = json::read(&path, 1 << 16, "the record of an unfinished run")?;
        Ok(record.date)
    }

    /// The screening of the run that is resumed, if it is of the same [`Screening::inputs`].
    pub fn kept_screening(&self, inputs: &str) -> Option<RefusedExamples> {
        let path = self.unfinished.join(SCREENING);
        let resumed = self.dir.is_some() && self.options.resume;
        // A damaged one is made again.
        let kept: Option<Screening> =
            resumed.then(|| json::read(&path, MAX_SCREENING_BYTES, "a screening").ok()).flatten();
        kept.filter(|kept| kept.inputs == inputs).map(|kept| kept.refused)
    }

    /// Checks that [`TuneOutput::screened`] may be written: it is none of `inputs` (option and path), and new, or a list that
    /// may be replaced.
    ///
    /// # Errors
    /// [`Error::Exists`]; [`Error::Input`] names what is in the way; [`Error::Io`].
    pub fn check_screened(&self, inputs: &[(&str, &Path)]) -> Result<()> {
        let options = &self.options;
        let Ok(path) = unfinished::beside(&options.path, SCREENED_ENDING) else { return Ok(()) };
        check_apart(&[("--screen", &path)], inputs)?;
        if self.dir.is_none() {
            return Ok(());
        }
        check_file(&path, IfExists::from_force(options.force || options.resume), |path| begins_with(path, SCREEN_START))
    }

    /// Checks a job on this model, whatever its examples, and returns its phases.
    ///
    /// # Errors
    /// [`Error::Input`] names the option.
    pub fn check(&self, files: &ModelDir, job: &TuneJob) -> Result<Vec<Phase>> {
        self.options.save.check(&job.recipe.method)?;
        let phases = job.phases(&files.config.cells())?;
        job.recipe.shared.check()?;
        job.recipe.shared.check_ranks(self.ranks)?;
        phases.iter().try_for_each(|phase| phase.options.check())?;
        let none = |phase: &Phase| matches!(phase.options.length(), Ok(Length::Steps(0) | Length::Epochs(0)));
        // No step merges an adapter, or saves it by itself.
        if phases.iter().all(none) && files.adapter().is_none() {
            return Err(Error::input(
                "--steps",
                "0 in every phase",
                "at least one step or epoch: nothing would be trained",
            ));
        }
        Ok(phases)
    }

    /// Checks a job on this model and these examples: options, phases, and that memory and disk have room for it. No
    /// weights are read. `watch` evaluates the run as it goes.
    ///
    /// # Errors
    /// [`Error::Input`] names the option; [`Error::Memory`] where memory or disk has no room.
    pub fn prepare<B: Backend>(
        self,
        files: &ModelDir,
        examples: impl Into<Mixture>,
        job: TuneJob,
        watch: Option<Watch>,
        backend: &B,
    ) -> Result<PreparedTune> {
        let (phases, mixture) = (self.check(files, &job)?, examples.into());
        let shared = &job.recipe.shared;
        shared.check_examples(mixture.examples())?;
        let (data, size) = (mixture_hash(&mixture), mixture.size());
        let loader = shared.load(mixture)?;
        let mut before = 0u64;
        for (i, phase) in phases.iter().enumerate() {
            let steps = phase.options.steps_of(&loader, shared)?;
            phase.options.check_warmup(steps)?;
            if i + 1 < phases.len() {
                before = steps.saturating_add(before);
            } else if let Some(watch) = &watch {
                watch.check(before, steps)?;
            }
        }
        let room = Room { output: &self, job: &job, phases: &phases, loader: &loader, watch: watch.as_ref() };
        room.check(files, backend)?;
        Ok(PreparedTune { output: self, job, phases, loader, data, size, watch, screening: None })
    }

    /// Checks that memory and disk have room for a job on examples of which some may still be left out: before the model is
    /// asked which.
    ///
    /// # Errors
    /// [`Error::Input`] names the option; [`Error::Memory`] where memory or disk has no room.
    pub fn check_room<B: Backend>(
        &self,
        files: &ModelDir,
        examples: impl Into<Mixture>,
        job: &TuneJob,
        watch: Option<&Watch>,
        backend: &B,
    ) -> Result<()> {
        let (phases, loader) = (self.check(files, job)?, job.recipe.shared.load(examples.into())?);
        Room { output: self, job, phases: &phases, loader: &loader, watch }.check(files, backend)
    }
}

/// A tuning run that is ready to begin.
#[must_use]
pub struct PreparedTune {
    output: OpenOutput,
    job: TuneJob,
    phases: Vec<Phase>,
    loader: Loader,
    /// Hash of the examples.
    data: String,
    watch: Option<Watch>,
    size: DataSize,
    screening: Option<(Screening, ScreenCounts)>,
}

impl PreparedTune {
    /// Writes these chat files into the tuned model.
    pub fn chat(mut self, chat: ChatFiles) -> Self {
        self.output.options.chat = chat;
        self
    }

    /// Keeps this screening of the examples beside the checkpoints, and the rows that it left out in the output.
    pub fn screening(mut self, screening: Option<(Screening, ScreenCounts)>) -> Self {
        self.screening = screening;
        self
    }

    /// Size of the training data.
    pub fn data(&self) -> DataSize {
        self.size
    }

    /// Reports [`crate::train::StepMetrics::speed_of_light`] against this roofline.
    pub fn roofline(mut self, roofline: Option<Roofline>) -> Self {
        self.output.options.roofline = roofline;
        self
    }

    /// Tunes the model directory of `text`, whose weights `decoder` holds, into the output, with `metrics.jsonl`,
    /// `updates.json` and `tune.json` beside the weights. An interrupted run leaves [`TuneOutput::unfinished`], from
    /// which `resume` continues bit for bit.
    ///
    /// # Errors
    /// As [`Tuner::run`]; [`Error::Io`] where the output cannot be written.
    pub fn run<B: Backend>(
        self,
        text: &ModelText,
        decoder: &mut Decoder<B>,
        callbacks: &mut dyn Callbacks<B>,
    ) -> Result<TuneSummary> {
        self.run_in(text, decoder, callbacks, &Alone)
    }

    /// [`PreparedTune::run`] as a rank of a group, of which rank 0 alone writes and evaluates. The other ranks may be done
    /// before the output is complete.
    ///
    /// # Errors
    /// As [`PreparedTune::run`]; [`Error::Failed`] names a rank that has ended.
    pub fn run_in<B: Backend>(
        self,
        text: &ModelText,
        decoder: &mut Decoder<B>,
        callbacks: &mut dyn Callbacks<B>,
        group: &dyn Group<B>,
    ) -> Result<TuneSummary> {
        let files = &text.files;
        let Self { output, job, phases, mut loader, data, size, watch, screening } = self;
        let OpenOutput { options, dir: out, unfinished: left, .. } = output;
        let run_dir = RunDir { dir: left.clone(), model: files.hash()?.to_owned(), data, resume: options.resume };
        let watch = match (watch, &out) {
            (Some(watch), Some(_)) => Some(watch.evaluator(decoder, text)?),
            (Some(watch), None) => Some(watch.without_evaluator()),
            (None, _) => None,
        };
        if let Method::Lora { lora, modules } = &job.recipe.method {
            decoder.add_lora(modules, *lora, job.recipe.shared.seed)?;
        }
        let rates: Vec<LearningRates> = phases.iter().map(|phase| phase.rates.clone()).collect();
        let mut tuner = Tuner::new(decoder, &mut loader, job.recipe.shared.clone(), phases)?
            .measure_updates()
            .initial_weights(|id, shape| files.tensor(id, shape))
            .at(run_dir)
            .group(group);
        if let Some(adapter) = files.adapter() {
            tuner = tuner.trains(|id| adapter.trains(id));
        }
        if let Some(roofline) = options.roofline {
            tuner = tuner.roofline(roofline);
        }
        if let Some((settings, evaluate)) = watch {
            tuner = tuner.watch(settings, evaluate);
        }
        // Before anything is removed or written, as a rank may have another run.
        tuner.agree()?;
        if out.is_some() {
            if !options.resume {
                unfinished::remove_run(&left)?;
            }
            std::fs::create_dir_all(&left).map_err(Error::io(&left, FileOp::Create))?;
            json::write(&left.join(RUN_RECORD), &RunRecord { date: options.clock })?;
            if let Some((screening, _)) = &screening {
                json::write(&left.join(SCREENING), screening)?;
            }
        }
        let mut summary = tuner.run(callbacks)?;
        let Some(out) = out else { return Ok(summary) };
        let path = std::path::absolute(files.dir()).map_err(Error::io(files.dir(), FileOp::Resolve))?;
        let path = path.display().to_string();
        let base = options.base.as_ref().map_or((path.as_str(), None), |(name, revision)| (name, revision.as_deref()));
        options.save.adapter(out.dir(), (files, &options.chat), decoder, &job.recipe.method, base)?;
        if options.save.merges() {
            decoder.merge_lora()?;
            let cells: BTreeSet<Cell> = rates.iter().flat_map(|rates| rates.iter().map(|(cell, _)| cell)).collect();
            let mut rounding = Rounding::default();
            let values = |id: ParamId| {
                let values = decoder.read(id)?;
                if cells.contains(&id.cell()) {
                    let shape = decoder.params().iter().find(|param| param.id == id).map(|param| param.shape.clone());
                    let before = files.tensor(id, &shape.unwrap_or_default())?;
                    rounding.count(&before, &values, files.dtype_of(id, options.save_dtype)?);
                }
                Ok(values)
            };
            files.write_as(out.dir(), options.save_dtype, values, options.max_shard_bytes)?;
            options.chat.write(files, out.dir())?;
            summary.rounding = Some(rounding);
        }
        let metrics = left.join("metrics.jsonl");
        let to = out.dir().join("metrics.jsonl");
        std::fs::copy(&metrics, &to).map_err(Error::io(&to, FileOp::Write))?;
        json::write(&out.dir().join("updates.json"), &summary.updates)?;
        let mut record = serde_json::json!({ "config": options.config, "job": job, "data": size, "summary": {
            "phases": summary.phases, "resumed_from": summary.resumed_from, "peak_bytes": summary.peak_bytes,
            "planned_bytes": summary.planned_bytes, "rounding": summary.rounding,
            "evaluations": summary.evaluations, "best_step": summary.best_step } });
        if let Some((Screening { lines, .. }, counts)) = &screening {
            record["screened"] = serde_json::json!(counts);
            let beside = unfinished::beside(&options.path, SCREENED_ENDING);
            write_screened(&beside.unwrap_or_else(|_| out.dir().join(SCREENED_FILE)), lines)?;
        }
        json::write(&out.dir().join("tune.json"), &record)?;
        out.commit()?;
        unfinished::remove_run(&left)?;
        Ok(summary)
    }
}
