//! Documents that begin alike: what they share is computed once.
//!
//! A token's activations depend on the tokens up to it alone, so rows of a packed batch with equal tokens up to and
//! including their own are equal in every layer. Prompts of one chat template share its system prompt at least.
//! Folded, a batch keeps one row of each; only attention, which needs whole documents, gets all rows back.

use super::pool::{Floats, Scratch};
use super::{Batch, Decoder};
use crate::backend::{Backend, GatherRows, In, Operator};
use crate::error::Result;
use std::collections::HashMap;

/// Which rows of a batch are distinct.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fold {
    /// For each distinct row, the first row that it stands for; ascending.
    pub(super) firsts: Vec<u32>,
    /// For each row, its place among the distinct ones.
    pub(super) places: Vec<u32>,
}

/// A [`Fold`] on the backend.
pub(super) struct Folded<'p, B: Backend> {
    pub(super) fold: Fold,
    firsts: Scratch<'p, B, u32>,
    places: Scratch<'p, B, u32>,
}

impl Fold {
    /// `None` where less than one row in sixteen would be saved.
    pub(super) fn of(batch: &Batch) -> Option<Self> {
        let mut fold = Self { firsts: Vec::new(), places: Vec::with_capacity(batch.tokens.len()) };
        // A row is known by the distinct row before it in its document, its token and its position.
        let mut known: HashMap<(Option<u32>, u32, u32), u32> = HashMap::new();
        for document in batch.starts.windows(2) {
            let mut before = None;
            for row in document[0] as usize..document[1] as usize {
                let next = fold.firsts.len() as u32;
                let place = *known.entry((before, batch.tokens[row], batch.positions[row])).or_insert(next);
                if place == next {
                    fold.firsts.push(row as u32);
                }
                fold.places.push(place);
                before = Some(place);
            }
        }
        (16 * fold.firsts.len() <= 15 * fold.places.len()).then_some(fold)
    }

    /// The distinct ones of values of all rows.
    pub(super) fn choose(&self, values: &[u32]) -> Vec<u32> {
        self.firsts.iter().map(|row| values[*row as usize]).collect()
    }

    /// The fold of the same batch `count` times, one after another; the copies share nothing.
    pub(super) fn repeated(&self, count: usize) -> Self {
        let copies = |from: &[u32], step: usize| {
            (0..count).flat_map(|copy| from.iter().map(move |x| x + (copy * step) as u32)).collect()
        };
        Self { firsts: copies(&self.firsts, self.places.len()), places: copies(&self.places, self.firsts.len()) }
    }
}

impl<B: Backend> Folded<'_, B> {
    /// All rows [tokens, width] of distinct ones.
    pub(super) fn unfold<'a>(&self, decoder: &'a Decoder<B>, x: In<'_, B>) -> Result<Floats<'a, B>> {
        let width = x.len() / self.fold.firsts.len();
        let mut y = decoder.floats(self.fold.places.len() * width)?;
        GatherRows { from: x, rows: self.places.view(), to: y.view_mut(), width }.run(&decoder.backend)?;
        Ok(y)
    }

    /// The distinct ones of all rows.
    pub(super) fn fold<'a>(&self, decoder: &'a Decoder<B>, x: In<'_, B>) -> Result<Floats<'a, B>> {
        let width = x.len() / self.fold.places.len();
        let mut y = decoder.floats(self.fold.firsts.len() * width)?;
        GatherRows { from: x, rows: self.firsts.view(), to: y.view_mut(), width }.run(&decoder.backend)?;
        Ok(y)
    }
}

impl<B: Backend> Decoder<B> {
    pub(super) fn folded(&self, fold: Fold) -> Result<Folded<'_, B>> {
        let (firsts, places) = (self.indices(&fold.firsts)?, self.indices(&fold.places)?);
        Ok(Folded { fold, firsts, places })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_beginnings_fold_and_equal_endings_do_not() {
        let batch = Batch::from_prompts([&[1, 2, 3, 9][..], &[1, 2, 4, 9], &[2, 2, 3, 9], &[1, 2, 3]]);
        let fold = Fold::of(&batch).unwrap();
        assert_eq!(fold.firsts, [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]);
        assert_eq!(fold.places, [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 8, 9, 0, 1, 2]);
        let twice = fold.repeated(2);
        assert_eq!(twice.firsts[10..12], [15, 16]);
        assert_eq!(twice.places[15..20], [10, 11, 12, 13, 10]);
    }

    #[test]
    fn what_is_not_worth_it_stays_as_it_is() {
        assert_eq!(Fold::of(&Batch::from_prompts([&[1, 2, 3][..], &[4, 2, 3]])), None);
    }
}
