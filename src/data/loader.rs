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

/// Micro-batches of alignment data (examples that are mixed in) and of the task's, in turns, alignment first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alternation {
    /// Micro-batches of alignment data, at least 1.
    pub alignment: usize,
    /// Micro-batches of the task's, at least 1.
    pub task: usize,
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
    alternation: Option<Alternation>,
    /// Where the micro-batches of an alternating epoch end in `order`.
    ends: Vec<usize>,
    position: LoaderPosition,
}

impl Loader {
    /// A loader at the start of the first epoch.
    ///
    /// # Errors
    /// [`Error::Input`] without examples, for a `batch_size` of 0, and for an example that is empty or longer than
    /// `max_length`.
    pub fn new(examples: Vec<Example>, options: LoaderOptions) -> Result<Self> {
        Self::build(examples, options, None)
    }

    /// A loader whose micro-batches alternate. An epoch holds every example of the task once; alignment data come over and
    /// over again, as they are needed. No row is packed from both.
    ///
    /// # Errors
    /// As [`Loader::new`]; [`Error::Input`] where there are no examples of one kind.
    pub fn alternating(examples: Vec<Example>, options: LoaderOptions, alternation: Alternation) -> Result<Self> {
        let alignment = examples.iter().filter(|example| example.replayed).count();
        if alignment == 0 || alignment == examples.len() {
            let found = format!("{alignment} examples of alignment data among {}", examples.len());
            return Err(Error::input("training data", found, "some of both, to alternate between"));
        }
        Self::build(examples, options, Some(alternation))
    }

    fn build(examples: Vec<Example>, options: LoaderOptions, alternation: Option<Alternation>) -> Result<Self> {
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
            match alternation {
                None => pack(&lengths, &all, options.max_length),
                Some(_) => {
                    let (alignment, task): (Vec<usize>, Vec<usize>) = all.iter().partition(|e| examples[**e].replayed);
                    [task, alignment].iter().flat_map(|all| pack(&lengths, all, options.max_length)).collect()
                }
            }
        } else {
            all.into_iter().map(|e| vec![e]).collect()
        };
        let (order, ends, position) = (Vec::new(), Vec::new(), LoaderPosition::default());
        let mut loader = Self { examples, options, rows, order, alternation, ends, position };
        loader.set_order();
        Ok(loader)
    }

    /// Micro-batches per epoch; the last may be smaller than the others.
    pub fn batches_per_epoch(&self) -> u64 {
        match self.alternation {
            None => self.rows.len().div_ceil(self.options.batch_size) as u64,
            Some(_) => self.ends.len() as u64,
        }
    }

    /// Whether the next micro-batch is the first of its kind after one of the other, or of an epoch.
    pub fn switches(&self) -> bool {
        self.alternation.is_some_and(|Alternation { alignment, task }| {
            let place = self.position.batch as usize % (alignment + task);
            place == 0 || place == alignment
        })
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
        let (size, batch) = (self.options.batch_size, self.position.batch as usize);
        let (start, count) = match self.alternation {
            None => (batch.saturating_mul(size), size),
            Some(_) => {
                let start = batch.checked_sub(1).and_then(|before| self.ends.get(before)).copied().unwrap_or(0);
                (start, self.ends.get(batch).map_or(0, |end| end - start))
            }
        };
        let rows = self.order.iter().skip(start).take(count);
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
        if let Some(alternation) = self.alternation {
            let is_alignment = |row: &usize| self.rows[*row].first().is_some_and(|e| self.examples[*e].replayed);
            let (alignment, task) = self.order.iter().partition(|row| is_alignment(row));
            (self.order, self.ends) = alternated([alignment, task], self.options.batch_size, alternation);
        }
    }
}

/// Rows of alignment and task in turns, `size` a micro-batch, and where the micro-batches end. The task's come once, those of
/// the alignment again from the first where they are spent.
fn alternated([alignment, task]: [Vec<usize>; 2], size: usize, alternation: Alternation) -> (Vec<usize>, Vec<usize>) {
    let (mut order, mut ends) = (Vec::new(), Vec::new());
    let mut aligned = alignment.iter().copied().cycle();
    let batches: Vec<&[usize]> = task.chunks(size).collect();
    for turn in batches.chunks(alternation.task) {
        for _ in 0..alternation.alignment {
            order.extend(aligned.by_ref().take(size.min(alignment.len())));
            ends.push(order.len());
        }
        for batch in turn {
            order.extend_from_slice(batch);
            ends.push(order.len());
        }
    }
    (order, ends)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_alternate_by_hand() {
        // Five rows of the task in batches of two, one batch of alignment before each two of them.
        let turns = Alternation { alignment: 1, task: 2 };
        let (order, ends) = alternated([vec![7, 8, 9], vec![0, 1, 2, 3, 4]], 2, turns);
        assert_eq!((order, ends), (vec![7, 8, 0, 1, 2, 3, 9, 7, 4], vec![2, 4, 6, 8, 9]));
        // A single row of alignment is a batch by itself.
        let (order, ends) = alternated([vec![9], vec![0, 1]], 2, Alternation { alignment: 2, task: 1 });
        assert_eq!((order, ends), (vec![9, 9, 0, 1], vec![1, 2, 4]));
    }
}
