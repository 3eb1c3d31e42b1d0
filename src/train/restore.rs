//! The beginning of a run, or a checkpoint back onto the device. Of several ranks, rank 0 has the files; the others get
//! from it what they hold.

use super::checkpoint::Checkpoint;
use super::metrics::MetricsLog;
use super::start::PhaseStart;
use super::state::{RunFiles, RunState, SavedState};
use super::tensors::{Holds, read_parts};
use super::{Callbacks, Optimizer, Tuner};
use crate::backend::{Backend, ViewMut};
use crate::engine::Decoder;
use crate::error::Result;
use crate::group::{Group, from_first};
use crate::io::safetensors::Safetensors;
use std::collections::{BTreeMap, BTreeSet};

/// What a run begins or continues with.
pub(super) struct Begun<B: Backend> {
    pub(super) run: RunState,
    /// Whether a checkpoint is continued.
    pub(super) resumed: bool,
    pub(super) optimizer: Option<Optimizer<B>>,
    pub(super) start: Option<PhaseStart<B>>,
    /// Files of rank 0, where the run has a directory.
    pub(super) files: Option<(RunFiles, MetricsLog)>,
}

impl<B: Backend> Tuner<'_, B> {
    /// Opens the directory of a run with this identity, and continues from the newest intact checkpoint if that is asked
    /// for.
    pub(super) fn begin(
        &mut self,
        identity: Option<serde_json::Value>,
        callbacks: &mut dyn Callbacks<B>,
    ) -> Result<Begun<B>> {
        let run = RunState::at(self.loader.position());
        let mut begun = Begun { run, resumed: false, optimizer: None, start: None, files: None };
        let Some((run_dir, identity)) = self.run_dir.clone().zip(identity) else { return Ok(begun) };
        let first = self.group.share().rank == 0;
        let (mut store, mut saved) = (None, None);
        if first {
            let mut files = RunFiles::open(&run_dir, identity)?;
            (files.keep_last, files.keep_start) = (self.options.keep_last, self.measure_updates);
            saved = if run_dir.resume { files.newest(callbacks)? } else { None };
            store = Some(files);
        }
        let (phases, batches) = (self.phases.len(), self.loader.batches_per_epoch());
        let state = || match (&store, &saved) {
            (Some(store), Some(saved)) => store.state(saved, phases, batches).map(Some),
            _ => Ok(None),
        };
        match from_first(self.group, state)? {
            Some(run) => {
                if self.measure_updates && run.phase_step > 0 && first {
                    begun.start = Some(self.phase_start(run.phase)?);
                }
                begun.optimizer = self.restore(saved.as_ref(), &run)?;
                self.loader.seek(run.position)?;
                (begun.run, begun.resumed) = (run, true);
            }
            None if run_dir.resume => callbacks.note("no checkpoint to resume; the run starts from the beginning"),
            None => {}
        }
        if let Some(store) = store {
            if saved.is_none() {
                store.clear()?;
            }
            let log = MetricsLog::open(&run_dir.dir.join("metrics.jsonl"), begun.run.metrics_bytes)?;
            begun.files = Some((store, log));
        }
        Ok(begun)
    }

    /// Restores weights, moments and averages of a checkpoint, which rank 0 has. The optimizer is `None` if no phase is
    /// left.
    pub(super) fn restore(&mut self, saved: Option<&Checkpoint>, run: &RunState) -> Result<Option<Optimizer<B>>> {
        load_weights(saved, self.decoder, self.group)?;
        self.load_means(saved)?;
        let Some(phase) = self.phases.get(run.phase) else { return Ok(None) };
        let share = self.group.share();
        let mut optimizer = Optimizer::sharded(self.decoder, &phase.rates, &self.trains, share)?;
        self.load_moments(saved, &mut optimizer)?;
        if self.options.prox.is_some() && run.phase_step > 0 {
            optimizer.set_anchors(self.decoder)?;
            self.load_anchors(saved, &mut optimizer)?;
        }
        Ok(Some(optimizer))
    }

    /// Restores moments and step counts; tensors that are not in the checkpoint stay at zero.
    fn load_moments(&self, saved: Option<&Checkpoint>, optimizer: &mut Optimizer<B>) -> Result<()> {
        let (file, _) = open(saved, "moments", self.group)?;
        let steps: BTreeMap<String, u32> = from_first(self.group, || {
            let state = saved.filter(|_| file.is_some()).map(Checkpoint::state::<SavedState>).transpose()?;
            Ok(state.map(|state| state.adam_steps).unwrap_or_default())
        })?;
        let backend = &self.decoder.backend;
        for slot in optimizer.slots_mut() {
            let Some(steps) = steps.get(&slot.id.to_string()) else { continue };
            let len = self.decoder.param(slot.id).map_or(0, |param| param.values.len());
            slot.steps = *steps;
            for (moment, buffer) in [("m", &mut slot.m), ("v", &mut slot.v)] {
                let (name, to) = (format!("{moment}.{}", slot.id), (buffer.view_mut(), len));
                read_parts(file.as_ref(), &name, backend, to, Holds::Part, self.group)?;
            }
        }
        Ok(())
    }

    /// Restores the anchors of the proximal term.
    fn load_anchors(&self, saved: Option<&Checkpoint>, optimizer: &mut Optimizer<B>) -> Result<()> {
        let (file, there) = open(saved, "anchors", self.group)?;
        let slots = optimizer.slots_mut().iter_mut();
        let anchors = slots.filter_map(|slot| Some((slot.id.to_string(), slot.anchor.as_mut()?.view_mut())));
        let anchors = anchors.filter(|(name, _)| there.contains(name)).collect();
        load(file.as_ref(), &self.decoder.backend, anchors, self.group)
    }

    /// Restores the moving averages.
    fn load_means(&mut self, saved: Option<&Checkpoint>) -> Result<()> {
        let (file, there) = open(saved, "means", self.group)?;
        let backend = &self.decoder.backend;
        for param in self.decoder.params() {
            let (name, len) = (param.id.to_string(), param.values.len());
            if there.contains(&name) {
                let mut mean = backend.zeros(len)?;
                read_parts(file.as_ref(), &name, backend, (mean.view_mut(), len), Holds::Whole, self.group)?;
                self.ema.means.insert(param.id, mean);
            }
        }
        Ok(())
    }
}

/// Restores the weights of a checkpoint, which rank 0 has.
pub(super) fn load_weights<B: Backend>(
    saved: Option<&Checkpoint>,
    decoder: &mut Decoder<B>,
    group: &dyn Group<B>,
) -> Result<()> {
    let (file, there) = open(saved, "weights", group)?;
    let (backend, params) = decoder.split_mut();
    let named = params.iter_mut().map(|param| (param.id.to_string(), param.values.view_mut()));
    load(file.as_ref(), backend, named.filter(|(name, _)| there.contains(name)).collect(), group)
}

/// A file of rank 0's checkpoint, and the names of the tensors in it on all ranks; none where there is no such file.
fn open<B: Backend>(
    saved: Option<&Checkpoint>,
    name: &str,
    group: &dyn Group<B>,
) -> Result<(Option<Safetensors>, BTreeSet<String>)> {
    let file = saved.map(|saved| saved.tensors(name)).transpose()?.flatten();
    let names = || file.iter().flat_map(Safetensors::tensors).map(|(name, ..)| name.to_owned()).collect();
    let names = from_first(group, || Ok(names()))?;
    Ok((file, names))
}

/// Reads whole tensors: each rank its part from rank 0, the others from those that have them.
fn load<B: Backend>(
    file: Option<&Safetensors>,
    backend: &B,
    mut tensors: Vec<(String, ViewMut<'_, B, B::Float>)>,
    group: &dyn Group<B>,
) -> Result<()> {
    let share = group.share();
    for (name, tensor) in &mut tensors {
        let len = tensor.len();
        let to = (tensor.part(share.of(len)), len);
        read_parts(file, name, backend, to, Holds::Part, group)?;
    }
    let mut tensors: Vec<_> = tensors.into_iter().map(|(_, tensor)| tensor).collect();
    group.all_gather(backend, &mut tensors)
}
