//! The models that are merged: a directory, or an adapter on the base model, read tensor by tensor.

use crate::backend::cpu::Cpu;
use crate::backend::{Backend, LinearBackwardInput, LinearShape, Operator};
use crate::engine::Lora;
use crate::error::{Error, Result};
use crate::model::{ModelConfig, ModelDir};
use crate::modules::ParamId;
use std::path::Path;

/// A model of a merge, and the option that names it.
pub(super) struct Source {
    pub(super) option: &'static str,
    pub(super) files: ModelDir,
}

/// Which tensors a model must have in common with the tuned one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Shared {
    /// All.
    All,
    /// The weights of the projections: another vocabulary, or context, makes no difference.
    Projections,
}

impl Source {
    /// Opens a model directory, or a LoRA adapter on the model at `base`.
    pub(super) fn open(option: &'static str, dir: &Path, base: &Path) -> Result<Self> {
        let is_adapter = dir.join("adapter_config.json").exists() && !dir.join("config.json").exists();
        let files = if is_adapter { ModelDir::open_with_adapter(base, dir) } else { ModelDir::open(dir) };
        Ok(Self { option, files: files? })
    }

    /// Checks that this model can be computed with tensor by tensor, beside the tuned one.
    pub(super) fn check_same_shape(&self, tuned: &Self, shared: Shared) -> Result<()> {
        let (own, other) = (&self.files.config, &tuned.files.config);
        for ((field, found), (_, expected)) in fields(own, shared).into_iter().zip(fields(other, shared)) {
            if found != expected {
                let place = format!("{} {}: {field}", self.option, self.files.dir().display());
                let expected = format!("{expected}, as in {} {}", tuned.option, tuned.files.dir().display());
                return Err(Error::input(place, found, expected));
            }
        }
        Ok(())
    }

    /// Reads a tensor as f32, with the adapter added to the weights that it adapts. Of a model whose head is tied, the
    /// head is the embedding.
    pub(super) fn tensor(&self, id: ParamId, shape: &[usize]) -> Result<Vec<f32>> {
        let config = &self.files.config;
        let id = if id == ParamId::Head && config.tied { ParamId::Embedding } else { id };
        let values = self.files.tensor(id, shape)?;
        let ParamId::Weight(module) = id else { return Ok(values) };
        let adapted = self.files.adapter_params().find(|(adapted, ..)| *adapted == module);
        let Some((_, adapter, [(a, a_shape), (b, b_shape)])) = adapted else { return Ok(values) };
        let (a, b) = (self.files.tensor(a, &a_shape)?, self.files.tensor(b, &b_shape)?);
        let cpu = Cpu::new();
        let upload = |values: &[f32]| {
            let mut buffer = cpu.zeros(values.len())?;
            cpu.write(values, buffer.view_mut()).map(|()| buffer)
        };
        let (mut weight, a, b) = (upload(&values)?, upload(&a)?, upload(&b)?);
        // W [outputs, inputs] += scale · B [outputs, rank] · A [rank, inputs] has the form of a backward pass.
        let lora = Lora { rank: adapter.rank, alpha: adapter.alpha, rslora: adapter.rslora };
        let (outputs, inputs) = config.module_shape(module.kind);
        let sizes = LinearShape { tokens: outputs, inputs, outputs: lora.rank };
        let product = LinearBackwardInput::new(b.view(), a.view(), weight.view_mut(), sizes);
        LinearBackwardInput { alpha: lora.scale(), accumulate: true, ..product }.run(&cpu)?;
        let mut values = values;
        cpu.read(weight.view(), &mut values)?;
        Ok(values)
    }
}

/// What must be equal of two models, as it is shown in an error.
fn fields(config: &ModelConfig, shared: Shared) -> Vec<(&'static str, String)> {
    let mut fields = vec![
        ("model_type", config.family.clone()),
        ("num_hidden_layers", config.layers.to_string()),
        ("hidden_size", config.hidden.to_string()),
        ("intermediate_size", config.ffn.to_string()),
        ("num_attention_heads", config.heads.to_string()),
        ("num_key_value_heads", config.kv_heads.to_string()),
        ("head_dim", config.head_dim.to_string()),
    ];
    if shared == Shared::All {
        let biases: Vec<&str> = config.biases.iter().map(|kind| kind.name()).collect();
        fields.extend([
            ("vocab_size", config.vocab.to_string()),
            ("biases", if biases.is_empty() { "none".into() } else { biases.join(", ") }),
            ("q and k norms", config.qk_norm.to_string()),
            ("rms_norm_eps", config.rms_norm_eps.to_string()),
            ("rope", format!("{:?}", config.rope)),
        ]);
    }
    fields
}
