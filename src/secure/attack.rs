//! A short attack on a model: a few steps of tuning on answered harmful requests, after which it is measured again. How deep
//! the safety of a model goes shows in how much of it is left (shallow alignment: Qi et al., arXiv 2406.05946).

use super::loaded::LoadedModel;
use crate::backend::Backend;
use crate::data::{DataSize, Example, Loader, RowReader};
use crate::engine::{Plan, Workload};
use crate::error::{Error, Result};
use crate::modules::LearningRates;
use crate::options::{above_zero, count, default_from_args};
use crate::progress::{Observer, Progress};
use crate::secure::text::{ModelText, check_free};
use crate::train::{Callbacks, Phase, PhaseOptions, RunPosition, StepMetrics, TuneOptions, Tuner};
use clap::Args;
use std::path::PathBuf;

/// Name of the phase.
const PHASE: &str = "attack";

/// A short attack.
#[derive(Clone, Debug, PartialEq, serde::Serialize, Args)]
pub struct AttackOptions {
    /// Attack both models as well: answered harmful requests as training rows, on which each is tuned for a few steps, in
    /// memory, and measured again. A measure of how deep the safety goes; no gate is about it
    #[arg(id = "attack", long = "attack", value_name = "FILE")]
    #[serde(skip)]
    pub file: Option<PathBuf>,
    /// Rows of --attack that are used, from the first
    #[arg(id = "attack_examples", long = "attack-examples", value_name = "N", value_parser = count, default_value_t = 20)]
    pub examples: usize,
    /// Optimizer steps of the attack
    #[arg(id = "attack_steps", long = "attack-steps", value_name = "N", default_value_t = 10)]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=10_000))]
    pub steps: u64,
    /// Learning rate of the attack, constant
    #[arg(id = "attack_lr", long = "attack-lr", value_name = "RATE", value_parser = above_zero::<f64>, default_value_t = 5e-5)]
    pub lr: f64,
}

default_from_args!(AttackOptions);

/// A tokenized attack.
pub struct Attack {
    options: AttackOptions,
    examples: Vec<Example>,
    seed: u64,
}

impl AttackOptions {
    /// Reads the rows; `None` where there is no file.
    ///
    /// # Errors
    /// [`Error::Input`] names file and line; [`Error::Memory`] where tuning has no room.
    pub fn read<B: Backend>(
        &self,
        text: &ModelText,
        seed: u64,
        rows: &mut RowReader,
        backend: &B,
    ) -> Result<Option<Attack>> {
        let Some(path) = &self.file else { return Ok(None) };
        let mut examples = text.examples(path, text.files.config.max_positions.min(1024), rows)?.examples;
        examples.truncate(self.examples);
        if examples.is_empty() {
            return Err(Error::input(path.display().to_string(), "no answer to train on", "answered requests"));
        }
        let attack = Attack { options: self.clone(), examples, seed };
        attack.check_memory(text, backend)?;
        Ok(Some(attack))
    }
}

impl Attack {
    fn tune_options(&self) -> TuneOptions {
        let longest = self.examples.iter().map(|example| example.tokens.len()).max().unwrap_or(1);
        TuneOptions {
            batch_size: self.examples.len().min(4),
            grad_accum: self.examples.len().div_ceil(4),
            max_length: longest,
            seed: self.seed,
            ..TuneOptions::default()
        }
    }

    fn check_memory<B: Backend>(&self, text: &ModelText, backend: &B) -> Result<()> {
        let options = self.tune_options();
        let work = Workload {
            tokens: options.batch_size * options.max_length,
            document_tokens: options.max_length,
            trained_share: DataSize::of(&self.examples).trained_share,
            recompute: options.recompute,
            lora: None,
            beside: options.beside::<B>(),
        };
        let planned_bytes = Plan::new::<B>(&text.files.config, &work, |_| true).total_bytes();
        check_free(backend, "the attack", planned_bytes, "a check without --attack")
    }
}

impl<B: Backend> LoadedModel<B> {
    /// Tunes all parameters on the attack's rows, every step on all of them, with adapters merged first. The directory that
    /// the model is from stays as it is.
    ///
    /// # Errors
    /// A failing device; [`Error::Failed`] where training diverges.
    pub fn attacked(&mut self, attack: &Attack, observer: Observer<'_>) -> Result<()> {
        self.decoder.merge_lora()?;
        let options = attack.tune_options();
        let mut loader = Loader::new(attack.examples.clone(), options.loader())?;
        let cells = self.decoder.config.cells();
        let rates = LearningRates::masked(&cells, &cells, 0.0);
        let AttackOptions { lr, steps, .. } = attack.options;
        let phase = PhaseOptions { lr, steps: Some(steps), epochs: None, ..PhaseOptions::default() };
        let phases = vec![Phase { name: PHASE.into(), rates, options: phase }];
        Tuner::new(&mut self.decoder, &mut loader, options, phases)?.run(&mut Steps(observer)).map(drop)
    }
}

/// Reports the steps.
struct Steps<'a>(Observer<'a>);

impl<B: Backend> Callbacks<B> for Steps<'_> {
    fn step(&mut self, metrics: &StepMetrics, at: &RunPosition) -> Result<()> {
        let (done, total) = (at.phase_step as usize, at.phase_steps as usize);
        (self.0)(Progress { task: PHASE, done, total, loss: metrics.loss });
        Ok(())
    }
}
