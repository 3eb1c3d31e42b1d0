//! Weights at the start of a phase, for ‖ΔW‖_F at its end without a second copy of the model.

use super::state::{RunFiles, RunState};
use super::tensors::read_values;
use super::updates::{Update, cell_updates};
use super::{Callbacks, Tuner};
use crate::backend::{Backend, FloatElement};
use crate::engine::Decoder;
use crate::error::Result;
use crate::modules::{Cell, ParamId};
use std::collections::{BTreeMap, BTreeSet};

/// Sources of the trained tensors' values at the start of a phase; a tensor in neither source had its initial value.
pub(super) struct PhaseStart<B: Backend> {
    trained: BTreeSet<ParamId>,
    /// Host copies of tensors that are in no file.
    held: BTreeMap<ParamId, Vec<B::Float>>,
    /// Tensors in the checkpoint at the start: those that had trained before.
    saved: BTreeSet<ParamId>,
}

impl<B: Backend> Tuner<'_, B> {
    /// Records the start of a phase. The decoder must hold the weights at the start of the phase, or, with checkpoints,
    /// of the run: tensors that had not trained are equal in both.
    pub(super) fn phase_start(&self, phase: usize) -> Result<PhaseStart<B>> {
        let trained: BTreeSet<ParamId> = self.phases.get(phase).into_iter().flat_map(|p| self.trained(p)).collect();
        let before = if phase == 0 { BTreeSet::new() } else { self.changed(phase - 1) };
        let saved = if self.run_dir.is_some() { &before & &trained } else { BTreeSet::new() };
        let mut held = BTreeMap::new();
        for param in self.decoder.params().iter().filter(|param| trained.contains(&param.id)) {
            let adapter = matches!(param.id, ParamId::LoraA(_) | ParamId::LoraB(_));
            let initial = self.initial.is_some() && !adapter && !before.contains(&param.id);
            if !initial && !saved.contains(&param.id) {
                let mut host = vec![B::Float::from_f32(0.0); param.values.len()];
                self.decoder.backend.read(param.values.view(), &mut host)?;
                held.insert(param.id, host);
            }
        }
        Ok(PhaseStart { trained, held, saved })
    }

    /// Updates of the cells since the start; `None`, with a note, if the checkpoint of the start is lost.
    pub(super) fn updates(
        &self,
        start: &PhaseStart<B>,
        run: &RunState,
        files: Option<&RunFiles>,
        callbacks: &mut dyn Callbacks<B>,
    ) -> Result<Option<BTreeMap<Cell, Update>>> {
        let mut file = None;
        if let Some(files) = files.filter(|_| !start.saved.is_empty()) {
            match files.weights(run.phase_start_step) {
                Ok(found) => file = Some(found),
                Err(why) => {
                    let phase = &self.phases[run.phase].name;
                    callbacks.note(&format!(
                        "updates of phase {phase} are not measured, its first checkpoint is lost: {why}"
                    ));
                    return Ok(None);
                }
            }
        }
        let decoder: &Decoder<B> = self.decoder;
        let params: Vec<_> = decoder.params().iter().map(|param| (param.id, param.shape.clone())).collect();
        let shapes: BTreeMap<ParamId, &[usize]> = params.iter().map(|(id, shape)| (*id, shape.as_slice())).collect();
        let scale = |id| decoder.lora_of(id).map_or(0.0, |lora| f64::from(lora.scale()));
        let widened = |values: &[B::Float]| values.iter().map(|x| x.to_f32()).collect::<Vec<f32>>();
        let before = |id: ParamId| {
            if !start.trained.contains(&id) {
                return decoder.read(id);
            }
            let shape = shapes[&id];
            match (start.held.get(&id), &file, &self.initial) {
                (Some(values), ..) => Ok(widened(values)),
                (None, Some(file), _) if start.saved.contains(&id) => {
                    Ok(widened(&read_values::<B::Float>(file, &id.to_string(), shape.iter().product())?))
                }
                (None, _, Some(initial)) => {
                    let mut values = initial(id, shape)?;
                    values.iter_mut().for_each(|x| *x = B::Float::from_f32(*x).to_f32());
                    Ok(values)
                }
                (None, ..) => unreachable!("{id} is held, saved or initial"),
            }
        };
        cell_updates(&params, scale, before, |id| decoder.read(id)).map(Some)
    }
}
