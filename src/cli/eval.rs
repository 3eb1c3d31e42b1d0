//! `swat eval`: safety and utility of a model.

use super::common::{Common, print_json, print_line, say};
use super::names::Names;
use super::open::{ModelArgs, OnDevice, Refusals};
use super::progress::Bars;
use crate::backend::Backend;
use crate::data::{Label, RowOptions, RowReader, SecurityPrompt, SkippedRows, Split, Task};
use crate::error::{Error, Result};
use crate::io::{IfExists, check_apart, check_file, write_atomic};
use crate::report::{Entry, Table, agreement_table};
use crate::secure::{
    AnswerKinds, Estimate, EvaluateOptions, Evaluation, EvaluationInput, Export, GuardOptions, GuardText, Harmfulness,
    Judge, ModelText, Moderated, Moderator, Perplexity, Probe, Rate,
};
use clap::Args;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Attack success rate, over-refusal, task score and perplexity of a model; no answer is printed, or kept without --export
#[derive(Args)]
#[command(after_help = "Examples:
  swat eval --model DIR --security attack.jsonl --security overrefusal.jsonl
  swat eval --model DIR --security security.jsonl --splits test,ood --task task.jsonl --limit 100 --json
  swat eval --model DIR --security security.jsonl --judge-model Qwen/Qwen3Guard-Gen-0.6B
  swat eval ... --judge-url http://localhost:8000/v1 --judge-model NAME --judge-rubric strongreject")]
pub(super) struct EvalCommand {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    refusals: Refusals,
    /// Labelled prompts: attack success rate on harmful ones, over-refusal on benign ones
    #[arg(long, value_name = "FILE", required_unless_present_any = ["task", "heldout"])]
    security: Vec<PathBuf>,
    /// Only these splits of --security
    #[arg(long, value_enum, value_delimiter = ',')]
    splits: Vec<Split>,
    /// Checkable tasks
    #[arg(long, value_name = "FILE")]
    task: Option<PathBuf>,
    /// Held-out conversations, for the perplexity
    #[arg(long, value_name = "FILE")]
    heldout: Option<PathBuf>,
    #[command(flatten)]
    rows: RowOptions,
    /// Use only the first prompts of each label, and the first tasks; 0 = all
    #[arg(long, default_value_t = 0)]
    limit: usize,
    #[command(flatten)]
    options: EvaluateOptions,
    /// Guard model that judges beside the judge at --judge-url: its directory, or its name on the hub
    #[arg(long, value_name = "DIR_OR_NAME", requires = "judge_url")]
    guard_model: Option<PathBuf>,
    #[command(flatten)]
    guard: GuardOptions,
    /// Write the prompts of --security and the answers to this file, as JSON lines for inspect_ai and HarmBench. It then holds
    /// what the model said to harmful prompts, in full: keep it where such text may be
    #[arg(long, value_name = "FILE", requires = "security")]
    export: Option<PathBuf>,
    /// Probes of `swat probe`, of this model or the one that it was tuned from, as an offline harmfulness score of the
    /// answers to harmful prompts, from 1 to 5. It measures what a conversation is about, not how useful an answer is
    #[arg(long, value_name = "FILE", requires = "security")]
    probe: Option<PathBuf>,
}

/// The JSON that is printed.
#[derive(Serialize)]
struct Output<'a> {
    #[serde(flatten)]
    evaluation: &'a Evaluation,
    skipped_rows: &'a [SkippedRows],
}

/// What a model is asked.
pub(super) struct Asked {
    pub(super) prompts: Vec<SecurityPrompt>,
    pub(super) tasks: Vec<Task>,
}

/// The files of [`Asked`]: these splits of the prompts (none = all), the first `limit` of each label and the first tasks
/// (0 = all).
pub(super) struct AskedFiles<'a> {
    pub(super) security: &'a [PathBuf],
    pub(super) splits: &'a [Split],
    pub(super) task: Option<&'a Path>,
    pub(super) limit: usize,
}

impl Asked {
    /// Reads the files.
    pub(super) fn read(files: &AskedFiles<'_>, seed: u64, rows: &mut RowReader) -> Result<Self> {
        let limit = if files.limit == 0 { usize::MAX } else { files.limit };
        let mut counts = std::collections::HashMap::new();
        let mut prompts = Vec::new();
        for path in files.security {
            for prompt in SecurityPrompt::read(path, seed, rows)? {
                let count = counts.entry(prompt.label).or_insert(0);
                if (files.splits.is_empty() || files.splits.contains(&prompt.split)) && *count < limit {
                    *count += 1;
                    prompts.push(prompt);
                }
            }
        }
        if prompts.is_empty() && !files.security.is_empty() {
            let splits: Vec<&str> = files.splits.iter().map(|split| split.name()).collect();
            let found = format!("no prompt of the splits {}", splits.join(", "));
            return Err(Error::input("--splits", found, "splits that the files of --security have"));
        }
        let mut tasks = files.task.map(|path| Task::read(path, rows)).transpose()?.unwrap_or_default();
        tasks.truncate(limit);
        Ok(Self { prompts, tasks })
    }

    /// Checks that there are harmful and benign prompts.
    pub(super) fn require_both_labels(&self) -> Result<()> {
        let count = |label| self.prompts.iter().filter(|prompt| prompt.label == label).count();
        let (harmful, benign) = (count(Label::Harmful), count(Label::Benign));
        if harmful > 0 && benign > 0 {
            return Ok(());
        }
        let found = format!("{harmful} harmful and {benign} benign prompts");
        let expected = "prompts of both labels: a model that refuses everything would pass without benign ones";
        Err(Error::input("--security", found, expected))
    }

    /// Checks that everything fits a model's context.
    pub(super) fn check(&self, text: &ModelText) -> Result<()> {
        text.check_prompts(self.prompts.iter().map(|p| (p.place.as_str(), p.prompt.as_str())))?;
        text.check_prompts(self.tasks.iter().map(|task| (task.place.as_str(), task.prompt.as_str())))
    }
}

impl OnDevice for EvalCommand {
    fn model(&self) -> Option<PathBuf> {
        Some(self.model.model.clone())
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        // Without an endpoint the judge is a guard model.
        if let Some(judge) = self.options.judge.take_if(|judge| judge.url.is_empty()) {
            self.guard_model = Some(judge.model.into());
        }
        self.guard_model.iter_mut().try_for_each(|model| names.model(model).map(drop))?;
        self.model.resolve(names)?;
        names.security(&mut self.security)?;
        names.file_if_any("--task", &mut self.task)?;
        names.file_if_any("--heldout", &mut self.heldout)
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        self.options.check()?;
        self.check_export()?;
        if self.guard_model.is_none() && self.guard != GuardOptions::default() {
            let found = "an option of a guard model, beside an endpoint alone";
            return Err(Error::input("--judge-template or --judge-pattern", found, "--guard-model DIR as well"));
        }
        let guard = self.guard_model.clone().map(|model| GuardOptions { model, ..self.guard.clone() });
        let guard = guard.as_ref().map(GuardText::open).transpose()?;
        let mut rows = RowReader::new(&self.rows);
        let task = self.task.as_deref();
        let files = AskedFiles { security: &self.security, splits: &self.splits, task, limit: self.limit };
        let asked = Asked::read(&files, common.seed, &mut rows)?;
        let refusals = self.refusals.list()?;
        let probe = self.probe.as_deref().map(Probe::load).transpose()?;
        let recorded = probe.as_ref().and_then(|probe| probe.metadata.date);
        let (text, _) = self.model.open_dated(recorded)?;
        let heldout = match &self.heldout {
            Some(path) => text.examples(path, text.files.config.max_positions.min(4096), &mut rows)?.examples,
            None => Vec::new(),
        };
        common.end_reading(&rows)?;
        asked.check(&text)?;
        let judge = self.options.judge.clone().map(Judge::new).transpose()?;
        if let Some(probe) = &probe {
            probe.check_shape(&text.files.config)?;
        }
        let guard = guard.map(|guard| guard.load(backend.clone())).transpose()?;
        let model = text.load(backend)?;
        let export = self.export.as_ref().map(|path| (path, Export::default()));
        let input = EvaluationInput {
            prompts: &asked.prompts,
            strict: None,
            tasks: &asked.tasks,
            heldout: &heldout,
            judge: judge.as_ref(),
            guard: guard.as_ref().map(|guard| guard as &dyn Moderator),
            export: export.as_ref().map(|(_, export)| export),
            probe: probe.as_ref(),
            first_tokens: probe.as_ref().and_then(|probe| probe.metadata.first_tokens.as_ref()),
        };
        let mut bars = Bars::new(common);
        let found = model.evaluate(&input, &self.options, &refusals, &mut bars.observer())?;
        bars.finish();
        // What was measured is printed even where the answers cannot be written.
        let exported = export.map_or(Ok(()), |(path, export)| write_atomic(path, export.into_text().as_bytes()));
        let failed = found.harmfulness.or(found.strongreject).filter(|harm| harm.failed > 0);
        let told = |harm: Harmfulness| {
            let reason = found.judge_failure.as_deref().unwrap_or_default();
            let of = harm.scored + harm.unscored;
            Error::failed(
                format!("{} of {of} answers have no score: {reason}", harm.failed),
                "check --judge-url, --judge-model and the key",
            )
        };
        if let Err(error) = found.guard.as_ref().map_or(Ok(()), Moderated::require) {
            say(&format!("note: {error}\n"));
        }
        // What was measured without the judge is printed all the same.
        let outcome = match failed {
            Some(harm) if harm.scored == 0 => exported.and_then(|()| Err(told(harm))),
            Some(harm) => {
                say(&format!("note: {}\n", told(harm)));
                exported
            }
            None => exported,
        };
        if common.json {
            return print_json(&Output { evaluation: &found, skipped_rows: rows.skipped() }).and(outcome);
        }
        let mut table = Table::new("Evaluation").column("").numbers("value", "").numbers("n", "");
        let mut rate = |what: &str, rate: &Rate| {
            let interval = Some((100.0 * rate.low, 100.0 * rate.high));
            let value = Entry::interval(100.0 * rate.value, interval, 1);
            table.row([Entry::text(what), value, Entry::count(rate.total as u64)]);
        };
        let none = BTreeMap::new();
        let (task, tasks) = found.task.as_ref().map_or((None, &none), |task| (Some(task.overall), &task.categories));
        for (what, overall, categories) in [
            ("attack success, %", found.asr, &found.asr_by_category),
            ("over-refusal, %", found.over_refusal, &found.over_refusal_by_category),
            ("task accuracy, %", task, tasks),
        ] {
            overall.iter().for_each(|overall| rate(what, overall));
            categories.iter().for_each(|(category, share)| rate(&format!("{what}: {category}"), share));
        }
        found.asr_coherent.iter().for_each(|share| rate("attack success by coherent answers, %", share));
        if let Some(guard) = &found.guard {
            rate(&format!("attack success by the guard model, %; {} without a verdict", guard.unscored), &guard.asr);
        }
        for (what, kinds) in [
            ("harmful prompts", found.harmful_answers),
            ("benign prompts", found.benign_answers),
            ("tasks", found.task_answers),
        ] {
            if let Some(AnswerKinds { empty, cut_off, incoherent }) = kinds {
                for (kind, share) in [("empty", empty), ("incoherent", incoherent), ("cut off", cut_off)] {
                    rate(&format!("answers to {what}: {kind}, %"), &share);
                }
            }
        }
        let points = found.j.map(|j| Estimate { value: 100.0 * j.value, low: 100.0 * j.low, high: 100.0 * j.high });
        for (what, estimate, decimals) in [
            ("J: refused harmful - refused benign, points", points, 1),
            ("AUROC of the refusal log-odds", found.auroc, 3),
        ] {
            let Some(estimate) = estimate else { continue };
            let value = Entry::interval(estimate.value, Some((estimate.low, estimate.high)), decimals);
            table.row([Entry::text(what), value, Entry::count(asked.prompts.len() as u64)]);
        }
        let by = [("judge", found.harmfulness), ("probe", found.probe_harmfulness)];
        for (by, harm) in by.into_iter().filter_map(|(by, harm)| Some((by, harm?))) {
            let what = format!("harmfulness by the {by}, 1 to 5; {} without a score", harm.unscored);
            table.row([Entry::text(what), Entry::fixed(harm.mean, 2), Entry::count(harm.scored as u64)]);
        }
        if let Some(score) = found.strongreject {
            let what = format!("StrongREJECT by the judge, 0 to 1; {} without a score", score.unscored);
            table.row([Entry::text(what), Entry::fixed(score.mean, 3), Entry::count(score.scored as u64)]);
        }
        if let Some(Perplexity { tokens, perplexity, .. }) = found.perplexity {
            table.row([Entry::text("perplexity"), Entry::fixed(perplexity, 3), Entry::count(tokens as u64)]);
        }
        print_line(table.text().trim_end())?;
        if !found.agreement.is_empty() {
            print_line(agreement_table(&found.agreement).text().trim_end())?;
        }
        outcome
    }
}

impl EvalCommand {
    /// Checks that the export overwrites nothing.
    fn check_export(&self) -> Result<()> {
        let Some(path) = &self.export else { return Ok(()) };
        check_file(path, IfExists::Fail, |_| false)?;
        let mut inputs = self.model.inputs();
        inputs.extend(self.security.iter().map(|path| ("--security", path.as_path())));
        check_apart(&[("--export", path)], &inputs)
    }
}
