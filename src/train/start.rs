//! The weights at the start of a phase, found again when it ends, so that ‖ΔW‖_F needs no second copy of the model.

use super::state::{Journal, RunState};
use super::tensors::read_values;
use super::updates::{Update, cell_updates};
use super::{Callbacks, Tuner};
use crate::backend::{Backend, FloatElement};
use crate::engine::Decoder;
use crate::error::Result;
use crate::modules::{Cell, ParamId};
use std::collections::{BTreeMap, BTreeSet};

/// Gives the values of a tensor of this shape as they were before the run.
pub(super) type Given<'a> = Box<dyn Fn(ParamId, &[usize]) -> Result<Vec<f32>> + 'a>;

/// Where each tensor that trains in a phase is found as it was when the phase began. What is neither held nor saved was
/// as it was given.
pub(super) struct PhaseStart<B: Backend> {
    trained: BTreeSet<ParamId>,
    /// Copies on the host of what is in no file.
    held: BTreeMap<ParamId, Vec<B::Float>>,
    /// In the checkpoint of that step: what had trained before.
    saved: BTreeSet<ParamId>,
}

impl<B: Backend> Tuner<'_, B> {
    /// Notes the start of a phase. The decoder must hold the weights of the phase's start, or, if there are checkpoints,
    /// those of the run's: what had not trained before is the same in both.
    pub(super) fn phase_start(&self, phase: usize) -> Result<PhaseStart<B>> {
        let trained: BTreeSet<ParamId> = self.phases.get(phase).into_iter().flat_map(|p| self.trained(p)).collect();
        let before = if phase == 0 { BTreeSet::new() } else { self.changed(phase - 1) };
        let saved = if self.run_dir.is_some() { &before & &trained } else { BTreeSet::new() };
        let mut held = BTreeMap::new();
        for param in self.decoder.params().iter().filter(|param| trained.contains(&param.id)) {
            let adapter = matches!(param.id, ParamId::LoraA(_) | ParamId::LoraB(_));
            let as_given = self.given.is_some() && !adapter && !before.contains(&param.id);
            if !as_given && !saved.contains(&param.id) {
                let mut host = vec![B::Float::from_f32(0.0); param.values.len()];
                self.decoder.backend.read(param.values.view(), &mut host)?;
                held.insert(param.id, host);
            }
        }
        Ok(PhaseStart { trained, held, saved })
    }

    /// How far the cells moved since; `None`, and a note, where the checkpoint of the start is lost.
    pub(super) fn updates(
        &self,
        start: &PhaseStart<B>,
        run: &RunState,
        journal: Option<&Journal>,
        callbacks: &mut dyn Callbacks<B>,
    ) -> Result<Option<BTreeMap<Cell, Update>>> {
        let mut file = None;
        if let Some(journal) = journal.filter(|_| !start.saved.is_empty()) {
            match journal.weights(run.phase_start_step) {
                Ok(found) => file = Some(found),
                Err(why) => {
                    let phase = &self.phases[run.phase].name;
                    callbacks
                        .note(&format!("the start of phase {phase} is lost, so its updates are not measured: {why}"));
                    return Ok(None);
                }
            }
        }
        let decoder: &Decoder<B> = self.decoder;
        let params: Vec<_> = decoder.params().iter().map(|param| (param.id, param.shape.clone())).collect();
        let shapes: BTreeMap<ParamId, &[usize]> = params.iter().map(|(id, shape)| (*id, shape.as_slice())).collect();
        let scale = decoder.lora().map_or(0.0, |lora| f64::from(lora.scale()));
        let widened = |values: &[B::Float]| values.iter().map(|x| x.to_f32()).collect::<Vec<f32>>();
        let before = |id: ParamId| {
            if !start.trained.contains(&id) {
                return decoder.read(id);
            }
            let shape = shapes[&id];
            match (start.held.get(&id), &file, &self.given) {
                (Some(values), ..) => Ok(widened(values)),
                (None, Some(file), _) if start.saved.contains(&id) => {
                    Ok(widened(&read_values::<B::Float>(file, &id.to_string(), shape.iter().product())?))
                }
                (None, _, Some(given)) => {
                    let mut values = given(id, shape)?;
                    values.iter_mut().for_each(|x| *x = B::Float::from_f32(*x).to_f32());
                    Ok(values)
                }
                (None, ..) => unreachable!("{id} is held, saved or given"),
            }
        };
        cell_updates(&params, scale, before, |id| decoder.read(id)).map(Some)
    }
}
