//! Weights on a backend.

use super::lora::Lora;
use super::pool::{Floats, Pool, Scratch};
use crate::backend::{Backend, Buffer, Documents, FloatElement, In, View};
use crate::engine::Batch;
use crate::error::{Error, Result};
use crate::model::{ModelConfig, ModelDir, RopeScaling, rope_table};
use crate::modules::{ModuleId, ParamId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// One tensor on the backend.
pub struct Parameter<B: Backend> {
    /// Its name.
    pub id: ParamId,
    /// Shape as in the checkpoint.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub values: Buffer<B, B::Float>,
}

/// A decoder on a backend.
pub struct Decoder<B: Backend> {
    /// Where it runs.
    pub backend: B,
    /// Sizes and hyper-parameters.
    pub config: ModelConfig,
    pub(super) params: Vec<Parameter<B>>,
    pub(super) index: BTreeMap<ParamId, usize>,
    pub(super) lora: BTreeMap<ModuleId, Lora>,
    pub(super) pool: Pool<B>,
    rope: Mutex<Option<RopeTable<B>>>,
}

/// Cosines and sines for the positions from 0 to `positions`.
pub(super) struct RopeTable<B: Backend> {
    positions: usize,
    pub(super) values: Arc<Buffer<B, f32>>,
}

/// Perturbed values that replace tensors of the decoder.
pub(super) type Overlay<'a, B> = BTreeMap<ParamId, In<'a, B>>;

impl<B: Backend> Decoder<B> {
    /// Uploads a model; `tensor(id, shape)` gives the values of each tensor of [`ModelConfig::params`].
    ///
    /// # Errors
    /// Those of `tensor`; [`Error::Device`] or [`Error::Memory`] where the device fails.
    ///
    /// # Panics
    /// Where `tensor` gives another number of values than the shape has.
    pub fn new(
        backend: B,
        config: ModelConfig,
        mut tensor: impl FnMut(ParamId, &[usize]) -> Result<Vec<f32>>,
    ) -> Result<Self> {
        let mut params = Vec::new();
        for (id, shape) in config.params() {
            let values = tensor(id, &shape)?;
            assert_eq!(values.len(), shape.iter().product::<usize>(), "{id}");
            params.push(Parameter { id, shape, values: upload(&backend, &values)? });
        }
        let index = params.iter().enumerate().map(|(i, p)| (p.id, i)).collect();
        Ok(Self {
            backend,
            config,
            params,
            index,
            lora: BTreeMap::new(),
            pool: Pool::default(),
            rope: Mutex::new(None),
        })
    }

    /// Uploads the model of a directory, with its adapter if it was opened with one.
    ///
    /// # Errors
    /// As [`ModelDir::tensor`]; [`Error::Device`] or [`Error::Memory`] where the device fails.
    pub fn from_files(backend: B, files: &ModelDir) -> Result<Self> {
        let mut decoder = Self::new(backend, files.config.clone(), |id, shape| files.tensor(id, shape))?;
        for (id, shape, [(a, a_shape), (b, b_shape)]) in files.adapter_params() {
            decoder.attach_lora(id, shape.into(), &files.tensor(a, &a_shape)?, &files.tensor(b, &b_shape)?)?;
        }
        Ok(decoder)
    }

    /// All tensors, in the order of [`ModelConfig::params`], then LoRA's.
    pub fn params(&self) -> &[Parameter<B>] {
        &self.params
    }

    /// The backend, and all tensors to change: an optimiser's view.
    pub fn split_mut(&mut self) -> (&B, &mut [Parameter<B>]) {
        (&self.backend, &mut self.params)
    }

    /// One tensor; `None` where the model has no such.
    pub fn param(&self, id: ParamId) -> Option<&Parameter<B>> {
        self.index.get(&id).map(|i| &self.params[*i])
    }

    /// A tensor's values on the host.
    ///
    /// # Errors
    /// [`Error::Input`] where the model has no such tensor, [`Error::Device`] where the device fails.
    pub fn read(&self, id: ParamId) -> Result<Vec<f32>> {
        let param = self.param(id).ok_or_else(|| Self::unknown(id))?;
        read_floats(&self.backend, param.values.view())
    }

    /// Replaces a tensor's values.
    ///
    /// # Errors
    /// [`Error::Input`] where the model has no such tensor, [`Error::Device`] where the device fails.
    pub fn write(&mut self, id: ParamId, values: &[f32]) -> Result<()> {
        let i = *self.index.get(&id).ok_or_else(|| Self::unknown(id))?;
        let narrowed: Vec<B::Float> = values.iter().map(|x| B::Float::from_f32(*x)).collect();
        self.backend.write(&narrowed, self.params[i].values.view_mut())
    }

    fn unknown(id: ParamId) -> Error {
        Error::input("model", format!("no tensor {id}"), "a parameter of this model")
    }

    /// The tensor that the head multiplies by: `lm_head`, or the embedding where they are tied.
    pub fn head(&self) -> ParamId {
        if self.config.tied { ParamId::Embedding } else { ParamId::Head }
    }

    /// Gives working memory back to the backend, between phases of different shape.
    pub fn release_pool(&self) {
        self.pool.clear();
    }

    /// A tensor's values, replaced by the overlay's where it has some.
    pub(super) fn values<'a>(&'a self, overlay: &Overlay<'a, B>, id: ParamId) -> In<'a, B> {
        overlay.get(&id).cloned().unwrap_or_else(|| self.params[self.index[&id]].values.view())
    }

    pub(super) fn values_if_any<'a>(&'a self, overlay: &Overlay<'a, B>, id: ParamId) -> Option<In<'a, B>> {
        self.index.contains_key(&id).then(|| self.values(overlay, id))
    }

    pub(super) fn floats(&self, len: usize) -> Result<Floats<'_, B>> {
        self.pool.floats.take(&self.backend, len)
    }

    pub(super) fn stats(&self, len: usize) -> Result<Scratch<'_, B, f32>> {
        self.pool.stats.take(&self.backend, len)
    }

    pub(super) fn indices(&self, values: &[u32]) -> Result<Scratch<'_, B, u32>> {
        let mut indices = self.pool.indices.take(&self.backend, values.len())?;
        self.backend.write(values, indices.view_mut())?;
        Ok(indices)
    }

    pub(super) fn documents(&self, starts: &[u32]) -> Result<Documents<B>> {
        let mut device = self.backend.zeros(starts.len())?;
        self.backend.write(starts, device.view_mut())?;
        Ok(Documents { starts: starts.to_vec(), device })
    }

    /// Checks a batch against the model, so that no input can index outside it.
    pub(super) fn check(&self, batch: &Batch) -> Result<()> {
        let wrong = |found: String, expected: String| Err(Error::input("batch", found, expected));
        if batch.tokens.is_empty() {
            return wrong("no tokens".into(), "at least one".into());
        }
        if let Some(token) = batch.tokens.iter().find(|t| **t as usize >= self.config.vocab) {
            return wrong(format!("token id {token}"), format!("ids below {}", self.config.vocab));
        }
        let longest = batch.positions.iter().max().map_or(0, |p| *p as usize + 1);
        if longest > self.longest_context() {
            return wrong(
                format!("a document of {longest} tokens"),
                format!("at most {} (the model's context)", self.longest_context()),
            );
        }
        assert_eq!(batch.tokens.len(), batch.positions.len());
        assert_eq!(batch.starts.last().map(|s| *s as usize), Some(batch.tokens.len()));
        Ok(())
    }

    /// Tokens that a document may have: `max_positions`, stretched where the rope scaling grows with the length.
    pub fn longest_context(&self) -> usize {
        match self.config.rope.scaling {
            RopeScaling::Dynamic { factor } => (self.config.max_positions as f64 * factor) as usize,
            _ => self.config.max_positions,
        }
    }

    /// The rope table for documents of `positions` tokens.
    pub(super) fn rope(&self, positions: usize) -> Result<Arc<Buffer<B, f32>>> {
        let trained = self.config.max_positions;
        let dynamic = matches!(self.config.rope.scaling, RopeScaling::Dynamic { .. });
        let wanted = if dynamic && positions > trained {
            positions
        } else {
            positions.next_power_of_two().clamp(1, trained.max(1))
        };
        let mut rope = self.rope.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = &*rope {
            let stretched = dynamic && (table.positions > trained || wanted > trained);
            if table.positions == wanted || (table.positions > wanted && !stretched) {
                return Ok(table.values.clone());
            }
        }
        let host = rope_table(&self.config, wanted);
        let mut values = self.backend.zeros(host.len())?;
        self.backend.write(&host, values.view_mut())?;
        let values = Arc::new(values);
        *rope = Some(RopeTable { positions: wanted, values: values.clone() });
        Ok(values)
    }
}

/// Host values on a backend, narrowed to its type.
pub(super) fn upload<B: Backend>(backend: &B, values: &[f32]) -> Result<Buffer<B, B::Float>> {
    let narrowed: Vec<B::Float> = values.iter().map(|x| B::Float::from_f32(*x)).collect();
    let mut buffer = backend.zeros(values.len())?;
    backend.write(&narrowed, buffer.view_mut())?;
    Ok(buffer)
}

/// A backend's values on the host, widened.
pub(super) fn read_floats<B: Backend, T: FloatElement>(backend: &B, view: View<'_, B, T>) -> Result<Vec<f32>> {
    let mut host = vec![T::from_f32(0.0); view.len()];
    backend.read(view, &mut host)?;
    Ok(host.into_iter().map(FloatElement::to_f32).collect())
}
