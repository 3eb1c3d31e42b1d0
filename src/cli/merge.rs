//! `swat merge`: defences after tuning.

use super::answers::AnswerLengths;
use super::common::{Common, print_json, print_line, say};
use super::eval::{Asked, AskedFiles};
use super::names::Names;
use super::open::{OnDevice, Refusals};
use super::progress::Bars;
use crate::backend::Backend;
use crate::data::{RowOptions, RowReader, Split};
use crate::error::Result;
use crate::io::{IfExists, OutputDir, check_apart};
use crate::model::Clock;
use crate::modules::ModuleKind;
use crate::progress::Progress;
use crate::report::{Entry, Table};
use crate::secure::{
    Alpha, Estimate, Evaluation, EvaluationInput, Limits, MergeMethod, MergeModels, MergeOptions, MergeSummary,
    MergedModule, PATH_POINTS, PathPoint, PathWalk, Rate, merge,
};
use clap::Args;
use std::path::PathBuf;

/// Merges a tuned model with those that it comes from, as a defence after tuning: path, SafeMERGE, SafeLoRA, RESTA
#[derive(Args)]
#[command(after_help = "Examples:
  swat merge --base DIR --tuned DIR --out merged --by path --alpha 0.7
  swat merge --base DIR --tuned DIR --out merged --by path --alpha auto --security security.jsonl --task task.jsonl
  swat merge --base CHAT --tuned DIR --unaligned PRETRAINED --out merged --by safelora --tau 0.5
  swat merge --base CHAT --tuned DIR --unaligned PRETRAINED --safe DIR --out merged --by safemerge --alpha 0.8 --tau 0.7
  swat merge --base CHAT --tuned DIR --unaligned DIR --out merged --by resta --alpha 1

With V = aligned - unaligned, C = V V^T / |V| and dW = tuned - base, of each projection:
  path       base + alpha (tuned - base)
  safemerge  base + alpha dW + (1 - alpha) (safe - base), where cos(dW, C dW) < tau
  safelora   base + C dW, where cos(dW, C dW) < tau
  resta      tuned + alpha (aligned - unaligned)

path and resta merge all tensors. safemerge and safelora leave norms, biases, embedding and head as they are tuned, and
say how many of them tuning has changed. It is computed on the CPU, tensor by tensor. docs/recipes.md has the papers.

--alpha auto measures the points 0, 0.25, 0.5, 0.75, 0.9 and 1 of the path on the valid split of --security, and takes, of
those within the limits, the one with the highest task score, without --task the largest. Limits are for values, without
their intervals. Exit code 3 = none is within them.")]
pub(super) struct MergeCommand {
    #[command(flatten)]
    models: MergeModels,
    #[command(flatten)]
    options: MergeOptions,
    #[command(flatten)]
    auto: AutoAlpha,
    /// Where the merged model directory appears when it is complete
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Replace --out. A directory that holds anything but what swat wrote is refused
    #[arg(long)]
    force: bool,
}

/// What `--alpha auto` measures.
#[derive(Args)]
#[command(mut_args(of_values))]
struct AutoAlpha {
    /// Labelled prompts, harmful and benign: files, or a set on the hub such as JailbreakBench/JBB-Behaviors
    #[arg(long, value_name = "FILE_OR_NAME", required_if_eq("alpha", "auto"))]
    security: Vec<PathBuf>,
    #[command(flatten)]
    rows: RowOptions,
    #[command(flatten)]
    refusals: Refusals,
    /// Only these splits of --security: not those by which the result is to be judged
    #[arg(long, value_enum, value_delimiter = ',', default_value = "valid")]
    splits: Vec<Split>,
    /// Checkable tasks: others than those by which the result is to be judged
    #[arg(long, value_name = "FILE")]
    task: Option<PathBuf>,
    #[command(flatten)]
    limits: Limits,
    #[command(flatten)]
    answers: AnswerLengths,
}

/// A limit of a value: its help without the interval, which a verdict has.
fn of_values(arg: clap::Arg) -> clap::Arg {
    let help = arg.get_help().map(|help| help.to_string().replace(", at the lower end of its 95 % interval", ""));
    help.into_iter().fold(arg, clap::Arg::help)
}

impl OnDevice for MergeCommand {
    fn model(&self) -> Option<PathBuf> {
        Some(self.models.base.clone())
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        self.models.paths().try_for_each(|path| names.model(path).map(drop))?;
        names.file_if_any("--task", &mut self.auto.task)?;
        names.security(&mut self.auto.security)
    }

    /// `--alpha auto`.
    fn run<B: Backend>(mut self, common: &Common, backend: B) -> Result<()> {
        if self.options.by != MergeMethod::Path {
            self.options.weight()?;
        }
        let auto = &self.auto;
        auto.limits.check()?;
        let options = auto.answers.options();
        options.check()?;
        let mut inputs = self.models.inputs();
        inputs.extend(auto.security.iter().map(|path| ("--security", path.as_path())));
        inputs.extend(auto.task.iter().map(|path| ("--task", path.as_path())));
        check_apart(&[("--out", &self.out)], &inputs)?;
        // Before anything is measured; it leaves nothing behind.
        drop(OutputDir::create(&self.out, IfExists::from_force(self.force))?);
        let mut rows = RowReader::new(&auto.rows);
        let task = auto.task.as_deref();
        let files = AskedFiles { security: &auto.security, splits: &auto.splits, task, limit: 0 };
        let asked = Asked::read(&files, common.seed, &mut rows)?;
        common.end_reading(&rows)?;
        asked.require_both_labels()?;
        let refusals = auto.refusals.list()?;
        let mut text = self.models.tuned_text()?;
        text.set_clock(Clock::now()?);
        asked.check(&text)?;
        let mut path = PathWalk::open(&self.models, text, backend)?;
        let mut found: Vec<Evaluation> = Vec::new();
        let mut bars = Bars::new(common);
        for alpha in PATH_POINTS {
            let model = path.at(alpha)?;
            let first_tokens = found.first().and_then(|base| base.outcomes.first_tokens.as_ref());
            let input = EvaluationInput {
                prompts: &asked.prompts,
                tasks: &asked.tasks,
                first_tokens,
                ..EvaluationInput::default()
            };
            let mut observer = bars.observer();
            let mut report = |p: Progress<'_>| observer(Progress { task: &format!("alpha {alpha}: {}", p.task), ..p });
            found.push(model.evaluate(&input, &options, &refusals, &mut report)?);
        }
        bars.finish();
        drop(path);
        let (points, chosen) = PathPoint::choose(&PATH_POINTS, &found, &auto.limits);
        let table = points_table(&points, chosen.as_ref().ok().copied());
        if common.json && chosen.is_err() {
            print_json(&serde_json::json!({ "points": points, "alpha": null }))?;
        } else if !common.json {
            print_line(&table.text())?;
        }
        self.options.alpha = Alpha::At(chosen?);
        self.options.points = points;
        self.merge(common)
    }
}

impl MergeCommand {
    pub(super) fn execute(mut self, common: &Common) -> Result<()> {
        if self.options.alpha == Alpha::Auto {
            return self.start(common);
        }
        self.resolve(&mut Names::new(common))?;
        self.merge(common)
    }

    fn merge(self, common: &Common) -> Result<()> {
        let mut bars = Bars::new(common);
        let if_exists = IfExists::from_force(self.force);
        let summary = merge(&self.models, &self.options, &self.out, if_exists, &mut bars.observer())?;
        bars.finish();
        if summary.changed == 0 {
            say("note: no tensor was changed: the output is the tuned model\n");
        }
        if summary.left_tuned > 0 {
            let left = summary.left_tuned;
            say(&format!(
                "note: {left} norms, biases, embeddings or heads differ from --base and stay as they are tuned\n"
            ));
        }
        if common.json {
            return print_json(&summary);
        }
        if !summary.modules.is_empty() {
            print_line(table(&summary).text().trim_end())?;
        }
        let MergeSummary { changed, tensors, .. } = summary;
        print_line(&format!("{changed} of {tensors} tensors changed; saved as {}", self.out.display()))
    }
}

/// The measured points of the path.
fn points_table(points: &[PathPoint], chosen: Option<f64>) -> Table {
    let mut table = Table::new("Points of the path, with 95 % intervals").numbers("alpha", "");
    for what in ["attack success, %", "over-refusal, %", "J, points", "AUROC", "task, %"] {
        table = table.numbers(what, "");
    }
    table = table.column("");
    let entry = |found: Option<Estimate>, factor: f64, decimals: usize| {
        found.map_or(Entry::missing(), |found| {
            Entry::interval(factor * found.value, Some((factor * found.low, factor * found.high)), decimals)
        })
    };
    for point in points {
        let verdict = match (point.alpha, point.excess) {
            (0.0, _) => "the base model".into(),
            (alpha, _) if Some(alpha) == chosen => "chosen".into(),
            (_, 0.0) => "within the limits".into(),
            (_, excess) => format!("{excess:.1} points beyond the limits"),
        };
        table.row([
            Entry::fixed(point.alpha, 2),
            entry(point.asr.map(Rate::estimate), 100.0, 1),
            entry(point.over_refusal.map(Rate::estimate), 100.0, 1),
            entry(point.j, 100.0, 1),
            entry(point.auroc, 1.0, 3),
            entry(point.task.map(Rate::estimate), 100.0, 1),
            Entry::text(verdict),
        ]);
    }
    table
}

/// The tests by kind of projection.
fn table(summary: &MergeSummary) -> Table {
    let tau = summary.tau.unwrap_or_default();
    let mut table = Table::new("Cosine of each update and its projection onto the alignment")
        .column("projection")
        .numbers("tested", "")
        .numbers(format!("below {tau}"), "")
        .numbers("smallest", "")
        .numbers("mean", "")
        .numbers("largest", "");
    for kind in ModuleKind::ALL {
        let of_kind = |module: &&MergedModule| module.module.ends_with(&format!(".{kind}"));
        let modules: Vec<&MergedModule> = summary.modules.iter().filter(of_kind).collect();
        let cosines: Vec<f64> = modules.iter().filter_map(|module| module.cosine).collect();
        let mean = cosines.iter().sum::<f64>() / cosines.len() as f64;
        let extreme = |pick: fn(f64, f64) -> f64| cosines.iter().copied().reduce(pick);
        table.row([
            Entry::text(kind.name()),
            Entry::count(cosines.len() as u64),
            Entry::count(modules.iter().filter(|module| module.changed).count() as u64),
            Entry::fixed(extreme(f64::min), 3),
            Entry::fixed(mean, 3),
            Entry::fixed(extreme(f64::max), 3),
        ]);
    }
    table
}
