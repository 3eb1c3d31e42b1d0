//! Shared-prefix deduplication: rows of a batch that prompts have in common are computed once.
//!
//! A token's activations depend on the tokens up to it alone, so rows of a packed batch with equal tokens up to and
//! including their own are equal in every layer. Prompts of one chat template share its system prompt at least.
//! A deduplicated batch keeps one row of each; only attention, which needs whole documents, gets all rows back. In the
//! backward pass a distinct row gets the sum of its copies' gradients. Rows that have a target are never shared: each has
//! its own gradient from above.

use super::pool::{Floats, Scratch};
use super::{Batch, Decoder};
use crate::backend::{AddRows, Backend, GatherRows, IGNORE, In, Operator, ScatterRows};
use crate::error::Result;
use std::collections::HashMap;

/// The distinct rows of a batch.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct DistinctRows {
    /// The first row of the batch with each distinct row's prefix; ascending.
    pub(super) firsts: Vec<u32>,
    /// For each row of the batch, the index of its distinct row.
    pub(super) index: Vec<u32>,
}

/// [`DistinctRows`] on the backend.
pub(super) struct Deduplicated<'p, B: Backend> {
    pub(super) distinct: DistinctRows,
    firsts: Scratch<'p, B, u32>,
    index: Scratch<'p, B, u32>,
}

impl DistinctRows {
    /// Of a batch; `None` where less than one row in sixteen would be saved.
    pub(super) fn of(batch: &Batch) -> Option<Self> {
        let mut rows = Self { firsts: Vec::new(), index: Vec::with_capacity(batch.tokens.len()) };
        // A row is known by the distinct row before it in its document, its token and its position.
        let mut known: HashMap<(Option<u32>, u32, u32), u32> = HashMap::new();
        for document in batch.starts.windows(2) {
            let mut before = None;
            for row in document[0] as usize..document[1] as usize {
                let next = rows.firsts.len() as u32;
                let found = match batch.targets.get(row).is_none_or(|target| *target == IGNORE) {
                    true => *known.entry((before, batch.tokens[row], batch.positions[row])).or_insert(next),
                    false => next,
                };
                if found == next {
                    rows.firsts.push(row as u32);
                }
                rows.index.push(found);
                before = Some(found);
            }
        }
        (16 * rows.firsts.len() <= 15 * rows.index.len()).then_some(rows)
    }

    /// Selects the values of the distinct rows.
    pub(super) fn select(&self, values: &[u32]) -> Vec<u32> {
        self.firsts.iter().map(|row| values[*row as usize]).collect()
    }

    /// Number of rows that need not be computed.
    pub(super) fn saved(&self) -> usize {
        self.index.len() - self.firsts.len()
    }

    /// The distinct rows of the same batch `count` times, one after another; the copies share nothing.
    pub(super) fn repeated(&self, count: usize) -> Self {
        let copies = |from: &[u32], step: usize| {
            (0..count).flat_map(|copy| from.iter().map(move |x| x + (copy * step) as u32)).collect()
        };
        Self { firsts: copies(&self.firsts, self.index.len()), index: copies(&self.index, self.firsts.len()) }
    }
}

impl<B: Backend> Deduplicated<'_, B> {
    /// All rows [tokens, width] from the distinct ones.
    pub(super) fn expand<'a>(&self, decoder: &'a Decoder<B>, x: In<'_, B>) -> Result<Floats<'a, B>> {
        let width = x.len() / self.distinct.firsts.len();
        let mut y = decoder.floats(self.distinct.index.len() * width)?;
        GatherRows { from: x, rows: self.index.view(), to: y.view_mut(), width }.run(&decoder.backend)?;
        Ok(y)
    }

    /// All rows \[tokens, width\]: each distinct row at its first occurrence, zeros elsewhere.
    pub(super) fn spread<'a>(&self, decoder: &'a Decoder<B>, x: In<'_, B>) -> Result<Floats<'a, B>> {
        let width = x.len() / self.distinct.firsts.len();
        let mut y = decoder.floats(self.distinct.index.len() * width)?;
        decoder.backend.clear(y.view_mut())?;
        ScatterRows { from: x, rows: self.firsts.view(), to: y.view_mut(), width }.run(&decoder.backend)?;
        Ok(y)
    }

    /// The distinct rows, each the sum of its occurrences in all rows \[tokens, width\]: the gradient of
    /// [`Deduplicated::expand`].
    pub(super) fn sum<'a>(&self, decoder: &'a Decoder<B>, x: In<'_, B>) -> Result<Floats<'a, B>> {
        let width = x.len() / self.distinct.index.len();
        let mut y = decoder.floats(self.distinct.firsts.len() * width)?;
        decoder.backend.clear(y.view_mut())?;
        AddRows { from: x, rows: self.index.view(), to: y.view_mut(), width }.run(&decoder.backend)?;
        Ok(y)
    }

    /// The distinct rows from all of them.
    pub(super) fn compact<'a>(&self, decoder: &'a Decoder<B>, x: In<'_, B>) -> Result<Floats<'a, B>> {
        let width = x.len() / self.distinct.index.len();
        let mut y = decoder.floats(self.distinct.firsts.len() * width)?;
        GatherRows { from: x, rows: self.firsts.view(), to: y.view_mut(), width }.run(&decoder.backend)?;
        Ok(y)
    }
}

impl<B: Backend> Decoder<B> {
    pub(super) fn deduplicated(&self, distinct: DistinctRows) -> Result<Deduplicated<'_, B>> {
        let (firsts, index) = (self.indices(&distinct.firsts)?, self.indices(&distinct.index)?);
        Ok(Deduplicated { distinct, firsts, index })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_prefixes_are_shared_and_equal_endings_are_not() {
        let batch = Batch::from_prompts([&[1, 2, 3, 9][..], &[1, 2, 4, 9], &[2, 2, 3, 9], &[1, 2, 3]]);
        let rows = DistinctRows::of(&batch).unwrap();
        assert_eq!(rows.firsts, [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]);
        assert_eq!(rows.index, [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 0, 1, 2]);
        let twice = rows.repeated(2);
        assert_eq!(twice.firsts[10..12], [15, 16]);
        assert_eq!(twice.index[15..20], [10, 11, 12, 13, 10]);
    }

    #[test]
    fn rows_with_a_target_are_their_own() {
        let mut batch = Batch::from_prompts([&[1, 2, 3, 9][..], &[1, 2, 3, 9]]);
        batch.targets = [IGNORE, IGNORE, 9, IGNORE].repeat(2);
        let rows = DistinctRows::of(&batch).unwrap();
        assert_eq!(rows.firsts, [0, 1, 2, 3, 6, 7]);
        assert_eq!(rows.index, [0, 1, 2, 3, 0, 1, 4, 5]);
    }

    #[test]
    fn few_shared_rows_are_not_worth_it() {
        assert_eq!(DistinctRows::of(&Batch::from_prompts([&[1, 2, 3][..], &[4, 2, 3]])), None);
    }
}
