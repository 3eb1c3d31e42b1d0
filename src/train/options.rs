//! Options of a training run and of its phases.

use super::{Lisa, Schedule, reference};
use crate::backend::Backend;
use crate::data::{Example, Loader, LoaderOptions, Mixture};
use crate::engine::Beside;
use crate::error::{Error, Result};
use crate::options::{above_zero, count, default_from_args, epochs, from_zero, inner_share, require, whole};
use clap::{ArgAction, Args};

/// Options that all phases of a run share.
#[derive(schemars::JsonSchema, Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, Args)]
#[serde(default, deny_unknown_fields)]
pub struct TuneOptions {
    /// Examples per micro-batch, or rows of `max_length` tokens with `packing`; activation memory grows in proportion
    #[arg(long, value_parser = count, default_value_t = 8)]
    pub batch_size: usize,
    /// Micro-batches per optimizer step: gradient accumulation at the memory of one micro-batch
    ///
    /// The loss is the mean over the trained tokens of all, so that 4 × 1 equals 1 × 4 up to rounding. A step never
    /// spans two epochs.
    #[arg(long, value_parser = count, default_value_t = 1)]
    pub grad_accum: usize,
    /// Longest example, in tokens; longer ones are truncated
    #[arg(long, value_parser = count, default_value_t = 1024)]
    pub max_length: usize,
    /// Pack whole examples into rows of `max_length` tokens: steps of equal size
    #[arg(long, action = ArgAction::Set, default_value_t = false)]
    pub packing: bool,
    /// Shuffle the examples before each epoch
    #[arg(long, action = ArgAction::Set, default_value_t = true)]
    pub shuffle: bool,
    /// Seed of shuffling and stochastic rounding.
    #[arg(skip)]
    pub seed: u64,
    /// AdamW's decay of the first moment.
    #[arg(skip = 0.9)]
    pub beta1: f32,
    /// AdamW's decay of the second moment.
    #[arg(skip = 0.999)]
    pub beta2: f32,
    /// Added to √v̂ in AdamW's denominator.
    #[arg(skip = 1e-8)]
    pub eps: f32,
    /// Steps between checkpoints (changed weights and their moments, on disk); 0 = between phases only
    #[arg(long, value_parser = whole, default_value_t = 200)]
    pub save_every: u64,
    /// Checkpoints to keep, at least 1; 2 survive damage to the newest
    #[arg(long, value_parser = count, default_value_t = 2)]
    pub keep_last: usize,
    /// Activation checkpointing: keep one activation per layer instead of ten and recompute the rest, a third more time
    #[arg(long)]
    pub recompute: bool,
    /// Carry Adam's moments into the next phase, for the tensors that train in both
    #[arg(long)]
    pub keep_optimizer: bool,
    /// End with an exponential moving average of the weights, w̄ ← d·w̄ + (1−d)·w after each step (a baseline)
    ///
    /// Costs 4 bytes per trained parameter on the device.
    #[arg(long, value_parser = inner_share::<f32>)]
    pub ema_decay: Option<f32>,
    /// Constrain the first tokens of answers: by the token-wise loss of arXiv 2406.05946, β times SCALE (1 = the paper's)
    ///
    /// Costs a forward pass over the data before the first step, and 4 bytes per trained token.
    #[arg(long, value_name = "SCALE", num_args = 0..=1, default_missing_value = "1", value_parser = above_zero::<f32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub constrain: Option<f32>,
    /// Distil the original model on the mixed-in examples: adds WEIGHT · KL(π₀ ‖ π) over its 64 likeliest tokens to their
    /// loss
    ///
    /// Costs a forward pass over those examples before the first step, and 512 bytes per trained token of them.
    #[arg(long, value_name = "WEIGHT", value_parser = above_zero::<f32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub distil: Option<f32>,
    /// Hold the trained weights near those at the start of the phase: adds RHO/2 · ‖θ − θ₀‖² to the loss (Lisa, arXiv
    /// 2405.18641)
    ///
    /// Costs a copy of the trained weights on the device, and in each checkpoint.
    #[arg(long, value_name = "RHO", value_parser = above_zero::<f32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prox: Option<f32>,
    /// Take turns: K1 steps on the mixed-in examples, then K2 on the others, with the proximal term towards the weights at
    /// the last turn (Lisa, arXiv 2405.18641)
    ///
    /// An epoch is one pass over the others, so that it has more steps.
    #[arg(long, value_name = "K1:K2")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lisa: Option<Lisa>,
    /// Train against a shift of the hidden states, by RHO along the gradient of the loss (Vaccine, arXiv 2402.01109): for
    /// aligning a model
    ///
    /// Two passes a step, about twice the time, and the activations of all layers.
    #[arg(long, value_name = "RHO", value_parser = above_zero::<f32>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vaccine: Option<f32>,
}

impl TuneOptions {
    /// The data loader's part of the options.
    pub fn loader(&self) -> LoaderOptions {
        LoaderOptions {
            batch_size: self.batch_size,
            max_length: self.max_length,
            packing: self.packing,
            shuffle: self.shuffle,
            seed: self.seed,
        }
    }

    /// The loader of a run's examples.
    ///
    /// # Errors
    /// As [`Loader::new`] and [`Loader::alternating`].
    pub fn load(&self, examples: impl Into<Mixture>) -> Result<Loader> {
        match self.lisa {
            None => Loader::new(examples, self.loader()),
            Some(lisa) => Loader::alternating(examples, self.loader(), lisa.alternation(self.grad_accum)),
        }
    }

    /// Checks that every value is in range.
    ///
    /// # Errors
    /// [`Error::Input`] names the field.
    pub fn check(&self) -> Result<()> {
        let unit = |x: f32| (0.0..1.0).contains(&x);
        require(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")?;
        require(self.grad_accum >= 1, "grad_accum", self.grad_accum, "at least 1")?;
        require(self.max_length >= 2, "max_length", self.max_length, "at least 2 tokens")?;
        require(self.keep_last >= 1, "keep_last", self.keep_last, "at least 1")?;
        require(unit(self.beta1), "beta1", self.beta1, "from 0 to below 1")?;
        require(unit(self.beta2), "beta2", self.beta2, "from 0 to below 1")?;
        require(self.eps > 0.0 && self.eps.is_finite(), "eps", self.eps, "above 0")?;
        let decay = self.ema_decay.unwrap_or(0.5);
        require(decay > 0.0 && decay < 1.0, "ema_decay", decay, "above 0 and below 1")?;
        for (field, value) in
            [("constrain", self.constrain), ("distil", self.distil), ("prox", self.prox), ("vaccine", self.vaccine)]
        {
            let value = value.unwrap_or(1.0);
            require(value > 0.0 && value.is_finite(), field, value, "above 0")?;
        }
        Ok(())
    }

    /// Checks that so many ranks can train with the options.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names the option.
    pub fn check_ranks(&self, ranks: usize) -> Result<()> {
        if ranks > 1 && self.vaccine.is_some() {
            let help = "leave it out, or train with one: its shift has a norm over a whole micro-batch, of which a rank \
                        has a part";
            return Err(Error::unsupported("training with several ranks", "vaccine", help));
        }
        Ok(())
    }

    /// Checks that the training data have what the options need.
    ///
    /// # Errors
    /// [`Error::Input`] names the option.
    pub fn check_examples(&self, examples: &[Example]) -> Result<()> {
        if self.distil.is_some() && !examples.iter().any(|example| example.replayed) {
            let expected = "examples mixed in by --mix, such as those of `swat replay`: the ones that are distilled";
            return Err(Error::input("distil", "no mixed-in example", expected));
        }
        let replayed = examples.iter().filter(|example| example.replayed).count();
        if self.lisa.is_some() && (replayed == 0 || replayed == examples.len()) {
            let expected =
                "examples mixed in by --mix, such as those of `swat replay`, beside others: steps on both take turns";
            return Err(Error::input("lisa", format!("{replayed} mixed-in examples of {}", examples.len()), expected));
        }
        Ok(())
    }

    /// Bytes of what a run keeps on disk of the model before it.
    pub fn reference_bytes(&self, examples: &[Example]) -> u64 {
        reference::reference_bytes(examples, self)
    }

    /// What the recipe keeps on the device beside weights, gradients and moments.
    pub fn beside<B: Backend>(&self) -> Beside {
        let teacher = if self.distil.is_some() { 8 * reference::TEACHER } else { 0 };
        let token_bytes = if self.constrain.is_some() || self.distil.is_some() { 8 + teacher } else { 0 };
        let mean = if self.ema_decay.is_some() { size_of::<f32>() } else { 0 };
        let anchor = if self.prox.is_some() { size_of::<B::Float>() } else { 0 };
        Beside { parameter_bytes: mean + anchor, token_bytes, outputs: self.vaccine.is_some() }
    }
}

/// Duration of a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Passes over the data.
    Epochs(u64),
    /// Optimizer steps.
    Steps(u64),
}

/// Options of one phase.
#[derive(schemars::JsonSchema, Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize, Args)]
#[serde(default, deny_unknown_fields)]
pub struct PhaseOptions {
    /// Base learning rate; a cell's factor multiplies it.
    #[arg(skip = 2e-5)]
    pub lr: f64,
    /// Learning-rate schedule of each phase
    #[arg(long, value_enum, default_value_t)]
    pub schedule: Schedule,
    /// Steps of linear warm-up of the learning rate at the start of each phase
    #[arg(long, value_parser = whole, default_value_t = 0)]
    pub lr_warmup_steps: u64,
    /// Share of the base rate at which the schedule ends.
    #[arg(skip)]
    pub min_lr_ratio: f64,
    /// Decoupled weight decay of the trained matrices; a cell's factor multiplies it
    #[arg(long, value_parser = from_zero::<f64>, default_value_t = 0.0)]
    pub weight_decay: f64,
    /// Decay norms and biases too, which transformers and TRL do not
    #[arg(long)]
    pub decay_all: bool,
    /// Clip the global norm of the gradients to this; 0 = no clipping
    #[arg(long, value_parser = from_zero::<f64>, default_value_t = 1.0)]
    pub max_grad_norm: f64,
    /// Epochs of the phase on everything; 0 = skip the phase. 1 if neither epochs nor steps are given
    #[arg(long, conflicts_with = "steps", value_parser = epochs)]
    pub epochs: Option<u64>,
    /// Optimizer steps of the phase on everything; 0 = skip the phase
    #[arg(long, value_parser = whole)]
    pub steps: Option<u64>,
}

default_from_args!(TuneOptions, PhaseOptions);

impl PhaseOptions {
    /// Duration of the phase: `steps`, else `epochs`, else one epoch.
    ///
    /// # Errors
    /// [`Error::Input`] where both `epochs` and `steps` are given.
    pub fn length(&self) -> Result<Length> {
        match (self.epochs, self.steps) {
            (Some(_), Some(_)) => Err(Error::input("steps", "both epochs and steps", "one of them")),
            (None, Some(steps)) => Ok(Length::Steps(steps)),
            (epochs, None) => Ok(Length::Epochs(epochs.unwrap_or(1))),
        }
    }

    /// Steps of the phase on the data of `loader`; a step does not span epochs.
    ///
    /// # Errors
    /// As [`PhaseOptions::length`].
    pub fn steps_of(&self, loader: &Loader, shared: &TuneOptions) -> Result<u64> {
        let per_epoch = loader.batches_per_epoch().div_ceil(shared.grad_accum as u64);
        Ok(match self.length()? {
            Length::Steps(steps) => steps,
            Length::Epochs(epochs) => epochs.saturating_mul(per_epoch),
        })
    }

    /// Checks that the warm-up ends within a phase of `steps` steps.
    ///
    /// # Errors
    /// [`Error::Input`] names the option.
    pub fn check_warmup(&self, steps: u64) -> Result<()> {
        let warmup = self.lr_warmup_steps;
        if steps == 0 || warmup < steps {
            return Ok(());
        }
        let found = format!("{warmup} steps of warm-up in a phase of {steps}");
        Err(Error::input("lr_warmup_steps", found, "fewer steps of warm-up than each phase has"))
    }

    /// Checks that every value is in range, and that a floor of the learning rate has a schedule that falls to it.
    ///
    /// # Errors
    /// [`Error::Input`] names the field.
    pub fn check(&self) -> Result<()> {
        let (lr, floor) = (self.lr, self.min_lr_ratio);
        require(lr > 0.0 && lr.is_finite(), "lr", lr, "above 0")?;
        require((0.0..=1.0).contains(&floor), "min_lr_ratio", floor, "from 0 to 1")?;
        let falls = self.schedule != Schedule::Constant || floor == 0.0;
        require(falls, "min_lr_ratio", format!("{floor} beside schedule = \"constant\""), "0, or another schedule")?;
        let not_negative = |x: f64| x >= 0.0 && x.is_finite();
        require(not_negative(self.weight_decay), "weight_decay", self.weight_decay, "0 or above")?;
        require(not_negative(self.max_grad_norm), "max_grad_norm", self.max_grad_norm, "0 (no clipping) or above")?;
        // A length in epochs is known with the data.
        match self.length()? {
            Length::Steps(steps) => self.check_warmup(steps),
            Length::Epochs(_) => Ok(()),
        }
    }
}
