//! A model directory on disk, and writing one.

use super::{ChatTemplate, ModelConfig, Tokenizer};
use crate::error::Result;
use crate::modules::ParamId;
use std::path::Path;

/// A checked Hugging Face model directory; tensors are read when asked for.
pub struct ModelDir {
    /// `config.json`.
    pub config: ModelConfig,
}

impl ModelDir {
    /// Opens and checks everything but the values: names, shapes, dtypes, offsets, tokenizer size.
    pub fn open(_dir: &Path) -> Result<Self> {
        todo!()
    }

    /// The values of one tensor, widened; refuses NaN and infinity by name.
    pub fn tensor(&self, _id: ParamId, _shape: &[usize]) -> Result<Vec<f32>> {
        todo!()
    }

    /// A hash of config and weights, which ties probes, maps and sets to this model.
    pub fn hash(&self) -> Result<String> {
        todo!()
    }

    /// `tokenizer.json`.
    pub fn tokenizer(&self) -> Result<Tokenizer> {
        todo!()
    }

    /// The chat template, or the one at `named`.
    pub fn chat_template(&self, _named: Option<&Path>) -> Result<ChatTemplate> {
        todo!()
    }

    /// Writes a model directory of the same kind into `out` (which must be an empty or fresh directory that the caller
    /// renames into place): shards of at most `max_shard_bytes`, the input's dtype, config and tokenizer copied.
    pub fn write(
        &self,
        _out: &Path,
        _tensor: impl FnMut(ParamId) -> Result<Vec<f32>>,
        _max_shard_bytes: u64,
    ) -> Result<()> {
        todo!()
    }
}
