//! Masked AdamW: moments and steps for the trained tensors alone.

use crate::backend::{
    AdamW, AdamWMasked, AdamWModule, Backend, Buffer, Operator, ProximalGradients, ProximalRow, Rounding, SumSquares,
    trace,
};
use crate::engine::{Decoder, Gradients};
use crate::error::Result;
use crate::group::{Alone, Group, Share};
use crate::modules::{Cell, LearningRates, ParamId, Rate};
use std::collections::{BTreeMap, BTreeSet};

/// State of this rank's part of one trained tensor: two moments per parameter, in the backend's dtype.
pub(super) struct Slot<B: Backend> {
    pub(super) id: ParamId,
    pub(super) m: Buffer<B, B::Moment>,
    pub(super) v: Buffer<B, B::Moment>,
    /// Steps of this tensor, for the bias correction.
    pub(super) steps: u32,
    /// What the proximal term holds it near.
    pub(super) anchor: Option<Buffer<B, B::Float>>,
    rate: Rate,
}

/// Settings of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepSettings {
    /// Scheduled learning rate; a cell's factor multiplies it.
    pub lr: f64,
    /// Decoupled weight decay; a cell's factor multiplies it.
    pub weight_decay: f64,
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to √v̂.
    pub eps: f32,
    /// Largest global gradient norm; `None` = no clipping.
    pub max_grad_norm: Option<f32>,
    /// Seed of stochastic rounding.
    pub seed: u64,
}

/// StepResult of a step.
#[derive(Clone, Debug, PartialEq)]
pub enum StepOutcome {
    /// Weights and moments were updated.
    Done {
        /// Global norm of the gradients before clipping.
        grad_norm: f64,
    },
    /// Skipped: weights, moments and step counts are unchanged.
    NonFinite {
        /// Cells whose gradients have a non-finite sum of squares.
        cells: Vec<Cell>,
    },
}

/// AdamW with the moments of the trained tensors, of this rank's part of them in a run of several.
pub struct Optimizer<B: Backend> {
    slots: Vec<Slot<B>>,
    squares: Buffer<B, f32>,
    share: Share,
}

impl<B: Backend> Optimizer<B> {
    /// Zero moments for the tensors that have a learning rate and that `trains` admits.
    ///
    /// # Errors
    /// [`crate::error::Error::Memory`] where the moments do not fit the device.
    pub fn new(decoder: &Decoder<B>, rates: &LearningRates, trains: impl Fn(ParamId) -> bool) -> Result<Self> {
        Self::sharded(decoder, rates, trains, Share::WHOLE)
    }

    /// As [`Optimizer::new`], for a rank's part of the tensors.
    ///
    /// # Errors
    /// As [`Optimizer::new`].
    pub fn sharded(
        decoder: &Decoder<B>,
        rates: &LearningRates,
        trains: impl Fn(ParamId) -> bool,
        share: Share,
    ) -> Result<Self> {
        Self::continued(Vec::new(), decoder, rates, trains, share)
    }

    /// The optimizer of the next phase: tensors that trained before keep their moments and step counts.
    ///
    /// # Errors
    /// As [`Optimizer::new`].
    pub fn next_phase(
        self,
        decoder: &Decoder<B>,
        rates: &LearningRates,
        trains: impl Fn(ParamId) -> bool,
    ) -> Result<Self> {
        Self::continued(self.slots, decoder, rates, trains, self.share)
    }

    fn continued(
        old: Vec<Slot<B>>,
        decoder: &Decoder<B>,
        rates: &LearningRates,
        trains: impl Fn(ParamId) -> bool,
        share: Share,
    ) -> Result<Self> {
        let mut old: BTreeMap<ParamId, Slot<B>> = old.into_iter().map(|slot| (slot.id, slot)).collect();
        let mut slots = Vec::new();
        for param in decoder.params() {
            let Some(rate) = rates.get(param.id.cell()).filter(|_| trains(param.id)) else {
                old.remove(&param.id);
                continue;
            };
            slots.push(match old.remove(&param.id) {
                Some(slot) => Slot { rate, ..slot },
                None => {
                    let (len, backend) = (share.of(param.values.len()).len(), &decoder.backend);
                    let (m, v) = (backend.zeros(len)?, backend.zeros(len)?);
                    Slot { id: param.id, m, v, steps: 0, anchor: None, rate }
                }
            });
        }
        let squares = decoder.backend.zeros(slots.len())?;
        Ok(Self { slots, squares, share })
    }

    /// Leaves norms and biases, the tensors of one dimension, without weight decay, as transformers and TRL do.
    pub fn decay_matrices_only(&mut self, decoder: &Decoder<B>) {
        let vectors: BTreeSet<ParamId> =
            decoder.params().iter().filter(|param| param.shape.len() == 1).map(|param| param.id).collect();
        for slot in self.slots.iter_mut().filter(|slot| vectors.contains(&slot.id)) {
            slot.rate.weight_decay = 0.0;
        }
    }

    /// Anchors the proximal term of each tensor at its current values, in place of earlier ones.
    ///
    /// # Errors
    /// [`crate::error::Error::Memory`] where a copy of the trained tensors does not fit the device.
    pub fn set_anchors(&mut self, decoder: &Decoder<B>) -> Result<()> {
        for slot in &mut self.slots {
            let Some(param) = decoder.param(slot.id) else { continue };
            let anchor = match &mut slot.anchor {
                Some(anchor) => anchor,
                none => none.insert(decoder.backend.zeros(param.values.len())?),
            };
            decoder.backend.copy(param.values.view(), anchor.view_mut())?;
        }
        Ok(())
    }

    /// Adds rho·(w − anchor), the gradient of Lisa's proximal term (arXiv 2405.18641), to the gradients of the tensors
    /// that have an anchor. It belongs before [`Optimizer::step`], which clips the gradients of the whole loss.
    ///
    /// # Errors
    /// A failing device.
    pub fn add_proximal(&self, decoder: &Decoder<B>, gradients: &mut Gradients<B>, rho: f32) -> Result<()> {
        let mut anchors: BTreeMap<ParamId, &Buffer<B, B::Float>> =
            self.slots.iter().filter_map(|slot| Some((slot.id, slot.anchor.as_ref()?))).collect();
        let mut table = Vec::new();
        for (id, grad) in gradients.iter_mut() {
            if let Some((anchor, param)) = anchors.remove(&id).zip(decoder.param(id)) {
                table.push(ProximalRow { grad: grad.view_mut(), weight: param.values.view(), anchor: anchor.view() });
            }
        }
        ProximalGradients { table: &mut table, rho }.run(&decoder.backend)
    }

    /// Trained tensors, in the decoder's order.
    pub fn trained(&self) -> impl Iterator<Item = ParamId> + '_ {
        self.slots.iter().map(|slot| slot.id)
    }

    pub(super) fn slots(&self) -> &[Slot<B>] {
        &self.slots
    }

    pub(super) fn slots_mut(&mut self) -> &mut [Slot<B>] {
        &mut self.slots
    }

    /// Cells whose gradients, the sums over all ranks, are not finite.
    ///
    /// # Errors
    /// A failing device or rank.
    ///
    /// # Panics
    /// Where `gradients` lacks a tensor of [`Optimizer::trained`].
    pub fn non_finite_cells(
        &mut self,
        backend: &B,
        gradients: &Gradients<B>,
        group: &dyn Group<B>,
    ) -> Result<Vec<Cell>> {
        let squares = self.squares(backend, gradients, (self.share, group))?;
        Ok(self.cells_where(&squares, |s| !s.is_finite()))
    }

    /// One step of AdamW (Loshchilov and Hutter, arXiv 1711.05101) with the global gradient norm clipped.
    ///
    /// # Errors
    /// A failing device.
    ///
    /// # Panics
    /// Where `gradients` lacks a tensor of [`Optimizer::trained`].
    pub fn step(
        &mut self,
        decoder: &mut Decoder<B>,
        gradients: &Gradients<B>,
        settings: &StepSettings,
    ) -> Result<StepOutcome> {
        self.step_in(decoder, gradients, settings, &Alone)
    }

    /// [`Optimizer::step`] of a group: each rank updates its part, by the gradients of its part, and gets the parts of the
    /// others.
    ///
    /// # Errors
    /// A failing device or rank.
    ///
    /// # Panics
    /// Where `gradients` lacks a tensor of [`Optimizer::trained`].
    pub fn step_in(
        &mut self,
        decoder: &mut Decoder<B>,
        gradients: &Gradients<B>,
        settings: &StepSettings,
        group: &dyn Group<B>,
    ) -> Result<StepOutcome> {
        let _span = trace::phase("optimizer");
        let squares = self.squares(&decoder.backend, gradients, (self.share, group))?;
        let total: f64 = squares.iter().map(|s| f64::from(*s)).sum();
        // A sum beyond f32 is an infinity to a backend that adds up in f32.
        if !total.is_finite() || total > f64::from(f32::MAX) {
            let mut cells = self.cells_where(&squares, |s| !s.is_finite());
            if cells.is_empty() {
                let largest = squares.iter().copied().fold(0.0, f32::max);
                cells = self.cells_where(&squares, |s| s == largest);
            }
            return Ok(StepOutcome::NonFinite { cells });
        }
        let grad_norm = total.sqrt();

        // Bias correction depends on a tensor's steps: one table per number of steps. There is more than one only where
        // moments were carried into a phase that trains more tensors.
        let (backend, params) = decoder.split_mut();
        let mut tables: BTreeMap<u32, (Vec<AdamWModule<'_, B>>, Vec<f32>)> = BTreeMap::new();
        let mut slots = self.slots.iter_mut().zip(&squares).peekable();
        for param in params {
            let Some((slot, square)) = slots.next_if(|(slot, _)| slot.id == param.id) else { continue };
            let (table, table_squares) = tables.entry(slot.steps).or_default();
            let part = self.share.of(param.values.len());
            table.push(AdamWModule {
                weight: param.values.range_mut(part.clone()),
                grad: buffer(gradients, slot.id).range(part),
                m: slot.m.view_mut(),
                v: slot.v.view_mut(),
                lr: (settings.lr * f64::from(slot.rate.lr)) as f32,
                weight_decay: (settings.weight_decay * f64::from(slot.rate.weight_decay)) as f32,
            });
            table_squares.push(*square);
        }
        let several = tables.len() > 1 || self.share.size > 1;
        for (steps, (table, table_squares)) in &mut tables {
            let mut max_grad_norm = settings.max_grad_norm;
            if several {
                // The backend clips by the norm of one table; this bound yields the factor of all tables together. The
                // squares are those of all ranks.
                backend.write(table_squares, self.squares.range_mut(0..table_squares.len()))?;
                let own: f64 = table_squares.iter().map(|s| f64::from(*s)).sum();
                max_grad_norm = max_grad_norm.and_then(|max| {
                    let factor = f64::from(max) / (grad_norm + 1e-6);
                    (factor < 1.0).then_some((factor * (own.sqrt() + 1e-6)) as f32)
                });
            }
            let StepSettings { beta1, beta2, eps, seed, .. } = *settings;
            let hyper = AdamW {
                beta1,
                beta2,
                eps,
                step: steps.saturating_add(1),
                max_grad_norm,
                seed,
                rounding: Rounding::Stochastic,
            };
            let squares = self.squares.range(0..table_squares.len());
            AdamWMasked { table, squares, hyper }.run(backend)?;
        }
        drop(tables);
        for slot in &mut self.slots {
            slot.steps = slot.steps.saturating_add(1);
        }
        let trained: BTreeSet<ParamId> = self.trained().collect();
        let (backend, params) = decoder.split_mut();
        let params = params.iter_mut().filter(|param| trained.contains(&param.id));
        group.all_gather(backend, &mut params.map(|param| param.values.view_mut()).collect::<Vec<_>>())?;
        Ok(StepOutcome::Done { grad_norm })
    }

    /// Σ g² of each slot over the parts of all ranks; those of this rank are on the device.
    fn squares(
        &mut self,
        backend: &B,
        gradients: &Gradients<B>,
        (share, group): (Share, &dyn Group<B>),
    ) -> Result<Vec<f32>> {
        let part = |slot: &Slot<B>| {
            let gradient = buffer(gradients, slot.id);
            gradient.range(share.of(gradient.len()))
        };
        let parts: Vec<_> = self.slots.iter().map(part).collect();
        SumSquares { parts: &parts, squares: self.squares.view_mut() }.run(backend)?;
        let mut squares = vec![0f32; self.squares.len()];
        backend.read(self.squares.view(), &mut squares)?;
        let mut sums: Vec<f64> = squares.iter().map(|square| f64::from(*square)).collect();
        group.all_reduce(&mut sums)?;
        Ok(sums.into_iter().map(|sum| sum as f32).collect())
    }

    /// Distinct cells of the slots whose sum of squares `matches`.
    fn cells_where(&self, squares: &[f32], matches: impl Fn(f32) -> bool) -> Vec<Cell> {
        let of_slots = self.slots.iter().zip(squares);
        let found: BTreeSet<Cell> = of_slots.filter(|(_, s)| matches(**s)).map(|(slot, _)| slot.id.cell()).collect();
        found.into_iter().collect()
    }
}

fn buffer<B: Backend>(gradients: &Gradients<B>, id: ParamId) -> &Buffer<B, B::Grad> {
    gradients.get(id).unwrap_or_else(|| panic!("no gradient buffer of {id}"))
}
