//! State of a run, and its checkpoints.

use super::checkpoint::{BEST, CHECKPOINTS, Checkpoint, CheckpointWriter, Checkpoints};
use super::ema::Ema;
use super::moments::Moments;
use super::step::{StepBatches, StepResult};
use super::tensors::{spec, write_buffer};
use super::updates::PhaseUpdates;
use super::watch::WatchState;
use super::{Phase, PhaseSummary, RunDir, RunPosition, Updates, identity};
use crate::backend::Backend;
use crate::data::LoaderPosition;
use crate::engine::Decoder;
use crate::error::{Error, FileOp, Result};
use crate::io::safetensors::{Safetensors, TensorSpec};
use crate::io::{json, remove};
use crate::modules::{Cell, ParamId};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

/// Steps with a non-finite loss or gradient in a row after which a run fails.
const MAX_IN_A_ROW: u64 = 10;
/// A run fails where more than one in this many steps of a phase is skipped for a non-finite loss or gradient,
const SKIPPED_SHARE: u64 = 4;
/// once it has taken so many steps, or at the end of the phase.
const JUDGED_STEPS: u64 = 40;
/// Most cells that the reason of a skipped step names.
const NAMED_CELLS: usize = 4;

/// State of a run, saved as JSON. No f64 of it must be restored exactly, as a JSON parser may be off by one bit.
#[derive(Default, serde::Serialize, serde::Deserialize)]
pub(super) struct RunState {
    /// Index of the phase.
    pub(super) phase: usize,
    /// Steps taken in the phase.
    pub(super) phase_step: u64,
    /// Steps taken over all phases.
    pub(super) step: u64,
    /// `step` at the start of the phase.
    pub(super) phase_start_step: u64,
    /// Position of the loader.
    pub(super) position: LoaderPosition,
    /// Bytes of `metrics.jsonl` up to this step.
    pub(super) metrics_bytes: u64,
    non_finite_in_a_row: u64,
    empty_in_a_row: u64,
    /// Reason if the last step was skipped.
    pub(super) skipped: Option<String>,
    /// One per phase that has begun.
    pub(super) summaries: Vec<PhaseSummary>,
    /// One per finished phase that was measured.
    pub(super) updates: Vec<PhaseUpdates>,
    /// Evaluations so far.
    #[serde(default)]
    pub(super) watch: WatchState,
}

impl RunState {
    /// The state before the first step.
    pub(super) fn at(position: LoaderPosition) -> Self {
        Self { position, ..Self::default() }
    }

    /// Whether the state is consistent with the run, as a checkpoint file is not trusted.
    fn is_consistent(&self, phases: usize, batches_per_epoch: u64) -> bool {
        let begun = self.phase + usize::from(self.phase_step > 0);
        let steps = self.step <= 1 << 53 && self.phase_step <= self.step && self.phase_start_step <= self.step;
        steps && begun <= phases && self.summaries.len() == begun && self.position.batch < batches_per_epoch
    }

    /// The position in a phase of `phase_steps` steps, for callbacks.
    pub(super) fn position_in(&self, phase: &str, phase_steps: u64) -> RunPosition {
        let (step, phase_step, epoch) = (self.step, self.phase_step, self.position.epoch);
        RunPosition { phase: phase.to_owned(), step, phase_step, phase_steps, epoch }
    }

    /// Advances by a step.
    pub(super) fn advance(&mut self, position: LoaderPosition, group: &StepBatches, outcome: &StepResult) {
        self.step += 1;
        self.phase_step += 1;
        self.position = position;
        let summary = &mut self.summaries[self.phase];
        summary.steps += 1;
        summary.tokens += group.tokens;
        summary.trained_tokens += group.trained_tokens;
        self.skipped = match outcome {
            StepResult::Trained { loss, .. } => {
                summary.first_loss.get_or_insert(*loss as f32);
                summary.last_loss = Some(*loss as f32);
                (self.non_finite_in_a_row, self.empty_in_a_row) = (0, 0);
                None
            }
            StepResult::NonFinite { loss, cells } => {
                summary.skipped_non_finite += 1;
                self.non_finite_in_a_row += 1;
                self.empty_in_a_row = 0;
                summary.last_skipped = Some(reason(*loss, cells));
                summary.last_skipped.clone()
            }
            StepResult::Empty => {
                summary.skipped_empty += 1;
                self.empty_in_a_row += 1;
                Some("no trained tokens".into())
            }
        };
    }

    /// Fails after too many skipped steps: in a row, or of the steps so far once there are enough of them, or at the
    /// end of the phase.
    pub(super) fn check_progress(&self, phase: &Phase, total: u64, steps_per_epoch: u64) -> Result<()> {
        let Phase { name: phase, options, .. } = phase;
        let skipped = self.summaries.get(self.phase).map_or(0, |summary| summary.skipped_non_finite);
        let judged = self.phase_step >= JUDGED_STEPS || self.phase_step == total;
        let too_many = judged && skipped * SKIPPED_SHARE > self.phase_step;
        if self.non_finite_in_a_row >= MAX_IN_A_ROW || too_many {
            let reason = self.summaries.get(self.phase).and_then(|s| s.last_skipped.as_deref()).unwrap_or_default();
            let (lr, taken) = (options.lr, self.phase_step);
            return Err(Error::failed(
                format!("phase {phase}: {skipped} of {taken} steps were skipped, the last for a {reason}"),
                format!(
                    "lower lr ({lr:e}) or max_grad_norm ({}), raise lr_warmup_steps ({}), and check the model with \
                     `swat score`",
                    options.max_grad_norm, options.lr_warmup_steps
                ),
            ));
        }
        if self.empty_in_a_row >= steps_per_epoch {
            return Err(Error::failed(
                format!("phase {phase}: an epoch without trained tokens"),
                "raise max_length, so that answers are not cut off, or check the data",
            ));
        }
        Ok(())
    }
}

/// Writes the tensors of `changed` to a checkpoint.
fn write_weights<B: Backend>(
    draft: &mut CheckpointWriter,
    decoder: &Decoder<B>,
    changed: &BTreeSet<ParamId>,
) -> Result<()> {
    let weights = || decoder.params().iter().filter(|param| changed.contains(&param.id));
    let specs: Vec<TensorSpec> = weights().map(|param| spec::<B::Float>(param.id.to_string(), &param.shape)).collect();
    draft.tensors("weights", &specs, |writer| {
        weights().try_for_each(|param| write_buffer(writer, &decoder.backend, &param.values))
    })
}

fn reason(loss: f64, cells: &[Cell]) -> String {
    let what = if loss.is_finite() { "non-finite gradient" } else { "non-finite loss" };
    if cells.is_empty() {
        return what.into();
    }
    let names: Vec<String> = cells.iter().take(NAMED_CELLS).map(Cell::to_string).collect();
    let more = cells.len() - names.len();
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{what}, gradients of {}{more}", names.join(", "))
}

/// `state.json` of a checkpoint.
#[derive(serde::Deserialize)]
pub(super) struct SavedState {
    identity: serde_json::Value,
    /// Optimizer steps of each tensor with moments.
    pub(super) adam_steps: BTreeMap<String, u32>,
    /// Files of the moments, at least 1.
    #[serde(default = "one")]
    pub(super) moments_parts: usize,
    run: RunState,
}

fn one() -> usize {
    1
}

/// Writes what rank 0 has of a checkpoint.
fn write_tensors<B: Backend>(
    draft: &mut CheckpointWriter,
    run: &RunState,
    moments: &Moments<'_, B>,
    ema: &Ema<B>,
    changed: &BTreeSet<ParamId>,
) -> Result<()> {
    let backend = &moments.decoder.backend;
    write_weights(draft, moments.decoder, changed)?;
    moments.write(draft)?;

    // At the start of a phase they are the weights.
    let moving = moments.moving().filter(|_| run.phase_step > 0);
    let anchors: Vec<_> = moving.filter_map(|slot| Some((slot.id, slot.anchor.as_ref()?))).collect();
    if !anchors.is_empty() {
        let specs: Vec<TensorSpec> =
            anchors.iter().map(|(id, anchor)| spec::<B::Float>(id.to_string(), &[anchor.len()])).collect();
        draft.tensors("anchors", &specs, |writer| {
            anchors.iter().try_for_each(|(_, anchor)| write_buffer(writer, backend, anchor))
        })?;
    }

    let means = &ema.means;
    if !means.is_empty() {
        let specs: Vec<TensorSpec> =
            means.iter().map(|(id, mean)| spec::<f32>(id.to_string(), &[mean.len()])).collect();
        draft.tensors("means", &specs, |writer| {
            means.values().try_for_each(|mean| write_buffer(writer, backend, mean))
        })?;
    }
    Ok(())
}

/// Files of a run: checkpoints and `updates.json`.
pub(super) struct RunFiles {
    dir: PathBuf,
    store: Checkpoints,
    /// Weights of the lowest held-out loss.
    best: Checkpoints,
    identity: serde_json::Value,
    /// Checkpoints to keep.
    pub(super) keep_last: usize,
    /// Keep the checkpoint at the start of the phase, for its updates.
    pub(super) keep_start: bool,
}

impl RunFiles {
    /// Keeps weights as the best of the run, until a checkpoint is saved beside those before.
    pub(super) fn save_best<B: Backend>(
        &self,
        step: u64,
        decoder: &Decoder<B>,
        changed: &BTreeSet<ParamId>,
    ) -> Result<()> {
        let mut draft = self.best.begin(step)?;
        write_weights(&mut draft, decoder, changed)?;
        draft.commit(&step)
    }

    /// The weights that were kept at a step.
    pub(super) fn best(&self, step: u64) -> Result<Checkpoint> {
        self.best.open(step)
    }

    /// Opens or creates a run directory, in which the newest checkpoint alone is kept.
    pub(super) fn open(run_dir: &RunDir, identity: serde_json::Value) -> Result<Self> {
        std::fs::create_dir_all(&run_dir.dir).map_err(Error::io(&run_dir.dir, FileOp::Create))?;
        let (store, best) = (Checkpoints::new(&run_dir.dir, CHECKPOINTS), Checkpoints::new(&run_dir.dir, BEST));
        Ok(Self { dir: run_dir.dir.clone(), store, best, identity, keep_last: 1, keep_start: false })
    }

    /// Removes what an earlier run began to write and did not finish.
    pub(super) fn remove_unfinished(&self) -> Result<()> {
        self.store.remove_unfinished()?;
        self.best.remove_unfinished()
    }

    /// Removes the files of an earlier run.
    pub(super) fn clear(&self) -> Result<()> {
        self.store.clear()?;
        self.best.clear()?;
        remove(&self.updates())
    }

    fn updates(&self) -> PathBuf {
        self.dir.join("updates.json")
    }

    /// The state of a checkpoint, which must be of the same run.
    pub(super) fn state(&self, saved: &Checkpoint, phases: usize, batches_per_epoch: u64) -> Result<RunState> {
        let state: SavedState = saved.state()?;
        identity::check(&state.identity, &self.identity, &saved.dir)?;
        let place = saved.dir.join("state.json").display().to_string();
        if state.moments_parts == 0 {
            return Err(Error::input(place + ": moments_parts", "0", "at least 1"));
        }
        if !state.run.is_consistent(phases, batches_per_epoch) {
            return Err(Error::input(place, "a position outside the run", "an intact checkpoint"));
        }
        Ok(state.run)
    }

    /// Weights of the checkpoint of a step, verified by hash.
    pub(super) fn weights(&self, step: u64) -> Result<Safetensors> {
        let saved = self.store.open(step)?;
        let none = || Error::input(saved.dir.display().to_string(), "no weights", "an intact checkpoint");
        saved.tensors("weights")?.ok_or_else(none)
    }

    /// Writes a checkpoint with the weights of `changed` and the moments of all ranks, and prunes old ones.
    pub(super) fn save<B: Backend>(
        &self,
        run: &RunState,
        moments: &Moments<'_, B>,
        ema: &Ema<B>,
        changed: &BTreeSet<ParamId>,
    ) -> Result<()> {
        let mut draft = self.store.begin(run.step)?;
        moments.announce()?;
        let written = write_tensors(&mut draft, run, moments, ema, changed);
        moments.collect(&mut draft, written)?;

        let adam_steps: BTreeMap<String, u32> =
            moments.moving().map(|slot| (slot.id.to_string(), slot.steps)).collect();
        let mut state = serde_json::json!({ "identity": self.identity, "adam_steps": adam_steps, "run": run });
        if moments.parts() > 1 {
            state["moments_parts"] = moments.parts().into();
        }
        draft.commit(&state)?;
        let start = (self.keep_start && run.phase > 0).then_some(run.phase_start_step);
        self.store.prune(run.step, self.keep_last, start)?;
        // Only now, as a run that is resumed from an older checkpoint needs the best weights of that time.
        self.best.keep_only(run.watch.best.map(|(step, _)| step))
    }

    /// Writes `updates.json`.
    pub(super) fn write_updates(&self, updates: &[PhaseUpdates]) -> Result<()> {
        if updates.is_empty() {
            return Ok(());
        }
        json::write(&self.updates(), &Updates { phases: updates.to_vec() })
    }
}
