//! Batches in a seeded order, from an exact position.

use super::Example;

/// How batches are made.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LoaderOptions {
    /// Examples a micro-batch, or with packing: rows of `max_length` tokens a micro-batch.
    pub batch_size: usize,
    /// Longest row, in tokens; longer examples are cut (and counted).
    pub max_length: usize,
    /// Fill rows of `max_length` with whole examples.
    pub packing: bool,
    /// A new order each epoch.
    pub shuffle: bool,
    /// Seed of the orders.
    pub seed: u64,
}

/// Where a loader stands; saved in checkpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LoaderPosition {
    /// Epochs finished.
    pub epoch: u64,
    /// Micro-batches of this epoch already given out.
    pub batch: u64,
}

/// An endless sequence of micro-batches: epoch after epoch.
pub struct Loader {}

impl Loader {
    /// Examples must not be empty.
    pub fn new(_examples: Vec<Example>, _options: LoaderOptions) -> Self {
        todo!()
    }

    /// Micro-batches an epoch.
    pub fn batches_per_epoch(&self) -> u64 {
        todo!()
    }

    /// Where it stands.
    pub fn position(&self) -> LoaderPosition {
        todo!()
    }

    /// Goes to a position (of the same examples and options).
    pub fn seek(&mut self, _position: LoaderPosition) {
        todo!()
    }

    /// The next micro-batch: documents, each a list of examples' tokens with targets. Never fails, never ends.
    pub fn next_documents(&mut self) -> Vec<&Example> {
        todo!()
    }
}
