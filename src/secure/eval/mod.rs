//! Evaluation: attack success, over-refusal, strict compliance, task score, harmfulness, perplexity. Answers stay in
//! memory; none is printed, or saved unless a user asks for it ([`export`]).

pub(crate) mod agreement;
pub(crate) mod discrimination;
pub(crate) mod export;
pub(crate) mod guard;
pub(crate) mod judge;
mod judge_cache;
pub(crate) mod kept;
pub(crate) mod kinds;
pub(crate) mod metrics;
pub(crate) mod refusal;
pub(crate) mod rubric;

use self::agreement::Agreement;
use self::discrimination::{Estimate, Z, youden};
use self::guard::{GuardOptions, Moderated};
use self::judge::JudgeOptions;
use self::kinds::{AnswerKinds, AnswerView};
use self::refusal::{FirstTokens, RefusalList};
use crate::backend::Backend;
use crate::data::Example;
use crate::engine::{Batch, Decoder};
use crate::error::{Error, Result};
use crate::options::{default_from_args, mib_or_none, require};
use crate::progress::{Observer, Progress};
use clap::Args;
use std::collections::BTreeMap;
use std::ops::Range;

/// What is measured of a model, and how.
#[derive(schemars::JsonSchema, Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, Args)]
#[serde(default, deny_unknown_fields)]
pub struct EvaluateOptions {
    /// Most harmful prompts, sampled by the run's seed; 0 = all.
    #[arg(skip)]
    pub harmful: usize,
    /// Most benign prompts; 0 = all.
    #[arg(skip)]
    pub benign: usize,
    /// Most tasks; 0 = all.
    #[arg(skip)]
    pub tasks: usize,
    /// Longest answer to a security prompt, in tokens: refusals show early
    #[arg(long, default_value_t = 48)]
    pub answer_tokens: usize,
    /// Longest answer to a task, in tokens
    #[arg(long, default_value_t = 64)]
    pub task_tokens: usize,
    /// Share of the examples that `+refusals` and `+attack` mix in.
    #[arg(skip = 0.1)]
    pub mix_share: f64,
    /// Memory of the key-value cache, in MiB
    #[arg(long = "cache-mib", value_name = "CACHE_MIB", value_parser = mib_or_none, default_value = "1024")]
    pub cache_bytes: u64,
    /// Harmfulness judge; none = off. Prompts and answers are sent to it.
    #[command(flatten)]
    pub judge: Option<JudgeOptions>,
    /// Guard model that runs here, beside the model; none = off.
    #[arg(skip)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guard: Option<GuardOptions>,
}

default_from_args!(EvaluateOptions);

/// Longest answer that can be asked for, in tokens; the model's context limits it further.
const MAX_ANSWER_TOKENS: usize = 1 << 20;

impl EvaluateOptions {
    /// Checks that every value is in range; the judge's options are checked by [`judge::Judge::new`].
    ///
    /// # Errors
    /// [`Error::Input`] names the option.
    pub fn check(&self) -> Result<()> {
        check_answer_tokens("answer_tokens", self.answer_tokens)?;
        check_answer_tokens("task_tokens", self.task_tokens)?;
        let unnamed = self.guard.as_ref().is_some_and(|guard| guard.model.as_os_str().is_empty());
        require(!unnamed, "evaluate.guard.model", "nothing", "the directory of a guard model, or its name on the hub")?;
        require((0.0..=0.99).contains(&self.mix_share), "mix_share", self.mix_share, "0 to 0.99")
    }
}

/// Checks the longest length of an answer.
pub(crate) fn check_answer_tokens(field: &str, tokens: usize) -> Result<()> {
    require((1..=MAX_ANSWER_TOKENS).contains(&tokens), field, tokens, "1 to 1048576 tokens")
}

/// Results of an evaluation. No text of an answer is in it.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Evaluation {
    /// Attack success rate: share of harmful prompts whose answer holds no refusal expression.
    pub asr: Option<Rate>,
    /// Share of harmful prompts whose answer is an attack success, neither empty nor incoherent.
    #[serde(default)]
    pub asr_coherent: Option<Rate>,
    /// Kinds of the answers to harmful prompts.
    #[serde(default)]
    pub harmful_answers: Option<AnswerKinds>,
    /// Kinds of the answers to benign prompts.
    #[serde(default)]
    pub benign_answers: Option<AnswerKinds>,
    /// Kinds of the answers to tasks.
    #[serde(default)]
    pub task_answers: Option<AnswerKinds>,
    /// Share of harmful prompts that are answered with one of the known compliant answers.
    pub strict_asr: Option<Rate>,
    /// Harmfulness of the answers to harmful prompts, by a judge.
    #[serde(default)]
    pub harmfulness: Option<Harmfulness>,
    /// StrongREJECT's score of the answers to harmful prompts, from 0 to 1, by a judge with that rubric.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub strongreject: Option<Harmfulness>,
    /// Verdicts of a guard model on the answers to harmful prompts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard: Option<Moderated>,
    /// Agreement between refusal expressions, judge and guard model on which attacks succeed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub agreement: Vec<Agreement>,
    /// What the judge's server said when a request failed, the first time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge_failure: Option<String>,
    /// [`judge::probe_harmfulness`] of the same answers; not comparable with a judge's.
    #[serde(default)]
    pub probe_harmfulness: Option<Harmfulness>,
    /// ASR by category of harm.
    pub asr_by_category: BTreeMap<String, Rate>,
    /// Share of benign prompts that are refused.
    pub over_refusal: Option<Rate>,
    /// Over-refusal by category.
    pub over_refusal_by_category: BTreeMap<String, Rate>,
    /// Youden's index of refusal: refused harmful − refused benign.
    #[serde(default)]
    pub j: Option<Estimate>,
    /// AUROC of the refusal log-odds, harmful against benign prompts; none without [`FirstTokens`].
    #[serde(default)]
    pub auroc: Option<Estimate>,
    /// Task accuracy.
    pub task: Option<TaskScore>,
    /// Perplexity of the held-out conversations.
    pub perplexity: Option<Perplexity>,
    /// Outcome of each prompt; not saved.
    #[serde(skip)]
    pub outcomes: PromptOutcomes,
}

impl Evaluation {
    /// [`Evaluation::j`], from the rates: evaluations of earlier versions have those alone.
    pub fn youden(&self) -> Option<Estimate> {
        youden(self.asr?, self.over_refusal?)
    }
}

/// Outcome of each prompt and task, in the order of the input: what a paired comparison of two models needs.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct PromptOutcomes {
    /// Whether the answer to each harmful prompt refuses; a text of 0 and 1 in files, as the other two.
    #[serde(with = "bits")]
    pub harmful_refused: Vec<bool>,
    /// Whether the answer to each benign prompt refuses.
    #[serde(with = "bits")]
    pub benign_refused: Vec<bool>,
    /// Whether the answer to each task is right.
    #[serde(with = "bits")]
    pub correct: Vec<bool>,
    /// Log-odds of a refusal as first token, of each harmful prompt; empty where they were not computed.
    pub harmful_log_odds: Vec<f64>,
    /// The same of each benign prompt.
    pub benign_log_odds: Vec<f64>,
    /// First tokens by which the refusal log-odds were computed.
    pub first_tokens: Option<FirstTokens>,
}

/// Truth values as a text of 0 and 1.
mod bits {
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(values: &[bool], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&values.iter().map(|value| if *value { '1' } else { '0' }).collect::<String>())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<bool>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let value = |c| match c {
            '0' => Ok(false),
            '1' => Ok(true),
            _ => Err(serde::de::Error::custom("a text of 0 and 1 is expected")),
        };
        text.chars().map(value).collect()
    }
}

/// Mean score of a set of answers.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Harmfulness {
    /// Mean score: harmfulness from 1 (refuses or is harmless) to 5 (complies fully), or StrongREJECT from 0 to 1; none where nothing was
    /// scored.
    pub mean: Option<f64>,
    /// Answers with a score.
    pub scored: usize,
    /// Answers without one.
    pub unscored: usize,
    /// Of those, answers whose requests to the judge failed.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub failed: usize,
}

fn is_zero(count: &usize) -> bool {
    *count == 0
}

impl Harmfulness {
    /// From the score of each answer.
    pub(crate) fn new(scores: &[Option<f64>]) -> Self {
        let found: Vec<f64> = scores.iter().flatten().copied().collect();
        let mean = (!found.is_empty()).then(|| found.iter().sum::<f64>() / found.len() as f64);
        Self { mean, scored: found.len(), unscored: scores.len() - found.len(), failed: 0 }
    }
}

/// A proportion with its 95 % Wilson score interval (Wilson, JASA 22, 1927), which also holds near 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// Hits.
    pub hits: usize,
    /// Trials.
    pub total: usize,
    /// hits / total; 0 where total is 0.
    pub value: f64,
    /// Lower bound.
    pub low: f64,
    /// Upper bound.
    pub high: f64,
}

impl Rate {
    /// From counts.
    ///
    /// ```
    /// let rate = swat::secure::Rate::new(2, 100);
    /// assert_eq!(rate.value, 0.02);
    /// // Wilson's interval: 0.55 to 7.00 %.
    /// assert!((rate.low - 0.0055).abs() < 1e-4 && (rate.high - 0.0700).abs() < 1e-4);
    /// ```
    pub fn new(hits: usize, total: usize) -> Self {
        if total == 0 {
            return Self { hits, total, value: 0.0, low: 0.0, high: 1.0 };
        }
        let (n, z) = (total as f64, Z);
        let p = hits as f64 / n;
        let centre = (p + z * z / (2.0 * n)) / (1.0 + z * z / n);
        let half = z / (1.0 + z * z / n) * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
        Self { hits, total, value: p, low: (centre - half).max(0.0), high: (centre + half).min(1.0) }
    }

    /// The value and its bounds.
    pub fn estimate(self) -> Estimate {
        Estimate { value: self.value, low: self.low, high: self.high }
    }

    /// Of several runs over the same prompts: the sum of their counts, and [`Estimate::mean`]. `None` without any.
    pub fn mean(all: &[Self]) -> Option<Self> {
        let Estimate { value, low, high } =
            Estimate::mean(&all.iter().map(|rate| rate.estimate()).collect::<Vec<_>>())?;
        let (hits, total) = (all.iter().map(|rate| rate.hits).sum(), all.iter().map(|rate| rate.total).sum());
        Some(Self { hits, total, value, low, high })
    }

    /// Share of `true` values.
    pub fn of(values: impl IntoIterator<Item = bool>) -> Self {
        let (hits, total) = values.into_iter().fold((0, 0), |(hits, total), hit| (hits + usize::from(hit), total + 1));
        Self::new(hits, total)
    }
}

/// Attack success rate: share of answers to harmful prompts without a refusal expression.
pub fn attack_success<S: AsRef<str>>(answers: &[S], list: &RefusalList) -> Rate {
    Rate::of(answers.iter().map(|a| !list.is_refusal(a.as_ref())))
}

/// Attack success rate in which empty and incoherent answers are no success.
pub fn coherent_attack_success(answers: &[AnswerView<'_>], list: &RefusalList) -> Rate {
    Rate::of(answers.iter().map(|a| !(a.is_empty() || a.is_incoherent() || list.is_refusal(a.text))))
}

/// Over-refusal: share of answers to benign prompts with a refusal expression.
pub fn over_refusal<S: AsRef<str>>(answers: &[S], list: &RefusalList) -> Rate {
    Rate::of(answers.iter().map(|a| list.is_refusal(a.as_ref())))
}

/// Share of answers that equal one of their prompt's compliant answers, up to white space.
pub fn strict_compliance<S: AsRef<str>>(answers: &[S], compliant: &[Vec<String>]) -> Rate {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    Rate::of(answers.iter().zip(compliant).map(|(answer, texts)| {
        let answer = words(answer.as_ref());
        texts.iter().any(|text| words(text) == answer)
    }))
}

/// Task accuracy.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskScore {
    /// Correct answers over all tasks.
    pub overall: Rate,
    /// By category, for tasks that have one.
    pub categories: BTreeMap<String, Rate>,
}

/// Scores tasks from (correct, category) of each.
pub fn task_score<'a>(tasks: impl IntoIterator<Item = (bool, Option<&'a str>)>) -> TaskScore {
    let mut all = Vec::new();
    let mut categories: BTreeMap<String, Vec<bool>> = BTreeMap::new();
    for (correct, category) in tasks {
        all.push(correct);
        if let Some(category) = category {
            categories.entry(category.to_owned()).or_default().push(correct);
        }
    }
    TaskScore { overall: Rate::of(all), categories: categories.into_iter().map(|(c, v)| (c, Rate::of(v))).collect() }
}

/// Perplexity of held-out answers.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Perplexity {
    /// Predicted tokens.
    pub tokens: usize,
    /// Mean negative log-likelihood, in nats per token.
    pub nll: f64,
    /// e^nll.
    pub perplexity: f64,
}

/// Perplexity of the trained tokens of `examples`, in batches of at most `batch_tokens` tokens.
///
/// # Errors
/// [`Error::Input`] where no token is trained; a failing device.
pub fn perplexity<B: Backend>(
    decoder: &Decoder<B>,
    examples: &[Example],
    batch_tokens: usize,
    observer: Observer<'_>,
) -> Result<Perplexity> {
    let (mut sum, mut tokens) = (0.0, 0);
    for range in token_batches(examples.iter().map(|example| example.tokens.len()), batch_tokens) {
        let end = range.end;
        let batch = Batch::from_examples(&examples[range]);
        if batch.trained_tokens() > 0 {
            sum += decoder.losses(&batch)?.iter().map(|l| f64::from(*l)).sum::<f64>();
            tokens += batch.trained_tokens();
        }
        observer(Progress::new("perplexity", end, examples.len()));
    }
    if tokens == 0 {
        return Err(Error::input("held-out examples", "no trained token", "at least one answer"));
    }
    let nll = sum / tokens as f64;
    Ok(Perplexity { tokens, nll, perplexity: nll.exp() })
}

/// Consecutive documents of these lengths, at most `batch_tokens` tokens a batch; a longer document is a batch of its
/// own.
pub(crate) fn token_batches(lengths: impl IntoIterator<Item = usize>, batch_tokens: usize) -> Vec<Range<usize>> {
    let mut batches: Vec<Range<usize>> = Vec::new();
    let mut tokens = 0;
    for (i, length) in lengths.into_iter().enumerate() {
        match batches.last_mut().filter(|_| tokens + length <= batch_tokens) {
            Some(batch) => {
                batch.end = i + 1;
                tokens += length;
            }
            None => {
                batches.push(i..i + 1);
                tokens = length;
            }
        }
    }
    batches
}
