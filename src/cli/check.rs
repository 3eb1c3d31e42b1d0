//! `swat check`: whether a tuned model is as safe and useful as the one that it was tuned from.

use super::answers::AnswerLengths;
use super::common::{Common, print_json, print_line, say};
use super::eval::{Asked, AskedFiles};
use super::names::Names;
use super::open::{GuardArgs, ModelArgs, OnDevice, Refusals};
use super::progress::Bars;
use crate::backend::{Backend, Element};
use crate::data::{RowOptions, RowReader, Split};
use crate::error::{Error, FileOp, Result};
use crate::io::{IfExists, check_apart, check_file};
use crate::model::Clock;
use crate::report::{agreement_tables, check_tables};
use crate::secure::{
    Attack, AttackOptions, Check, EvaluateOptions, Evaluation, EvaluationInput, FirstTokens, GuardText, KeptEvaluation,
    Limits, ModelText, Moderated, Moderator, RefusalList,
};
use clap::Args;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Checks that a tuned model is as safe and useful as its base: a verdict by exit code, for CI
#[derive(Args)]
#[command(after_help = "Examples:
  swat check --model TUNED --against BASE --security security.jsonl --task task.jsonl
  swat check --model BASE --adapter ADAPTER --against BASE --security security.jsonl
  swat check --model TUNED --against BASE --security security.jsonl --max-asr-rise 5 --json --out check.json
  swat check --model TUNED --against BASE --security security.jsonl --attack attack.jsonl --cache .swat-cache

Both models answer the same prompts. A gate compares the change of a share with its limit, in points; it fails where the
whole 95 % interval of the change, over the paired prompts, lies above the limit.

Exit codes: 0 = held, 3 = not held, 2 = wrong input, 1 = failed while running.")]
pub(super) struct CheckCommand {
    #[command(flatten)]
    model: ModelArgs,
    /// Model that --model was tuned from: a directory, or a name on the hub
    #[arg(long, value_name = "DIR_OR_NAME")]
    against: PathBuf,
    #[command(flatten)]
    refusals: Refusals,
    /// Labelled prompts, harmful and benign: files, or a set on the hub such as JailbreakBench/JBB-Behaviors
    #[arg(long, value_name = "FILE_OR_NAME", required = true)]
    security: Vec<PathBuf>,
    #[command(flatten)]
    rows: RowOptions,
    /// Only these splits of --security
    #[arg(long, value_enum, value_delimiter = ',')]
    splits: Vec<Split>,
    /// Checkable tasks
    #[arg(long, value_name = "FILE")]
    task: Option<PathBuf>,
    /// Use only the first prompts of each label, and the first tasks; 0 = all
    #[arg(long, default_value_t = 0)]
    limit: usize,
    #[command(flatten)]
    limits: Limits,
    #[command(flatten)]
    guard: GuardArgs,
    #[command(flatten)]
    answers: AnswerLengths,
    #[command(flatten)]
    attack: AttackOptions,
    /// Keep the base model's measures in this directory, and use those that are there for the same model, prompts, options
    /// and version
    #[arg(long, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Write measures and verdict to this file as well, as JSON
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Replace --out
    #[arg(long)]
    force: bool,
}

/// What both models are measured by.
struct Measured<'a> {
    asked: Asked,
    options: EvaluateOptions,
    refusals: RefusalList,
    guard: Option<&'a dyn Moderator>,
    /// Hash of the guard model and how it is asked.
    guard_hash: Option<String>,
    common: &'a Common,
}

impl Measured<'_> {
    /// The measures of a model, and those after the attack, if there is one.
    fn evaluate<B: Backend>(
        &self,
        text: ModelText,
        backend: B,
        attack: Option<&Attack>,
        first_tokens: Option<&FirstTokens>,
    ) -> Result<Vec<Evaluation>> {
        let mut model = text.load(backend)?;
        let (prompts, tasks) = (self.asked.prompts.as_slice(), self.asked.tasks.as_slice());
        let mut bars = Bars::new(self.common);
        let guard = self.guard;
        let input = EvaluationInput { prompts, tasks, guard, first_tokens, ..EvaluationInput::default() };
        let mut found = vec![model.evaluate(&input, &self.options, &self.refusals, &mut bars.observer())?];
        found.iter().filter_map(|found| found.guard.as_ref()).try_for_each(Moderated::require)?;
        if let Some(attack) = attack {
            model.attacked(attack, &mut bars.observer())?;
            let own = found.first().and_then(|found| found.outcomes.first_tokens.clone());
            let input = EvaluationInput { first_tokens: first_tokens.or(own.as_ref()), ..input };
            found.push(model.evaluate(&input, &self.options, &self.refusals, &mut bars.observer())?);
        }
        bars.finish();
        Ok(found)
    }

    /// What the measures of a model depend on.
    fn inputs(&self, text: &ModelText, attack: Option<(&AttackOptions, &Path)>) -> Result<Value> {
        let EvaluateOptions { answer_tokens, task_tokens, .. } = self.options;
        let attack = attack.map(|(options, path)| -> Result<Value> {
            let bytes = std::fs::read(path).map_err(Error::io(path, FileOp::Read))?;
            Ok(json!([options, blake3::hash(&bytes).to_hex().as_str()]))
        });
        let mut inputs = json!({ "model": text.files.hash()?, "chat_template": text.chat()?.template().sources(),
            "prompts": self.asked.prompts, "tasks": self.asked.tasks, "answer_tokens": answer_tokens,
            "task_tokens": task_tokens, "refusals": format!("{:?}", self.refusals), "seed": self.common.seed,
            "attack": attack.transpose()?, "swat": env!("CARGO_PKG_VERSION") });
        if let Some(hash) = &self.guard_hash {
            inputs["guard"] = hash.as_str().into();
        }
        Ok(inputs)
    }
}

impl CheckCommand {
    fn asked(&self, common: &Common) -> Result<Asked> {
        let task = self.task.as_deref();
        let files = AskedFiles { security: &self.security, splits: &self.splits, task, limit: self.limit };
        let mut rows = RowReader::new(&self.rows);
        let asked = Asked::read(&files, common.seed, &mut rows)?;
        common.end_reading(&rows)?;
        asked.require_both_labels()?;
        Ok(asked)
    }

    /// Opens both models, the base first, without their weights.
    fn open(&self, asked: &Asked, clock: Clock) -> Result<[ModelText; 2]> {
        let base = ModelArgs { model: self.against.clone(), ..self.model.without_adapter() };
        let (base, _) = base.open_dated(Some(clock))?;
        let (tuned, _) = self.model.open_dated(Some(clock))?;
        for text in [&base, &tuned] {
            asked.check(text)?;
        }
        Ok([base, tuned])
    }

    fn check_out(&self) -> Result<()> {
        let Some(out) = &self.out else { return Ok(()) };
        check_file(out, IfExists::from_force(self.force), Check::is_file)?;
        let mut inputs = self.model.inputs();
        inputs.push(("--against", &self.against));
        inputs.extend(self.security.iter().map(|path| ("--security", path.as_path())));
        inputs.extend(self.task.iter().map(|path| ("--task", path.as_path())));
        inputs.extend(self.refusals.inputs());
        inputs.extend(self.guard.inputs());
        inputs.extend(self.attack.file.iter().map(|path| ("--attack", path.as_path())));
        check_apart(&[("--out", out)], &inputs)
    }
}

impl OnDevice for CheckCommand {
    fn model(&self) -> Option<PathBuf> {
        Some(self.against.clone())
    }

    fn resolve(&mut self, names: &mut Names<'_>) -> Result<()> {
        self.model.resolve(names)?;
        self.guard.resolve(names)?;
        names.model(&mut self.against)?;
        names.security(&mut self.security)?;
        names.file_if_any("--attack", &mut self.attack.file)?;
        names.file_if_any("--task", &mut self.task)
    }

    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        self.limits.check()?;
        self.check_out()?;
        let options = self.answers.options();
        options.check()?;
        let (asked, refusals) = (self.asked(common)?, self.refusals.list()?);
        let clock = self.model.date.map_or_else(Clock::now, Ok)?;
        let [base_text, tuned_text] = self.open(&asked, clock)?;
        let guard = self.guard.options().as_ref().map(GuardText::open).transpose()?;
        let guard_hash = guard.as_ref().map(GuardText::hash).transpose()?;
        let guard = guard.map(|guard| guard.load(backend.clone())).transpose()?;
        let guard = guard.as_ref().map(|guard| guard as &dyn Moderator);
        let measured = Measured { asked, options, refusals, guard, guard_hash, common };
        let (same_tokens, vocab) = (same_tokens(&base_text, &tuned_text)?, tuned_text.files.config.vocab);
        let attack = self.attack.file.as_deref().map(|path| (&self.attack, path));
        let mut rows = RowReader::new(&self.rows);
        let [base_attack, tuned_attack] =
            [&base_text, &tuned_text].map(|text| self.attack.read(text, common.seed, &mut rows, &backend));
        let (base_attack, tuned_attack) = (base_attack?, tuned_attack?);
        let base = match &self.cache {
            None => measured.evaluate(base_text, backend.clone(), base_attack.as_ref(), None)?,
            Some(dir) => {
                let mut inputs = measured.inputs(&base_text, attack)?;
                // As it is hashed in full, and not to be written: no saved file holds a prompt.
                let asked = json!([inputs["prompts"].take(), inputs["tasks"].take(), inputs["chat_template"].take()]);
                inputs["asked"] = blake3::hash(asked.to_string().as_bytes()).to_hex().as_str().into();
                let template = base_text.chat()?.template();
                let date = template.uses_clock().then_some(clock);
                let source = template.source().to_owned();
                let measure = || -> Result<Vec<KeptEvaluation>> {
                    let found = measured.evaluate(base_text, backend.clone(), base_attack.as_ref(), None)?;
                    Ok(found.into_iter().map(KeptEvaluation::from).collect())
                };
                let kept = KeptEvaluation::cached(dir, &inputs, (B::Float::NAME, date, &source), measure)?;
                kept.into_iter().map(Evaluation::from).collect()
            }
        };
        let Some((base, base_attacked)) = base.split_first() else { return Ok(()) };
        let known = |first: &&FirstTokens| same_tokens && first.tokens().iter().all(|id| (*id as usize) < vocab);
        let first = base.outcomes.first_tokens.as_ref().filter(known);
        if first.is_none() && !common.quiet {
            let why = match base.outcomes.first_tokens {
                None => "the base model refuses all prompts or none",
                Some(_) => "the models' tokenizers differ",
            };
            say(&format!(
                "note: {why}: the tuned model's AUROC is by the first tokens of its own answers, if at all\n"
            ));
        }
        let tuned = measured.evaluate(tuned_text, backend, tuned_attack.as_ref(), first)?;
        let Some((tuned, tuned_attacked)) = tuned.split_first() else { return Ok(()) };
        let named = self.model.adapter.as_ref().unwrap_or(&self.model.model);
        let mut check = Check::new((&self.against, base), (named, tuned), self.limits);
        base_attacked.iter().for_each(|found| check.add_attacked("base", &self.against, found));
        tuned_attacked.iter().for_each(|found| check.add_attacked("tuned", named, found));
        if let Some(out) = &self.out {
            check.save(out)?;
        }
        match common.json {
            true => print_json(&check)?,
            false => {
                let [measures, verdict, answers] = check_tables(&check);
                print_line(format!("{}\n{}\n{}", measures.text(), answers.text(), verdict.text()).trim_end())?;
                for table in agreement_tables(&check) {
                    print_line(table.text().trim_end())?;
                }
            }
        }
        check.verdict.require()
    }
}

/// Whether tokens mean the same in both models, as far as a sample of the vocabulary shows.
fn same_tokens(base: &ModelText, tuned: &ModelText) -> Result<bool> {
    let vocab = base.files.config.vocab.min(tuned.files.config.vocab) as u32;
    for id in (0..vocab).step_by((vocab as usize / 997).max(1)) {
        if base.tokenizer.decode(&[id])? != tuned.tokenizer.decode(&[id])? {
            return Ok(false);
        }
    }
    Ok(true)
}
