//! `config.json` of a Hugging Face model directory.

mod fields;
mod json;

use crate::modules::{ModuleId, ModuleKind, ParamId};

/// Shape of a decoder of the Llama kind (Llama, Mistral, Qwen2, Qwen3).
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `model_type` of the file: `llama`, `mistral`, `qwen2`, `qwen3`.
    pub family: String,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of the MLP.
    pub ffn: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head; not always hidden / heads.
    pub head_dim: usize,
    /// Added to the mean square in every RMSNorm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: Rope,
    /// `max_position_embeddings`: the longest context.
    pub max_positions: usize,
    /// The head shares the embedding's weight.
    pub tied: bool,
    /// Projections that have a bias.
    pub biases: Vec<ModuleKind>,
    /// RMSNorm on each head of q and k (Qwen3).
    pub qk_norm: bool,
    /// Sliding window of each layer, \[layers\].
    pub windows: Vec<Option<usize>>,
    /// Beginning of text, where the tokenizer adds one.
    pub bos: Option<u32>,
    /// Tokens that end an answer (`config.json` and `generation_config.json`).
    pub eos: Vec<u32>,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Change of the frequencies for long contexts.
    pub scaling: RopeScaling,
}

/// `rope_scaling` in the kinds in use; formulas as in `transformers.modeling_rope_utils`.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// As trained.
    None,
    /// Positions divided by `factor`.
    Linear {
        /// ≥ 1
        factor: f64,
    },
    /// NTK-aware: the base grows with the length beyond `max_positions`.
    Dynamic {
        /// ≥ 1
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// Division of the low frequencies.
        factor: f64,
        /// Ramp's lower end.
        low_freq_factor: f64,
        /// Ramp's upper end.
        high_freq_factor: f64,
        /// Context before the extension.
        original_max_positions: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Extension of the context.
        factor: f64,
        /// Ramp's fast end.
        beta_fast: f64,
        /// Ramp's slow end.
        beta_slow: f64,
        /// Factor on cosines and sines; 0.1·ln(factor) + 1 if the file is silent.
        attention_factor: f64,
        /// Context before the extension.
        original_max_positions: usize,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
}

impl ModelConfig {
    /// Columns of Q's output: heads · head_dim.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of K's and V's output: kv_heads · head_dim.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// (outputs, inputs) of a projection.
    pub fn module_shape(&self, kind: ModuleKind) -> (usize, usize) {
        match kind {
            ModuleKind::Q => (self.q_width(), self.hidden),
            ModuleKind::K | ModuleKind::V => (self.kv_width(), self.hidden),
            ModuleKind::O => (self.hidden, self.q_width()),
            ModuleKind::Gate | ModuleKind::Up => (self.ffn, self.hidden),
            ModuleKind::Down => (self.hidden, self.ffn),
        }
    }

    /// Every tensor that the checkpoint must hold, in the engine's order, with its shape.
    pub fn params(&self) -> Vec<(ParamId, Vec<usize>)> {
        let mut params = vec![(ParamId::Embedding, vec![self.vocab, self.hidden])];
        for layer in 0..self.layers {
            params.push((ParamId::InputNorm(layer), vec![self.hidden]));
            let mut modules = |kinds: &[ModuleKind]| {
                for &kind in kinds {
                    let (outputs, inputs) = self.module_shape(kind);
                    let id = ModuleId { layer, kind };
                    params.push((ParamId::Weight(id), vec![outputs, inputs]));
                    if self.biases.contains(&kind) {
                        params.push((ParamId::Bias(id), vec![outputs]));
                    }
                }
            };
            modules(&[ModuleKind::Q, ModuleKind::K, ModuleKind::V, ModuleKind::O]);
            modules(&[ModuleKind::Gate, ModuleKind::Up, ModuleKind::Down]);
            if self.qk_norm {
                params.push((ParamId::QNorm(layer), vec![self.head_dim]));
                params.push((ParamId::KNorm(layer), vec![self.head_dim]));
            }
            params.push((ParamId::PostAttentionNorm(layer), vec![self.hidden]));
        }
        params.push((ParamId::FinalNorm, vec![self.hidden]));
        if !self.tied {
            params.push((ParamId::Head, vec![self.vocab, self.hidden]));
        }
        params
    }

    /// Every cell of the model.
    pub fn cells(&self) -> crate::modules::ModuleSet {
        self.params().into_iter().map(|(id, _)| id.cell()).collect()
    }
}
