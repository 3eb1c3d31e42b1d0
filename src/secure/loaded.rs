//! A model directory opened on a device, and the steps of the method on it.

use super::eval::agreement::Agreement;
use super::eval::discrimination::auroc_estimate;
use super::eval::export::{Export, Told};
use super::eval::guard::{Moderated, Moderator};
use super::eval::judge::{Judge, probe_harmfulness};
use super::eval::kinds::{AnswerKinds, AnswerView};
use super::eval::refusal::{FirstTokens, RefusalList};
use super::eval::rubric::Rubric;
use super::eval::{
    EvaluateOptions, Evaluation, Harmfulness, Rate, attack_success, coherent_attack_success, over_refusal, perplexity,
    strict_compliance, task_score,
};
use super::probe::control::ControlLabel;
use super::probe::drift::{Drift, drift};
use super::probe::features::{Snapshot, features, prompts_hash, snapshot};
use super::probe::train::{ProbeInput, ProbeOptions, train_probe};
use super::probe::{Head, Probe};
use super::robustness::RobustnessOptions;
use super::robustness::conflict::conflict_map;
use super::robustness::map::{MapInputs, RobustnessMap};
use super::robustness::noise::Noise;
use super::robustness::scorer::{PerturbationScorer, ScorerInput, ScorerOptions};
use super::robustness::step::{PlannedStep, StepOptions};
use super::text::ModelText;
use crate::backend::Backend;
use crate::data::{Example, SecurityPrompt, Task};
use crate::engine::{Decoder, Finish, GenerateOptions, Generation, NoiseKind};
use crate::error::Result;
use crate::progress::{Observer, Progress};
use std::collections::BTreeMap;
use std::path::Path;

/// Tokens of an answer by which a refusal is recognised.
pub const REFUSAL_TOKENS: usize = 24;
/// Tokens of a forward pass that reads hidden states.
const FEATURE_TOKENS: usize = 8192;

/// A model directory with its weights on a device.
pub struct LoadedModel<B: Backend> {
    /// Files, tokenizer and chat template.
    pub text: ModelText,
    /// The decoder with its weights on the device.
    pub decoder: Decoder<B>,
}

/// Inputs of an evaluation; measures without input are left out.
#[derive(Clone, Copy, Default)]
pub struct EvaluationInput<'a> {
    /// Harmful prompts give the attack success rate, benign ones over-refusal.
    pub prompts: &'a [SecurityPrompt],
    /// Compliant answers of harmful prompts, by prompt, for the strict attack success rate.
    pub strict: Option<&'a BTreeMap<String, Vec<String>>>,
    /// Checkable tasks.
    pub tasks: &'a [Task],
    /// Held-out conversations, for the perplexity.
    pub heldout: &'a [Example],
    /// Grades the answers to harmful prompts, which are sent to its endpoint.
    pub judge: Option<&'a Judge>,
    /// A guard model that judges the answers to harmful prompts.
    pub guard: Option<&'a dyn Moderator>,
    /// Receives the security prompts with their answers.
    pub export: Option<&'a Export>,
    /// Scores the answers to harmful prompts offline ([`probe_harmfulness`]).
    pub probe: Option<&'a Probe>,
    /// First tokens for the refusal log-odds, of this model or the one that it was tuned from; learned from this model's
    /// own answers if not given.
    pub first_tokens: Option<&'a FirstTokens>,
}

/// A generated answer.
struct Answer {
    text: String,
    tokens: Vec<u32>,
    finish: Finish,
}

impl Answer {
    fn view(&self) -> AnswerView<'_> {
        AnswerView { text: &self.text, tokens: &self.tokens, finish: self.finish }
    }
}

impl<B: Backend> LoadedModel<B> {
    /// Opens a model directory for chat, with its own chat template or the one at `chat_template`.
    ///
    /// # Errors
    /// As [`ModelText::open`] and [`ModelText::load`].
    pub fn open(backend: B, dir: &Path, chat_template: Option<&Path>) -> Result<Self> {
        ModelText::open(dir, chat_template)?.load(backend)
    }

    fn render_security(&self, prompts: &[SecurityPrompt]) -> Result<Vec<Vec<u32>>> {
        self.text.render_prompts(prompts.iter().map(|p| p.prompt.as_str()))
    }

    /// Greedy answers to rendered prompts; progress counts tokens of `task`, up to the most there can be.
    fn answers(
        &self,
        prompts: &[Vec<u32>],
        (max_new_tokens, cache_bytes): (usize, u64),
        task: &str,
        observer: Observer<'_>,
    ) -> Result<Vec<Answer>> {
        let stop = self.text.stop_tokens();
        let options = GenerateOptions { max_new_tokens, cache_bytes, stop, ..GenerateOptions::default() };
        let most = prompts.len() * max_new_tokens;
        let mut done = 0;
        let generations = self.decoder.generate(prompts, &options, &mut |_, _| {
            done += 1;
            observer(Progress::new(task, done.min(most), most));
        })?;
        let answer = |Generation { tokens, finish }| {
            let text = self.text.tokenizer.decode(&tokens)?;
            Ok(Answer { text, tokens, finish })
        };
        generations.into_iter().map(answer).collect()
    }

    /// Trains the probes of every layer; the model's own answers, of `answer_tokens` tokens, say which prompts it
    /// refuses.
    ///
    /// # Errors
    /// As [`train_probe`]; a failing device.
    pub fn train_probe(
        &self,
        prompts: &[SecurityPrompt],
        options: &ProbeOptions,
        answer_tokens: usize,
        refusals: &RefusalList,
        observer: Observer<'_>,
    ) -> Result<Probe> {
        let tokens = self.render_security(prompts)?;
        let answers = self.answers(&tokens, (answer_tokens, 1 << 30), "own answers", observer)?;
        let refused: Vec<bool> = answers.iter().map(|a| refusals.is_refusal(&a.text)).collect();
        let first = FirstTokens::learn(first_refusals(&answers, &refused));
        let features = features(&self.decoder, &tokens, options.batch_tokens, observer)?;
        let control = ControlLabel::choose(prompts);
        let control_labels = control.as_ref().map(|c| c.labels(prompts));
        let input = ProbeInput {
            features: &features,
            labels: prompts,
            refused: Some(&refused),
            first_tokens: first.as_ref(),
            control: control.as_ref().zip(control_labels.as_deref()),
            model_hash: self.text.files.hash()?,
            prompts_hash: &prompts_hash(&tokens, prompts),
        };
        train_probe(input, options, observer)
    }

    /// The scorer of the robustness map and the search. `update` perturbations read the tuned directory that they name.
    ///
    /// # Errors
    /// As [`PerturbationScorer::new`].
    pub fn scorer<'a>(
        &'a self,
        probe: &'a Probe,
        prompts: &'a [SecurityPrompt],
        options: ScorerOptions,
    ) -> Result<PerturbationScorer<'a, B>> {
        let kind = options.kind.engine_kind(&self.text.files)?;
        self.with_scorer_input((probe, prompts, kind), |input| PerturbationScorer::new(input, options))
    }

    /// The scorer of a map by the planned step, in the place of the options' perturbation.
    ///
    /// # Errors
    /// As [`PerturbationScorer::new`].
    pub fn step_scorer<'a>(
        &'a self,
        probe: &'a Probe,
        prompts: &'a [SecurityPrompt],
        options: ScorerOptions,
        step: PlannedStep,
    ) -> Result<PerturbationScorer<'a, B>> {
        let asked = (probe, prompts, NoiseKind::Zero);
        self.with_scorer_input(asked, |input| PerturbationScorer::of_step(input, options, step))
    }

    /// The conflict map of the planned step.
    ///
    /// # Errors
    /// As [`PerturbationScorer::new`] and [`conflict_map`].
    pub fn conflict_map(
        &self,
        (probe, prompts): (&Probe, &[SecurityPrompt]),
        (options, map): (ScorerOptions, &RobustnessOptions),
        (step, made_from): (&PlannedStep, Option<MapInputs>),
        out: Option<&Path>,
        observer: Observer<'_>,
    ) -> Result<RobustnessMap> {
        // No copy is perturbed.
        let options = ScorerOptions { kind: Noise::Step, retrain: false, ..options };
        let asked = (probe, prompts, NoiseKind::Zero);
        let mut scorer = self.with_scorer_input(asked, |input| PerturbationScorer::new(input, options))?;
        scorer.made_from = made_from;
        conflict_map(&scorer, step, map, out, observer)
    }

    /// The planned step on these examples.
    ///
    /// # Errors
    /// As [`PlannedStep::new`].
    pub fn planned_step(
        &self,
        examples: Vec<Example>,
        options: &StepOptions,
        observer: Observer<'_>,
    ) -> Result<PlannedStep> {
        PlannedStep::new(&self.decoder, examples, options, observer)
    }

    fn with_scorer_input<'a, T>(
        &'a self,
        (probe, prompts, kind): (&'a Probe, &'a [SecurityPrompt], NoiseKind),
        make: impl FnOnce(ScorerInput<'a, '_, B>) -> Result<T>,
    ) -> Result<T> {
        let control = probe.metadata.control.as_ref().map(|c| c.labels(prompts));
        make(ScorerInput {
            decoder: &self.decoder,
            model_hash: self.text.files.hash()?,
            probe,
            prompts: &self.render_security(prompts)?,
            labels: prompts,
            control: control.as_deref(),
            kind,
        })
    }

    /// Hidden states and refusal log-odds of prompts.
    ///
    /// # Errors
    /// As [`snapshot`].
    pub fn snapshot(&self, probe: &Probe, prompts: &[SecurityPrompt], observer: Observer<'_>) -> Result<Snapshot> {
        let first = probe.metadata.first_tokens.as_ref();
        snapshot(&self.decoder, &self.render_security(prompts)?, first, FEATURE_TOKENS, observer)
    }

    /// Drift of this model from the one whose snapshot is `base`.
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

    /// Generates answers to everything in `input` and scores them; their texts are dropped.
    ///
    /// # Errors
    /// A failing device. Requests to a judge that fail are counted.
    pub fn evaluate(
        &self,
        input: &EvaluationInput<'_>,
        options: &EvaluateOptions,
        refusals: &RefusalList,
        observer: Observer<'_>,
    ) -> Result<Evaluation> {
        options.check()?;
        let mut found = Evaluation::default();
        let lengths = (options.answer_tokens, options.cache_bytes);
        let (harmful, benign): (Vec<_>, Vec<_>) = input.prompts.iter().cloned().partition(SecurityPrompt::is_harmful);
        // First token of each answer, and whether it refuses.
        let mut first = Vec::new();
        let (mut judged, mut moderated) = (Vec::new(), Vec::new());
        if !harmful.is_empty() {
            let tokens = self.render_security(&harmful)?;
            let answers = self.answers(&tokens, lengths, "harmful prompts", observer)?;
            let texts: Vec<&str> = answers.iter().map(|a| a.text.as_str()).collect();
            let views: Vec<AnswerView<'_>> = answers.iter().map(Answer::view).collect();
            found.outcomes.harmful_refused = texts.iter().map(|text| refusals.is_refusal(text)).collect();
            first.extend(first_refusals(&answers, &found.outcomes.harmful_refused));
            found.asr = Some(attack_success(&texts, refusals));
            found.asr_coherent = Some(coherent_attack_success(&views, refusals));
            found.harmful_answers = Some(AnswerKinds::of(&views));
            found.asr_by_category = by_category(&harmful, &texts, |texts| attack_success(texts, refusals));
            if let Some(judge) = input.judge {
                let pairs = harmful.iter().map(|prompt| prompt.prompt.as_str()).zip(texts.iter().copied());
                let grades = judge.grade(pairs, |done| observer(Progress::new("judge", done, texts.len())));
                let score = Some(Harmfulness { failed: grades.failed, ..Harmfulness::new(&grades.scores) });
                match judge.rubric() {
                    Rubric::Harmfulness => found.harmfulness = score,
                    Rubric::StrongReject => found.strongreject = score,
                }
                found.judge_failure = grades.failure;
                judged = grades.scores;
            }
            if let Some(guard) = input.guard {
                let pairs: Vec<(&str, &str)> =
                    harmful.iter().map(|prompt| prompt.prompt.as_str()).zip(texts.iter().copied()).collect();
                moderated = guard.verdicts(&pairs, observer)?;
                found.guard = Some(Moderated::new(&moderated));
            }
            if input.judge.is_some() || input.guard.is_some() {
                let rubric = input.judge.map(Judge::rubric).unwrap_or_default();
                let unsafe_by_judge = judged.iter().map(|score| score.map(|score| rubric.is_harmful(score))).collect();
                let answered = found.outcomes.harmful_refused.iter().map(|refused| Some(!refused)).collect();
                found.agreement = Agreement::of_all(&[
                    ("expressions", answered),
                    ("judge", unsafe_by_judge),
                    ("guard", moderated.clone()),
                ]);
            }
            if let Some(export) = input.export {
                for (i, (prompt, answer)) in harmful.iter().zip(&answers).enumerate() {
                    let (judge, guard) = (judged.get(i).copied().flatten(), moderated.get(i).copied().flatten());
                    let (answer, finish, refused) = (&answer.text, answer.finish, found.outcomes.harmful_refused[i]);
                    export.tell(&Told { prompt, answer, finish, refused, judge, guard });
                }
            }
            if let Some(probe) = input.probe {
                let scores = self.probe_scores(probe, &tokens, &answers, refusals, observer)?;
                found.probe_harmfulness = Some(Harmfulness::new(&scores));
            }
            if let Some(strict) = input.strict {
                let compliant = harmful.iter().map(|p| strict.get(&p.prompt).cloned().unwrap_or_default());
                found.strict_asr = Some(strict_compliance(&texts, &compliant.collect::<Vec<_>>()));
            }
        }
        if !benign.is_empty() {
            let tokens = self.render_security(&benign)?;
            let answers = self.answers(&tokens, lengths, "benign prompts", observer)?;
            let texts: Vec<&str> = answers.iter().map(|a| a.text.as_str()).collect();
            found.benign_answers = Some(AnswerKinds::of(&answers.iter().map(Answer::view).collect::<Vec<_>>()));
            found.outcomes.benign_refused = texts.iter().map(|text| refusals.is_refusal(text)).collect();
            first.extend(first_refusals(&answers, &found.outcomes.benign_refused));
            found.over_refusal = Some(over_refusal(&texts, refusals));
            found.over_refusal_by_category = by_category(&benign, &texts, |texts| over_refusal(texts, refusals));
            if let Some(export) = input.export {
                for ((prompt, answer), refused) in benign.iter().zip(&answers).zip(&found.outcomes.benign_refused) {
                    let (answer, finish, refused) = (&answer.text, answer.finish, *refused);
                    export.tell(&Told { prompt, answer, finish, refused, judge: None, guard: None });
                }
            }
        }
        found.j = found.youden();
        if !harmful.is_empty() && !benign.is_empty() {
            found.outcomes.first_tokens = input.first_tokens.cloned().or_else(|| FirstTokens::learn(first));
            if let Some(first) = &found.outcomes.first_tokens {
                let odds = self.refusal_log_odds(first, [&harmful, &benign], observer)?;
                found.auroc = auroc_estimate(&odds[0], &odds[1]);
                [found.outcomes.harmful_log_odds, found.outcomes.benign_log_odds] = odds;
            }
        }
        if !input.tasks.is_empty() {
            let tokens = self.text.render_prompts(input.tasks.iter().map(|t| t.prompt.as_str()))?;
            let answers = self.answers(&tokens, (options.task_tokens, options.cache_bytes), "tasks", observer)?;
            let scored = input.tasks.iter().zip(&answers).map(|(t, a)| (t.matches(&a.text), t.category.as_deref()));
            let scored: Vec<_> = scored.collect();
            found.outcomes.correct = scored.iter().map(|(correct, _)| *correct).collect();
            found.task = Some(task_score(scored));
            found.task_answers = Some(AnswerKinds::of(&answers.iter().map(Answer::view).collect::<Vec<_>>()));
        }
        if !input.heldout.is_empty() {
            found.perplexity = Some(perplexity(&self.decoder, input.heldout, 4096, observer)?);
        }
        Ok(found)
    }

    /// Refusal log-odds of harmful and of benign prompts.
    fn refusal_log_odds(
        &self,
        first: &FirstTokens,
        prompts: [&[SecurityPrompt]; 2],
        observer: Observer<'_>,
    ) -> Result<[Vec<f64>; 2]> {
        first.check(Some(self.text.files.config.vocab), "refusal log-odds")?;
        let mut odds = |prompts| -> Result<Vec<f64>> {
            let tokens = self.render_security(prompts)?;
            let read = snapshot(&self.decoder, &tokens, Some(first), FEATURE_TOKENS, &mut *observer)?;
            Ok(read.refusal.unwrap_or_default())
        };
        let [harmful, benign] = prompts;
        Ok([odds(harmful)?, odds(benign)?])
    }

    /// [`probe_harmfulness`] of each answer, at the probe's metric layer and the last token of prompt and answer.
    fn probe_scores(
        &self,
        probe: &Probe,
        prompts: &[Vec<u32>],
        answers: &[Answer],
        refusals: &RefusalList,
        observer: Observer<'_>,
    ) -> Result<Vec<Option<f64>>> {
        probe.check_shape(&self.text.files.config)?;
        let longest = self.decoder.longest_context();
        let conversation = |(prompt, answer): (&Vec<u32>, &Answer)| -> Vec<u32> {
            prompt.iter().chain(&answer.tokens).copied().take(longest).collect()
        };
        let conversations: Vec<Vec<u32>> = prompts.iter().zip(answers).map(conversation).collect();
        let read = features(&self.decoder, &conversations, FEATURE_TOKENS, observer)?;
        let layer = probe.metadata.metric_layer;
        let logits = probe.logits(layer, &Head::Harmful, &read.layers[layer])?;
        let score = |(a, logit): (&Answer, f64)| Some(probe_harmfulness(&a.text, logit, refusals));
        Ok(answers.iter().zip(logits).map(score).collect())
    }
}

/// First token of each answer, and whether the answer refuses.
fn first_refusals(answers: &[Answer], refused: &[bool]) -> Vec<(u32, bool)> {
    answers.iter().zip(refused).filter_map(|(answer, refused)| Some((*answer.tokens.first()?, *refused))).collect()
}

/// A rate over the answers of each category.
fn by_category(prompts: &[SecurityPrompt], texts: &[&str], rate: impl Fn(&[&str]) -> Rate) -> BTreeMap<String, Rate> {
    let mut categories: BTreeMap<&String, Vec<&str>> = BTreeMap::new();
    for (prompt, text) in prompts.iter().zip(texts) {
        if let Some(category) = &prompt.category {
            categories.entry(category).or_default().push(text);
        }
    }
    categories.into_iter().map(|(name, texts)| (name.clone(), rate(&texts))).collect()
}
