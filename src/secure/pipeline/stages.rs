//! The stages of a secure tuning run: each is kept by the hash of its inputs.

use super::data::Asked;
use super::{SecureRun, Tuning};
use crate::backend::{Backend, Element};
use crate::data::{Example, RowReader};
use crate::error::{Error, FileOp, Result};
use crate::io::write_atomic;
use crate::model::ChatFiles;
use crate::progress::{Observer, Progress};
use crate::secure::eval::Evaluation;
use crate::secure::eval::guard::Moderated;
use crate::secure::eval::kept::KeptEvaluation;
use crate::secure::eval::refusal::FirstTokens;
use crate::secure::loaded::{EvaluationInput, LoadedModel};
use crate::secure::merge::{MergeModels, PathWalk};
use crate::secure::output::TuneOutput;
use crate::secure::recipe::{Mix, mixed};
use crate::secure::replay::ReplaySummary;
use crate::secure::save::SaveAs;
use crate::secure::screen::RefusedExamples;
use crate::secure::study::{Stages, file_hash, hash};
use crate::secure::text::ModelText;
use crate::secure::tune::examples_hash;
use crate::train::{Callbacks, RunPosition, StepMetrics};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// The replayed answers, in the working folder.
const REPLAY: &str = "replay.jsonl";

/// A model to be measured, and what its measures are kept by.
pub(super) struct Subject<'s> {
    /// Name of the stage: `choice/given`.
    pub(super) name: String,
    /// What makes the model.
    pub(super) model: Value,
    pub(super) asked: &'s Asked,
    pub(super) first_tokens: Option<&'s FirstTokens>,
}

/// Where the result of a stage is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// An earlier run.
    Kept,
    /// This one.
    Made,
}

/// A tuned model in the working folder.
pub(super) struct Tuned {
    pub(super) dir: PathBuf,
    /// What made it.
    pub(super) inputs: Value,
}

/// Hash of the replayed answers' file, and their counts.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub(super) struct Replayed {
    hash: String,
    pub(super) summary: ReplaySummary,
}

impl<B: Backend> SecureRun<'_, B> {
    pub(super) fn stages(&self) -> Stages {
        let template = self.text.chat().ok().map(|chat| chat.template());
        let date = template.filter(|template| template.uses_clock()).map(|_| self.clock);
        let source = template.map(|template| template.sources()).unwrap_or_default();
        Stages::new(&self.job.work.join("stages"), B::Float::NAME, date, &source)
    }

    /// Opens a model of the run, with its chat template at the time of the run.
    pub(super) fn text_of(&self, dir: &Path) -> Result<ModelText> {
        let mut text = ModelText::open(dir, self.job.chat_template.as_deref())?;
        text.set_clock(self.clock);
        Ok(text)
    }

    pub(super) fn load(&self, dir: &Path) -> Result<LoadedModel<B>> {
        self.text_of(dir)?.load(self.backend.clone())
    }

    /// The original model, read once for all stages that ask it before [`SecureRun::release`].
    pub(super) fn given(&self) -> Result<Rc<LoadedModel<B>>> {
        if let Some(given) = self.given.borrow().as_ref() {
            return Ok(Rc::clone(given));
        }
        let given = Rc::new(self.load(&self.job.model)?);
        self.given.replace(Some(Rc::clone(&given)));
        Ok(given)
    }

    /// Frees the memory of the original model.
    pub(super) fn release(&self) {
        self.given.take();
    }

    /// The measures of a subject, which `load` loads unless they are kept; and where they are from.
    pub(super) fn measure(
        &self,
        stages: &Stages,
        subject: &Subject<'_>,
        observer: Observer<'_>,
        load: impl FnOnce() -> Result<Rc<LoadedModel<B>>>,
    ) -> Result<(Evaluation, Origin)> {
        let Subject { name, model, asked, first_tokens } = subject;
        let options = &self.job.evaluate;
        let mut inputs = json!({ "model": model, "asked": asked.hash(), "answer_tokens": options.answer_tokens,
            "task_tokens": options.task_tokens, "refusals": format!("{:?}", self.refusals), "first_tokens": first_tokens });
        if let Some(hash) = &self.guard.hash {
            inputs["guard"] = hash.as_str().into();
        }
        let mut origin = Origin::Kept;
        let kept: KeptEvaluation = stages.run(&format!("measure/{name}"), &inputs, || {
            origin = Origin::Made;
            let input = EvaluationInput {
                prompts: &asked.prompts,
                tasks: &asked.tasks,
                heldout: &asked.heldout,
                first_tokens: *first_tokens,
                guard: self.guard.get(&self.backend)?,
                ..EvaluationInput::default()
            };
            let mut report = |p: Progress<'_>| observer(Progress { task: &format!("measure: {}", p.task), ..p });
            let found = load()?.evaluate(&input, options, self.refusals, &mut report)?;
            found.guard.as_ref().map_or(Ok(()), Moderated::require)?;
            Ok(found.into())
        })?;
        Ok((kept.into(), origin))
    }

    /// The model's own answers, in the working folder.
    pub(super) fn replayed(
        &self,
        stages: &Stages,
        model_hash: &str,
        observer: Observer<'_>,
    ) -> Result<(Replayed, Origin)> {
        let options = self.replay_options();
        let prompts = blake3::hash(json!(self.data.security).to_string().as_bytes()).to_hex()[..16].to_owned();
        let inputs = json!({ "model": model_hash, "prompts": prompts, "answer_tokens": options.answer_tokens,
            "per": options.per, "seed": options.seed, "refusals": format!("{:?}", self.refusals) });
        let path = self.job.work.join(REPLAY);
        let mut origin = Origin::Kept;
        let unchanged = |kept: &Replayed| file_hash(&path).is_ok_and(|hash| hash == kept.hash);
        let kept = stages.run_unless("replay", &inputs, unchanged, || {
            origin = Origin::Made;
            let (lines, summary) = self.given()?.replay(&self.data.security, &options, self.refusals, observer)?;
            write_atomic(&path, lines.as_bytes())?;
            Ok(Replayed { hash: file_hash(&path)?, summary })
        })?;
        Ok((kept, origin))
    }

    /// Which conversations of the data, those that are set aside among them, answer what the original model refuses.
    pub(super) fn refused(
        &self,
        stages: &Stages,
        model_hash: &str,
        observer: Observer<'_>,
    ) -> Result<(RefusedExamples, Origin)> {
        let asked: Vec<Example> = self.data.conversations().cloned().collect();
        let inputs = json!({ "model": model_hash, "data": examples_hash(&asked),
            "refusals": format!("{:?}", self.refusals) });
        let mut origin = Origin::Kept;
        let found = stages.run("screen", &inputs, || {
            origin = Origin::Made;
            self.given()?.refused_examples(&asked, self.refusals, observer)
        })?;
        Ok((found, origin))
    }

    /// The rows of the data that are left out.
    pub(super) fn screened_lines(&self, refused: &RefusedExamples) -> Result<String> {
        let (mut rows, max_length) = (RowReader::new(&self.job.rows), self.job.tune.shared.max_length);
        self.job.data.iter().map(|path| refused.lines(path, &self.text, max_length, &mut rows)).collect()
    }

    /// The model that a recipe makes.
    pub(super) fn tuned(
        &self,
        stages: &Stages,
        tuning: &Tuning,
        (model_hash, replayed, refused): (&str, Option<&Replayed>, Option<&RefusedExamples>),
        observer: Observer<'_>,
    ) -> Result<(Tuned, Origin)> {
        let train = examples_hash(&self.data.train);
        let replay = tuning.replay.zip(replayed).map(|(share, replayed)| json!([share, replayed.hash]));
        let mut inputs = json!({ "model": model_hash, "job": tuning.job, "train": train, "replay": replay,
            "save_dtype": self.job.save_dtype });
        let refused = refused.filter(|_| tuning.job.recipe.screen);
        if let Some(refused) = refused {
            inputs["screened"] = refused.hash().into();
        }
        let folder = self.job.work.join("tuned");
        let dir = folder.join(format!("{}-{}", tuning.stem, &hash(&inputs)[..8]));
        let mut origin = Origin::Kept;
        let there = |(): &()| dir.join("config.json").is_file();
        stages.run_unless(&format!("tune/{}", tuning.stem), &inputs, there, || {
            origin = Origin::Made;
            std::fs::create_dir_all(&folder).map_err(Error::io(&folder, FileOp::Create))?;
            let text = self.text_of(&self.job.model)?;
            let shared = &tuning.job.recipe.shared;
            let mut more = Vec::new();
            if let Some(share) = tuning.replay {
                let path = self.job.work.join(REPLAY);
                let mut answers = text.examples(&path, shared.max_length, &mut RowReader::default())?.examples;
                answers.iter_mut().for_each(|example| example.replayed = true);
                more.push((Mix::Replay, share, answers));
            }
            let examples = mixed(self.data.train.clone(), more, shared.seed, |own| match refused {
                None => Ok(own),
                Some(refused) => Ok(refused.leave_out(own)?.0),
            })?;
            let output = TuneOutput {
                path: dir.clone(),
                force: true,
                resume: true,
                max_shard_bytes: self.job.max_shard_bytes,
                save_dtype: self.job.save_dtype,
                save: SaveAs::Merged,
                base: None,
                roofline: None,
                chat: ChatFiles::default(),
                config: json!({ "recipe": tuning.name, "seed": self.job.seed, "swat": env!("CARGO_PKG_VERSION") }),
                clock: text.chat()?.template().uses_clock().then_some(self.clock),
            };
            let output = output.open(&[("--model", &self.job.model)])?;
            let prepared = output.prepare(&text.files, examples, tuning.job.clone(), None, &self.backend)?;
            let prepared = prepared.chat(text.chat_files());
            let mut model = text.load(self.backend.clone())?;
            prepared.run(&model.text, &mut model.decoder, &mut Steps(observer)).map(drop)
        })?;
        Ok((Tuned { dir, inputs }, origin))
    }

    /// A point between the original model and a tuned one.
    pub(super) fn point(&self, tuned: &Path, alpha: f64) -> Result<LoadedModel<B>> {
        if alpha >= 1.0 {
            return self.load(tuned);
        }
        let mut walk = PathWalk::open(&self.path(tuned), self.text_of(tuned)?, self.backend.clone())?;
        walk.at(alpha)?;
        Ok(walk.into_model())
    }

    pub(super) fn path(&self, tuned: &Path) -> MergeModels {
        MergeModels { base: self.job.model.clone(), tuned: tuned.to_owned(), ..MergeModels::default() }
    }
}

/// Reports the steps of a tuning run.
struct Steps<'a>(Observer<'a>);

impl<B: Backend> Callbacks<B> for Steps<'_> {
    fn step(&mut self, metrics: &StepMetrics, at: &RunPosition) -> Result<()> {
        let (done, total) = (at.phase_step as usize, at.phase_steps as usize);
        (self.0)(Progress { task: &format!("tuning {}", at.phase), done, total, loss: metrics.loss });
        Ok(())
    }
}
