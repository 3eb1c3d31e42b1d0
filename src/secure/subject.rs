//! A model under study, and each step of the method on it.

use super::{
    Answer, ControlLabel, Drift, FirstTokens, Head, Judge, Judgement, Perplexity, PerturbationScorer, Probe,
    ProbeInput, ProbeOptions, Rate, RefusalList, ScorerInput, ScorerOptions, Snapshot, TaskScore, attack_success,
    drift, features, generate_answers, over_refusal, perplexity, probe_harmfulness, prompts_hash, render_prompts,
    snapshot, strict_compliance, task_score, train_probe,
};
use crate::backend::Backend;
use crate::data::{Chat, Example, Examples, Label, SecurityPrompt, Task};
use crate::engine::{Decoder, GenerateOptions};
use crate::error::Result;
use crate::model::{ChatTemplate, ModelDir, Tokenizer};
use crate::progress::{Observer, Progress};
use std::collections::BTreeMap;
use std::path::Path;

/// A model that can chat.
pub struct Subject<B: Backend> {
    /// Its directory.
    pub files: ModelDir,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its chat template.
    pub template: ChatTemplate,
    /// Its weights.
    pub decoder: Decoder<B>,
}

/// What is asked of a model to see what tuning did.
#[derive(Clone, Copy, Default)]
pub struct Questions<'a> {
    /// Harmful prompts give the attack success rate, benign ones over-refusal.
    pub prompts: &'a [SecurityPrompt],
    /// Answers that obey word for word, by prompt.
    pub strict: Option<&'a BTreeMap<String, Vec<String>>>,
    /// Checkable tasks.
    pub tasks: &'a [Task],
    /// Held-out conversations.
    pub heldout: &'a [Example],
    /// Grades the answers to harmful prompts; none = off. Sends prompts and answers to its endpoint.
    pub judge: Option<&'a Judge>,
    /// Reads the hidden states behind the answers to harmful prompts ([`probe_harmfulness`]); none = off.
    pub probe: Option<&'a Probe>,
}

/// How answers are made for an evaluation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AnswerLengths {
    /// To security prompts, in tokens.
    pub security: usize,
    /// To tasks, in tokens.
    pub task: usize,
    /// Key-value cache, in bytes.
    pub cache_bytes: u64,
}

/// What a model does. No text of an answer is in it.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Evaluation {
    /// Share of harmful prompts whose answer holds no refusal expression.
    pub asr: Option<Rate>,
    /// Share of harmful prompts that are obeyed word for word.
    pub strict_asr: Option<Rate>,
    /// Harmfulness score of the answers to harmful prompts, by a judge.
    #[serde(default)]
    pub harmfulness: Option<Harmfulness>,
    /// A probe's reading of the hidden states behind the same answers ([`probe_harmfulness`]): no judge, and not to be
    /// compared with one. It says what a conversation is about, not how useful an answer is.
    #[serde(default)]
    pub probe_harmfulness: Option<Harmfulness>,
    /// ASR by category of harm.
    pub asr_by_category: BTreeMap<String, Rate>,
    /// Share of benign prompts that are refused.
    pub over_refusal: Option<Rate>,
    /// Over-refusal by category.
    pub over_refusal_by_category: BTreeMap<String, Rate>,
    /// Share of tasks done.
    pub task: Option<TaskScore>,
    /// On the held-out conversations.
    pub perplexity: Option<Perplexity>,
}

/// What a judge, or a probe in its place, makes of the answers to harmful prompts.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Harmfulness {
    /// Mean score from 1 (refuses or harmless) to 5 (complies fully); none where nothing was scored.
    pub mean: Option<f64>,
    /// Answers that got a score.
    pub scored: usize,
    /// Answers without one.
    pub unscored: usize,
}

impl Harmfulness {
    /// The mean of what was scored.
    fn of(judgements: &[Judgement]) -> Self {
        let scores: Vec<f64> = judgements.iter().filter_map(|judgement| judgement.score).collect();
        let mean = (!scores.is_empty()).then(|| scores.iter().sum::<f64>() / scores.len() as f64);
        Self { mean, scored: scores.len(), unscored: judgements.len() - scores.len() }
    }
}

impl<B: Backend> Subject<B> {
    /// Opens a model directory on a backend.
    ///
    /// # Errors
    /// As [`ModelDir::open`]; [`crate::error::Error::Memory`] where the weights do not fit the device.
    pub fn open(backend: B, dir: &Path, chat_template: Option<&Path>) -> Result<Self> {
        let files = ModelDir::open(dir)?;
        let tokenizer = files.tokenizer()?;
        let template = files.chat_template(chat_template)?;
        let decoder = Decoder::new(backend, files.config.clone(), |id, shape| files.tensor(id, shape))?;
        Ok(Self { files, tokenizer, template, decoder })
    }

    /// Tokenised training conversations.
    ///
    /// # Errors
    /// As [`Examples::read`].
    pub fn examples(&self, path: &Path, max_length: usize) -> Result<Examples> {
        let chat = Chat::new(&self.template, &self.tokenizer, &self.files.config.eos);
        Examples::read(path, &chat, max_length)
    }

    /// Prompts as the model sees them.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] where the template refuses a prompt.
    pub fn render<'p>(&self, prompts: impl IntoIterator<Item = &'p str>) -> Result<Vec<Vec<u32>>> {
        render_prompts(&self.template, &self.tokenizer, prompts, None)
    }

    /// Greedy answers.
    ///
    /// # Errors
    /// As [`generate_answers`].
    pub fn answers(
        &self,
        prompts: &[Vec<u32>],
        max_new_tokens: usize,
        cache_bytes: u64,
        task: &str,
        observer: Observer<'_>,
    ) -> Result<Vec<Answer>> {
        let stop = self.files.config.eos.clone();
        let options = GenerateOptions { max_new_tokens, cache_bytes, stop, ..GenerateOptions::default() };
        generate_answers(&self.decoder, &self.tokenizer, prompts, &options, task, observer)
    }

    /// Trains the probes on every layer; the model's own answers of `answer_tokens` tokens tell what it refuses.
    ///
    /// # Errors
    /// As [`train_probe`]; a failing device.
    pub fn probe(
        &self,
        prompts: &[SecurityPrompt],
        options: &ProbeOptions,
        answer_tokens: usize,
        refusals: &RefusalList,
        observer: Observer<'_>,
    ) -> Result<Probe> {
        let tokens = self.render(prompts.iter().map(|p| p.prompt.as_str()))?;
        let answers = self.answers(&tokens, answer_tokens, 1 << 30, "own answers", observer)?;
        let refused: Vec<bool> = answers.iter().map(|a| refusals.is_refusal(&a.text)).collect();
        let first = FirstTokens::learn(answers.iter().zip(&refused).filter_map(|(a, r)| Some((a.first?, *r))));
        let batch_tokens = options.batch_tokens;
        let features = features(&self.decoder, &tokens, batch_tokens, observer)?;
        let control = ControlLabel::choose(prompts);
        let control_labels = control.as_ref().map(|c| c.labels(prompts));
        let input = ProbeInput {
            features: &features,
            labels: prompts,
            refused: Some(&refused),
            first_tokens: first.as_ref(),
            control: control.as_ref().zip(control_labels.as_deref()),
            model_hash: self.files.hash()?,
            prompts_hash: &prompts_hash(&tokens, prompts),
        };
        train_probe(input, options, observer)
    }

    /// What map and search are made with. `update` perturbations read the tuned directory that they name.
    ///
    /// # Errors
    /// As [`PerturbationScorer::new`].
    pub fn scorer<'a>(
        &'a self,
        probe: &'a Probe,
        prompts: &'a [SecurityPrompt],
        options: ScorerOptions,
    ) -> Result<PerturbationScorer<'a, B>> {
        let tokens = self.render(prompts.iter().map(|p| p.prompt.as_str()))?;
        let control = probe.about.control.as_ref().map(|c| c.labels(prompts));
        let kind = options.kind.engine_kind(&self.files)?;
        let input = ScorerInput {
            decoder: &self.decoder,
            model_hash: self.files.hash()?,
            probe,
            prompts: &tokens,
            labels: prompts,
            control: control.as_deref(),
            kind,
        };
        PerturbationScorer::new(input, options)
    }

    /// Hidden states and refusal log-odds of prompts, as a probe's drift needs them.
    ///
    /// # Errors
    /// As [`snapshot`].
    pub fn snapshot(&self, probe: &Probe, prompts: &[SecurityPrompt], observer: Observer<'_>) -> Result<Snapshot> {
        let tokens = self.render(prompts.iter().map(|p| p.prompt.as_str()))?;
        let first = probe.about.first_tokens.as_ref();
        snapshot(&self.decoder, &tokens, first, 8192, observer)
    }

    /// Drift of this model against the one that `base` was read from.
    ///
    /// # Errors
    /// As [`drift`].
    pub fn drift(
        &self,
        probe: &Probe,
        prompts: &[SecurityPrompt],
        base: &Snapshot,
        observer: Observer<'_>,
    ) -> Result<Drift> {
        drift(probe, base, &self.snapshot(probe, prompts, observer)?, prompts)
    }

    /// Answers everything that is asked, and scores it. Texts are dropped.
    ///
    /// # Errors
    /// A failing device, or a judge that does not answer.
    pub fn evaluate(
        &self,
        questions: &Questions<'_>,
        lengths: AnswerLengths,
        refusals: &RefusalList,
        observer: Observer<'_>,
    ) -> Result<Evaluation> {
        let mut evaluation = Evaluation::default();
        for label in [Label::Harmful, Label::Benign] {
            let prompts: Vec<&SecurityPrompt> = questions.prompts.iter().filter(|p| p.label == label).collect();
            if prompts.is_empty() {
                continue;
            }
            let tokens = self.render(prompts.iter().map(|p| p.prompt.as_str()))?;
            let what = if label == Label::Harmful { "harmful prompts" } else { "benign prompts" };
            let answers = self.answers(&tokens, lengths.security, lengths.cache_bytes, what, observer)?;
            let texts: Vec<&str> = answers.iter().map(|a| a.text.as_str()).collect();
            let mut categories: BTreeMap<String, Vec<&str>> = BTreeMap::new();
            for (prompt, text) in prompts.iter().zip(&texts) {
                if let Some(category) = &prompt.category {
                    categories.entry(category.clone()).or_default().push(text);
                }
            }
            let by = |rate: &dyn Fn(&[&str]) -> Rate| {
                categories.iter().map(|(name, texts)| (name.clone(), rate(texts))).collect()
            };
            if label == Label::Harmful {
                evaluation.asr = Some(attack_success(&texts, refusals));
                evaluation.asr_by_category = by(&|texts| attack_success(texts, refusals));
                if let Some(judge) = questions.judge {
                    let asked = prompts.iter().map(|p| p.prompt.as_str()).zip(texts.iter().copied());
                    evaluation.harmfulness = Some(judged(judge, asked, observer)?);
                }
                if let Some(probe) = questions.probe {
                    let judgements = self.probed(probe, &tokens, &answers, refusals, observer)?;
                    evaluation.probe_harmfulness = Some(Harmfulness::of(&judgements));
                }
                if let Some(strict) = questions.strict {
                    let obeyed: Vec<Vec<String>> =
                        prompts.iter().map(|p| strict.get(&p.prompt).cloned().unwrap_or_default()).collect();
                    evaluation.strict_asr = Some(strict_compliance(&texts, &obeyed));
                }
            } else {
                evaluation.over_refusal = Some(over_refusal(&texts, refusals));
                evaluation.over_refusal_by_category = by(&|texts| over_refusal(texts, refusals));
            }
        }
        if !questions.tasks.is_empty() {
            let tokens = self.render(questions.tasks.iter().map(|t| t.prompt.as_str()))?;
            let answers = self.answers(&tokens, lengths.task, lengths.cache_bytes, "tasks", observer)?;
            let judged = questions.tasks.iter().zip(&answers);
            evaluation.task = Some(task_score(judged.map(|(t, a)| (t.matches(&a.text), t.category.as_deref()))));
        }
        if !questions.heldout.is_empty() {
            evaluation.perplexity = Some(perplexity(&self.decoder, questions.heldout, 4096, observer)?);
        }
        Ok(evaluation)
    }

    /// [`probe_harmfulness`] of each answer, at the probe's metric layer, behind the last token of prompt and answer.
    fn probed(
        &self,
        probe: &Probe,
        prompts: &[Vec<u32>],
        answers: &[Answer],
        refusals: &RefusalList,
        observer: Observer<'_>,
    ) -> Result<Vec<Judgement>> {
        probe.check_shape(&self.files.config)?;
        let longest = self.decoder.longest_context();
        let conversations: Vec<Vec<u32>> = prompts
            .iter()
            .zip(answers)
            .map(|(prompt, answer)| prompt.iter().chain(&answer.tokens).copied().take(longest).collect())
            .collect();
        let read = features(&self.decoder, &conversations, 8192, observer)?;
        let layer = probe.about.metric_layer;
        let logits = probe.logits(layer, &Head::Harmful, &read.layers[layer])?;
        Ok(answers.iter().zip(logits).map(|(a, logit)| probe_harmfulness(&a.text, logit, refusals)).collect())
    }
}

fn judged<'t>(
    judge: &Judge,
    asked: impl ExactSizeIterator<Item = (&'t str, &'t str)>,
    observer: Observer<'_>,
) -> Result<Harmfulness> {
    let total = asked.len();
    let mut judgements = Vec::with_capacity(total);
    for (i, (prompt, answer)) in asked.enumerate() {
        judgements.push(judge.judge(prompt, answer)?);
        observer(Progress::new("judge", i + 1, total));
    }
    Ok(Harmfulness::of(&judgements))
}
