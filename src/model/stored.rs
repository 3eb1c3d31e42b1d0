//! The dtype in which weights are saved.

use crate::io::safetensors::Dtype;

/// Dtype of saved weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum StoredAs {
    /// Of each tensor that of the model that was read
    #[default]
    AsStored,
    /// 4 bytes per weight
    F32,
    /// 2 bytes per weight, rounded to nearest even
    Bf16,
}

impl StoredAs {
    /// The one dtype of all tensors; `None` where each keeps its own.
    pub fn dtype(self) -> Option<Dtype> {
        match self {
            Self::AsStored => None,
            Self::F32 => Some(Dtype::F32),
            Self::Bf16 => Some(Dtype::BF16),
        }
    }

    /// Its name in `config.json`.
    pub(super) fn config_name(self) -> Option<&'static str> {
        match self {
            Self::AsStored => None,
            Self::F32 => Some("float32"),
            Self::Bf16 => Some("bfloat16"),
        }
    }
}
