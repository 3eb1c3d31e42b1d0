//! Seeded micro-batches with a position that can be saved and restored.

use super::Example;
use super::packing::pack;
use crate::error::{Error, Result};
use crate::rng::Philox;

/// Stream of the first epoch's order; each epoch has its own.
const EPOCH_STREAMS: u64 = 1 << 63;
/// Stream of the draws that decide which examples share a row.
const PACKING_STREAM: u64 = u64::MAX;
/// Stream of the draws that decide which examples are mixed in.
const MIX_STREAM: u64 = u64::MAX - 1;

/// Batch size, packing and order.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LoaderOptions {
    /// Examples per micro-batch; with packing, rows of `max_length` tokens per micro-batch.
    pub batch_size: usize,
    /// Maximum length of a row, in tokens.
    pub max_length: usize,
    /// Whether to pack several examples into a row of at most `max_length` tokens.
    pub packing: bool,
    /// Whether to shuffle the rows in every epoch.
    pub shuffle: bool,
    /// Seed of the shuffles.
    pub seed: u64,
}

/// Position of a [`Loader`]; saved in checkpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LoaderPosition {
    /// Completed epochs.
    pub epoch: u64,
    /// Micro-batches of the current epoch that were already returned; less than [`Loader::batches_per_epoch`].
    pub batch: u64,
}

/// The size of a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchSize {
    /// Tokens.
    pub tokens: usize,
    /// Tokens that count in the loss.
    pub trained_tokens: usize,
    /// Length of the longest document, in tokens.
    pub longest: usize,
}

/// Endless stream of micro-batches; every example occurs once an epoch. An epoch's order depends only on the seed and
/// the epoch's number. Rows are packed once, so all epochs are equally long.
pub struct Loader {
    examples: Vec<Example>,
    options: LoaderOptions,
    /// Example indices of each row; one without packing.
    rows: Vec<Vec<usize>>,
    /// Row indices in the order of the current epoch.
    order: Vec<usize>,
    position: LoaderPosition,
}

impl Loader {
    /// A loader at the start of the first epoch.
    ///
    /// # Errors
    /// [`Error::Input`] without examples, for a `batch_size` of 0, and for an example that is empty or longer than
    /// `max_length`.
    pub fn new(examples: Vec<Example>, options: LoaderOptions) -> Result<Self> {
        if examples.is_empty() {
            return Err(Error::input("training data", "no examples", "at least one"));
        }
        if options.batch_size == 0 {
            return Err(Error::input("batch_size", "0", "at least 1"));
        }
        let lengths: Vec<usize> = examples.iter().map(|e| e.tokens.len()).collect();
        if let Some(wrong) = lengths.iter().position(|l| !(1..=options.max_length).contains(l)) {
            let found = format!("{} tokens in example {wrong}", lengths.get(wrong).copied().unwrap_or(0));
            return Err(Error::input("training data", found, format!("1 to {} (max_length)", options.max_length)));
        }
        let mut all: Vec<usize> = (0..examples.len()).collect();
        let rows = if options.packing {
            if options.shuffle {
                Philox::new(options.seed, PACKING_STREAM).shuffle(&mut all);
            }
            pack(&lengths, &all, options.max_length)
        } else {
            all.into_iter().map(|e| vec![e]).collect()
        };
        let mut loader = Self { examples, options, rows, order: Vec::new(), position: LoaderPosition::default() };
        loader.set_order();
        Ok(loader)
    }

    /// Micro-batches per epoch; the last may be smaller than the others.
    pub fn batches_per_epoch(&self) -> u64 {
        self.rows.len().div_ceil(self.options.batch_size) as u64
    }

    /// Upper bound on every micro-batch: for each quantity, the rows that have most of it.
    pub fn largest_batch(&self) -> BatchSize {
        self.largest_part(1)
    }

    /// [`Loader::largest_batch`] of each of `parts` to which the rows of a micro-batch are dealt out.
    pub fn largest_part(&self, parts: usize) -> BatchSize {
        let most = |of: &dyn Fn(&Example) -> usize| -> usize {
            let sum = |row: &Vec<usize>| -> usize { row.iter().map(|e| of(&self.examples[*e])).sum() };
            let mut sums: Vec<usize> = self.rows.iter().map(sum).collect();
            sums.sort_unstable_by_key(|sum| std::cmp::Reverse(*sum));
            sums.iter().take(self.options.batch_size.div_ceil(parts)).sum()
        };
        BatchSize {
            tokens: most(&|example| example.tokens.len()),
            trained_tokens: most(&|example| example.trained.iter().skip(1).filter(|trained| **trained).count()),
            longest: self.examples.iter().map(|example| example.tokens.len()).max().unwrap_or(0),
        }
    }

    /// Position of the next micro-batch.
    pub fn position(&self) -> LoaderPosition {
        self.position
    }

    /// Moves to a position of a loader with the same examples and options.
    ///
    /// # Errors
    /// [`Error::Input`] where the epoch has no such batch.
    pub fn seek(&mut self, position: LoaderPosition) -> Result<()> {
        let batches = self.batches_per_epoch();
        if position.batch >= batches {
            return Err(Error::input(
                "position in the training data",
                format!("batch {}", position.batch),
                format!("one of the {batches} batches of an epoch, so the same data and options as before"),
            ));
        }
        let same_epoch = position.epoch == self.position.epoch;
        self.position = position;
        if !same_epoch {
            self.set_order();
        }
        Ok(())
    }

    /// All examples, in the order that they were given in.
    pub fn examples(&self) -> &[Example] {
        &self.examples
    }

    /// The documents of the next micro-batch, one per example.
    pub fn next_documents(&mut self) -> Vec<&Example> {
        let documents = self.next_indices();
        documents.into_iter().filter_map(|e| self.examples.get(e)).collect()
    }

    /// [`Loader::next_documents`] as indices of [`Loader::examples`].
    pub fn next_indices(&mut self) -> Vec<usize> {
        self.next_rows().concat()
    }

    /// [`Loader::next_indices`] by rows.
    pub fn next_rows(&mut self) -> Vec<Vec<usize>> {
        let size = self.options.batch_size;
        let rows = self.order.iter().skip((self.position.batch as usize).saturating_mul(size)).take(size);
        let rows: Vec<Vec<usize>> = rows.filter_map(|row| self.rows.get(*row)).cloned().collect();
        self.position.batch += 1;
        if self.position.batch == self.batches_per_epoch() {
            self.position = LoaderPosition { epoch: self.position.epoch.wrapping_add(1), batch: 0 };
            self.set_order();
        }
        rows
    }

    fn set_order(&mut self) {
        self.order = (0..self.rows.len()).collect();
        if self.options.shuffle {
            Philox::new(self.options.seed, EPOCH_STREAMS.wrapping_add(self.position.epoch)).shuffle(&mut self.order);
        }
    }
}

/// Mixes examples of `extra` into `base` so that they make up `share` (0 to 0.99) of the result, rounded to whole
/// examples. `base` stays complete and in order; `extra` is drawn without replacement, repeatedly if it is too short,
/// and inserted at random positions.
///
/// # Errors
/// [`Error::Input`] for a share out of range, or an empty `extra` with a share above 0.
pub fn mix<T: Clone>(base: &[T], extra: &[T], share: f64, seed: u64) -> Result<Vec<T>> {
    if !(0.0..=0.99).contains(&share) {
        return Err(Error::input("share of mixed-in examples", share.to_string(), "0 to 0.99"));
    }
    let count = (share / (1.0 - share) * base.len() as f64).round() as usize;
    if count > 0 && extra.is_empty() {
        return Err(Error::input("examples to mix in", "none", format!("{count}, for a share of {share}")));
    }
    let mut rng = Philox::new(seed, MIX_STREAM);
    let mut drawn: Vec<&T> = Vec::new();
    while drawn.len() < count {
        let mut round: Vec<&T> = extra.iter().collect();
        rng.shuffle(&mut round);
        drawn.extend(round.into_iter().take(count - drawn.len()));
    }
    let mut is_extra = vec![false; base.len()];
    is_extra.resize(base.len() + count, true);
    rng.shuffle(&mut is_extra);
    let (mut base, mut drawn) = (base.iter(), drawn.into_iter());
    Ok(is_extra.into_iter().filter_map(|extra| if extra { drawn.next() } else { base.next() }).cloned().collect())
}
