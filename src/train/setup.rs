//! A run and its parts: phases, directory, callbacks.

use super::access::Access;
use super::ema::Ema;
use super::reference::Reference;
use super::watch::Watched;
use super::{Length, PhaseOptions, RunPosition, StepMetrics, TuneOptions};
use crate::backend::{Backend, Roofline};
use crate::data::Loader;
use crate::engine::{BUCKET_BYTES, Decoder, Plan};
use crate::error::Result;
use crate::group::{Alone, Group};
use crate::modules::{LearningRates, ParamId};
use crate::progress::Progress;
use std::path::PathBuf;

/// One phase of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Phase {
    /// Name in metrics and updates, such as `mods` or `all`.
    pub name: String,
    /// Learning-rate factors; a cell without one is frozen.
    pub rates: LearningRates,
    /// Duration, learning rate, clipping.
    pub options: PhaseOptions,
}

/// Directory of a run's files, and the identity of its checkpoints.
#[derive(Clone, Debug, PartialEq)]
pub struct RunDir {
    /// Holds `metrics.jsonl`, `updates.json` and `checkpoints/`.
    pub dir: PathBuf,
    /// Hash of the original model.
    pub model: String,
    /// Hash of the examples.
    pub data: String,
    /// Continue from the newest intact checkpoint, if any; otherwise old metrics and checkpoints are removed.
    pub resume: bool,
}

/// Callbacks of the training loop. An error ends the run as an interruption does.
///
/// `epoch_ends` and `phase_ends` precede the checkpoint of their step: across an interruption and a resume they are
/// called at least once for a [`RunPosition`], with the same weights each time.
pub trait Callbacks<B: Backend> {
    /// A warning, such as a damaged checkpoint.
    fn note(&mut self, _text: &str) {}
    /// How the run is done, such as which ranks write its checkpoints.
    fn info(&mut self, _text: &str) {}
    /// Work before the first step, such as the reference of the constrained loss.
    fn prepares(&mut self, _progress: Progress<'_>) {}
    /// The run begins; memory and compute plans by phase.
    fn run_begins(&mut self, _plans: &[(String, Plan)]) {}
    /// A phase begins, or is resumed.
    ///
    /// # Errors
    /// Ends the run, as in all callbacks.
    fn phase_begins(&mut self, _at: &RunPosition) -> Result<()> {
        Ok(())
    }
    /// A step was taken or skipped.
    ///
    /// # Errors
    /// Ends the run.
    fn step(&mut self, _metrics: &StepMetrics, _at: &RunPosition) -> Result<()> {
        Ok(())
    }
    /// An epoch ended.
    ///
    /// # Errors
    /// Ends the run.
    fn epoch_ends(&mut self, _decoder: &Decoder<B>, _at: &RunPosition) -> Result<()> {
        Ok(())
    }
    /// A phase ended.
    ///
    /// # Errors
    /// Ends the run.
    fn phase_ends(&mut self, _decoder: &Decoder<B>, _at: &RunPosition) -> Result<()> {
        Ok(())
    }
}

impl<B: Backend> Callbacks<B> for () {}

/// Values of a tensor of this shape before the run.
pub(super) type InitialTensor<'a> = Box<dyn Fn(ParamId, &[usize]) -> Result<Vec<f32>> + 'a>;

/// Runs phases one after another over one loader, so that 2 + 4 epochs in two phases see the batches of 6 epochs in
/// one.
pub struct Tuner<'a, B: Backend> {
    pub(super) decoder: &'a mut Decoder<B>,
    pub(super) loader: &'a mut Loader,
    pub(super) options: TuneOptions,
    pub(super) phases: Vec<Phase>,
    pub(super) trains: Box<dyn Fn(ParamId) -> bool + 'a>,
    pub(super) run_dir: Option<RunDir>,
    pub(super) measure_updates: bool,
    pub(super) initial: Option<InitialTensor<'a>>,
    pub(super) roofline: Option<Roofline>,
    pub(super) watched: Option<Watched<'a, B>>,
    pub(super) reference: Option<Reference>,
    pub(super) ema: Ema<B>,
    pub(super) group: &'a dyn Group<B>,
    pub(super) bucket_bytes: usize,
    pub(super) access: Access,
}

impl<'a, B: Backend> Tuner<'a, B> {
    /// A run without files. It trains the adapters alone if the decoder has any, else all tensors with a learning rate.
    ///
    /// `loader` must be made with [`TuneOptions::loader`]; phases of no steps are left out.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] where a phase has both `epochs` and `steps`.
    pub fn new(
        decoder: &'a mut Decoder<B>,
        loader: &'a mut Loader,
        options: TuneOptions,
        phases: Vec<Phase>,
    ) -> Result<Self> {
        let adapter = |id: ParamId| matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_));
        let adapted = decoder.params().iter().any(|param| adapter(param.id));
        let mut kept = Vec::new();
        for phase in phases {
            if !matches!(phase.options.length()?, Length::Epochs(0) | Length::Steps(0)) {
                kept.push(phase);
            }
        }
        let trains = Box::new(move |id| adapter(id) || !adapted);
        Ok(Self {
            decoder,
            loader,
            options,
            phases: kept,
            trains,
            run_dir: None,
            measure_updates: false,
            initial: None,
            roofline: None,
            watched: None,
            reference: None,
            ema: Ema::default(),
            group: &Alone,
            bucket_bytes: BUCKET_BYTES,
            access: Access::First,
        })
    }

    /// Trains together with the other ranks of a group, each of which runs the same phases over the same data from the
    /// same weights: a rank computes its part of each batch, and updates its part of the weights. Losses, norms and
    /// weights are the same on all ranks, and those of one rank up to rounding. Rank 0 alone writes files, evaluates, and
    /// measures updates; a [`RunDir`] and evaluations are given to all ranks. Where all of them see rank 0's directory, each
    /// writes and reads its moments itself.
    pub fn group(mut self, group: &'a dyn Group<B>) -> Self {
        self.group = group;
        self
    }

    /// Sends gradients to the other ranks of a group in buckets of so many bytes ([`crate::engine::buckets`]), the same on
    /// all ranks; [`BUCKET_BYTES`] by default. More than one is sent while the backward pass goes on.
    pub fn bucket_bytes(mut self, bytes: usize) -> Self {
        self.bucket_bytes = bytes;
        self
    }

    /// Restricts training to the tensors that `trains` admits, among the cells with a learning rate.
    pub fn trains(mut self, trains: impl Fn(ParamId) -> bool + 'a) -> Self {
        self.trains = Box::new(trains);
        self
    }

    /// Writes metrics, updates and checkpoints to a directory.
    pub fn at(mut self, run_dir: RunDir) -> Self {
        self.run_dir = Some(run_dir);
        self
    }

    /// Measures ‖ΔW‖_F of each cell in each phase. The weights at the start of a phase are kept until its end: in the
    /// checkpoint at the start if there is a [`RunDir`], else as a copy of the trained weights on the host. The first
    /// phase needs the copy unless [`Tuner::initial_weights`] are known.
    pub fn measure_updates(mut self) -> Self {
        self.measure_updates = true;
        self
    }

    /// Source of the weights before the run: `tensor(id, shape)` gives the values of any tensor but adapters. It is
    /// called at the end of a phase, one tensor at a time.
    pub fn initial_weights(mut self, tensor: impl Fn(ParamId, &[usize]) -> Result<Vec<f32>> + 'a) -> Self {
        self.initial = Some(Box::new(tensor));
        self
    }

    /// Reports [`StepMetrics::speed_of_light`] against this roofline.
    pub fn roofline(mut self, roofline: Roofline) -> Self {
        self.roofline = Some(roofline);
        self
    }
}
