//! Text to tokens and back.

use crate::error::Result;

/// A `tokenizer.json`.
pub struct Tokenizer {}

impl Tokenizer {
    /// Token ids; `special` lets the post-processor add its tokens (never for text that a chat template rendered).
    pub fn encode(&self, _text: &str, _special: bool) -> Result<Vec<u32>> {
        todo!()
    }

    /// Text, special tokens skipped.
    pub fn decode(&self, _tokens: &[u32]) -> Result<String> {
        todo!()
    }

    /// Ids from 0 to this, exclusive.
    pub fn vocab(&self) -> usize {
        todo!()
    }
}
