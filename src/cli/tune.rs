//! `swat tune`: two-phase tuning, or any of its ablations.

mod recipe;
mod screen;

use super::common::{Common, print_json, print_line, say};
use super::method::MethodArgs;
use super::names::Names;
use super::open::{ModelArgs, OnDevice, State};
use super::plan::plan_json;
use super::preview::{LEFT_OUT, preview};
use super::progress::StepBar;
use super::ranks::{Rank, RankArgs, Role, refuse_pipes, start_processes};
use crate::backend::{Backend, Roofline};
use crate::data::{Example, RowOptions, RowReader};
use crate::error::{Error, Result};
use crate::group::{Alone, Group, Together, from_first, over_hosts};
use crate::interrupt;
use crate::io::{check_not_in, lies_in};
use crate::options::{above_zero, epochs, share, whole};
use crate::report::EventFile;
use crate::report::format::{bytes, count, percent};
use crate::secure::{
    Base, Method, Mix, ModelText, Recipe, RefusalLanguage, Screening, SetSpec, TuneJob, TuneOutput, TuneRecipe,
    WatchOptions, mixed, recipe_help,
};
use crate::train::{Evaluation, PhaseOptions, Rounding, peak_bytes};
use clap::Args;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Fine-tunes a model: in two phases with --mods, first Mods_Rob alone, then everything; plainly without
#[derive(Args)]
#[command(after_help = "Examples:
  swat tune --model DIR --data train.jsonl --out tuned --epochs 3                        plain
  swat tune --model DIR --data train.jsonl --out tuned --mods mods.json --mods-epochs 4 --epochs 3
  swat tune --model DIR --data train.jsonl --out tuned --mods 'layers.8-15.{o_proj,v_proj}' --mods-steps 200 --steps 400
  swat tune --model DIR --data train.jsonl --out adapter --method lora --lora-modules all-linear --save adapter
  swat tune --model DIR --data train.jsonl --out tuned --epochs 3 --recipe plain+replay=.1,ema=.99 --replay replay.jsonl
  swat tune --model DIR --adapter adapter --data more.jsonl --out merged              trains that adapter further
  swat tune --model DIR --data train.jsonl --preview                    what would be trained, and nothing else
  swat tune ... --gpus 8                                                on all GPUs of this machine; more: docs/scale.md
  swat tune ... --resume                                                continues an interrupted run, bit for bit")]
pub(super) struct Tune {
    #[command(flatten)]
    model: ModelArgs,
    /// Training conversations: alpaca, sharegpt, messages, prompt-completion or question-answer rows of JSONL, JSON, CSV or
    /// Parquet files, see docs/data.md; a file, or a name on the hub: org/name[/config][:split]
    #[arg(long, value_name = "FILE_OR_NAME", required = true, num_args = 1..)]
    data: Vec<PathBuf>,
    #[command(flatten)]
    rows: RowOptions,
    /// Modules of the first phase: a file of `swat search`, or a set such as layers.8-15.{q_proj,v_proj}
    #[arg(long, value_name = "SET_OR_FILE")]
    mods: Option<SetSpec>,
    /// Epochs of the phase on --mods
    #[arg(long, conflicts_with = "mods_steps", value_parser = epochs)]
    mods_epochs: Option<u64>,
    /// Optimizer steps of the phase on --mods
    #[arg(long, value_parser = whole)]
    mods_steps: Option<u64>,
    /// Learning rate of the phase on --mods; --lr if not given
    #[arg(long, value_parser = above_zero::<f64>)]
    mods_lr: Option<f64>,
    #[command(flatten)]
    method: MethodArgs,
    /// Learning rate; 2e-5 for full, 2e-4 for lora if not given
    #[arg(long, value_parser = above_zero::<f64>)]
    lr: Option<f64>,
    #[command(flatten)]
    recipe: TuneRecipe,
    /// How to tune, as in the settings of `swat run`: plain+replay=.1,ema=.99; --help lists bases and keys
    #[arg(long = "recipe", id = "recipe", value_name = "RECIPE", long_help = recipe_help())]
    named: Option<Recipe>,
    /// For replay= in --recipe: the model's own answers, a file of `swat replay`
    #[arg(long, value_name = "FILE", requires = "recipe")]
    replay: Option<PathBuf>,
    /// For refusals= in --recipe: training conversations in which harmful requests are refused (refusal expressions are
    /// --refusal-expressions)
    #[arg(long, value_name = "FILE", requires = "recipe")]
    refusals: Option<PathBuf>,
    /// For attack= in --recipe: conversations in which harmful requests are answered
    #[arg(long, value_name = "FILE", requires = "recipe")]
    attack: Option<PathBuf>,
    /// For screening: languages of the built-in refusal expressions, such as en,de,fr, or all
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LANGUAGE", default_value = "en")]
    refusal_languages: Vec<RefusalLanguage>,
    /// For screening: refusal expressions, one per line, in place of the built-in ones
    #[arg(long, value_name = "FILE", conflicts_with = "refusal_languages")]
    refusal_expressions: Option<PathBuf>,
    /// Mix in examples of another training file, such as refusals; each epoch takes others of them
    #[arg(long, value_name = "FILE", requires = "mix_share", conflicts_with = "recipe")]
    mix: Option<PathBuf>,
    /// Share of the examples of an epoch that come from --mix
    #[arg(long, value_parser = share::<f64>, requires = "mix")]
    mix_share: Option<f64>,
    /// Show the text of the first example and which of it is trained, and how much of all examples, then exit
    #[arg(long)]
    preview: bool,
    #[command(flatten)]
    watch: WatchOptions,
    /// Write losses, learning rate, speed and evaluations as event files for TensorBoard
    #[arg(long, value_name = "DIR")]
    tensorboard: Option<PathBuf>,
    #[command(flatten)]
    output: TuneOutput,
    /// Precision of gradients and moments beside bf16 weights: f32 (12 bytes per trained parameter) or bf16 (6)
    #[arg(long, value_enum, default_value_t = State::F32)]
    state: State,
    #[command(flatten)]
    ranks: RankArgs,
    /// This process among those that train together.
    #[arg(skip)]
    rank: Option<Rank>,
}

impl OnDevice for Tune {
    fn model(&self) -> Option<PathBuf> {
        Some(self.model.model.clone())
    }

    fn state(&self) -> State {
        self.state
    }

    fn start(mut self, common: &Common) -> Result<()> {
        let role = if self.preview { Role::Alone } else { self.ranks.role()? };
        if !matches!(role, Role::Alone) {
            refuse_pipes(&self.inputs())?;
        }
        match role {
            Role::Launcher(size) => return start_processes(size, Together::Ranks, common),
            Role::Alone => self.resolve(&mut Names::new(common))?,
            Role::Rank(place) => {
                let rank = self.ranks.join(place, common)?;
                let hosts = rank.hosts.transport().clone();
                let result = self.start_as(rank, common);
                hosts.end(result.as_ref().err());
                return result;
            }
        }
        self.start_resolved(common)
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        self.model.resolve(names)?;
        names.data(&mut self.data)?;
        let Self { mix, replay, refusals, attack, watch, .. } = self;
        let (held_out, security) = (&mut watch.eval_data, &mut watch.eval_security);
        for (option, file) in [
            ("--mix", mix),
            ("--replay", replay),
            ("--refusals", refusals),
            ("--attack", attack),
            ("--eval-data", held_out),
            ("--eval-security", security),
        ] {
            names.file_if_any(option, file)?;
        }
        Ok(())
    }

    fn run<B: Backend>(mut self, common: &Common, backend: B) -> Result<()> {
        if self.preview {
            return preview(common, &self.model, &self.data, &self.rows, self.recipe.shared.max_length);
        }
        let rank = self.rank.take();
        let place = rank.as_ref().map(|rank| rank.place.clone());
        let first = place.as_ref().is_none_or(|place| place.share.rank == 0);
        let group: Box<dyn Group<B>> = match rank {
            Some(rank) => over_hosts(rank.hosts, &backend)?,
            None => Box::new(Alone),
        };
        // All that can be known is checked before the weights are read.
        self.recipe.shared.check()?;
        let mixes = self.mixes()?;
        let mut output = TuneOutput {
            config: json!({ "model": self.model.shown(), "data": self.data, "mix": self.mix, "mix_share": self.mix_share,
                "rows": self.rows, "seed": common.seed, "swat": env!("CARGO_PKG_VERSION") }),
            base: self.model.name.as_ref().map(|name| (name.repo().into(), name.given_revision().map(String::from))),
            ..self.output.clone()
        };
        if let Some(recipe) = &self.named {
            output.config["recipe"] = json!(recipe);
            let mixes = mixes.iter().map(|(what, share, path)| json!([what.name(), share, path]));
            output.config["mixes"] = mixes.collect();
        }
        interrupt::watch();
        let mut output = output.open_as(&self.inputs(), place.as_ref())?;
        let opened = first.then(|| self.model.open_dated(output.recorded_clock()?)).transpose()?;
        // All ranks render at the time of rank 0.
        let date = from_first(&*group, || Ok(opened.as_ref().and_then(|(_, date)| *date)))?;
        let (text, date) = opened.map_or_else(|| self.model.open_dated(date), Ok)?;
        output.options.clock = date;
        if let Some(date) = date {
            output.options.config["date"] = json!(date);
        }
        let job = self.job(common, &text)?;
        let mut rows = RowReader::new(&self.rows);
        let mut examples = Vec::new();
        for path in &self.data {
            examples.extend(self.read(common, &text, path, &mut rows)?);
        }
        let mut more = Vec::new();
        let mix = self.mix.as_deref().zip(self.mix_share).map(|(path, share)| (Mix::Replay, share, path));
        for (what, share, path) in mixes.into_iter().chain(mix) {
            let mut examples = self.read(common, &text, path, &mut rows)?;
            examples.iter_mut().for_each(|example| example.replayed = what == Mix::Replay);
            more.push((what, share, examples));
        }
        let watch = self.watch.read(&text, self.recipe.shared.max_length, common.seed, &mut rows)?;
        common.end_reading(&rows)?;
        output.options.config["skipped_rows"] = json!(rows.skipped());
        let mut callbacks = StepBar::new(common);
        if let Some(dir) = self.tensorboard.as_ref().filter(|_| first) {
            let resumed = self.output.resume;
            check_not_in(&[("--tensorboard", dir)], &self.inputs())?;
            if dir.exists() && !dir.is_dir() {
                let found = format!("{}, which is no directory", dir.display());
                return Err(Error::input("--tensorboard", found, "a directory, to which event files are added"));
            }
            for taken in [&self.output.path, &self.output.unfinished()] {
                if lies_in(dir, taken)? {
                    let found = format!("{}, in the output of the run", dir.display());
                    return Err(Error::input("--tensorboard", found, "a directory beside --out"));
                }
            }
            callbacks.events = Some(if resumed { EventFile::resume(dir)? } else { EventFile::create(dir)? });
        }
        let screening = match job.recipe.screen {
            false => None,
            true => {
                let (run, data) = ((&output, &job, watch.as_ref()), (examples.as_slice(), more.as_slice()));
                Some(self.screening((common, &text, date), run, data, (&*group, &backend))?)
            }
        };
        let mut screened = None;
        let mixture = mixed(examples, more, common.seed, |own| match &screening {
            None => Ok(own),
            Some(Screening { refused, .. }) => {
                let (kept, counts) = refused.leave_out(own)?;
                screened = Some(counts);
                Ok(kept)
            }
        })?;
        let trained_rows = watch.as_ref().map_or(0, |watch| watch.trained_rows(mixture.examples()));
        if trained_rows > 0 && first && !common.quiet {
            say(&format!(
                "note: {trained_rows} examples of --eval-data are trained on as well: their loss says how well they are \
                 learned, not how the model does on other text\n"
            ));
        }
        let prepared = output.prepare(&text.files, mixture, job, watch, &backend)?.chat(text.chat_files());
        let prepared = prepared.screening(screening.zip(screened));
        let data = prepared.data();
        // Before the model is loaded, so that its buffers do not raise the run's peak memory.
        let prepared = prepared.roofline(first.then(|| Roofline::measure_if_free(&backend)).flatten());
        // Of a GPU's memory nothing is the program's.
        let program = if backend.device_peak_bytes().is_some() { 0 } else { peak_bytes() };
        let mut model = text.load(backend)?;
        let summary = prepared.run_in(&model.text, &mut model.decoder, &mut callbacks, &*group)?;
        callbacks.finish();
        // No rank has done its work before the output is complete.
        from_first(&*group, || Ok(()))?;
        if !first {
            return Ok(());
        }
        if common.json {
            let plans = callbacks.plans.iter().map(|(phase, plan)| (phase.clone(), plan_json(plan)));
            return print_json(&json!({ "out": self.output.path, "phases": summary.phases, "data": data,
                "peak_bytes": summary.peak_bytes, "planned_bytes": summary.planned_bytes,
                "plans": plans.collect::<serde_json::Map<_, _>>(), "resumed_from": summary.resumed_from,
                "rounding": summary.rounding, "evaluations": summary.evaluations, "best_step": summary.best_step,
                "screened": screened, "skipped_rows": rows.skipped(), "eval_rows_trained": trained_rows }));
        }
        if let Some(counts) = &screened {
            print_line(&screen::told(counts, &self.output.screened()))?;
        }
        let trained = percent(data.trained_share, 1);
        print_line(&format!("trained on {} of {} tokens ({trained})", data.trained_tokens, data.tokens))?;
        for phase in &summary.phases {
            let loss = |x: Option<f32>| x.map_or("none".into(), |x| format!("{x:.4}"));
            let skipped = [(phase.skipped_non_finite, "not finite"), (phase.skipped_empty, "without trained tokens")];
            let skipped = skipped.iter().filter(|(count, _)| *count > 0);
            let skipped: String = skipped.map(|(count, why)| format!("  {count} skipped ({why})")).collect();
            print_line(&format!(
                "phase {:<5} {:>6} steps  loss {} -> {}  {:.0} tok/s{skipped}",
                phase.phase,
                phase.steps,
                loss(phase.first_loss),
                loss(phase.last_loss),
                phase.tokens as f64 / phase.seconds.max(1e-9)
            ))?;
        }
        let named = |name: &str, of: fn(&Evaluation) -> Option<f64>| {
            let found: Vec<f64> = summary.evaluations.iter().filter_map(of).collect();
            let (first, last) = found.first().zip(found.last())?;
            Some(format!("{name} {first:.4} -> {last:.4}"))
        };
        let loss = named("held-out loss", |done| done.found.loss);
        let refusal = named("refusal log-odds of harmful prompts", |done| done.found.refusal);
        for text in [loss, refusal].into_iter().flatten() {
            print_line(&text)?;
        }
        if let Some(step) = summary.best_step {
            print_line(&format!("the weights are those of step {step}, with the lowest held-out loss"))?;
        }
        if let Some(Rounding { moved, unchanged }) = summary.rounding.filter(|found| found.unchanged > 0) {
            let share = percent(unchanged as f64 / moved as f64, 1);
            print_line(&format!(
                "{share} of the {} weights that moved are saved unchanged: the model is stored with too few digits for \
                 steps this small; --save-dtype f32 keeps them all",
                count(moved)
            ))?;
        }
        if rows.skipped_rows() > 0 {
            print_line(&format!("{} bad rows of the data were left out", rows.skipped_rows()))?;
        }
        let planned = bytes(summary.planned_bytes);
        let peak = bytes(summary.peak_bytes);
        print_line(&match program {
            0 => format!("peak memory {peak}, {planned} planned"),
            program => format!(
                "peak memory {peak}; {} before the model was loaded (program, data, measuring the roofline), and {planned} \
                 planned for the model",
                bytes(program.min(summary.peak_bytes))
            ),
        })?;
        print_line(&format!("the tuned model is in {}", self.output.path.display()))
    }
}

impl Tune {
    /// The run as one of several ranks. What is fetched from the hub is fetched once for each machine.
    fn start_as(mut self, rank: Rank, common: &Common) -> Result<()> {
        let common = rank.options(common)?;
        let (size, batch_size) = (rank.place.share.size, self.recipe.shared.batch_size);
        if batch_size < size && !common.quiet {
            say(&format!(
                "note: --batch-size {batch_size} is divided among {size} ranks, some of which have nothing to do\n"
            ));
        }
        let fetches = rank.place.local_rank == 0;
        for turn in [true, false] {
            if turn == fetches {
                self.resolve(&mut Names::new(&common))?;
            }
            rank.wait_for_all()?;
        }
        self.rank = Some(rank);
        self.start_resolved(&common)
    }

    /// Every file and directory that is read, with its option.
    fn inputs(&self) -> Vec<(&str, &Path)> {
        let mut inputs = self.model.inputs();
        inputs.extend(self.data.iter().map(|path| ("--data", path.as_path())));
        let watched = [("--eval-data", &self.watch.eval_data), ("--eval-security", &self.watch.eval_security)];
        inputs.extend(watched.into_iter().filter_map(|(option, path)| Some((option, path.as_deref()?))));
        inputs.extend(self.mix.iter().map(|path| ("--mix", path.as_path())));
        inputs.extend(self.mixed().into_iter().filter_map(|(_, option, path)| Some((option, path?))));
        inputs.extend(self.refusal_expressions.iter().map(|path| ("--refusal-expressions", path.as_path())));
        inputs.extend(self.mods.iter().filter_map(SetSpec::file).map(|path| ("--mods", path)));
        inputs
    }

    fn read(&self, common: &Common, text: &ModelText, path: &Path, rows: &mut RowReader) -> Result<Vec<Example>> {
        let max_length = self.recipe.shared.max_length;
        let read = text.examples(path, max_length, rows)?;
        let total = read.examples.len() + read.dropped + read.context;
        for (count, what) in [
            (read.cut, format!("were truncated to {max_length} tokens")),
            (read.dropped, format!("were dropped: their prompts fill {max_length} tokens")),
            (read.context, "were dropped: no answer has a weight".to_owned()),
            (read.left_out, LEFT_OUT.to_owned()),
        ] {
            if count > 0 && !common.quiet {
                let share = percent(count as f64 / total as f64, 1);
                say(&format!("{}: {count} examples ({share}) {what}\n", path.display()));
            }
        }
        Ok(read.examples)
    }

    fn job(&self, common: &Common, text: &ModelText) -> Result<TuneJob> {
        let config = &text.files.config;
        let resolve = |mods: &SetSpec| {
            let hash = mods.file().map(|_| text.files.hash()).transpose()?;
            mods.resolve(config, None, hash)
        };
        let mods = self.mods.as_ref().map(resolve).transpose()?;
        let named = self.named.as_ref().and_then(|named| named.options.lora);
        let mut recipe = self.recipe.clone();
        recipe.shared.seed = common.seed;
        if let Some(adapter) = text.files.adapter() {
            if adapter.dropout() > 0.0 && !common.quiet {
                say(&format!("{}: lora_dropout is left out: swat trains without dropout\n", adapter.dir().display()));
            }
            recipe.method = Method::Adapter { cells: adapter.cells() };
        } else {
            recipe.method = self.method.method(config, named)?;
        }
        recipe.all_phase.lr = self.lr.unwrap_or_else(|| recipe.method.default_lr());
        recipe.mods_phase = PhaseOptions {
            lr: self.mods_lr.unwrap_or(recipe.all_phase.lr),
            epochs: self.mods_epochs,
            steps: self.mods_steps,
            ..recipe.all_phase.clone()
        };
        let Some(named) = &self.named else { return Ok(TuneJob { mods, recipe }) };
        self.check_recipe(named)?;
        // A Mods_Rob file must be of this model.
        let hash = match &named.base {
            Base::Warmup(set) => set.file().map(|_| text.files.hash()).transpose()?,
            Base::Rates(_) => Some(text.files.hash()?),
            _ => None,
        };
        named.job(&recipe, config, mods.as_ref(), hash)
    }
}
