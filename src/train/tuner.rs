//! The training loop: phases, steps, checkpoints, resume.

use super::checkpoint::{CHECKPOINTS, Checkpoints};
use super::metrics::MetricsLog;
use super::moments::Moments;
use super::restore::Begun;
use super::start::PhaseStart;
use super::state::{RunFiles, RunState};
use super::step::{StepBatches, StepResult, take_step};
use super::updates::PhaseUpdates;
use super::{
    Callbacks, Optimizer, Phase, PhaseOptions, PhaseSummary, StepMetrics, StepSettings, TuneSummary, Tuner, Updates,
    identity, peak_bytes,
};
use crate::backend::Backend;
use crate::engine::{Gradients, MinimumCost, roofline_seconds};
use crate::error::{Error, Result};
use crate::interrupt::{self, Section};
use std::time::Instant;

impl<B: Backend> Tuner<'_, B> {
    /// Checks options and phases, and that all ranks of a group have the same run. Nothing is written; [`Tuner::run`] does it
    /// as well.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] names an option that is out of range, or the rank that has another run, and what
    /// differs; [`crate::error::Error::Failed`] names a rank that has ended.
    pub fn agree(&self) -> Result<()> {
        self.check()?;
        match &self.run_dir {
            Some(run_dir) => identity::agree(&self.in_common(&self.identity(run_dir)?), self.group),
            None => Ok(()),
        }
    }

    /// Runs all phases, or the rest of them from a checkpoint.
    ///
    /// # Errors
    /// As [`Tuner::agree`]; [`crate::error::Error::Input`] for a checkpoint of another run; [`crate::error::Error::Failed`]
    /// where training diverges; [`crate::error::Error::Io`]; errors of callbacks.
    pub fn run(mut self, callbacks: &mut dyn Callbacks<B>) -> Result<TuneSummary> {
        self.agree()?;
        let plans = self.plans();
        let identity = self.run_dir.as_ref().map(|run_dir| self.identity(run_dir)).transpose()?;
        callbacks.run_begins(&plans);
        // Before a checkpoint's weights take the place of those that the run began with.
        self.reference = self.reference(callbacks)?;
        let Begun { mut run, resumed, mut optimizer, mut start, mut files } = self.begin(identity, callbacks)?;
        let resumed_from = resumed.then_some(run.step);
        let mut summary = TuneSummary { resumed_from, ..TuneSummary::default() };

        // Without files nothing can be saved, and a signal ends the process.
        let section = self.run_dir.is_some().then(Section::begin);
        while run.phase < self.phases.len() {
            self.phase(&mut run, &mut optimizer, start.take(), files.as_mut(), callbacks)?;
        }
        drop(section);
        let store = files.as_ref().map(|(store, _)| store);
        summary.best_step = self.restore_best(&run.watch, run.step, store)?;
        summary.evaluations = run.watch.evaluations;
        self.ema.apply(self.decoder)?;
        summary.phases = run.summaries;
        summary.updates = Updates { phases: run.updates };
        summary.peak_bytes = self.peak_bytes();
        summary.planned_bytes = plans.iter().map(|(_, plan)| plan.total_bytes()).max().unwrap_or(0);
        Ok(summary)
    }

    fn peak_bytes(&self) -> u64 {
        self.decoder.backend.device_peak_bytes().unwrap_or_else(peak_bytes)
    }

    /// The signal that has asked a rank to end, the same on all ranks.
    fn stopped(&self) -> Result<Option<i32>> {
        let (own, size) = (interrupt::asked(), self.group.share().size);
        if size == 1 || self.run_dir.is_none() {
            return Ok(own);
        }
        let signal = own.and_then(|signal| u8::try_from(signal).ok()).unwrap_or(0);
        let received = self.group.exchange(vec![vec![signal]; size])?;
        let largest = received.iter().flatten().copied().max().unwrap_or(0);
        Ok((largest > 0).then_some(i32::from(largest)))
    }

    /// Saves a checkpoint: rank 0 writes it, with the moments that the other ranks write beside it or send.
    fn save(
        &self,
        run: &RunState,
        optimizer: Option<&Optimizer<B>>,
        last_phase: usize,
        files: Option<&mut (RunFiles, MetricsLog)>,
    ) -> Result<()> {
        let moments = Moments { decoder: self.decoder, optimizer, group: self.group, access: self.access };
        match (files, &self.run_dir) {
            (Some((store, log)), _) => {
                log.sync()?;
                store.save(run, &moments, &self.ema, &self.changed(last_phase))
            }
            (None, Some(run_dir)) => moments.give(&Checkpoints::new(&run_dir.dir, CHECKPOINTS), run.step),
            (None, None) => Ok(()),
        }
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
            None => Optimizer::sharded(self.decoder, &phase.rates, &self.trains, self.group.share())?,
        };
        if !phase.options.decay_all {
            adam.decay_matrices_only(self.decoder);
        }
        let mut gradients = Gradients::new(self.decoder, |id| phase.rates.trains(id.cell()) && (self.trains)(id))?;
        let minimum = self.minimum_cost(&phase);
        if self.options.ema_decay.is_some() {
            self.ema.begin(self.decoder, adam.trained())?;
        }
        // Those of a resumed phase are in its checkpoint.
        if self.options.prox.is_some() && run.phase_step == 0 {
            adam.set_anchors(self.decoder)?;
        }
        let start = match start {
            None if self.measure_updates && self.group.share().rank == 0 => Some(self.phase_start(run.phase)?),
            start => start,
        };
        if run.summaries.len() == run.phase {
            run.summaries.push(PhaseSummary { phase: phase.name.clone(), ..PhaseSummary::default() });
        }
        callbacks.phase_begins(&run.position_in(&phase.name, total))?;
        if run.step == 0 {
            let at = run.position_in(&phase.name, total);
            self.evaluate(&mut run.watch, &phase, &at, None)?;
        }

        while run.phase_step < total && !run.watch.stopped {
            let mut metrics = self.step(&phase, &minimum, total, run, &mut adam, &mut gradients)?;
            let at = run.position_in(&phase.name, total);
            let store = files.as_deref().map(|(store, _)| store);
            let found = self.evaluate(&mut run.watch, &phase, &at, store)?;
            (metrics.eval_loss, metrics.eval_refusal) = (found.loss, found.refusal);
            if let Some((_, log)) = files.as_deref_mut() {
                log.append(&metrics)?;
                run.metrics_bytes = log.bytes();
            }
            callbacks.step(&metrics, &at)?;
            run.check_progress(&phase, total, self.steps_per_epoch())?;
            if run.position.batch == 0 {
                callbacks.epoch_ends(self.decoder, &at)?;
            }
            let due = self.options.save_every > 0 && run.step.is_multiple_of(self.options.save_every);
            let stopped = self.stopped()?;
            // The last step of a phase is saved below, after the phase.
            if (due || stopped.is_some()) && run.phase_step < total && !run.watch.stopped {
                self.save(run, Some(&adam), run.phase, files.as_deref_mut())?;
                if let Some(signal) = stopped.filter(|_| self.run_dir.is_some()) {
                    return Err(Error::Interrupted { signal, step: run.step });
                }
            }
        }

        // The measurements below hold tensors on the host: not at the same time as gradients and activations.
        drop(gradients);
        self.decoder.release_pool();
        callbacks.phase_ends(self.decoder, &run.position_in(&phase.name, total))?;
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
        if let Some((store, _)) = files.as_deref_mut() {
            store.write_updates(&run.updates)?;
        }
        self.save(run, optimizer.as_ref(), run.phase - 1, files)?;
        match self.stopped()?.filter(|_| self.run_dir.is_some()) {
            Some(signal) => Err(Error::Interrupted { signal, step: run.step }),
            None => Ok(()),
        }
    }

    /// One step: batches, gradients, optimizer, metrics.
    fn step(
        &mut self,
        phase: &Phase,
        minimum: &MinimumCost,
        total: u64,
        run: &mut RunState,
        adam: &mut Optimizer<B>,
        gradients: &mut Gradients<B>,
    ) -> Result<StepMetrics> {
        let began = Instant::now();
        if self.options.prox.is_some() && self.loader.switches() {
            adam.set_anchors(self.decoder)?;
        }
        let share = self.group.share();
        let group = StepBatches::next(self.loader, self.options.grad_accum, self.reference.as_ref(), share);
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
        let sums = (self.group, self.bucket_bytes);
        let outcome = take_step(self.decoder, adam, gradients, &group, &settings, &self.options, sums)?;
        if let (StepResult::Trained { .. }, Some(decay)) = (&outcome, self.options.ema_decay) {
            self.ema.update(self.decoder, decay)?;
        }
        run.advance(self.loader.position(), &group, &outcome);

        let seconds = began.elapsed().as_secs_f64();
        run.summaries[run.phase].seconds += seconds;
        let light = self.roofline.filter(|_| group.trained_tokens > 0);
        let light = light.map(|roofline| roofline_seconds(&minimum.step(&group.batches), &roofline));
        let (loss, grad_norm, skipped) = match outcome {
            StepResult::Trained { loss, grad_norm } => (Some(loss), Some(grad_norm), None),
            StepResult::NonFinite { loss, .. } => (Some(loss).filter(|l| l.is_finite()), None, run.skipped.clone()),
            StepResult::Empty => (None, None, run.skipped.clone()),
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
            eval_loss: None,
            eval_refusal: None,
            skipped,
        })
    }
}
