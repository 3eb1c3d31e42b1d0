//! Whether memory and disk have room for a tuning run.

use super::OpenOutput;
use crate::backend::Backend;
use crate::data::Loader;
use crate::engine::{Lora, Plan, Workload};
use crate::error::{Error, Result};
use crate::io::OutputDir;
use crate::model::ModelDir;
use crate::modules::ParamId;
use crate::secure::tune::{Method, TuneJob};
use crate::secure::watch::Watch;
use crate::train::{Phase, disk_bytes};
use std::collections::BTreeMap;

/// What a run needs room for.
pub(super) struct Room<'a> {
    pub(super) output: &'a OpenOutput,
    pub(super) job: &'a TuneJob,
    pub(super) phases: &'a [Phase],
    pub(super) loader: &'a Loader,
    pub(super) watch: Option<&'a Watch>,
}

impl Room<'_> {
    /// Holds the run against memory and disk.
    ///
    /// # Errors
    /// [`Error::Memory`] says which has no room.
    pub(super) fn check<B: Backend>(&self, files: &ModelDir, backend: &B) -> Result<()> {
        self.check_memory(files, backend)?;
        self.check_disk::<B>(files)
    }

    /// Tensors that a phase trains.
    fn trained(&self, files: &ModelDir, phase: &Phase) -> Vec<(ParamId, usize)> {
        let config = &files.config;
        let sizes = |(id, shape): (ParamId, Vec<usize>)| (id, shape.iter().product());
        let all: Vec<(ParamId, usize)> = match &self.job.recipe.method {
            Method::Full => config.params().into_iter().map(sizes).collect(),
            Method::Lora { lora, modules } => lora.params(config, modules).into_iter().map(sizes).collect(),
            Method::Adapter { .. } => {
                let trained = |id: &ParamId| files.adapter().is_some_and(|adapter| adapter.trains(*id));
                let whole = config.params().into_iter().filter(|(id, _)| trained(id));
                files.adapter_params().flat_map(|(_, _, tensors)| tensors).chain(whole).map(sizes).collect()
            }
        };
        all.into_iter().filter(|(id, _)| phase.rates.trains(id.cell())).collect()
    }

    /// Holds the plan of the largest phase against the memory that is free.
    fn check_memory<B: Backend>(&self, files: &ModelDir, backend: &B) -> Result<()> {
        let Some(free) = backend.free_memory() else { return Ok(()) };
        let shared = &self.job.recipe.shared;
        let (ranks, mut free_bytes) = (self.output.ranks, free.bytes);
        if backend.device_peak_bytes().is_none() {
            free_bytes /= self.output.local_ranks as u64;
        }
        let batch = self.loader.largest_part(ranks);
        let lora = match &self.job.recipe.method {
            Method::Full => None,
            Method::Lora { lora, .. } => Some(*lora),
            Method::Adapter { .. } => Lora::largest(files),
        };
        let work = Workload {
            tokens: batch.tokens,
            document_tokens: batch.longest,
            trained_share: batch.trained_tokens as f64 / batch.tokens.max(1) as f64,
            recompute: shared.recompute,
            lora,
            beside: shared.beside::<B>(),
        };
        for phase in self.phases {
            let trained = self.trained(files, phase);
            let trains = |id: ParamId| trained.iter().any(|(other, _)| *other == id);
            let planned_bytes = Plan::new::<B>(&files.config, &work, trains).sharded(ranks).total_bytes();
            if planned_bytes > free_bytes {
                return Err(Error::Memory {
                    what: format!("phase {} on {}", phase.name, backend.name()),
                    planned_bytes,
                    free_bytes,
                    help: format!(
                        "{} is the bound; `swat plan` says what would make it fit: --recompute, a smaller --batch-size \
                         with more --grad-accum, --state bf16, --method lora",
                        free.bound
                    ),
                });
            }
        }
        Ok(())
    }

    /// Holds what will be written against the disk: the model, the checkpoints that there are at once, and the best
    /// weights.
    fn check_disk<B: Backend>(&self, files: &ModelDir) -> Result<()> {
        let Some(dir) = self.output.dir.as_ref().map(OutputDir::dir) else { return Ok(()) };
        let shared = &self.job.recipe.shared;
        let (mut changed, mut best, mut checkpoint, mut count) = (BTreeMap::new(), 0, 0, 0);
        let watch = self.watch;
        for phase in self.phases {
            let trained = self.trained(files, phase);
            let moments = trained.iter().map(|(_, n)| 2 * n * size_of::<B::Moment>()).sum::<usize>();
            changed.extend(trained);
            let beside = shared.beside::<B>().parameter_bytes;
            let parameters = changed.values().sum::<usize>();
            checkpoint = checkpoint.max((parameters * (size_of::<B::Float>() + beside) + moments) as u64);
            let steps = phase.options.steps_of(self.loader, shared)?;
            let copies = watch.map_or(0, |watch| watch.best_copies(steps, shared.save_every));
            best = copies.saturating_mul((parameters * size_of::<B::Float>()) as u64);
            count += steps.checked_div(shared.save_every).unwrap_or(0) + u64::from(steps > 0);
        }
        // One is being written while the others are kept, among them that of the start of the phase.
        let most = shared.keep_last as u64 + 1 + u64::from(self.phases.len() > 1);
        let options = &self.output.options;
        let model = if options.save.merges() { files.stored_bytes(options.save_dtype)? } else { 0 };
        let need = model.saturating_add(best).saturating_add(checkpoint.saturating_mul(count.min(most)));
        let need = need.saturating_add(shared.reference_bytes(self.loader.examples()));
        let there = disk_bytes(&self.output.unfinished);
        let Ok(free) = fs4::available_space(dir) else { return Ok(()) };
        if need.saturating_sub(there) <= free {
            return Ok(());
        }
        Err(Error::Memory {
            what: format!(
                "{}: the tuned model, {} checkpoints{} on disk",
                dir.display(),
                count.min(most),
                if best > 0 { " and the best weights" } else { "" }
            ),
            planned_bytes: need.saturating_sub(there),
            free_bytes: free,
            help: "free some disk space, take another --out, or keep fewer checkpoints (--keep-last 1, no --keep-best)"
                .into(),
        })
    }
}
