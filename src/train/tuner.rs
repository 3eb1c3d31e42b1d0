//! A run: phases over one decoder and one loader, heard through callbacks, interrupted and resumed at will.

use super::metrics::MetricsLog;
use super::start::{Given, PhaseStart};
use super::state::{Journal, RunState};
use super::step::{Group, Outcome, take_step};
use super::updates::PhaseUpdates;
use super::{Length, Optimizer, PhaseOptions, StepMetrics, StepSettings, TuneOptions, Updates, peak_bytes};
use crate::backend::{Backend, Roofline};
use crate::data::Loader;
use crate::engine::{Decoder, Floor, Gradients, Plan, light_seconds};
use crate::error::Result;
use crate::modules::{LearningRates, ParamId};
use std::path::PathBuf;
use std::time::Instant;

/// So many steps in a row without a finite loss and gradient end the run.
const MAX_NON_FINITE_IN_A_ROW: u64 = 20;

/// One phase: what trains, and how.
#[derive(Clone, Debug, PartialEq)]
pub struct Phase {
    /// Its name in metrics and updates, such as `mods` and `all`.
    pub name: String,
    /// What trains and how fast; a cell that is not listed is frozen.
    pub rates: LearningRates,
    /// The rest.
    pub options: PhaseOptions,
}

/// Where a run keeps its files, and what its checkpoints are tied to.
#[derive(Clone, Debug, PartialEq)]
pub struct RunDir {
    /// Gets `metrics.jsonl`, `updates.json` and `checkpoints/`.
    pub dir: PathBuf,
    /// A hash of the model as given.
    pub model: String,
    /// A hash of the examples.
    pub data: String,
    /// Continue from the newest whole checkpoint, if there is one. Otherwise old metrics and checkpoints are removed.
    pub resume: bool,
}

/// Where a run stands when a hook is called.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RunPosition {
    /// Name of the phase.
    pub phase: String,
    /// Steps taken, over all phases.
    pub step: u64,
    /// Steps taken in this phase.
    pub phase_step: u64,
    /// Steps that this phase has.
    pub phase_steps: u64,
    /// Epochs finished, over all phases.
    pub epoch: u64,
}

/// What happened in a phase.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PhaseSummary {
    /// Its name.
    pub phase: String,
    /// Steps, with those that were skipped.
    pub steps: u64,
    /// Skipped because the loss or a gradient was not finite.
    pub skipped_non_finite: u64,
    /// Skipped because no token had a loss.
    pub skipped_empty: u64,
    /// Tokens with a loss.
    pub trained_tokens: u64,
    /// All tokens.
    pub tokens: u64,
    /// Loss of the first step that had one.
    pub first_loss: Option<f32>,
    /// Loss of the last.
    pub last_loss: Option<f32>,
    /// Time spent in steps, in seconds.
    pub seconds: f64,
}

/// What happened in a run.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct TuneSummary {
    /// One a phase; phases of length 0 are left out.
    pub phases: Vec<PhaseSummary>,
    /// How far each cell moved, if asked for.
    pub updates: Updates,
    /// The step whose checkpoint was continued.
    pub resumed_from: Option<u64>,
    /// The most memory that was used, in bytes: as [`StepMetrics::peak_bytes`].
    pub peak_bytes: u64,
    /// [`Plan::total_bytes`] of the phase that takes most.
    #[serde(default)]
    pub planned_bytes: u64,
}

/// What a caller may listen to. An error ends the run as an interruption does.
///
/// The callbacks of an epoch and of a phase come before the checkpoint of that step is written: after an interruption and a
/// resume each has been called at least once, and perhaps twice, for the same [`RunPosition`] and the same weights.
pub trait Callbacks<B: Backend> {
    /// Something that the user should know, such as a damaged checkpoint.
    fn note(&mut self, _text: &str) {}
    /// The run begins: what each phase will take, by its name.
    fn run_begins(&mut self, _plans: &[(String, Plan)]) {}
    /// A phase begins, or is continued.
    fn phase_begins(&mut self, _at: &RunPosition) -> Result<()> {
        Ok(())
    }
    /// A step was taken or skipped.
    fn step(&mut self, _metrics: &StepMetrics, _at: &RunPosition) -> Result<()> {
        Ok(())
    }
    /// An epoch is over.
    fn epoch_ends(&mut self, _decoder: &Decoder<B>, _at: &RunPosition) -> Result<()> {
        Ok(())
    }
    /// A phase is over.
    fn phase_ends(&mut self, _decoder: &Decoder<B>, _at: &RunPosition) -> Result<()> {
        Ok(())
    }
}

impl<B: Backend> Callbacks<B> for () {}

/// Runs phases one after another. The loader goes on from phase to phase, so that 2 + 4 epochs in two phases see the
/// same batches as 6 epochs in one.
pub struct Tuner<'a, B: Backend> {
    pub(super) decoder: &'a mut Decoder<B>,
    pub(super) loader: &'a mut Loader,
    pub(super) options: TuneOptions,
    pub(super) phases: Vec<Phase>,
    pub(super) trains: Box<dyn Fn(ParamId) -> bool + 'a>,
    pub(super) run_dir: Option<RunDir>,
    pub(super) measure_updates: bool,
    pub(super) given: Option<Given<'a>>,
    roofline: Option<Roofline>,
}

impl<'a, B: Backend> Tuner<'a, B> {
    /// A run that writes nothing. Trains adapters alone where the decoder has any, else all tensors with a rate.
    ///
    /// The loader must have been made with [`TuneOptions::loader`]; phases of length 0 are left out.
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
            given: None,
            roofline: None,
        })
    }

    /// Trains only the tensors for which `trains` is true, of the cells that have a rate.
    pub fn trains(mut self, trains: impl Fn(ParamId) -> bool + 'a) -> Self {
        self.trains = Box::new(trains);
        self
    }

    /// Writes metrics, updates and checkpoints.
    pub fn at(mut self, run_dir: RunDir) -> Self {
        self.run_dir = Some(run_dir);
        self
    }

    /// Measures ‖ΔW‖_F of each cell in each phase. What a phase starts from is kept until its end: as a copy on the host
    /// of what trains, in the backend's type, or where there is a [`RunDir`], in the checkpoint at the phase's start. The
    /// first phase has none and needs the copy, unless [`Tuner::given`] spares it.
    pub fn measure_updates(mut self) -> Self {
        self.measure_updates = true;
        self
    }

    /// `tensor(id, shape)` gives the values of a tensor, except adapters, as the decoder had them before the run; it is
    /// asked when a phase ends, one tensor at a time.
    pub fn given(mut self, tensor: impl Fn(ParamId, &[usize]) -> Result<Vec<f32>> + 'a) -> Self {
        self.given = Some(Box::new(tensor));
        self
    }

    /// Holds every step against these: [`StepMetrics::speed_of_light`].
    pub fn roofline(mut self, roofline: Roofline) -> Self {
        self.roofline = Some(roofline);
        self
    }

    /// Runs all phases, or what a checkpoint says is left of them.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] names an option or a checkpoint of another run; [`crate::error::Error::Failed`]
    /// where training diverges; [`crate::error::Error::Io`]; what a callback returns.
    pub fn run(mut self, callbacks: &mut dyn Callbacks<B>) -> Result<TuneSummary> {
        self.check()?;
        let plans = self.plans();
        callbacks.run_begins(&plans);
        let mut run = RunState::at(self.loader.position());
        let mut optimizer = None;
        let mut start = None;
        let mut summary = TuneSummary::default();
        let mut journal = None;
        if let Some(run_dir) = self.run_dir.clone() {
            let identity = self.identity(&run_dir)?;
            let store = Journal::new(&run_dir, identity, self.options.keep_last, self.measure_updates)?;
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
                None if run_dir.resume => {
                    callbacks.note("there is no checkpoint to resume; the run starts at the beginning")
                }
                None => {}
            }
            if saved.is_none() {
                store.clear()?;
            }
            let log = MetricsLog::open(&run_dir.dir.join("metrics.jsonl"), run.metrics_bytes)?;
            journal = Some((store, log));
        }

        while run.phase < self.phases.len() {
            self.phase(&mut run, &mut optimizer, start.take(), journal.as_mut(), callbacks)?;
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

    /// One phase from where it stands to its end, and the step into the next.
    fn phase(
        &mut self,
        run: &mut RunState,
        optimizer: &mut Option<Optimizer<B>>,
        start: Option<PhaseStart<B>>,
        mut journal: Option<&mut (Journal, MetricsLog)>,
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
            if let Some((_, log)) = journal.as_deref_mut() {
                log.append(&metrics)?;
                run.metrics_bytes = log.bytes();
            }
            let at = run.progress(&phase.name, total);
            callbacks.step(&metrics, &at)?;
            run.give_up(&phase.name, MAX_NON_FINITE_IN_A_ROW, self.steps_per_epoch())?;
            if run.position.batch == 0 {
                callbacks.epoch_ends(self.decoder, &at)?;
            }
            let due = self.options.save_every > 0 && run.step.is_multiple_of(self.options.save_every);
            // The last step of a phase is saved below, with the phase behind it.
            let due = due && run.phase_step < total;
            if let Some((store, log)) = journal.as_deref_mut().filter(|_| due) {
                log.sync()?;
                store.save(run, self.decoder, Some(&adam), &self.changed(run.phase))?;
            }
        }

        // What follows holds tensors on the host: not beside the gradients and activations of a step.
        drop(gradients);
        self.decoder.release_pool();
        callbacks.phase_ends(self.decoder, &run.progress(&phase.name, total))?;
        if let Some(start) = start {
            let store = journal.as_deref().map(|(store, _)| store);
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
        if let Some((store, log)) = journal {
            log.sync()?;
            store.write_updates(&run.updates)?;
            store.save(run, self.decoder, optimizer.as_ref(), &self.changed(run.phase - 1))?;
        }
        Ok(())
    }

    /// One step: batches, gradients, weights, and the line that says so.
    fn step(
        &mut self,
        phase: &Phase,
        floor: &Floor,
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
        let light = light.map(|roofline| light_seconds(&floor.step(&group.batches), &roofline));
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
