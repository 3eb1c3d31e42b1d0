//! Evaluations during a run, the best weights by them, and the early end of its last phase.

use super::access::Access;
use super::restore::load_weights;
use super::state::RunFiles;
use super::{Phase, RunPosition, Tuner};
use crate::backend::Backend;
use crate::engine::Decoder;
use crate::error::Result;
use crate::group::from_first;

/// When a run is evaluated, and what follows from it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WatchSettings {
    /// Steps between evaluations; there is one before the first step and one at the end of each phase as well.
    pub every: u64,
    /// End with the weights of the last phase whose held-out loss was the lowest.
    pub keep_best: bool,
    /// End the last phase after so many evaluations in a row without a lower held-out loss.
    pub patience: Option<u64>,
    /// Hash of what is evaluated, part of the run where the weights depend on it.
    pub data: String,
}

impl WatchSettings {
    /// Whether the weights at the end depend on the evaluations.
    pub(super) fn decides(&self) -> bool {
        self.keep_best || self.patience.is_some()
    }
}

/// What an evaluation measures.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Evaluated {
    /// Mean cross-entropy of held-out answers, in nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss: Option<f64>,
    /// Mean refusal log-odds over harmful prompts: below 0 the model complies rather than refuses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refusal: Option<f64>,
}

/// An evaluation of a run.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Evaluation {
    /// Steps taken before it, over all phases; 0 = the model before the run.
    pub step: u64,
    /// What it measured.
    #[serde(flatten)]
    pub found: Evaluated,
}

/// Evaluations so far; part of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub(super) struct WatchState {
    pub(super) evaluations: Vec<Evaluation>,
    /// Step and held-out loss of the best weights of the last phase.
    pub(super) best: Option<(u64, f64)>,
    /// Evaluations of the last phase since then.
    since_best: u64,
    /// Whether patience has run out.
    pub(super) stopped: bool,
}

/// Measures a decoder; see [`Tuner::watch`].
pub type Evaluator<'a, B> = Box<dyn FnMut(&Decoder<B>) -> Result<Evaluated> + 'a>;

/// A run's evaluations.
pub(super) struct Watched<'a, B: Backend> {
    pub(super) settings: WatchSettings,
    evaluate: Evaluator<'a, B>,
}

impl<'a, B: Backend> Tuner<'a, B> {
    /// Evaluates the run as it goes, on rank 0 for all. `evaluate` must not depend on anything but the decoder's weights.
    pub fn watch(mut self, settings: WatchSettings, evaluate: Evaluator<'a, B>) -> Self {
        self.watched = Some(Watched { settings, evaluate });
        self
    }

    /// Evaluates if it is due at this position; keeps the weights if they are the best. Returns what was measured.
    pub(super) fn evaluate(
        &mut self,
        state: &mut WatchState,
        phase: &Phase,
        at: &RunPosition,
        files: Option<&RunFiles>,
    ) -> Result<Evaluated> {
        let Some(watched) = &mut self.watched else { return Ok(Evaluated::default()) };
        let WatchSettings { every, keep_best, patience, .. } = watched.settings;
        let due = at.step == 0 || at.phase_step == at.phase_steps || every > 0 && at.step.is_multiple_of(every);
        let last = state.evaluations.last().map(|done| done.step);
        if !due || last == Some(at.step) {
            return Ok(Evaluated::default());
        }
        let found = from_first(self.group, || (watched.evaluate)(self.decoder))?;
        state.evaluations.push(Evaluation { step: at.step, found });
        let is_last = self.phases.last().is_some_and(|last| last.name == phase.name);
        let Some(loss) = found.loss.filter(|loss| loss.is_finite() && is_last && at.phase_step > 0) else {
            return Ok(found);
        };
        if state.best.is_none_or(|(_, best)| loss < best) {
            (state.best, state.since_best) = (Some((at.step, loss)), 0);
            if let Some(files) = files.filter(|_| keep_best) {
                files.save_best(at.step, self.decoder, &self.changed(self.phases.len() - 1))?;
            }
        } else {
            state.since_best += 1;
            state.stopped = patience.is_some_and(|patience| state.since_best >= patience);
        }
        Ok(found)
    }

    /// Restores the best weights of the last phase, where they are wanted and are not those of its end.
    pub(super) fn restore_best(
        &mut self,
        state: &WatchState,
        step: u64,
        files: Option<&RunFiles>,
    ) -> Result<Option<u64>> {
        let wanted = self.watched.as_ref().is_some_and(|watched| watched.settings.keep_best);
        let Some((best, _)) = state.best.filter(|_| wanted && self.run_dir.is_some()) else { return Ok(None) };
        if best != step {
            let saved = files.map(|files| files.best(best)).transpose()?;
            load_weights(saved.as_ref(), self.decoder, (Access::First, self.group))?;
        }
        Ok(Some(best))
    }
}
