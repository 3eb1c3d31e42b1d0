//! Checks, durations, memory plans and identity of a run on its model and data.

use super::WatchSettings;
use super::reference::replayed_hash;
use super::{Phase, RunDir, Tuner};
use crate::backend::{Backend, Element};
use crate::data::BatchSize;
use crate::engine::{MinimumCost, Plan, Workload};
use crate::error::{Error, Result};
use crate::modules::{Cell, ParamId};
use std::collections::BTreeSet;

impl<B: Backend> Tuner<'_, B> {
    /// Checks that options and phases can run on this model.
    pub(super) fn check(&self) -> Result<()> {
        self.options.check()?;
        self.options.check_ranks(self.group.share().size)?;
        self.options.check_examples(self.loader.examples())?;
        let cells: BTreeSet<Cell> = self.decoder.params().iter().map(|param| param.id.cell()).collect();
        for phase in &self.phases {
            let place = |field: &str| format!("phase {}: {field}", phase.name);
            phase.options.check().map_err(|e| match e {
                Error::Input { place: field, found, expected } => {
                    Error::Input { place: place(&field), found, expected }
                }
                other => other,
            })?;
            for (cell, rate) in phase.rates.iter() {
                if !cells.contains(&cell) {
                    return Err(Error::input(place("rates"), cell.to_string(), "cells of this model"));
                }
                if !(rate.lr.is_finite() && rate.lr > 0.0 && rate.weight_decay.is_finite() && rate.weight_decay >= 0.0)
                {
                    let found = format!("{cell}: lr factor {}, weight decay factor {}", rate.lr, rate.weight_decay);
                    return Err(Error::input(place("rates"), found, "finite factors, lr above 0, decay not below 0"));
                }
            }
            if self.trained(phase).next().is_none() {
                return Err(Error::input(place("rates"), "no trained tensor", "at least one"));
            }
        }
        Ok(())
    }

    /// Tensors that a phase trains, in the decoder's order.
    pub(super) fn trained<'s>(&'s self, phase: &'s Phase) -> impl Iterator<Item = ParamId> + 's {
        let ids = self.decoder.params().iter().map(|param| param.id);
        ids.filter(|id| phase.rates.trains(id.cell()) && (self.trains)(*id))
    }

    /// Memory and compute of each phase, for the largest batch of the data.
    pub(super) fn plans(&self) -> Vec<(String, Plan)> {
        let ranks = self.group.share().size;
        let BatchSize { tokens, trained_tokens, longest } = self.loader.largest_part(ranks);
        let work = Workload {
            tokens,
            document_tokens: longest,
            trained_share: trained_tokens as f64 / tokens.max(1) as f64,
            recompute: self.options.recompute,
            lora: self.decoder.lora(),
            beside: self.options.beside::<B>(),
        };
        let plan = |phase: &Phase| {
            let trained: BTreeSet<ParamId> = self.trained(phase).collect();
            let plan = Plan::new::<B>(&self.decoder.config, &work, |id| trained.contains(&id));
            (phase.name.clone(), plan.sharded(ranks))
        };
        self.phases.iter().map(plan).collect()
    }

    /// Minimum cost of a phase's steps.
    pub(super) fn minimum_cost(&self, phase: &Phase) -> MinimumCost {
        let trained: BTreeSet<ParamId> = self.trained(phase).collect();
        MinimumCost::new::<B>(&self.decoder.config, self.decoder.lora(), |id| trained.contains(&id))
    }

    /// Tensors that phases up to `last` train: the content of a checkpoint.
    pub(super) fn changed(&self, last: usize) -> BTreeSet<ParamId> {
        self.phases.iter().take(last + 1).flat_map(|phase| self.trained(phase)).collect()
    }

    /// Steps per epoch; a step does not span epochs.
    pub(super) fn steps_per_epoch(&self) -> u64 {
        self.loader.batches_per_epoch().div_ceil(self.options.grad_accum as u64)
    }

    /// Steps of a phase.
    pub(super) fn steps(&self, phase: &Phase) -> Result<u64> {
        phase.options.steps_of(self.loader, &self.options)
    }

    /// What all ranks must have in common: what determines the bytes of the run, and when they communicate.
    pub(super) fn in_common(&self, identity: &serde_json::Value) -> serde_json::Value {
        let mut common = identity.clone();
        common["save_every"] = self.options.save_every.into();
        common["eval_every"] = self.watched.as_ref().map(|watched| watched.settings.every).into();
        common
    }

    /// Everything that determines the bytes of a run. Options that only trade time, memory or disk may change on
    /// resume.
    pub(super) fn identity(&self, run_dir: &RunDir) -> Result<serde_json::Value> {
        let failed = |e: serde_json::Error| Error::failed(format!("options: {e}"), "this is a bug; please report it");
        let mut options = serde_json::to_value(&self.options).map_err(failed)?;
        if let Some(options) = options.as_object_mut() {
            for unchecked in ["save_every", "keep_last", "recompute"] {
                options.shift_remove(unchecked);
            }
        }
        let mut phases = Vec::new();
        for phase in &self.phases {
            let mut tensors = blake3::Hasher::new();
            let mut count = 0;
            for id in self.trained(phase) {
                count += 1;
                tensors.update(format!("{id}\n").as_bytes());
            }
            let mut options = serde_json::to_value(&phase.options).map_err(failed)?;
            if let Some(options) = options.as_object_mut().filter(|_| phase.options.weight_decay == 0.0) {
                options.shift_remove("decay_all");
            }
            phases.push(serde_json::json!({
                "name": phase.name,
                "options": options,
                "rates": serde_json::to_value(&phase.rates).map_err(failed)?,
                "tensors": format!("{count} (blake3 {:.12})", tensors.finalize().to_hex()),
            }));
        }
        let device = self.decoder.backend.name();
        let mut identity = serde_json::json!({
            "model": run_dir.model,
            "data": run_dir.data,
            "batches_per_epoch": self.loader.batches_per_epoch(),
            // The generator of the orders: checkpoints without it drew them by another one.
            "orders": "philox",
            "device": device.split(':').next(),
            "precision": [B::Float::NAME, B::Grad::NAME, B::Moment::NAME],
            "measure_updates": self.measure_updates,
            "options": options,
            "phases": phases,
            "lora": self.decoder.lora(),
        });
        if let Some(watched) = self.watched.as_ref().filter(|watched| watched.settings.decides()) {
            let WatchSettings { every, keep_best, patience, data } = &watched.settings;
            identity["watch"] =
                serde_json::json!({ "every": every, "keep_best": keep_best, "patience": patience, "data": data });
        }
        if self.options.distil.is_some() {
            identity["replayed"] = replayed_hash(self.loader.examples()).into();
        }
        Ok(identity)
    }
}
