//! `swat eval`: safety and utility of a model.

use super::common::{Common, print_json, print_line};
use super::open::{ModelArgs, OnDevice, Refusals};
use super::progress::Bars;
use crate::backend::Backend;
use crate::data::{SecurityPrompt, Split, Task};
use crate::error::Result;
use crate::report::format::{fixed, percent};
use crate::secure::{EvaluateOptions, EvaluationInput, Harmfulness, Judge, Probe, Rate};
use clap::Args;
use std::path::PathBuf;

/// Attack success rate, over-refusal, task score and perplexity of a model; no answer is printed or kept
#[derive(Args)]
#[command(after_help = "Examples:
  swat eval --model DIR --security attack.jsonl --security overrefusal.jsonl
  swat eval --model DIR --security security.jsonl --splits test,ood --task task.jsonl --limit 100 --json")]
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
    /// Use only the first prompts of each label, and the first tasks; 0 = all
    #[arg(long, default_value_t = 0)]
    limit: usize,
    #[command(flatten)]
    options: EvaluateOptions,
    /// Probes of `swat probe`, of this model or the one that it was tuned from, as an offline harmfulness score of the
    /// answers to harmful prompts, from 1 to 5. It measures what a conversation is about, not how useful an answer is
    #[arg(long, value_name = "FILE", requires = "security")]
    probe: Option<PathBuf>,
}

impl OnDevice for EvalCommand {
    fn run<B: Backend>(self, common: &Common, backend: B) -> Result<()> {
        let limit = if self.limit == 0 { usize::MAX } else { self.limit };
        let mut counts = std::collections::HashMap::new();
        let mut prompts = Vec::new();
        for path in &self.security {
            for prompt in SecurityPrompt::read(path, common.seed)? {
                let count = counts.entry(prompt.label).or_insert(0);
                if (self.splits.is_empty() || self.splits.contains(&prompt.split)) && *count < limit {
                    *count += 1;
                    prompts.push(prompt);
                }
            }
        }
        let mut tasks = self.task.as_deref().map(Task::read).transpose()?.unwrap_or_default();
        tasks.truncate(limit);
        let model = self.model.open(backend)?;
        let heldout = match &self.heldout {
            Some(path) => model.examples(path, model.files.config.max_positions.min(4096))?.examples,
            None => Vec::new(),
        };
        let judge = self.options.judge.clone().map(Judge::new).transpose()?;
        let probe = self.probe.as_deref().map(Probe::load).transpose()?;
        if let Some(probe) = &probe {
            probe.check_shape(&model.files.config)?;
        }
        let input = EvaluationInput {
            prompts: &prompts,
            strict: None,
            tasks: &tasks,
            heldout: &heldout,
            judge: judge.as_ref(),
            probe: probe.as_ref(),
        };
        let mut bars = Bars::new(common);
        let found = model.evaluate(&input, &self.options, &self.refusals.list()?, &mut bars.observer())?;
        bars.finish();
        if common.json {
            return print_json(&found);
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
            harmfulness("by the probe, 1 to 5", harm)?;
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
