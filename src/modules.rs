//! Names of parameters, sets of modules, and per-module learning rates.

mod rates;
mod set;

pub use rates::{LearningRates, Rate, RateTable};
pub use set::ModuleSet;

use std::fmt;

/// One of the seven projections of a decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ModuleKind {
    /// `self_attn.q_proj`
    Q,
    /// `self_attn.k_proj`
    K,
    /// `self_attn.v_proj`
    V,
    /// `self_attn.o_proj`
    O,
    /// `mlp.gate_proj`
    Gate,
    /// `mlp.up_proj`
    Up,
    /// `mlp.down_proj`
    Down,
}

impl ModuleKind {
    /// All kinds, in the order in which a layer uses them.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Name in a Hugging Face checkpoint: `q_proj` … `down_proj`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// The inverse of [`ModuleKind::name`].
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|k| k.name() == name)
    }

    /// Whether it belongs to the attention block, not to the MLP.
    pub fn in_attention(self) -> bool {
        matches!(self, Self::Q | Self::K | Self::V | Self::O)
    }
}

impl fmt::Display for ModuleKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A projection of one layer: its weight and its bias, if any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModuleId {
    /// Layer index from 0.
    pub layer: usize,
    /// Which projection.
    pub kind: ModuleKind,
}

impl fmt::Display for ModuleId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "layers.{}.{}", self.layer, self.kind)
    }
}

/// A group of parameters that is perturbed, frozen or trained as one.
///
/// Written `embed_tokens`, `layers.3.norms`, `layers.3.q_proj`, `norm` or `lm_head`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cell {
    /// `model.embed_tokens`; with a tied head, the head too.
    Embedding,
    /// All norm weights of a layer: the two layer norms and, in Qwen3, the q and k norms.
    Norms(usize),
    /// One of the seven projections of a layer.
    Module(ModuleId),
    /// The final norm.
    FinalNorm,
    /// `lm_head`, unless it is tied to the embedding.
    Head,
}

impl Cell {
    /// The cell of the projection `kind` of `layer`.
    pub fn module(layer: usize, kind: ModuleKind) -> Self {
        Self::Module(ModuleId { layer, kind })
    }

    /// The layer it belongs to, if any.
    pub fn layer(self) -> Option<usize> {
        match self {
            Self::Module(m) => Some(m.layer),
            Self::Norms(layer) => Some(layer),
            _ => None,
        }
    }

    /// Name without the layer: `q_proj`, `norms`, `embed_tokens`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embed_tokens",
            Self::Norms(_) => "norms",
            Self::Module(m) => m.kind.name(),
            Self::FinalNorm => "norm",
            Self::Head => "lm_head",
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layer() {
            Some(layer) => write!(f, "layers.{layer}.{}", self.name()),
            None => f.write_str(self.name()),
        }
    }
}

impl std::str::FromStr for Cell {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}`: expected embed_tokens, norm, lm_head, layers.N.norms or layers.N.{{q,k,v,o,gate,up,down}}_proj"
            )
        };
        match text {
            "embed_tokens" => return Ok(Self::Embedding),
            "norm" => return Ok(Self::FinalNorm),
            "lm_head" => return Ok(Self::Head),
            _ => {}
        }
        let (layer, rest) = text.strip_prefix("layers.").and_then(|t| t.split_once('.')).ok_or_else(wrong)?;
        let layer = layer.parse().map_err(|_| wrong())?;
        if rest == "norms" {
            return Ok(Self::Norms(layer));
        }
        ModuleKind::from_name(rest).map(|kind| Self::module(layer, kind)).ok_or_else(wrong)
    }
}

impl serde::Serialize for Cell {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Cell {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(d)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A tensor of a checkpoint, with its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ParamId {
    /// `model.embed_tokens.weight` [vocab, hidden]
    Embedding,
    /// `model.layers.L.input_layernorm.weight` \[hidden\]
    InputNorm(usize),
    /// `model.layers.L.….weight` [outputs, inputs]
    Weight(ModuleId),
    /// `model.layers.L.….bias` \[outputs\]
    Bias(ModuleId),
    /// `model.layers.L.self_attn.q_norm.weight` \[head_dim\]
    QNorm(usize),
    /// `model.layers.L.self_attn.k_norm.weight` \[head_dim\]
    KNorm(usize),
    /// `model.layers.L.post_attention_layernorm.weight` \[hidden\]
    PostAttentionNorm(usize),
    /// `model.norm.weight` \[hidden\]
    FinalNorm,
    /// `lm_head.weight` [vocab, hidden], absent when tied
    Head,
    /// LoRA's A of a module [rank, inputs]
    LoraA(ModuleId),
    /// LoRA's B of a module [outputs, rank]
    LoraB(ModuleId),
}

impl ParamId {
    /// The cell that the tensor belongs to.
    pub fn cell(self) -> Cell {
        match self {
            Self::Embedding => Cell::Embedding,
            Self::Weight(m) | Self::Bias(m) | Self::LoraA(m) | Self::LoraB(m) => Cell::Module(m),
            Self::InputNorm(l) | Self::QNorm(l) | Self::KNorm(l) | Self::PostAttentionNorm(l) => Cell::Norms(l),
            Self::FinalNorm => Cell::FinalNorm,
            Self::Head => Cell::Head,
        }
    }

    /// The layer it belongs to, if any.
    pub fn layer(self) -> Option<usize> {
        self.cell().layer()
    }
}

impl fmt::Display for ParamId {
    /// The tensor's name in a Hugging Face checkpoint.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let module = |f: &mut fmt::Formatter<'_>, m: &ModuleId, what: &str| {
            let block = if m.kind.in_attention() { "self_attn" } else { "mlp" };
            write!(f, "model.layers.{}.{block}.{}.{what}", m.layer, m.kind)
        };
        match self {
            Self::Embedding => f.write_str("model.embed_tokens.weight"),
            Self::InputNorm(l) => write!(f, "model.layers.{l}.input_layernorm.weight"),
            Self::Weight(m) => module(f, m, "weight"),
            Self::Bias(m) => module(f, m, "bias"),
            Self::QNorm(l) => write!(f, "model.layers.{l}.self_attn.q_norm.weight"),
            Self::KNorm(l) => write!(f, "model.layers.{l}.self_attn.k_norm.weight"),
            Self::PostAttentionNorm(l) => write!(f, "model.layers.{l}.post_attention_layernorm.weight"),
            Self::FinalNorm => f.write_str("model.norm.weight"),
            Self::Head => f.write_str("lm_head.weight"),
            Self::LoraA(m) => module(f, m, "lora_A.weight"),
            Self::LoraB(m) => module(f, m, "lora_B.weight"),
        }
    }
}
