//! Options of a run and of its phases.

use super::Schedule;
use crate::data::LoaderOptions;
use crate::error::{Error, Result};

/// What all phases of a run share.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TuneOptions {
    /// Examples a micro-batch; with `packing`, rows of `max_length` tokens.
    pub batch_size: usize,
    /// Micro-batches a step. Memory is that of one; their gradients are summed, and the loss is divided by the trained
    /// tokens of all, so that 4 × 1 equals 1 × 4 up to rounding. A step never reaches over the end of an epoch.
    pub grad_accum: usize,
    /// Longest example, in tokens; activation memory grows in proportion.
    pub max_length: usize,
    /// Fill rows of `max_length` with whole examples: steps of equal size.
    pub packing: bool,
    /// A new order each epoch.
    pub shuffle: bool,
    /// Seed of the orders and of stochastic rounding.
    pub seed: u64,
    /// AdamW's decay of the first moment.
    pub beta1: f32,
    /// AdamW's decay of the second moment.
    pub beta2: f32,
    /// AdamW's term beside √v̂.
    pub eps: f32,
    /// A checkpoint every so many steps, 0 = only between phases. One costs the bytes of the weights that changed and
    /// of their moments on disk; an interruption loses at most the steps since the last.
    pub save_every: u64,
    /// Checkpoints that are kept, at least 1; 2 survive damage to the newest.
    pub keep_last: usize,
    /// Keep one activation a layer instead of ten and compute the rest again: about a third more time.
    pub recompute: bool,
    /// Carry moments from one phase into the next, for the tensors that train in both.
    pub keep_optimizer: bool,
    /// Keep a running mean of the weights, w̄ ← d·w̄ + (1−d)·w after each step, and end with it. Costs 4 bytes a trained
    /// parameter on the host, and a read of the trained weights each step.
    pub ema_decay: Option<f32>,
}

impl Default for TuneOptions {
    fn default() -> Self {
        Self {
            batch_size: 8,
            grad_accum: 1,
            max_length: 1024,
            packing: false,
            shuffle: true,
            seed: 0,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            save_every: 200,
            keep_last: 2,
            recompute: false,
            keep_optimizer: false,
            ema_decay: None,
        }
    }
}

impl TuneOptions {
    /// The options of the loader that feeds the run.
    pub fn loader(&self) -> LoaderOptions {
        LoaderOptions {
            batch_size: self.batch_size,
            max_length: self.max_length,
            packing: self.packing,
            shuffle: self.shuffle,
            seed: self.seed,
        }
    }

    /// Refuses values outside their range, by field.
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
        require(decay > 0.0 && decay < 1.0, "ema_decay", decay, "above 0 and below 1")
    }
}

/// How long a phase runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// Passes over the data.
    Epochs(u64),
    /// Optimiser steps.
    Steps(u64),
}

/// What each phase has of its own.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PhaseOptions {
    /// Base learning rate; a cell's factor multiplies it.
    pub lr: f64,
    /// Its shape over the phase.
    pub schedule: Schedule,
    /// Steps of linear warm-up at the start of the phase.
    pub lr_warmup_steps: u64,
    /// Share of the base rate at which the schedule ends.
    pub min_lr_ratio: f64,
    /// Decoupled weight decay on everything that trains; a cell's factor multiplies it.
    pub weight_decay: f64,
    /// The global norm of the gradients is clipped to this; 0 = no clipping.
    pub max_grad_norm: f64,
    /// Passes over the data; 0 = no such phase. At most one of `epochs` and `steps`; neither = 1 epoch.
    pub epochs: Option<u64>,
    /// Optimiser steps; 0 = no such phase.
    pub steps: Option<u64>,
}

impl Default for PhaseOptions {
    fn default() -> Self {
        Self {
            lr: 2e-5,
            schedule: Schedule::Cosine,
            lr_warmup_steps: 0,
            min_lr_ratio: 0.0,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
            epochs: None,
            steps: None,
        }
    }
}

impl PhaseOptions {
    /// How long the phase runs; an error where both `epochs` and `steps` are given.
    ///
    /// # Errors
    /// [`Error::Input`], as said above.
    pub fn length(&self) -> Result<Length> {
        match (self.epochs, self.steps) {
            (Some(_), Some(_)) => Err(Error::input("steps", "both epochs and steps", "one of them")),
            (None, Some(steps)) => Ok(Length::Steps(steps)),
            (epochs, None) => Ok(Length::Epochs(epochs.unwrap_or(1))),
        }
    }

    /// Refuses values outside their range, by field.
    ///
    /// # Errors
    /// [`Error::Input`] names the field.
    pub fn check(&self) -> Result<()> {
        let (lr, floor) = (self.lr, self.min_lr_ratio);
        require(lr > 0.0 && lr.is_finite(), "lr", lr, "above 0")?;
        require((0.0..=1.0).contains(&floor), "min_lr_ratio", floor, "from 0 to 1")?;
        let not_negative = |x: f64| x >= 0.0 && x.is_finite();
        require(not_negative(self.weight_decay), "weight_decay", self.weight_decay, "0 or above")?;
        require(not_negative(self.max_grad_norm), "max_grad_norm", self.max_grad_norm, "0 (no clipping) or above")?;
        self.length().map(drop)
    }
}

fn require(good: bool, field: &str, found: impl std::fmt::Display, expected: &str) -> Result<()> {
    if good { Ok(()) } else { Err(Error::input(field, found.to_string(), expected)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_fields_are_refused_and_defaults_fill_the_rest() {
        let options: TuneOptions = serde_json::from_str(r#"{"batch_size": 3}"#).unwrap();
        assert_eq!(options, TuneOptions { batch_size: 3, ..TuneOptions::default() });
        let wrong = serde_json::from_str::<PhaseOptions>(r#"{"learning_rate": 1.0}"#).unwrap_err();
        assert!(wrong.to_string().contains("learning_rate"), "{wrong}");
    }

    #[test]
    fn wrong_values_are_named() {
        let named = |options: TuneOptions| options.check().unwrap_err().to_string();
        assert!(named(TuneOptions { beta1: 1.0, ..TuneOptions::default() }).contains("beta1"));
        assert!(named(TuneOptions { grad_accum: 0, ..TuneOptions::default() }).contains("grad_accum"));
        assert!(named(TuneOptions { ema_decay: Some(f32::NAN), ..TuneOptions::default() }).contains("ema_decay"));
        assert!(TuneOptions::default().check().is_ok());
        let named = |options: PhaseOptions| options.check().unwrap_err().to_string();
        assert!(named(PhaseOptions { lr: f64::NAN, ..PhaseOptions::default() }).contains("lr"));
        assert!(named(PhaseOptions { weight_decay: -0.1, ..PhaseOptions::default() }).contains("weight_decay"));
        assert!(named(PhaseOptions { epochs: Some(1), steps: Some(1), ..PhaseOptions::default() }).contains("both"));
    }

    #[test]
    fn length_is_one_epoch_unless_told() {
        let length = |epochs, steps| PhaseOptions { epochs, steps, ..PhaseOptions::default() }.length().unwrap();
        assert_eq!(length(None, None), Length::Epochs(1));
        assert_eq!(length(Some(0), None), Length::Epochs(0));
        assert_eq!(length(None, Some(7)), Length::Steps(7));
    }
}
