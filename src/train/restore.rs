//! The beginning of a run, or a checkpoint back onto the device. Of several ranks, each reads what it holds where all see
//! the files; else rank 0 has them, and the others get it from there.

use super::access::{Access, obstacle};
use super::checkpoint::{CHECKPOINTS, Checkpoint, Checkpoints};
use super::metrics::MetricsLog;
use super::parts::Source;
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
        let mut store = None;
        if first {
            let mut files = RunFiles::open(&run_dir, identity)?;
            (files.keep_last, files.keep_start) = (self.options.keep_last, self.measure_updates);
            files.remove_unfinished()?;
            store = Some(files);
        }
        let checkpoints = Checkpoints::new(&run_dir.dir, CHECKPOINTS);
        self.find_access(&checkpoints, callbacks)?;
        let mut saved = None;
        if run_dir.resume {
            let damaged = |text: String| {
                if first {
                    callbacks.note(&text)
                }
            };
            saved = checkpoints.newest(self.access, self.group, damaged)?;
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
            None if run_dir.resume && first => {
                callbacks.note("no checkpoint to resume; the run starts from the beginning")
            }
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

    /// Decides once for a run who reads and writes its checkpoints.
    fn find_access(&mut self, checkpoints: &Checkpoints, callbacks: &mut dyn Callbacks<B>) -> Result<()> {
        let share = self.group.share();
        if share.size == 1 {
            return Ok(());
        }
        let (access, how) = match obstacle(checkpoints.dir(), self.group)? {
            None => (Access::Each, "checkpoints: each rank writes its own moments".to_owned()),
            Some(why) => {
                let how = format!(
                    "checkpoints: rank 0 writes the moments of all ranks, as not all share its directory ({why})"
                );
                (Access::First, how)
            }
        };
        self.access = access;
        if share.rank == 0 {
            callbacks.info(&how);
        }
        Ok(())
    }

    /// Restores weights, moments and averages of a checkpoint, on the ranks that have access to it. The optimizer is `None`
    /// if no phase is left.
    fn restore(&mut self, saved: Option<&Checkpoint>, run: &RunState) -> Result<Option<Optimizer<B>>> {
        load_weights(saved, self.decoder, (self.access, self.group))?;
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
        let (steps, parts): (BTreeMap<String, u32>, usize) = from_first(self.group, || {
            let state = saved.map(Checkpoint::state::<SavedState>).transpose()?;
            Ok(state.map(|state| (state.adam_steps, state.moments_parts)).unwrap_or_default())
        })?;
        let source = Source::new(self.access, saved.map(|saved| saved.moments(parts)).transpose()?);
        let backend = &self.decoder.backend;
        for slot in optimizer.slots_mut() {
            let Some(steps) = steps.get(&slot.id.to_string()) else { continue };
            let len = self.decoder.param(slot.id).map_or(0, |param| param.values.len());
            slot.steps = *steps;
            for (moment, buffer) in [("m", &mut slot.m), ("v", &mut slot.v)] {
                let (name, to) = (format!("{moment}.{}", slot.id), (buffer.view_mut(), len));
                read_parts(&source, &name, backend, to, Holds::Part, self.group)?;
            }
        }
        Ok(())
    }

    /// Restores the anchors of the proximal term.
    fn load_anchors(&self, saved: Option<&Checkpoint>, optimizer: &mut Optimizer<B>) -> Result<()> {
        let (source, there) = open(saved, "anchors", (self.access, self.group))?;
        let slots = optimizer.slots_mut().iter_mut();
        let anchors = slots.filter_map(|slot| Some((slot.id.to_string(), slot.anchor.as_mut()?.view_mut())));
        let anchors = anchors.filter(|(name, _)| there.contains(name)).collect();
        load(&source, &self.decoder.backend, anchors, self.group)
    }

    /// Restores the moving averages.
    fn load_means(&mut self, saved: Option<&Checkpoint>) -> Result<()> {
        let (source, there) = open(saved, "means", (self.access, self.group))?;
        let backend = &self.decoder.backend;
        for param in self.decoder.params() {
            let (name, len) = (param.id.to_string(), param.values.len());
            if there.contains(&name) {
                let mut mean = backend.zeros(len)?;
                read_parts(&source, &name, backend, (mean.view_mut(), len), Holds::Whole, self.group)?;
                self.ema.means.insert(param.id, mean);
            }
        }
        Ok(())
    }
}

/// Restores the weights of a checkpoint, on the ranks that have access to it.
pub(super) fn load_weights<B: Backend>(
    saved: Option<&Checkpoint>,
    decoder: &mut Decoder<B>,
    (access, group): (Access, &dyn Group<B>),
) -> Result<()> {
    let (source, there) = open(saved, "weights", (access, group))?;
    let (backend, params) = decoder.split_mut();
    let named = params.iter_mut().map(|param| (param.id.to_string(), param.values.view_mut()));
    load(&source, backend, named.filter(|(name, _)| there.contains(name)).collect(), group)
}

/// A file of a checkpoint, and the names of the tensors in it on all ranks; none where there is no such file.
fn open<B: Backend>(
    saved: Option<&Checkpoint>,
    name: &str,
    (access, group): (Access, &dyn Group<B>),
) -> Result<(Source, BTreeSet<String>)> {
    let file = saved.map(|saved| saved.tensors(name)).transpose()?.flatten();
    let names = || file.iter().flat_map(Safetensors::tensors).map(|(name, ..)| name.to_owned()).collect();
    let names = from_first(group, || Ok(names()))?;
    Ok((Source::new(access, file.map(Into::into)), names))
}

/// Reads whole tensors: each rank its part, the others from those that have them.
fn load<B: Backend>(
    source: &Source,
    backend: &B,
    mut tensors: Vec<(String, ViewMut<'_, B, B::Float>)>,
    group: &dyn Group<B>,
) -> Result<()> {
    let share = group.share();
    for (name, tensor) in &mut tensors {
        let len = tensor.len();
        let to = (tensor.part(share.of(len)), len);
        read_parts(source, name, backend, to, Holds::Part, group)?;
    }
    let mut tensors: Vec<_> = tensors.into_iter().map(|(_, tensor)| tensor).collect();
    group.all_gather(backend, &mut tensors)
}
