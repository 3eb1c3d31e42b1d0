//! The training loop: phases, steps, checkpoints, resume.

use super::metrics::MetricsLog;
use super::start::PhaseStart;
use super::state::{RunFiles, RunState};
use super::step::{StepBatches, StepResult, take_step};
use super::updates::PhaseUpdates;
use super::{
    Callbacks, Optimizer, Phase, PhaseOptions, PhaseSummary, StepMetrics, StepSettings, TuneSummary, Tuner, Updates,
    peak_bytes,
};
use crate::backend::Backend;
use crate::engine::{Gradients, MinimumCost, roofline_seconds};
use crate::error::{Error, Result};
use crate::interrupt::{self, Section};
use std::time::Instant;

impl<B: Backend> Tuner<'_, B> {
    /// Runs all phases, or the rest of them from a checkpoint.
    ///
    /// # Errors
    /// [`crate::error::Error::Input`] names an option that is out of range, or a checkpoint of another run;
    /// [`crate::error::Error::Failed`] where training diverges; [`crate::error::Error::Io`]; errors of callbacks.
    pub fn run(mut self, callbacks: &mut dyn Callbacks<B>) -> Result<TuneSummary> {
        self.check()?;
        let plans = self.plans();
        callbacks.run_begins(&plans);
        // Before a checkpoint's weights take the place of those that the run began with.
        self.reference = self.reference(callbacks)?;
        let mut run = RunState::at(self.loader.position());
        let mut optimizer = None;
        let mut start = None;
        let mut summary = TuneSummary::default();
        let mut files = None;
        if self.group.share().size > 1 {
            // Vaccine's shift has a norm over a whole micro-batch, of which a rank has a part.
            let what = [("a checkpoint", self.run_dir.is_some()), ("vaccine", self.options.vaccine.is_some())];
            if let Some((what, _)) = what.into_iter().find(|(_, asked)| *asked) {
                return Err(Error::unsupported("training with several ranks", what, "leave it out, or train with one"));
            }
        }
        if let Some(run_dir) = self.run_dir.clone() {
            let identity = self.identity(&run_dir)?;
            let mut store = RunFiles::open(&run_dir, identity)?;
            (store.keep_last, store.keep_start) = (self.options.keep_last, self.measure_updates);
            let saved = if run_dir.resume { store.newest(callbacks)? } else { None };
            match &saved {
                Some(saved) => {
                    run = store.state(saved, self.phases.len(), self.loader.batches_per_epoch())?;
                    summary.resumed_from = Some(run.step);
                    if self.measure_updates && run.phase_step > 0 {
                        start = Some(self.phase_start(run.phase)?);
                    }
                    optimizer = self.restore(&store, saved, &run)?;
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

        // Without files nothing can be saved, and a signal ends the process.
        let section = files.is_some().then(Section::begin);
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
            None if self.measure_updates => Some(self.phase_start(run.phase)?),
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
            let stopped = interrupt::asked();
            // The last step of a phase is saved below, after the phase.
            let due = (due || stopped.is_some()) && run.phase_step < total && !run.watch.stopped;
            if let Some((store, log)) = files.as_deref_mut().filter(|_| due) {
                log.sync()?;
                store.save(run, self.decoder, Some(&adam), &self.ema, &self.changed(run.phase))?;
                if let Some(signal) = stopped {
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
        if let Some((store, log)) = files {
            log.sync()?;
            store.write_updates(&run.updates)?;
            store.save(run, self.decoder, optimizer.as_ref(), &self.ema, &self.changed(run.phase - 1))?;
            if let Some(signal) = interrupt::asked() {
                return Err(Error::Interrupted { signal, step: run.step });
            }
        }
        Ok(())
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
        let outcome = take_step(self.decoder, adam, gradients, &group, &settings, &self.options, self.group)?;
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
