//! Seeded micro-batches with a position that can be saved and restored.

use super::Example;
use super::mixture::{Mixture, drawn};
use super::packing::pack;
use crate::error::{Error, Result};
use crate::rng::Philox;
use std::ops::Range;

/// Stream of the first epoch's order; each epoch has its own.
const EPOCH_STREAMS: u64 = 1 << 63;
/// Stream of the draws that decide which examples share a row.
const PACKING_STREAM: u64 = u64::MAX;
/// Stream of the draws that decide where in an epoch mixed-in rows stand.
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

/// Endless stream of micro-batches; every example occurs once an epoch, but of a [`Mixture`]'s pools their part of it. An
/// epoch's order depends only on the seed and the epoch's number. Rows are packed once, so all epochs are equally long.
pub struct Loader {
    examples: Vec<Example>,
    options: LoaderOptions,
    /// Example indices of each row; one without packing.
    rows: Vec<Vec<usize>>,
    /// Rows that are mixed in.
    pools: Vec<RowPool>,
    /// The rows of an epoch in order: a row that every epoch has, or the next of a pool.
    slots: Vec<Slot>,
    /// Row indices in the order of the current epoch.
    order: Vec<usize>,
    alternation: Option<Alternation>,
    /// Where the micro-batches of an alternating epoch end in `order`.
    ends: Vec<usize>,
    position: LoaderPosition,
}

/// Rows of the examples of a pool, of which no row has any other.
struct RowPool {
    rows: Range<usize>,
    per_epoch: usize,
    seed: u64,
}

#[derive(Clone, Copy)]
enum Slot {
    Row(usize),
    Pool(usize),
}

impl Loader {
    /// A loader at the start of the first epoch.
    ///
    /// # Errors
    /// [`Error::Input`] without examples, for a `batch_size` of 0, and for an example that is empty or longer than
    /// `max_length`.
    pub fn new(examples: impl Into<Mixture>, options: LoaderOptions) -> Result<Self> {
        Self::build(examples.into(), options, None)
    }

    /// A loader whose micro-batches alternate. An epoch holds every example of the task once; alignment data come over and
    /// over again, as they are needed. No row is packed from both.
    ///
    /// # Errors
    /// As [`Loader::new`]; [`Error::Input`] where there are no examples of one kind.
    pub fn alternating(examples: impl Into<Mixture>, options: LoaderOptions, alternation: Alternation) -> Result<Self> {
        let mixture = examples.into();
        let alignment = mixture.examples().iter().filter(|example| example.replayed).count();
        if alignment == 0 || alignment == mixture.examples().len() {
            let found = format!("{alignment} examples of alignment data among {}", mixture.examples().len());
            return Err(Error::input("training data", found, "some of both, to alternate between"));
        }
        Self::build(mixture, options, Some(alternation))
    }

    fn build(mixture: Mixture, options: LoaderOptions, alternation: Option<Alternation>) -> Result<Self> {
        let base = mixture.base();
        let (examples, parts) = mixture.into_parts();
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
        let mut packing = Philox::new(options.seed, PACKING_STREAM);
        let mut rows_of = |part: Range<usize>| -> Vec<Vec<usize>> {
            let mut order: Vec<usize> = part.collect();
            if !options.packing {
                return order.into_iter().map(|e| vec![e]).collect();
            }
            if options.shuffle {
                packing.shuffle(&mut order);
            }
            // No row has both of what alternates.
            let apart = alternation.is_some();
            let (alignment, task): (Vec<usize>, Vec<usize>) =
                order.iter().partition(|e| apart && examples[**e].replayed);
            [task, alignment].iter().flat_map(|order| pack(&lengths, order, options.max_length)).collect()
        };
        let mut rows = rows_of(0..base);
        let mut slots: Vec<Slot> = (0..rows.len()).map(Slot::Row).collect();
        let mut pools = Vec::new();
        for part in parts {
            let found = rows_of(part.examples.clone());
            let is_alignment = examples.get(part.examples.start).is_some_and(|example| example.replayed);
            let per_epoch = match alternation {
                // Its share is that of the turns.
                Some(_) if is_alignment => found.len(),
                _ => (found.len() * part.per_epoch).div_ceil(part.examples.len().max(1)),
            };
            slots.resize(slots.len() + per_epoch, Slot::Pool(pools.len()));
            pools.push(RowPool { rows: rows.len()..rows.len() + found.len(), per_epoch, seed: part.seed });
            rows.extend(found);
        }
        if !pools.is_empty() {
            scatter(&mut slots, &mut Philox::new(options.seed, MIX_STREAM));
        }
        let (order, ends, position) = (Vec::new(), Vec::new(), LoaderPosition::default());
        let mut loader = Self { examples, options, rows, pools, slots, order, alternation, ends, position };
        loader.set_order();
        Ok(loader)
    }

    /// Micro-batches per epoch; the last may be smaller than the others.
    pub fn batches_per_epoch(&self) -> u64 {
        match self.alternation {
            None => self.slots.len().div_ceil(self.options.batch_size) as u64,
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
        let draw = |RowPool { rows, per_epoch, seed }: &RowPool| {
            let start = rows.start;
            let members = drawn(rows.len(), *per_epoch, self.position.epoch, *seed);
            members.into_iter().map(move |member| start + member)
        };
        let mut mixed_in: Vec<_> = self.pools.iter().map(draw).collect();
        let row = |slot: &Slot| match *slot {
            Slot::Row(row) => Some(row),
            Slot::Pool(pool) => mixed_in.get_mut(pool).and_then(Iterator::next),
        };
        self.order = self.slots.iter().filter_map(row).collect();
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

/// Puts the rows of pools at random places among the others, which stay in order.
fn scatter(slots: &mut Vec<Slot>, rng: &mut Philox) {
    let (rows, mut mixed_in): (Vec<Slot>, Vec<Slot>) = slots.iter().partition(|slot| matches!(slot, Slot::Row(_)));
    rng.shuffle(&mut mixed_in);
    let mut is_mixed_in = vec![false; rows.len()];
    is_mixed_in.resize(slots.len(), true);
    rng.shuffle(&mut is_mixed_in);
    let (mut rows, mut mixed_in) = (rows.into_iter(), mixed_in.into_iter());
    *slots = is_mixed_in.into_iter().filter_map(|mixed| if mixed { mixed_in.next() } else { rows.next() }).collect();
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
