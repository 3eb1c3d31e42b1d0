//! `swat eval`: what a model does when it is asked.

use super::open::{ModelArgs, OnDevice, Refusals};
use super::progress::Bars;
use super::{Common, print_json, print_line};
use crate::backend::Backend;
use crate::data::{SecurityPrompt, Split, Task};
use crate::error::{Error, Result};
use crate::report::format::{fixed, percent};
use crate::secure::{AnswerLengths, Harmfulness, Judge, JudgeOptions, Probe, Questions, Rate};
use clap::Args;
use std::path::PathBuf;

/// Attack success rate, over-refusal, task score and perplexity of a model; no answer is printed or kept
#[derive(Args)]
#[command(after_help = "Examples:
  swat eval --model DIR --security attack.jsonl --security overrefusal.jsonl
  swat eval --model DIR --security security.jsonl --splits test,ood --task task.jsonl --limit 100 --json")]
pub(super) struct EvalCommand {
    #[command(flatten)]
    common: Common,
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    refusals: Refusals,
    /// Labelled prompts: harmful ones give the attack success rate, benign ones over-refusal
    #[arg(long, value_name = "FILE", required_unless_present_any = ["task", "heldout"])]
    security: Vec<PathBuf>,
    /// Only these splits of --security
    #[arg(long, value_delimiter = ',')]
    splits: Vec<String>,
    /// Checkable tasks
    #[arg(long, value_name = "FILE")]
    task: Option<PathBuf>,
    /// Conversations for the perplexity
    #[arg(long, value_name = "FILE")]
    heldout: Option<PathBuf>,
    /// First so many prompts of each label, and tasks; 0 = all
    #[arg(long, default_value_t = 0)]
    limit: usize,
    /// Longest answer to a security prompt
    #[arg(long, default_value_t = 48)]
    answer_tokens: usize,
    /// Longest answer to a task
    #[arg(long, default_value_t = 64)]
    task_tokens: usize,
    /// Grade harmfulness from 1 to 5 by a judge behind an OpenAI-compatible endpoint, such as http://localhost:8000/v1;
    /// prompts and answers are sent there
    #[arg(long, value_name = "URL", requires = "judge_model")]
    judge_url: Option<String>,
    /// Name of the judging model
    #[arg(long, value_name = "NAME", requires = "judge_url")]
    judge_model: Option<String>,
    /// Environment variable that holds the judge's key
    #[arg(long, value_name = "VARIABLE", requires = "judge_url")]
    judge_key_env: Option<String>,
    /// Longest wait for one of the judge's replies, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = JudgeOptions::default().timeout_seconds, requires = "judge_url")]
    judge_timeout: f64,
    /// Tries after a failed one, with doubling waits from 1 second
    #[arg(long, value_name = "N", default_value_t = JudgeOptions::default().retries, requires = "judge_url")]
    judge_retries: u32,
    /// Probes of `swat probe`, on this model or the one that it was tuned from: their reading of the hidden states behind the
    /// answers to harmful prompts, from 1 to 5. No judge: it sees what a conversation is about, not how useful an answer is
    #[arg(long, value_name = "FILE", requires = "security")]
    probe: Option<PathBuf>,
    /// Memory for keys and values, in MiB
    #[arg(long, default_value_t = 1024)]
    cache_mib: u64,
}

impl OnDevice for EvalCommand {
    fn common(&self) -> &Common {
        &self.common
    }

    fn run<B: Backend>(self, backend: B) -> Result<()> {
        let limit = if self.limit == 0 { usize::MAX } else { self.limit };
        let splits = self
            .splits
            .iter()
            .map(|name| {
                let split = Split::ALL.into_iter().find(|s| s.name() == name);
                split.ok_or_else(|| Error::input("--splits", name, "train, valid, test or ood"))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut counts = std::collections::HashMap::new();
        let mut prompts = Vec::new();
        for path in &self.security {
            for prompt in SecurityPrompt::read(path, self.common.seed)? {
                let count = counts.entry(prompt.label).or_insert(0);
                if (splits.is_empty() || splits.contains(&prompt.split)) && *count < limit {
                    *count += 1;
                    prompts.push(prompt);
                }
            }
        }
        let mut tasks = self.task.as_deref().map(Task::read).transpose()?.unwrap_or_default();
        tasks.truncate(limit);
        let subject = self.model.subject(backend)?;
        let heldout = match &self.heldout {
            Some(path) => subject.examples(path, subject.files.config.max_positions.min(4096))?.examples,
            None => Vec::new(),
        };
        let judge = match (self.judge_url, self.judge_model) {
            (Some(url), Some(model)) => {
                let (key_env, timeout_seconds, retries) = (self.judge_key_env, self.judge_timeout, self.judge_retries);
                let options = JudgeOptions { url, model, key_env, timeout_seconds, retries, ..JudgeOptions::default() };
                Some(Judge::new(options)?)
            }
            _ => None,
        };
        let probe = self.probe.as_deref().map(Probe::load).transpose()?;
        if let Some(probe) = &probe {
            probe.check_shape(&subject.files.config)?;
        }
        let questions = Questions {
            prompts: &prompts,
            strict: None,
            tasks: &tasks,
            heldout: &heldout,
            judge: judge.as_ref(),
            probe: probe.as_ref(),
        };
        let lengths =
            AnswerLengths { security: self.answer_tokens, task: self.task_tokens, cache_bytes: self.cache_mib << 20 };
        let mut bars = Bars::new(&self.common);
        let found = subject.evaluate(&questions, lengths, &self.refusals.list()?, &mut bars.observer())?;
        bars.finish();
        if self.common.json {
            return print_json(&serde_json::to_value(&found).unwrap_or_default());
        }
        let rate = |what: &str, rate: &Rate| {
            let interval = format!("{} to {}", percent(rate.low, 1), percent(rate.high, 1));
            print_line(&format!("{what:<24} {:>7}  ({interval}, n = {})", percent(rate.value, 1), rate.total))
        };
        if let Some(asr) = &found.asr {
            rate("attack success", asr)?;
        }
        for (category, asr) in &found.asr_by_category {
            rate(&format!("  {category}"), asr)?;
        }
        let harmfulness = |what: &str, harm: &Harmfulness| {
            let mean = harm.mean.map_or("none".into(), |mean| fixed(mean, 2));
            let (scored, unscored) = (harm.scored, harm.unscored);
            print_line(&format!("{what:<24} {mean:>7}  (n = {scored}, {unscored} without a score)"))
        };
        if let Some(harm) = &found.harmfulness {
            harmfulness("harmfulness, 1 to 5", harm)?;
        }
        if let Some(harm) = &found.probe_harmfulness {
            harmfulness("probe's reading, 1 to 5", harm)?;
        }
        if let Some(refused) = &found.over_refusal {
            rate("over-refusal", refused)?;
        }
        if let Some(task) = &found.task {
            rate("task", &task.overall)?;
            for (category, score) in &task.categories {
                rate(&format!("  {category}"), score)?;
            }
        }
        if let Some(perplexity) = &found.perplexity {
            print_line(&format!(
                "perplexity               {:>7}  ({} tokens)",
                fixed(perplexity.perplexity, 3),
                perplexity.tokens
            ))?;
        }
        Ok(())
    }
}
