//! `swat secure`: tuning that keeps a model safe, and shows it.

use super::answers::AnswerLengths;
use super::common::{Common, print_json, print_line, say};
use super::method::MethodArgs;
use super::names::Names;
use super::open::{GuardArgs, ModelArgs, OnDevice, Refusals, State};
use super::progress::Bars;
use super::recipe::Beside;
use crate::backend::Backend;
use crate::data::{RowOptions, RowReader};
use crate::error::{Error, Result};
use crate::interrupt;
use crate::io::write_atomic;
use crate::model::{ModelDir, StoredAs};
use crate::options::{above_zero, mib};
use crate::report::format::bytes;
use crate::report::{Entry, Table, check_tables, model_card, secure_report, times_table, tried_table};
use crate::secure::pipeline::{DEFAULT_RECIPES, SecureJob, SecurePlan, SecureReport, SecureRun, Secured};
use crate::secure::{Base, Limits, Recipe, TuneRecipe, secure_recipe_help};
use clap::Args;
use std::path::PathBuf;

/// Tunes a model, keeps it as safe as it was, and shows it: model, report, model card, and a verdict by exit code
#[derive(Args)]
#[command(after_help = "Examples:
  swat secure --model DIR --data my.jsonl --security security.jsonl --task task.jsonl --out tuned
  swat secure --model org/name --data my.jsonl --security JailbreakBench/JBB-Behaviors --out tuned --epochs 3
  swat secure --model DIR --data my.jsonl --security security.jsonl --out tuned --method lora --lora-modules all-linear
  swat secure --model DIR --data my.jsonl --security security.jsonl --out tuned --recipe plain+replay=.1,screen
  swat secure ... --plan                                      stages, time, memory and disk, and nothing else

The original model is measured; conversations that answer what it refuses are left out of the data (screen in a recipe), and
its own refusals, and its own answers to benign prompts, are mixed in (replay=). Recipes are tried in order until one is within
half of each limit on the split valid and half of ood of --security: plain+replay=.15,screen, the same with distil=1, and
plain+replay=.3,distil=2,screen, if no --recipe is given. Where none passes the limits, points between the original model and
the tuned one are tried as well. What is chosen is measured on test and the rest of ood.

An --adapter is merged first: model and adapter together are what is tuned, and held to its own refusals.

Stages are kept in the working folder: the same command continues a run that ended early, to the same bytes.

Exit codes: 0 = held, 3 = not held (the model is written all the same), 2 = wrong input, 1 = failed while running.")]
pub(super) struct SecureCommand {
    #[command(flatten)]
    model: ModelArgs,
    /// Training conversations: a file, or a name on the hub: org/name[/config][:split]
    #[arg(long, value_name = "FILE_OR_NAME", required = true, num_args = 1..)]
    data: Vec<PathBuf>,
    #[command(flatten)]
    rows: RowOptions,
    /// Labelled prompts, harmful and benign, with the splits train (replayed), valid (choice), test (verdict) and ood
    /// (half for selection, half for the verdict); assigned by --seed where the file has none. Files, or a set on the
    /// hub: JailbreakBench/JBB-Behaviors
    #[arg(long, value_name = "FILE_OR_NAME")]
    security: Vec<PathBuf>,
    /// Checkable tasks: half of them for selection, half for the verdict. Without it a tenth of --data is set aside, and
    /// its loss is measured; it is not gated
    #[arg(long, value_name = "FILE")]
    task: Option<PathBuf>,
    /// Recipe; repeat to try several in order. If none is given: plain+replay=.15,screen, the
    /// same with distil=1, and plain+replay=.3,distil=2,screen
    #[arg(long = "recipe", value_name = "RECIPE", long_help = recipes_help())]
    recipes: Vec<Recipe>,
    #[command(flatten)]
    refusals: Refusals,
    #[command(flatten)]
    limits: Limits,
    #[command(flatten)]
    guard: GuardArgs,
    #[command(flatten)]
    method: MethodArgs,
    /// Learning rate, for recipes without lr=; 2e-5 for full, 2e-4 for lora if not given
    #[arg(long, value_parser = above_zero::<f64>)]
    lr: Option<f64>,
    #[command(flatten)]
    recipe: TuneRecipe,
    #[command(flatten)]
    answers: AnswerLengths,
    /// Where the tuned model directory appears when everything is done
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Working folder, with stages and candidates; OUT.work if not given. It stays: remove it when it is no longer needed
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Print stages, time, memory and disk, and stop
    #[arg(long)]
    plan: bool,
    /// Replace --out. A directory that holds anything but what swat wrote is refused
    #[arg(long)]
    force: bool,
    /// Dtype of the saved weights: as-stored keeps those of --model, whose bf16 loses small updates
    #[arg(long, value_enum, default_value_t)]
    save_dtype: StoredAs,
    /// Largest safetensors shard, in MiB
    #[arg(long = "max-shard-mib", value_name = "MAX_SHARD_MIB", value_parser = mib, default_value = "4096")]
    max_shard_bytes: u64,
    /// Precision of gradients and moments beside bf16 weights: f32 (12 bytes per trained parameter) or bf16 (6)
    #[arg(long, value_enum, default_value_t = State::F32)]
    state: State,
}

impl OnDevice for SecureCommand {
    fn model(&self) -> Option<PathBuf> {
        Some(self.model.model.clone())
    }

    fn state(&self) -> State {
        self.state
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        if self.security.is_empty() {
            let expected = "labelled prompts to measure safety on: a file (docs/data.md), or a public set on the hub, \
                            --security JailbreakBench/JBB-Behaviors (100 harmful prompts and their benign twins)";
            return Err(Error::input("--security", "none", expected));
        }
        self.check_recipes()?;
        self.model.resolve(names)?;
        self.model.name.iter().for_each(|name| names.card(name));
        self.guard.resolve(names)?;
        names.data(&mut self.data)?;
        names.file_if_any("--task", &mut self.task)?;
        names.security(&mut self.security)
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        let refusals = self.refusals.list()?;
        let mut rows = RowReader::new(&self.rows);
        let only_plan = self.plan;
        let run = SecureRun::open(self.job(common)?, backend, &refusals, &mut rows)?;
        common.end_reading(&rows)?;
        let plan = run.plan()?;
        if only_plan {
            return print_plan(common, &plan);
        }
        run.check_room(&plan)?;
        interrupt::watch();
        let mut bars = Bars::new(common);
        let quiet = common.quiet;
        let mut stage = |line: &str| {
            if !quiet {
                say(&format!("{line}\n"));
            }
        };
        let mut observer = bars.observer();
        let mut report = SecureReport { observer: &mut observer, stage: &mut stage };
        let Secured { outcome, check, output, times } = run.run(&plan, &mut report)?;
        drop(observer);
        bars.finish();
        write_atomic(&output.dir().join("README.md"), model_card(&outcome, &check).as_bytes())?;
        write_atomic(&output.dir().join("report.html"), secure_report(&outcome, &check).html()?.as_bytes())?;
        output.commit()?;
        if common.json {
            print_json(&outcome)?;
        } else {
            let [measures, verdict, answers] = check_tables(&check);
            print_line(&tried_table(&outcome).text())?;
            print_line(&measures.text())?;
            print_line(&answers.text())?;
            print_line(&verdict.text())?;
            print_line(&times_table(&times).text())?;
            if self.task.is_none() {
                print_line(
                    "no --task: usefulness is not gated; the loss of set-aside conversations is in outcome.json",
                )?;
            }
            print_line(&format!("the tuned model, README.md and report.html are in {}", self.out.display()))?;
            print_line(&format!(
                "candidates stay in {}; remove it when it is no longer needed",
                self.work().display()
            ))?;
        }
        outcome.require()
    }
}

impl SecureCommand {
    fn work(&self) -> PathBuf {
        self.work.clone().unwrap_or_else(|| SecureJob::default_work(&self.out))
    }

    /// Refuses recipes that contradict another option, or need a Mods_Rob beside them. The default recipes are tried with
    /// any option.
    fn check_recipes(&self) -> Result<()> {
        let beside = Beside { lr: None, mods_lr: None, method: &self.method, tune: &self.recipe };
        for recipe in &self.recipes {
            if matches!(recipe.base, Base::Swat | Base::Reversed | Base::ModsOnly | Base::MlLr(_)) {
                let expected = "swat:mods=SET_OR_FILE or plain as the base; `swat tune --mods` takes this one";
                return Err(Error::input(recipe.place(), "no Mods_Rob", expected));
            }
            beside.check(recipe)?;
        }
        Ok(())
    }

    fn job(&self, common: &Common) -> Result<SecureJob> {
        let recipes = match self.recipes.as_slice() {
            [] => DEFAULT_RECIPES.into_iter().map(str::parse).collect::<Result<_>>()?,
            given => given.to_vec(),
        };
        let mut tune = self.recipe.clone();
        tune.method = self.method.method(&ModelDir::read_config(&self.model.model)?, None)?;
        tune.all_phase.lr = self.lr.unwrap_or_else(|| tune.method.default_lr());
        let command: Vec<String> = std::env::args().skip(1).collect();
        Ok(SecureJob {
            model: self.model.model.clone(),
            model_name: self.model.shown(),
            adapter: self.model.adapter.clone(),
            chat_template: self.model.chat_template.clone(),
            date: self.model.date,
            data: self.data.clone(),
            rows: self.rows.clone(),
            security: self.security.clone(),
            task: self.task.clone(),
            recipes,
            tune,
            evaluate: self.answers.options(),
            limits: self.limits,
            guard: self.guard.options(),
            seed: common.seed,
            out: self.out.clone(),
            force: self.force,
            work: self.work(),
            save_dtype: self.save_dtype,
            max_shard_bytes: self.max_shard_bytes,
            command: format!("swat {}", command.join(" ")),
        })
    }
}

/// `--help` of `--recipe`.
fn recipes_help() -> String {
    let [first, second, third] = DEFAULT_RECIPES;
    format!(
        "Recipe; repeat to try several in order. If none is given: {first}, {second} and {third}\n\n{}",
        secure_recipe_help()
    )
}

fn print_plan(common: &Common, plan: &SecurePlan) -> Result<()> {
    if common.json {
        return print_json(plan);
    }
    let mut table = Table::new("Stages").column("").numbers("about", "").column("");
    let time = |seconds: f64| match seconds {
        s if s < 90.0 => format!("{s:.0} s"),
        s if s < 5400.0 => format!("{:.0} min", s / 60.0),
        s => format!("{:.1} h", s / 3600.0),
    };
    for stage in &plan.stages {
        let when = if stage.optional { "only if what was tried before is not good enough" } else { "" };
        table.row([Entry::text(&stage.name), Entry::text(time(stage.seconds)), Entry::text(when)]);
    }
    let (all, needed) = plan.seconds();
    table.note = format!(
        "{} in all, {} of them in any case: rough, from FLOPs and the measured peak of this machine",
        time(all),
        time(needed)
    );
    print_line(&table.text())?;
    print_line(&format!("memory  {}", bytes(plan.memory_bytes)))?;
    print_line(&format!("disk    {}", bytes(plan.disk_bytes)))
}
