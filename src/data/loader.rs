//! Batches in a seeded order, from an exact position.

use super::Example;
use super::draw::Draw;
use super::packing::pack;
use crate::error::{Error, Result};

/// Draws that decide which examples share a row; epochs count up from 0 and never get here.
const PACKING_STREAM: u64 = u64::MAX;
/// Draws that decide which examples are mixed in.
const MIX_STREAM: u64 = u64::MAX - 1;

/// How batches are made.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LoaderOptions {
    /// Examples a micro-batch, or with packing: rows of `max_length` tokens a micro-batch.
    pub batch_size: usize,
    /// Longest row, in tokens, and so the longest example.
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
    /// Micro-batches of this epoch already given out; less than there are in an epoch.
    pub batch: u64,
}

/// The size of a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchSize {
    /// Tokens.
    pub tokens: usize,
    /// Those that are trained.
    pub trained_tokens: usize,
    /// Tokens of its longest document.
    pub longest: usize,
}

/// An endless sequence of micro-batches: epoch after epoch, each example once an epoch. The order of an epoch depends
/// on the seed and the epoch's number alone. Packed rows stay the same in all epochs, so that all are equally long.
pub struct Loader {
    examples: Vec<Example>,
    options: LoaderOptions,
    /// Indices of the examples of each row; a single one without packing.
    rows: Vec<Vec<usize>>,
    /// Indices of rows in the order of this epoch.
    order: Vec<usize>,
    position: LoaderPosition,
}

impl Loader {
    /// A loader at the beginning of the first epoch. No examples, a `batch_size` of 0, and an example that is empty or
    /// longer than `max_length` (see [`Example::from_conversation`]) are errors.
    ///
    /// # Errors
    /// [`Error::Input`] without examples, for a `batch_size` of 0, and for an example that is empty or too long.
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
                Draw::stream(options.seed, PACKING_STREAM).shuffle(&mut all);
            }
            pack(&lengths, &all, options.max_length)
        } else {
            all.into_iter().map(|e| vec![e]).collect()
        };
        let mut loader = Self { examples, options, rows, order: Vec::new(), position: LoaderPosition::default() };
        loader.set_order();
        Ok(loader)
    }

    /// Micro-batches an epoch; the last may be smaller than the others.
    pub fn batches_per_epoch(&self) -> u64 {
        self.rows.len().div_ceil(self.options.batch_size) as u64
    }

    /// A bound on the micro-batches of all epochs: the rows that have most of each.
    pub fn largest_batch(&self) -> BatchSize {
        let most = |of: &dyn Fn(&Example) -> usize| -> usize {
            let sum = |row: &Vec<usize>| -> usize { row.iter().map(|e| of(&self.examples[*e])).sum() };
            let mut sums: Vec<usize> = self.rows.iter().map(sum).collect();
            sums.sort_unstable_by_key(|sum| std::cmp::Reverse(*sum));
            sums.iter().take(self.options.batch_size).sum()
        };
        BatchSize {
            tokens: most(&|example| example.tokens.len()),
            trained_tokens: most(&|example| example.trained.iter().skip(1).filter(|trained| **trained).count()),
            longest: self.examples.iter().map(|example| example.tokens.len()).max().unwrap_or(0),
        }
    }

    /// Tokens of all examples over the tokens that their rows could hold, at most 1.
    pub fn fill_rate(&self) -> f64 {
        let tokens: usize = self.examples.iter().map(|e| e.tokens.len()).sum();
        tokens as f64 / (self.rows.len() as f64 * self.options.max_length as f64)
    }

    /// Where it stands.
    pub fn position(&self) -> LoaderPosition {
        self.position
    }

    /// Goes to a position of the same examples and options; one that these do not have is an error.
    ///
    /// # Errors
    /// [`Error::Input`] for a position outside an epoch.
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

    /// The next micro-batch: its documents, one an example. Never fails, never ends.
    pub fn next_documents(&mut self) -> Vec<&Example> {
        let size = self.options.batch_size;
        let rows = self.order.iter().skip((self.position.batch as usize).saturating_mul(size)).take(size);
        let documents: Vec<usize> = rows.filter_map(|row| self.rows.get(*row)).flatten().copied().collect();
        self.position.batch += 1;
        if self.position.batch == self.batches_per_epoch() {
            self.position = LoaderPosition { epoch: self.position.epoch.wrapping_add(1), batch: 0 };
            self.set_order();
        }
        documents.into_iter().filter_map(|e| self.examples.get(e)).collect()
    }

    fn set_order(&mut self) {
        self.order = (0..self.rows.len()).collect();
        if self.options.shuffle {
            Draw::stream(self.options.seed, self.position.epoch).shuffle(&mut self.order);
        }
    }
}

/// `base` with so many of `extra` mixed in that these are `share` of the result (rounded to whole ones), for controls
/// such as 10 % of refusals. `base` stays complete and in order; the others, drawn without replacement as long as there
/// are any left and then again from all, stand at random places. `share` must be in 0 … 0.99, and `extra` not empty
/// unless it is 0.
///
/// # Errors
/// [`Error::Input`] for a share out of range, or without anything to mix in.
pub fn mix<T: Clone>(base: &[T], extra: &[T], share: f64, seed: u64) -> Result<Vec<T>> {
    if !(0.0..=0.99).contains(&share) {
        return Err(Error::input("share of mixed-in examples", share.to_string(), "0 to 0.99"));
    }
    let count = (share / (1.0 - share) * base.len() as f64).round() as usize;
    if count > 0 && extra.is_empty() {
        return Err(Error::input("examples to mix in", "none", format!("{count}, for a share of {share}")));
    }
    let mut draw = Draw::stream(seed, MIX_STREAM);
    let mut drawn: Vec<&T> = Vec::new();
    while drawn.len() < count {
        let mut round: Vec<&T> = extra.iter().collect();
        draw.shuffle(&mut round);
        drawn.extend(round.into_iter().take(count - drawn.len()));
    }
    let mut is_extra = vec![false; base.len()];
    is_extra.resize(base.len() + count, true);
    draw.shuffle(&mut is_extra);
    let (mut base, mut drawn) = (base.iter(), drawn.into_iter());
    Ok(is_extra.into_iter().filter_map(|extra| if extra { drawn.next() } else { base.next() }).cloned().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loader(examples: u32, options: LoaderOptions) -> Loader {
        let example =
            |id| Example { tokens: vec![id; 1 + id as usize % 5], trained: vec![id % 3 > 0; 1 + id as usize % 5] };
        Loader::new((0..examples).map(example).collect(), options).unwrap()
    }

    fn options() -> LoaderOptions {
        LoaderOptions { batch_size: 4, max_length: 8, packing: false, shuffle: true, seed: 3 }
    }

    fn ids(documents: Vec<&Example>) -> Vec<u32> {
        documents.iter().map(|e| e.tokens[0]).collect()
    }

    #[test]
    fn the_order_is_the_one_of_checkpoints_written_earlier() {
        let mut loader = loader(10, options());
        let first: Vec<u32> = (0..3).flat_map(|_| ids(loader.next_documents())).collect();
        assert_eq!(first, [7, 8, 1, 0, 4, 2, 9, 6, 5, 3]);
    }

    #[test]
    fn epochs_and_seeds_differ_and_without_shuffling_the_order_is_the_files() {
        let epoch = |seed, skip| {
            let mut loader = loader(40, LoaderOptions { batch_size: 40, seed, ..options() });
            loader.seek(LoaderPosition { epoch: skip, batch: 0 }).unwrap();
            ids(loader.next_documents())
        };
        assert_eq!(epoch(1, 2), epoch(1, 2));
        assert!(epoch(1, 2) != epoch(1, 3) && epoch(1, 2) != epoch(2, 2));
        let mut plain = loader(5, LoaderOptions { shuffle: false, ..options() });
        assert_eq!(ids(plain.next_documents()), [0, 1, 2, 3]);
        assert_eq!(ids(plain.next_documents()), [4]);
        assert_eq!(plain.position(), LoaderPosition { epoch: 1, batch: 0 });
        assert_eq!(ids(plain.next_documents()), [0, 1, 2, 3]);
    }

    #[test]
    fn no_batch_is_larger_than_the_largest() {
        for packing in [false, true] {
            let mut loader = loader(23, LoaderOptions { packing, ..options() });
            let largest = loader.largest_batch();
            let sizes = (0..60).map(|_| {
                let documents = loader.next_documents();
                assert!(documents.iter().all(|e| e.tokens.len() <= largest.longest));
                let trained = |e: &&Example| e.trained.iter().skip(1).filter(|trained| **trained).count();
                assert!(documents.iter().map(trained).sum::<usize>() <= largest.trained_tokens);
                documents.iter().map(|e| e.tokens.len()).sum()
            });
            let most: usize = sizes.max().unwrap();
            assert!(most <= largest.tokens && largest.trained_tokens < largest.tokens, "{most} of {largest:?}");
            assert!(most + 4 > largest.tokens, "a bound that is far away");
        }
    }

    #[test]
    fn packing_fills_rows() {
        let packed = loader(1000, LoaderOptions { packing: true, ..options() });
        assert_eq!(packed.batches_per_epoch(), 94, "3,000 tokens in 375 rows of 8");
        assert_eq!(packed.fill_rate(), 1.0);
        assert_eq!(loader(1000, options()).fill_rate(), 3.0 / 8.0);
    }

    #[test]
    fn wrong_input_is_refused() {
        let example = |length| vec![Example { tokens: vec![0; length], trained: vec![true; length] }];
        let error = |examples, options| Loader::new(examples, options).err().unwrap().to_string();
        assert!(error(Vec::new(), options()).contains("no examples"));
        assert!(error(example(9), options()).contains("9 tokens in example 0; expected 1 to 8"));
        assert!(error(example(0), options()).contains("0 tokens"));
        assert!(error(example(1), LoaderOptions { batch_size: 0, ..options() }).contains("batch_size"));
        let mut loader = loader(10, options());
        assert!(loader.seek(LoaderPosition { epoch: 0, batch: 3 }).is_err());
        loader.seek(LoaderPosition { epoch: u64::MAX, batch: 2 }).unwrap();
        assert_eq!(loader.next_documents().len(), 2);
    }

    #[test]
    fn mixing_in_gives_the_share_and_keeps_the_base_in_order() {
        let (base, extra): (Vec<u32>, Vec<u32>) = ((0..90).collect(), (100..150).collect());
        let mixed = mix(&base, &extra, 0.1, 7).unwrap();
        let (mut added, kept): (Vec<u32>, Vec<u32>) = mixed.iter().partition(|v| **v >= 100);
        assert_eq!(kept, base);
        assert_eq!(added.len(), 10);
        added.sort_unstable();
        added.dedup();
        assert_eq!(added.len(), 10, "drawn without replacement");
        assert!(mixed[90..].iter().any(|v| *v < 100), "not just appended");
        assert_ne!(mixed, mix(&base, &extra, 0.1, 8).unwrap());
        assert_eq!(mix(&base, &[], 0.0, 7).unwrap(), base);
        let again = mix(&base, &[7], 0.5, 7).unwrap();
        assert_eq!(again.len(), 180);
        for (extra, share) in [(&extra[..], 1.0), (&extra, -0.1), (&extra, f64::NAN), (&[], 0.5)] {
            assert!(mix(&base, extra, share, 7).is_err());
        }
    }
}
