//! The training loop: phases over one decoder and one loader, with callbacks, checkpoints and resume.

use super::metrics::MetricsLog;
use super::start::{InitialTensor, PhaseStart};
use super::state::{RunFiles, RunState};
use super::step::{Group, Outcome, take_step};
use super::updates::PhaseUpdates;
use super::{Length, Optimizer, PhaseOptions, StepMetrics, StepSettings, TuneOptions, Updates, peak_bytes};
use crate::backend::{Backend, Roofline};
use crate::data::Loader;
use crate::engine::{Decoder, Gradients, MinimumCost, Plan, roofline_seconds};
use crate::error::Result;
use crate::modules::{LearningRates, ParamId};
use std::path::PathBuf;
use std::time::Instant;

/// Consecutive steps with a non-finite loss or gradient after which the run fails.
const MAX_NON_FINITE_STEPS: u64 = 20;

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

/// Position of a run at a callback.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunPosition {
    /// Name of the phase.
    pub phase: String,
    /// Steps taken, over all phases.
    pub step: u64,
    /// Steps taken in this phase.
    pub phase_step: u64,
    /// Steps of this phase.
    pub phase_steps: u64,
    /// Epochs finished, over all phases.
    pub epoch: u64,
}

/// Statistics of a phase.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PhaseSummary {
    /// Its name.
    pub phase: String,
    /// Steps, skipped ones included.
    pub steps: u64,
    /// Steps skipped for a non-finite loss or gradient.
    pub skipped_non_finite: u64,
    /// Steps skipped for lack of trained tokens.
    pub skipped_empty: u64,
    /// Tokens with a loss.
    pub trained_tokens: u64,
    /// All tokens.
    pub tokens: u64,
    /// First loss.
    pub first_loss: Option<f32>,
    /// Last loss.
    pub last_loss: Option<f32>,
    /// Wall time of the steps, in seconds.
    pub seconds: f64,
}

/// Statistics of a run.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct TuneSummary {
    /// One per phase; phases of no steps are left out.
    pub phases: Vec<PhaseSummary>,
    /// Updates of each cell, if measured.
    pub updates: Updates,
    /// Step of the checkpoint that was resumed.
    pub resumed_from: Option<u64>,
    /// Peak memory in bytes, as [`StepMetrics::peak_bytes`].
    pub peak_bytes: u64,
    /// Largest [`Plan::total_bytes`] of a phase.
    #[serde(default)]
    pub planned_bytes: u64,
}

/// Callbacks of the training loop. An error ends the run as an interruption does.
///
/// `epoch_ends` and `phase_ends` precede the checkpoint of their step: across an interruption and a resume they are called
/// at least once for a [`RunPosition`], with the same weights each time.
pub trait Callbacks<B: Backend> {
    /// A warning, such as a damaged checkpoint.
    fn note(&mut self, _text: &str) {}
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

/// Runs phases one after another over one loader, so that 2 + 4 epochs in two phases see the batches of 6 epochs in one.
pub struct Tuner<'a, B: Backend> {
    pub(super) decoder: &'a mut Decoder<B>,
    pub(super) loader: &'a mut Loader,
    pub(super) options: TuneOptions,
    pub(super) phases: Vec<Phase>,
    pub(super) trains: Box<dyn Fn(ParamId) -> bool + 'a>,
    pub(super) run_dir: Option<RunDir>,
    pub(super) measure_updates: bool,
    pub(super) initial: Option<InitialTensor<'a>>,
    roofline: Option<Roofline>,
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
        })
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
    /// checkpoint at the start if there is a [`RunDir`], else as a copy of the trained weights on the host. The first phase
    /// needs the copy unless [`Tuner::initial_weights`] are known.
    pub fn measure_updates(mut self) -> Self {
        self.measure_updates = true;
        self
    }

    /// Source of the weights before the run: `tensor(id, shape)` gives the values of any tensor but adapters. It is called
    /// at the end of a phase, one tensor at a time.
    pub fn initial_weights(mut self, tensor: impl Fn(ParamId, &[usize]) -> Result<Vec<f32>> + 'a) -> Self {
        self.initial = Some(Box::new(tensor));
        self
    }

    /// Reports [`StepMetrics::speed_of_light`] against this roofline.
    pub fn roofline(mut self, roofline: Roofline) -> Self {
        self.roofline = Some(roofline);
        self
    }

    /// Runs all phases, or the rest of them from a checkpoint.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] names an option that is out of range, or a checkpoint of another run;
    /// [`crate::error::Error::Failed`] where training diverges; [`crate::error::Error::Io`]; errors of callbacks.
    pub fn run(mut self, callbacks: &mut dyn Callbacks<B>) -> Result<TuneSummary> {
        self.check()?;
        let plans = self.plans();
        callbacks.run_begins(&plans);
        let mut run = RunState::at(self.loader.position());
        let mut optimizer = None;
        let mut start = None;
        let mut summary = TuneSummary::default();
        let mut files = None;
        if let Some(run_dir) = self.run_dir.clone() {
            let identity = self.identity(&run_dir)?;
            let store = RunFiles::new(&run_dir, identity, self.options.keep_last, self.measure_updates)?;
            let saved = if run_dir.resume { store.newest(callbacks)? } else { None };
            match &saved {
                Some(saved) => {
                    run = store.state(saved, self.phases.len(), self.loader.batches_per_epoch())?;
                    summary.resumed_from = Some(run.step);
                    if self.measure_updates && run.phase_step > 0 {
                        start = Some(self.phase_start(run.phase)?);
                    }
                    optimizer = self.restore(&store, saved, &mut run)?;
                    self.loader.seek(run.position)?;
                }
                None if run_dir.resume => callbacks.note("no checkpoint to resume; the run starts from the beginning"),
                None => {}
            }
            if saved.is_none() {
                store.clear()?;
            }
            let log = MetricsLog::open(&run_dir.dir.join("metrics.jsonl"), run.metrics_bytes)?;
            files = Some((store, log));
        }

        while run.phase < self.phases.len() {
            self.phase(&mut run, &mut optimizer, start.take(), files.as_mut(), callbacks)?;
        }
        run.ema.apply(self.decoder)?;
        summary.phases = run.summaries;
        summary.updates = Updates { phases: run.updates };
        summary.peak_bytes = self.peak_bytes();
        summary.planned_bytes = plans.iter().map(|(_, plan)| plan.total_bytes()).max().unwrap_or(0);
        Ok(summary)
    }

    fn peak_bytes(&self) -> u64 {
        self.decoder.backend.device_peak_bytes().unwrap_or_else(peak_bytes)
    }

    /// Runs the current phase from its position to its end, and advances to the next.
    fn phase(
        &mut self,
        run: &mut RunState,
        optimizer: &mut Option<Optimizer<B>>,
        start: Option<PhaseStart<B>>,
        mut files: Option<&mut (RunFiles, MetricsLog)>,
        callbacks: &mut dyn Callbacks<B>,
    ) -> Result<()> {
        let phase = self.phases[run.phase].clone();
        let total = self.steps(&phase)?;
        let mut adam = match optimizer.take() {
            Some(adam) => adam,
            None => Optimizer::new(self.decoder, &phase.rates, &self.trains)?,
        };
        let mut gradients = Gradients::new(self.decoder, |id| phase.rates.trains(id.cell()) && (self.trains)(id))?;
        let floor = self.floor(&phase);
        if self.options.ema_decay.is_some() {
            run.ema.begin(self.decoder, adam.trained())?;
        }
        let start = match start {
            None if self.measure_updates => Some(self.phase_start(run.phase)?),
            start => start,
        };
        if run.summaries.len() == run.phase {
            run.summaries.push(PhaseSummary { phase: phase.name.clone(), ..PhaseSummary::default() });
        }
        callbacks.phase_begins(&run.progress(&phase.name, total))?;

        while run.phase_step < total {
            let metrics = self.step(&phase, &floor, total, run, &mut adam, &mut gradients)?;
            if let Some((_, log)) = files.as_deref_mut() {
                log.append(&metrics)?;
                run.metrics_bytes = log.bytes();
            }
            let at = run.progress(&phase.name, total);
            callbacks.step(&metrics, &at)?;
            run.check_progress(&phase.name, MAX_NON_FINITE_STEPS, self.steps_per_epoch())?;
            if run.position.batch == 0 {
                callbacks.epoch_ends(self.decoder, &at)?;
            }
            let due = self.options.save_every > 0 && run.step.is_multiple_of(self.options.save_every);
            // The last step of a phase is saved below, after the phase.
            let due = due && run.phase_step < total;
            if let Some((store, log)) = files.as_deref_mut().filter(|_| due) {
                log.sync()?;
                store.save(run, self.decoder, Some(&adam), &self.changed(run.phase))?;
            }
        }

        // The measurements below hold tensors on the host: not at the same time as gradients and activations.
        drop(gradients);
        self.decoder.release_pool();
        callbacks.phase_ends(self.decoder, &run.progress(&phase.name, total))?;
        if let Some(start) = start {
            let store = files.as_deref().map(|(store, _)| store);
            if let Some(cells) = self.updates(&start, run, store, callbacks)? {
                run.updates.push(PhaseUpdates { phase: phase.name.clone(), cells });
            }
        }
        run.phase += 1;
        run.phase_step = 0;
        run.phase_start_step = run.step;
        // Moments that are not carried over are freed before the next phase asks for its own.
        match self.phases.get(run.phase).filter(|_| self.options.keep_optimizer) {
            Some(next) => *optimizer = Some(adam.next_phase(self.decoder, &next.rates, &self.trains)?),
            None => drop(adam),
        }
        if let Some((store, log)) = files {
            log.sync()?;
            store.write_updates(&run.updates)?;
            store.save(run, self.decoder, optimizer.as_ref(), &self.changed(run.phase - 1))?;
        }
        Ok(())
    }

    /// One step: batches, gradients, optimizer, metrics.
    fn step(
        &mut self,
        phase: &Phase,
        floor: &MinimumCost,
        total: u64,
        run: &mut RunState,
        adam: &mut Optimizer<B>,
        gradients: &mut Gradients<B>,
    ) -> Result<StepMetrics> {
        let began = Instant::now();
        let group = Group::next(self.loader, self.options.grad_accum);
        let PhaseOptions { lr, schedule, lr_warmup_steps, min_lr_ratio, weight_decay, max_grad_norm, .. } =
            phase.options;
        let settings = StepSettings {
            lr: lr * schedule.factor(run.phase_step, total, lr_warmup_steps, min_lr_ratio),
            weight_decay,
            beta1: self.options.beta1,
            beta2: self.options.beta2,
            eps: self.options.eps,
            max_grad_norm: (max_grad_norm > 0.0).then_some(max_grad_norm as f32),
            seed: self.options.seed ^ run.step.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        };
        let outcome = take_step(self.decoder, adam, gradients, &group, &settings, self.options.recompute)?;
        if let (Outcome::Trained { .. }, Some(decay)) = (&outcome, self.options.ema_decay) {
            run.ema.update(self.decoder, decay)?;
        }
        run.advance(self.loader.position(), &group, &outcome);

        let seconds = began.elapsed().as_secs_f64();
        run.summaries[run.phase].seconds += seconds;
        let light = self.roofline.filter(|_| group.trained_tokens > 0);
        let light = light.map(|roofline| roofline_seconds(&floor.step(&group.batches), &roofline));
        let (loss, grad_norm, skipped) = match outcome {
            Outcome::Trained { loss, grad_norm } => (Some(loss), Some(grad_norm), None),
            Outcome::NonFinite { loss, .. } => (Some(loss).filter(|l| l.is_finite()), None, run.skipped.clone()),
            Outcome::Empty => (None, None, run.skipped.clone()),
        };
        Ok(StepMetrics {
            step: run.step,
            phase: phase.name.clone(),
            loss,
            lr: settings.lr,
            grad_norm,
            trained_tokens: group.trained_tokens,
            tokens: group.tokens,
            tok_per_s: group.tokens as f64 / seconds.max(1e-9),
            speed_of_light: light.map(|light| light / seconds.max(1e-9)),
            peak_bytes: self.peak_bytes(),
            step_ms: seconds * 1e3,
            skipped,
        })
    }
}
