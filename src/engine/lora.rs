//! Low-rank adapters (Hu et al., arXiv 2106.09685): y += scale · (x·Aᵀ)·Bᵀ beside a frozen projection.

use super::Decoder;
use super::decoder::{Parameter, upload};
use crate::backend::{Backend, Epilogue, In, Linear, LinearBackwardInput, LinearShape, Operator, Out};
use crate::error::{Error, Result};
use crate::model::{AdapterShape, ModelConfig, ModelDir};
use crate::modules::{Cell, ModuleId, ModuleSet, ParamId};
use crate::options::above_zero;
use crate::rng::Philox;

/// Rank and scale of adapters.
#[derive(schemars::JsonSchema, Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize, clap::Args)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// Rank of the adapters
    #[arg(long = "lora-rank", id = "lora_rank", value_name = "LORA_RANK", value_parser = lora_rank, default_value_t = 8)]
    pub rank: usize,
    /// The adapters' output is scaled by alpha / rank
    #[arg(long = "lora-alpha", id = "lora_alpha", value_name = "LORA_ALPHA", value_parser = above_zero::<f32>, default_value_t = 16.0)]
    pub alpha: f32,
    /// Scale by alpha / √rank (rsLoRA, arXiv 2312.03732)
    #[arg(long = "lora-rslora", id = "lora_rslora")]
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub rslora: bool,
}

crate::options::default_from_args!(Lora);

/// Parses the rank of adapters, from 1 to [`AdapterShape::MAX_RANK`].
///
/// # Errors
/// The range, where the text is outside of it.
pub fn lora_rank(text: &str) -> std::result::Result<usize, String> {
    let parsed = text.trim().parse().ok().filter(|rank| (1..=AdapterShape::MAX_RANK).contains(rank));
    parsed.ok_or_else(|| format!("expected a whole number from 1 to {}", AdapterShape::MAX_RANK))
}

impl Lora {
    /// alpha / rank, or alpha / √rank.
    pub fn scale(&self) -> f32 {
        let rank = self.rank as f32;
        self.alpha / if self.rslora { rank.sqrt() } else { rank }
    }

    /// The adapter of the largest rank that a model was opened with.
    pub fn largest(files: &ModelDir) -> Option<Self> {
        files.adapter_params().map(|(_, shape, _)| Self::from(shape)).max_by_key(|lora| lora.rank)
    }

    /// The adapters' tensors on the projections of `set`, with their shapes: A \[rank, inputs\] and B \[outputs,
    /// rank\].
    pub fn params(&self, config: &ModelConfig, set: &ModuleSet) -> Vec<(ParamId, Vec<usize>)> {
        let adapters = |cell| match cell {
            Cell::Module(id) => {
                let (outputs, inputs) = config.module_shape(id.kind);
                vec![(ParamId::LoraA(id), vec![self.rank, inputs]), (ParamId::LoraB(id), vec![outputs, self.rank])]
            }
            _ => Vec::new(),
        };
        set.iter().flat_map(adapters).collect()
    }
}

impl From<AdapterShape> for Lora {
    fn from(shape: AdapterShape) -> Self {
        Self { rank: shape.rank, alpha: shape.alpha, rslora: shape.rslora }
    }
}

impl<B: Backend> Decoder<B> {
    /// Adds adapters to the projections of `set`: A uniform in ±1/√inputs (as `peft`), B zero, so that the outputs are
    /// unchanged until the first step.
    ///
    /// # Errors
    /// [`Error::Input`] where the rank is 0; [`Error::Device`] or [`Error::Memory`] where the device fails.
    pub fn add_lora(&mut self, set: &ModuleSet, lora: Lora, seed: u64) -> Result<()> {
        if !(1..=AdapterShape::MAX_RANK).contains(&lora.rank) {
            return Err(Error::input("lora.rank", lora.rank.to_string(), format!("1 to {}", AdapterShape::MAX_RANK)));
        }
        let modules: Vec<ModuleId> = set
            .iter()
            .filter_map(|cell| if let Cell::Module(id) = cell { Some(id) } else { None })
            .filter(|id| id.layer < self.config.layers)
            .collect();
        for (stream, id) in modules.into_iter().enumerate() {
            let (outputs, inputs) = self.config.module_shape(id.kind);
            let bound = 1.0 / (inputs as f64).sqrt();
            let mut philox = Philox::new(seed, stream as u64);
            let a: Vec<f32> =
                (0..lora.rank * inputs).map(|_| ((philox.uniform() * 2.0 - 1.0) * bound) as f32).collect();
            self.attach_lora(id, lora, &a, &vec![0.0; outputs * lora.rank])?;
        }
        Ok(())
    }

    /// Adds an adapter with the values of A [rank, inputs] and B [outputs, rank] to a projection that has none.
    ///
    /// # Errors
    /// [`Error::Device`] or [`Error::Memory`] where the device fails.
    ///
    /// # Panics
    /// Where A or B has another number of values.
    pub fn attach_lora(&mut self, id: ModuleId, lora: Lora, a: &[f32], b: &[f32]) -> Result<()> {
        let (outputs, inputs) = self.config.module_shape(id.kind);
        for (id, shape, values) in
            [(ParamId::LoraA(id), vec![lora.rank, inputs], a), (ParamId::LoraB(id), vec![outputs, lora.rank], b)]
        {
            assert_eq!(values.len(), shape.iter().product::<usize>(), "{id}");
            self.index.insert(id, self.params.len());
            self.params.push(Parameter { id, shape, values: upload(&self.backend, values)? });
        }
        self.lora.insert(id, lora);
        Ok(())
    }

    /// The adapter of the largest rank, if there are any.
    pub fn lora(&self) -> Option<Lora> {
        self.lora.values().copied().max_by_key(|lora| lora.rank)
    }

    /// Rank and scale of a projection's adapter, if it has one.
    pub fn lora_of(&self, id: ModuleId) -> Option<Lora> {
        self.lora.get(&id).copied()
    }

    /// Adds scale · B·A to each adapted weight and removes the adapters.
    ///
    /// # Errors
    /// [`Error::Device`] or [`Error::Memory`] where the device fails.
    pub fn merge_lora(&mut self) -> Result<()> {
        let shapes = std::mem::take(&mut self.lora);
        let base = self.params.iter().take_while(|p| !matches!(p.id, ParamId::LoraA(_))).count();
        let adapters = self.params.split_off(base);
        for pair in adapters.chunks_exact(2) {
            let ParamId::LoraA(id) = pair[0].id else { unreachable!("A and B are added in pairs") };
            let (lora, (outputs, inputs)) = (shapes[&id], self.config.module_shape(id.kind));
            // W [outputs, inputs] += scale · B [outputs, rank] · A [rank, inputs] has the form of a backward pass.
            let shape = LinearShape { tokens: outputs, inputs, outputs: lora.rank };
            let weight = self.params[self.index[&ParamId::Weight(id)]].values.view_mut();
            let (a, b) = (pair[0].values.view(), pair[1].values.view());
            let product = LinearBackwardInput::new(b, a, weight, shape);
            LinearBackwardInput { alpha: lora.scale(), accumulate: true, ..product }.run(&self.backend)?;
        }
        self.index.retain(|id, _| !matches!(id, ParamId::LoraA(_) | ParamId::LoraB(_)));
        Ok(())
    }

    /// y += scale · (x·Aᵀ)·Bᵀ where the module has an adapter.
    pub(super) fn lora_forward(&self, id: ModuleId, x: In<'_, B>, y: Out<'_, B>, shape: LinearShape) -> Result<()> {
        let Some(lora) = self.lora_of(id) else { return Ok(()) };
        let (Some(a), Some(b)) = (self.param(ParamId::LoraA(id)), self.param(ParamId::LoraB(id))) else {
            return Ok(());
        };
        let mut u = self.floats(shape.tokens * lora.rank)?;
        let down = LinearShape { outputs: lora.rank, ..shape };
        let up = LinearShape { inputs: lora.rank, ..shape };
        Linear::new(x, a.values.view(), u.view_mut(), down).run(&self.backend)?;
        let epilogue = Epilogue { alpha: lora.scale(), accumulate: true, ..Epilogue::default() };
        Linear { epilogue, ..Linear::new(u.view(), b.values.view(), y, up) }.run(&self.backend)
    }
}
