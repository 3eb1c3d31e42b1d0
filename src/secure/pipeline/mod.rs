//! Secure tuning from end to end: measured as given, tuned by a recipe that keeps refusals, chosen on one split, and held to
//! limits on another.
//!
//! Recipes are tried in order until one is within half of each limit on the selection split. Where none is within the
//! limits themselves, nor passes the gates by its interval, points of the path towards the original model are tried
//! ([`POINTS`]), from the recipe that exceeds the halves least, until one is within the limits. What is chosen
//! ([`crate::secure::choose`]) is written and measured on the verdict prompts. Stages are kept in a working folder: a run
//! that ends early is continued by the same command, to the same bytes.

mod advice;
mod card;
mod data;
mod estimate;
mod outcome;
mod run;
mod stages;

pub use card::license_of;
pub use data::PartSizes;
pub use estimate::{PlannedStage, SecurePlan, StageTime};
pub use outcome::{BaseModel, SecureMeasures, SecureOutcome, SecureSetting, Tried};
pub use run::{Report as SecureReport, Secured};

use self::data::SecureData;
use super::check::Limits;
use super::eval::EvaluateOptions;
use super::eval::guard::{GuardOptions, LazyGuard};
use super::eval::refusal::RefusalList;
use super::loaded::LoadedModel;
use super::recipe::{Base, MergeStep, Mix, Recipe};
use super::replay::ReplayOptions;
use super::text::ModelText;
use super::tune::{TuneJob, TuneRecipe};
use super::warmup::check_warmups;
use crate::backend::Backend;
use crate::data::{RowOptions, RowReader, SecurityPrompt, Split};
use crate::error::{Error, Result};
use crate::io::input::check_rereadable;
use crate::io::{check_apart, json};
use crate::model::{Clock, ModelDir, StoredAs};
use crate::secure::merge::MergeMethod;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Points of the path that are tried where no recipe passes the limits, until one is within them.
pub const POINTS: [f64; 4] = [0.9, 0.75, 0.5, 0.25];
/// The recipes that are tried if none is given.
pub const DEFAULT_RECIPES: [&str; 3] =
    ["plain+replay=.15,screen", "plain+replay=.15,distil=1,screen", "plain+replay=.3,distil=2,screen"];

/// What a secure tuning run is asked to do.
#[derive(Clone, Debug)]
pub struct SecureJob {
    /// Directory of the model.
    pub model: PathBuf,
    /// How it was named.
    pub model_name: String,
    /// LoRA adapter that is merged into the model before anything else.
    pub adapter: Option<PathBuf>,
    /// Chat template, for a model without its own.
    pub chat_template: Option<PathBuf>,
    /// Date for a chat template that writes it; that of the run's beginning if not given.
    pub date: Option<Clock>,
    /// Training conversations.
    pub data: Vec<PathBuf>,
    /// How files are read.
    pub rows: RowOptions,
    /// Labelled prompts.
    pub security: Vec<PathBuf>,
    /// Checkable tasks; without them the loss of conversations that are set aside is measured.
    pub task: Option<PathBuf>,
    /// Recipes, in the order in which they are tried.
    pub recipes: Vec<Recipe>,
    /// What the recipes leave open.
    pub tune: TuneRecipe,
    /// Lengths of answers.
    pub evaluate: EvaluateOptions,
    /// Limits of choice and verdict.
    pub limits: Limits,
    /// Guard model that judges the answers to harmful prompts, beside the refusal expressions.
    pub guard: Option<GuardOptions>,
    /// Seed of splits, order and training.
    pub seed: u64,
    /// Where the tuned model directory appears.
    pub out: PathBuf,
    /// Whether an earlier output is replaced.
    pub force: bool,
    /// Working folder.
    pub work: PathBuf,
    /// Dtype of the saved weights.
    pub save_dtype: StoredAs,
    /// Largest safetensors shard, in bytes.
    pub max_shard_bytes: u64,
    /// The command line, for the record.
    pub command: String,
}

impl SecureJob {
    /// What is read, with its option.
    pub fn inputs(&self) -> Vec<(&str, &Path)> {
        let mut inputs = vec![("--model", self.model.as_path())];
        inputs.extend(self.chat_template.iter().map(|path| ("--chat-template", path.as_path())));
        inputs.extend(self.adapter.iter().map(|path| ("--adapter", path.as_path())));
        inputs.extend(self.data.iter().map(|path| ("--data", path.as_path())));
        inputs.extend(self.security.iter().map(|path| ("--security", path.as_path())));
        inputs.extend(self.task.iter().map(|path| ("--task", path.as_path())));
        inputs.extend(self.guard.iter().map(|guard| ("--judge-model", guard.model.as_path())));
        inputs
    }
}

/// A recipe as it is run.
struct Tuning {
    /// Its text.
    name: String,
    /// Name of its files.
    stem: String,
    job: TuneJob,
    /// Share of replayed answers in the data.
    replay: Option<f64>,
    /// Point on the path that the recipe asks for.
    alpha: f64,
}

impl Tuning {
    fn mixed(&self) -> f64 {
        self.replay.unwrap_or_default()
    }
}

/// A secure tuning run whose inputs are read and checked, but no weights.
pub struct SecureRun<'a, B: Backend> {
    job: SecureJob,
    backend: B,
    refusals: &'a RefusalList,
    text: ModelText,
    clock: Clock,
    data: SecureData,
    tunings: Vec<Tuning>,
    guard: LazyGuard<B>,
    /// The original model, while stages ask it.
    given: RefCell<Option<Rc<LoadedModel<B>>>>,
}

impl<'a, B: Backend> SecureRun<'a, B> {
    /// Reads and checks everything but the weights; writes nothing.
    ///
    /// # Errors
    /// [`Error::Input`] names the option, or file and line.
    pub fn open(job: SecureJob, backend: B, refusals: &'a RefusalList, rows: &mut RowReader) -> Result<Self> {
        job.limits.check()?;
        job.evaluate.check()?;
        job.tune.shared.check()?;
        job.tune.all_phase.check()?;
        check_rereadable(&job.inputs())?;
        check_apart(&[("--out", &job.out), ("--work", &job.work)], &job.inputs())?;
        check_apart(&[("--work", &job.work)], &[("--out", &job.out)])?;
        check_apart(&[("--out", &job.out)], &[("--work", &job.work)])?;
        let files = match &job.adapter {
            None => ModelDir::open(&job.model)?,
            Some(adapter) => ModelDir::open_with_adapter(&job.model, adapter)?,
        };
        let mut text = ModelText::of(files, job.chat_template.as_deref())?;
        let clock = match (job.date, recorded(&job.work)?) {
            (Some(date), _) | (None, Some(date)) => date,
            (None, None) => Clock::now()?,
        };
        text.set_clock(clock);
        let data = SecureData::read(&job, &text, rows)?;
        let tunings = job.recipes.iter().map(|recipe| tuning(&job, recipe, &text)).collect::<Result<Vec<_>>>()?;
        for tuning in &tunings {
            // The answers are made by the model.
            let replay: Vec<_> = tuning.replay.iter().map(|share| (Mix::Replay, *share, None)).collect();
            check_warmups(&tuning.job, &data.train, &replay).map_err(|e| e.at(&format!("recipe `{}`", tuning.name)))?;
        }
        let replays = tunings.iter().any(|tuning| tuning.replay.is_some());
        let refusable = |prompt: &SecurityPrompt| prompt.split == Split::Train && prompt.is_harmful();
        if replays && !data.security.iter().any(refusable) {
            let found = "no harmful prompt in the train split, of which refusals are replayed";
            return Err(Error::input("--security", found, "prompts of all splits"));
        }
        let guard = LazyGuard::open(job.guard.as_ref())?;
        Ok(Self { job, backend, refusals, text, clock, data, tunings, guard, given: RefCell::default() })
    }

    fn replays(&self) -> bool {
        self.tunings.iter().any(|tuning| tuning.replay.is_some())
    }

    fn screens(&self) -> bool {
        self.tunings.iter().any(|tuning| tuning.job.recipe.screen)
    }

    fn replay_options(&self) -> ReplayOptions {
        ReplayOptions { seed: self.job.seed, cache_bytes: self.job.evaluate.cache_bytes, ..ReplayOptions::default() }
    }
}

/// The date of the run that a working folder holds.
fn recorded(work: &Path) -> Result<Option<Clock>> {
    let path = work.join("stages/date.json");
    if path.exists() { json::read(&path, 1 << 12, "the date of a run").map(Some) } else { Ok(None) }
}

/// Options of two phases that the command line has.
fn given_phases(tune: &TuneRecipe) -> Vec<&'static str> {
    let given = [("rest_lr_factor", tune.rest_lr_factor != 0.0), ("keep_optimizer", tune.shared.keep_optimizer)];
    given.into_iter().filter_map(|(key, given)| given.then_some(key)).collect()
}

/// The run of a recipe.
fn tuning(job: &SecureJob, recipe: &Recipe, text: &ModelText) -> Result<Tuning> {
    let wrong = |found: &str, expected: &str| Err(Error::input(recipe.place(), found, expected));
    if recipe.is_given() {
        return wrong("a model that is not tuned", "a recipe that trains; the original model is measured in any case");
    }
    if recipe.options.seeds.is_some() {
        return wrong("seeds", "one model is tuned, by --seed; `swat run` tunes with several");
    }
    if job.tune.reversed {
        return wrong("reversed phases", "a recipe without them; `swat tune --recipe reversed` has them");
    }
    if recipe.options.by.is_some() {
        return wrong("by, which `swat run` takes", "swat:mods=FILE, a file of `swat search` on such a map");
    }
    let replay = recipe.options.share_of(Mix::Replay);
    if recipe.options.mixes.iter().any(|mix| mix.what != Mix::Replay) {
        return wrong("refusals or attack", "replay=SHARE; `swat tune` and `swat run` mix in files");
    }
    let alpha = match recipe.options.merge {
        None => 1.0,
        Some(MergeStep { by: MergeMethod::Path, value, .. }) => value,
        Some(_) => return wrong("a merge that needs further models", "merge=path:ALPHA, or `swat merge` afterwards"),
    };
    let mut tune = job.tune.clone();
    tune.shared.seed = job.seed;
    // A phase on a set of modules is as long as the one on everything.
    tune.mods_phase = tune.all_phase.clone();
    let hash = match &recipe.base {
        Base::Warmup(set) => set.file().map(|_| text.files.hash()).transpose()?,
        Base::Rates(_) => Some(text.files.hash()?),
        _ => None,
    };
    let tuned = recipe.job(&tune, &text.files.config, None, hash)?;
    recipe.check_phases(&given_phases(&job.tune))?;
    // Sets that the method does not train, and lengths that contradict the warm-up, are told before anything is measured.
    let phases = tuned.phases(&text.files.config.cells())?;
    phases.iter().try_for_each(|phase| phase.options.check().map_err(|e| e.at(&recipe.place())))?;
    Ok(Tuning { name: recipe.text.clone(), stem: recipe.stem(), job: tuned, replay: replay.flatten(), alpha })
}
