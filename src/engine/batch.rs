//! Packed tokens.

use crate::backend::IGNORE;

/// Documents one after another, without padding.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Batch {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// Position of each token in its document.
    pub positions: Vec<u32>,
    /// documents + 1 entries: the rows where documents begin, then the number of tokens.
    pub starts: Vec<u32>,
    /// The token each row must predict, or [`IGNORE`]; empty where there is no loss.
    pub targets: Vec<u32>,
}

impl Batch {
    /// Packs prompts: positions from 0, no targets.
    pub fn from_prompts<'a>(prompts: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut batch = Self { starts: vec![0], ..Self::default() };
        for prompt in prompts {
            batch.tokens.extend_from_slice(prompt);
            batch.positions.extend(0..prompt.len() as u32);
            batch.starts.push(batch.tokens.len() as u32);
        }
        batch
    }

    /// Number of documents.
    pub fn documents(&self) -> usize {
        self.starts.len().saturating_sub(1)
    }

    /// Rows of the last token of each document.
    pub fn last_rows(&self) -> Vec<u32> {
        self.starts.windows(2).map(|w| w[1] - 1).collect()
    }

    /// Positions with a loss.
    pub fn trained_tokens(&self) -> usize {
        self.targets.iter().filter(|t| **t != IGNORE).count()
    }
}
