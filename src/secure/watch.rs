//! What a tuning run is evaluated on as it goes: held-out loss, and the refusal log-odds that tuning erodes.

use super::eval::perplexity;
use super::eval::refusal::{FirstTokens, RefusalList};
use super::loaded::REFUSAL_TOKENS;
use super::probe::features::snapshot;
use super::text::ModelText;
use super::tune::examples_hash;
use crate::backend::Backend;
use crate::data::{Example, RowReader, SecurityPrompt};
use crate::engine::{Decoder, GenerateOptions};
use crate::error::{Error, Result};
use crate::train::{Evaluated, Evaluator, WatchSettings};
use clap::Args;
use std::collections::HashSet;
use std::path::PathBuf;

/// Tokens of a forward pass of an evaluation.
const EVAL_TOKENS: usize = 4096;

/// Evaluations during a tuning run.
#[derive(Clone, Debug, Args)]
pub struct WatchOptions {
    /// Held-out conversations: their loss is measured during the run
    #[arg(long, value_name = "FILE")]
    pub eval_data: Option<PathBuf>,
    /// Labelled prompts: the refusal log-odds of the harmful ones are measured during the run, an alarm long before
    /// answers change. Learned from the model's own answers before the first step, some of which must refuse
    #[arg(long, value_name = "FILE")]
    pub eval_security: Option<PathBuf>,
    /// Steps between evaluations; there is one before the run and at the end of each phase as well
    #[arg(long, value_name = "STEPS", default_value_t = 100)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub eval_every: u64,
    /// End with the weights of the last phase whose loss on --eval-data was the lowest. They take disk space, once for
    /// each better evaluation since the last checkpoint
    #[arg(long, requires = "eval_data", conflicts_with = "ema_decay")]
    pub keep_best: bool,
    /// End the last phase after so many evaluations in a row without a lower loss on --eval-data
    #[arg(long, value_name = "PATIENCE", requires = "eval_data")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..))]
    pub early_stop: Option<u64>,
}

/// Tokenized data of the evaluations.
pub struct Watch {
    settings: WatchSettings,
    heldout: Vec<Example>,
    harmful: Vec<Vec<u32>>,
    benign: Vec<Vec<u32>>,
    eos: Vec<u32>,
}

impl WatchOptions {
    /// Reads and tokenizes the data; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Input`] names file and line.
    pub fn read(&self, text: &ModelText, max_length: usize, seed: u64, rows: &mut RowReader) -> Result<Option<Watch>> {
        if self.eval_data.is_none() && self.eval_security.is_none() {
            return Ok(None);
        }
        let context = text.files.config.max_positions;
        let heldout = match &self.eval_data {
            Some(path) => text.examples(path, max_length.min(context), rows)?.examples,
            None => Vec::new(),
        };
        let prompts = match &self.eval_security {
            Some(path) => {
                let prompts = SecurityPrompt::read(path, seed, rows)?;
                text.check_prompts(prompts.iter().map(|p| (p.place.as_str(), p.prompt.as_str())))?;
                prompts
            }
            None => Vec::new(),
        };
        let of = |harmful: bool| {
            let prompts = prompts.iter().filter(|prompt| prompt.is_harmful() == harmful);
            text.render_prompts(prompts.map(|prompt| prompt.prompt.as_str()))
        };
        let settings = WatchSettings {
            every: self.eval_every,
            keep_best: self.keep_best,
            patience: self.early_stop,
            data: examples_hash(&heldout),
        };
        Ok(Some(Watch { settings, heldout, harmful: of(true)?, benign: of(false)?, eos: text.stop_tokens() }))
    }
}

impl Watch {
    /// Number of held-out examples that are among the training data.
    pub fn trained_rows(&self, train: &[Example]) -> usize {
        let trained: HashSet<&[u32]> = train.iter().map(|example| example.tokens.as_slice()).collect();
        self.heldout.iter().filter(|example| trained.contains(example.tokens.as_slice())).count()
    }

    /// Checks that what follows from the evaluations of the last phase can follow. `before` are the steps of the phases
    /// before it, `steps` its own.
    ///
    /// # Errors
    /// [`Error::Input`] names the option.
    pub(super) fn check(&self, before: u64, steps: u64) -> Result<()> {
        let WatchSettings { every, keep_best, patience, .. } = self.settings;
        let end = before.saturating_add(steps);
        let count = (end / every - before / every) + u64::from(steps > 0 && !end.is_multiple_of(every));
        let found = |what: &str| format!("{what}, with {count} evaluations in the last phase, of {steps} steps");
        if keep_best && count < 2 {
            return Err(Error::input("--keep-best", found("the best"), "a smaller --eval-every, or no --keep-best"));
        }
        match patience {
            // The first one is the lowest so far, and the last one is at the end.
            Some(patience) if patience.saturating_add(2) > count => {
                let expected =
                    "a smaller --eval-every or patience, so that the phase can end early, or no --early-stop";
                Err(Error::input("--early-stop", found(&format!("a patience of {patience}")), expected))
            }
            _ => Ok(()),
        }
    }

    /// Most copies of the best weights that are on disk at once, in a last phase of `steps` steps: the one that the last
    /// checkpoint refers to, and each better one since then.
    pub(super) fn best_copies(&self, steps: u64, save_every: u64) -> u64 {
        let WatchSettings { every, keep_best, .. } = self.settings;
        let apart = if save_every == 0 { steps } else { save_every };
        if keep_best { (1 + apart.div_ceil(every)).min(steps.div_ceil(every)) } else { 0 }
    }

    /// The settings, for a rank on which nothing is evaluated.
    pub(super) fn without_evaluator<'a, B: Backend>(self) -> (WatchSettings, Evaluator<'a, B>) {
        (self.settings, Box::new(|_| Ok(Evaluated::default())))
    }

    /// The evaluator, and its settings. `decoder` is the model before the run, whose answers tell by which first tokens
    /// it refuses; `decode` gives their text.
    ///
    /// # Errors
    /// [`Error::Input`] where it refuses none or all of the prompts; a failing device.
    pub(super) fn evaluator<'a, B: Backend>(
        self,
        decoder: &Decoder<B>,
        text: &ModelText,
    ) -> Result<(WatchSettings, Evaluator<'a, B>)> {
        let Self { settings, heldout, harmful, benign, eos } = self;
        let first = match harmful.is_empty() {
            true => None,
            false => {
                let prompts: Vec<Vec<u32>> = harmful.iter().chain(&benign).cloned().collect();
                let options =
                    GenerateOptions { max_new_tokens: REFUSAL_TOKENS, stop: eos, ..GenerateOptions::default() };
                let list = RefusalList::default();
                let mut answers = Vec::new();
                for answer in decoder.generate(&prompts, &options, &mut |_, _| {})? {
                    let refused = list.is_refusal(&text.tokenizer.decode(&answer.tokens)?);
                    answers.extend(answer.tokens.first().map(|token| (*token, refused)));
                }
                let none = "no refusal beside other answers of the model, by which its refusals would be recognised";
                let expected = "harmful prompts that the model refuses, and benign ones that it answers";
                Some(FirstTokens::learn(answers).ok_or_else(|| Error::input("--eval-security", none, expected))?)
            }
        };
        let evaluate = move |decoder: &Decoder<B>| {
            let loss = match heldout.is_empty() {
                true => None,
                false => Some(perplexity(decoder, &heldout, EVAL_TOKENS, &mut |_| {})?.nll),
            };
            let refusal = match &first {
                None => None,
                Some(first) => {
                    let odds = snapshot(decoder, &harmful, Some(first), EVAL_TOKENS, &mut |_| {})?.refusal;
                    let odds: Vec<f64> = odds.unwrap_or_default().into_iter().filter(|x| x.is_finite()).collect();
                    (!odds.is_empty()).then(|| odds.iter().sum::<f64>() / odds.len() as f64)
                }
            };
            Ok(Evaluated { loss, refusal })
        };
        Ok((settings, Box::new(evaluate)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_the_best_weights_are_counted() {
        let copies = |every, steps, save_every| {
            let settings = WatchSettings { every, keep_best: true, ..WatchSettings::default() };
            let (heldout, harmful, benign, eos) = Default::default();
            Watch { settings, heldout, harmful, benign, eos }.best_copies(steps, save_every)
        };
        // Evaluations at 10, 20, …, 100; a checkpoint at every 50th step refers to one of those before it.
        assert_eq!(copies(10, 100, 50), 6);
        // No checkpoint before the end, and no more copies than evaluations.
        assert_eq!((copies(10, 100, 0), copies(10, 35, 0)), (10, 4));
        assert_eq!(copies(100, 1000, 100), 2);
        assert_eq!(copies(100, 5, 100), 1);
    }

    /// Evaluations of the last phase by hand: of 100 steps after 25, every 50: at 50, 100 and its end, 125.
    #[test]
    fn what_cannot_follow_from_the_evaluations_is_refused() {
        let check = |every, keep_best, patience, (before, steps)| {
            let settings = WatchSettings { every, keep_best, patience, data: String::new() };
            let (heldout, harmful, benign, eos) = Default::default();
            let watch = Watch { settings, heldout, harmful, benign, eos };
            watch.check(before, steps).map_err(|e| e.to_string())
        };
        check(50, true, Some(1), (25, 100)).unwrap();
        let error = check(50, false, Some(2), (25, 100)).unwrap_err();
        assert!(error.contains("--early-stop: found a patience of 2, with 3 evaluations"), "{error}");
        // At the end alone, and at the end twice over: at step 100.
        assert!(
            check(100, true, None, (0, 60)).unwrap_err().contains("--keep-best: found the best, with 1 evaluation")
        );
        assert!(check(100, true, None, (0, 100)).is_err());
        check(100, true, None, (60, 100)).unwrap();
        check(100, false, None, (0, 5)).unwrap();
    }
}
