//! Configuration of a model.

mod fields;
mod json;

pub(super) use fields::Fields;

use crate::modules::{ModuleId, ModuleKind, ParamId};

/// Configuration of a decoder of the Llama family (Llama, Mistral, Qwen2, Qwen3).
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// `model_type` of `config.json`: `llama`, `mistral`, `qwen2` or `qwen3`.
    pub family: String,
    /// Vocabulary size: rows of the embedding.
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
    /// Width of a head; not necessarily hidden / heads.
    pub head_dim: usize,
    /// Epsilon of every RMSNorm.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: Rope,
    /// Maximum context length, in tokens.
    pub max_positions: usize,
    /// Whether the output head shares the embedding's weight.
    pub tied: bool,
    /// Projections with a bias.
    pub biases: Vec<ModuleKind>,
    /// Whether q and k heads are normalised by RMSNorm (Qwen3).
    pub qk_norm: bool,
    /// Attention window of each layer in tokens, \[layers\]; `None` = full attention.
    pub windows: Vec<Option<usize>>,
    /// Token id of the beginning of text.
    pub bos: Option<u32>,
    /// Token ids that end an answer: `eos_token_id` of `config.json` and `generation_config.json`, and the tokenizer's
    /// `eos_token`.
    pub eos: Vec<u32>,
}

/// Rotary position embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Scaling of the frequencies for longer contexts.
    pub scaling: RopeScaling,
}

/// Scaling of the rotary frequencies; formulas as in `transformers.modeling_rope_utils`.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// No scaling.
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
    /// Llama 3.1: low frequencies are divided, high ones kept, with a ramp between.
    Llama3 {
        /// Divisor of the low frequencies, ≥ 1.
        factor: f64,
        /// Lower end of the ramp, in waves per original context.
        low_freq_factor: f64,
        /// Upper end of the ramp, in waves per original context.
        high_freq_factor: f64,
        /// Context before the extension.
        original_max_positions: usize,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Extension factor of the context, ≥ 1.
        factor: f64,
        /// Fast end of the ramp, in rotations per original context; 32 by default.
        beta_fast: f64,
        /// Slow end of the ramp, in rotations per original context; 1 by default.
        beta_slow: f64,
        /// Factor on cosines and sines; 0.1·ln(factor) + 1 by default.
        attention_factor: f64,
        /// Context before the extension.
        original_max_positions: usize,
        /// Whether the ends of the ramp are rounded to whole dimensions.
        truncate: bool,
    },
}

impl ModelConfig {
    /// Width of q: heads · head_dim.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of k and of v: kv_heads · head_dim.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Shape of a projection's weight: (outputs, inputs).
    pub fn module_shape(&self, kind: ModuleKind) -> (usize, usize) {
        match kind {
            ModuleKind::Q => (self.q_width(), self.hidden),
            ModuleKind::K | ModuleKind::V => (self.kv_width(), self.hidden),
            ModuleKind::O => (self.hidden, self.q_width()),
            ModuleKind::Gate | ModuleKind::Up => (self.ffn, self.hidden),
            ModuleKind::Down => (self.hidden, self.ffn),
        }
    }

    /// All tensors of the checkpoint with their shapes, in the engine's order.
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

    /// All cells of the model.
    pub fn cells(&self) -> crate::modules::ModuleSet {
        self.params().into_iter().map(|(id, _)| id.cell()).collect()
    }
}
