//! Training examples with others that are mixed in.

use super::Example;
use super::example::DataSize;
use crate::error::{Error, Result};
use crate::rng::Philox;
use std::ops::Range;

/// Stream of the first round over a pool; each round has its own.
const ROUND_STREAMS: u64 = 1 << 62;

/// Whether examples that are mixed in change from epoch to epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redraw {
    /// Every epoch has the same: data of their own that another party brought.
    Never,
    /// Every epoch goes on in the file where the one before it ended: as many different examples as there are.
    EveryEpoch,
}

/// Training examples: some that every epoch has, and pools of which each epoch has a part.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixture<T = Example> {
    examples: Vec<T>,
    pools: Vec<Pool>,
}

/// Examples that are mixed in.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Pool {
    /// Their indices.
    pub examples: Range<usize>,
    /// How many an epoch has, at least 1; may be more than there are.
    pub per_epoch: usize,
    /// Seed of their order.
    pub seed: u64,
}

impl<T> From<Vec<T>> for Mixture<T> {
    fn from(examples: Vec<T>) -> Self {
        Self { examples, pools: Vec::new() }
    }
}

impl<T> Mixture<T> {
    /// Mixes in examples of `extra`, so that they make up `share` (0 to 0.99) of an epoch, rounded to whole examples. They are
    /// drawn without replacement, and again from the first when all have come.
    ///
    /// ```
    /// use swat::data::{Mixture, Redraw};
    ///
    /// let mut mixture = Mixture::from((0..85).collect::<Vec<u32>>());
    /// mixture.mix_in((100..200).collect(), 0.15, Redraw::EveryEpoch, 0)?;
    /// // An epoch has the 85 and 15 of the hundred; others of them in the next one.
    /// assert_eq!((mixture.per_epoch(), mixture.examples().len()), (100, 185));
    /// # Ok::<(), swat::error::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Input`] for a share out of range, or an empty `extra` with a share above 0.
    pub fn mix_in(&mut self, extra: Vec<T>, share: f64, redraw: Redraw, seed: u64) -> Result<()> {
        if !(0.0..=0.99).contains(&share) {
            return Err(Error::input("share of mixed-in examples", share.to_string(), "0 to 0.99"));
        }
        let per_epoch = (share / (1.0 - share) * self.per_epoch() as f64).round() as usize;
        if per_epoch == 0 {
            return Ok(());
        }
        if extra.is_empty() {
            return Err(Error::input("examples to mix in", "none", format!("{per_epoch}, for a share of {share}")));
        }
        let mut taken = vec![redraw == Redraw::EveryEpoch; extra.len()];
        drawn(extra.len(), per_epoch, 0, seed).into_iter().for_each(|member| taken[member] = true);
        let start = self.examples.len();
        self.examples.extend(extra.into_iter().zip(taken).filter_map(|(example, taken)| taken.then_some(example)));
        self.pools.push(Pool { examples: start..self.examples.len(), per_epoch, seed });
        Ok(())
    }

    /// Keeps the examples that `keep` is true for. An epoch has as many of a pool as are left of those that the first had, and
    /// one at least of a pool of which anything is left.
    pub fn retain(&mut self, keep: impl Fn(&T) -> bool) {
        let kept: Vec<bool> = self.examples.iter().map(keep).collect();
        let count = |range: Range<usize>| kept.iter().take(range.end).skip(range.start).filter(|kept| **kept).count();
        for pool in &mut self.pools {
            let Range { start, end } = pool.examples;
            let first = drawn(end - start, pool.per_epoch, 0, pool.seed);
            let left = first.into_iter().filter(|member| kept.get(start + member) == Some(&true)).count();
            pool.per_epoch = left.max(count(start..end).min(1));
            pool.examples = count(0..start)..count(0..end);
        }
        self.pools.retain(|pool| pool.per_epoch > 0);
        let mut kept = kept.into_iter();
        self.examples.retain(|_| kept.next().unwrap_or(true));
    }

    /// All examples: those of every epoch, then those of each pool.
    pub fn examples(&self) -> &[T] {
        &self.examples
    }

    /// The pools, in the order in which they were mixed in.
    pub fn pools(&self) -> &[Pool] {
        &self.pools
    }

    /// Examples that every epoch has.
    pub fn base(&self) -> usize {
        self.pools.first().map_or(self.examples.len(), |pool| pool.examples.start)
    }

    /// Examples of an epoch.
    pub fn per_epoch(&self) -> usize {
        self.base() + self.pools.iter().map(|pool| pool.per_epoch).sum::<usize>()
    }

    /// Examples and pools.
    pub(super) fn into_parts(self) -> (Vec<T>, Vec<Pool>) {
        (self.examples, self.pools)
    }
}

impl Mixture {
    /// Size of an epoch; of a pool its part of the whole.
    pub fn size(&self) -> DataSize {
        let (base, _) = self.examples.split_at(self.base());
        let mut size = DataSize::of(base);
        for pool in &self.pools {
            let whole = DataSize::of(self.examples.get(pool.examples.clone()).unwrap_or_default());
            let part =
                |count: usize| (count as f64 * pool.per_epoch as f64 / whole.examples.max(1) as f64).round() as usize;
            size.examples += pool.per_epoch;
            size.tokens += part(whole.tokens);
            size.trained_tokens += part(whole.trained_tokens);
        }
        size.trained_share = size.trained_tokens as f64 / (size.tokens as f64).max(1.0);
        size
    }
}

/// The members of a pool that an epoch has, as indices below `members`: of the endless sequence of shuffled rounds over all of
/// them, that from `epoch · per_epoch` on.
pub(super) fn drawn(members: usize, per_epoch: usize, epoch: u64, seed: u64) -> Vec<usize> {
    let mut drawn = Vec::with_capacity(per_epoch);
    let Some(start) = (epoch as u128 * per_epoch as u128).checked_div(members as u128) else { return drawn };
    let mut skip = (epoch as u128 * per_epoch as u128 % members as u128) as usize;
    let mut round = start as u64;
    while drawn.len() < per_epoch {
        let mut order: Vec<usize> = (0..members).collect();
        Philox::new(seed, ROUND_STREAMS.wrapping_add(round)).shuffle(&mut order);
        drawn.extend(order.into_iter().skip(skip).take(per_epoch - drawn.len()));
        (skip, round) = (0, round.wrapping_add(1));
    }
    drawn
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_go_through_a_pool_before_any_of_it_comes_again() {
        // Ten members, four an epoch: two and a half epochs are one round.
        let drawn: Vec<usize> = (0..5).flat_map(|epoch| drawn(10, 4, epoch, 3)).collect();
        for round in drawn.chunks(10) {
            let mut round = round.to_vec();
            round.sort_unstable();
            assert_eq!(round, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(drawn[..10], drawn[10..], "each round has an order of its own");
    }

    #[test]
    fn a_pool_smaller_than_its_part_of_an_epoch_comes_again() {
        let mut twice = drawn(3, 6, 7, 1);
        twice.sort_unstable();
        assert_eq!(twice, [0, 0, 1, 1, 2, 2]);
        assert_eq!(drawn(0, 5, 1, 3), [0; 0]);
    }

    #[test]
    fn what_is_left_out_is_left_out_of_base_and_pools() {
        let mut mixture = Mixture::from((0..6).collect::<Vec<u32>>());
        mixture.mix_in((10..20).collect(), 0.4, Redraw::Never, 3).unwrap();
        mixture.mix_in(vec![30], 0.2, Redraw::Never, 3).unwrap();
        mixture.mix_in((40..43).collect(), 0.5, Redraw::Never, 4).unwrap();
        // 4 of the first; one that comes 3 times, as 2.5 are rounded; 13 of three, each 4 times and one once more.
        assert_eq!(mixture.pools().iter().map(|pool| pool.per_epoch).collect::<Vec<_>>(), [4, 3, 13]);
        let first = mixture.examples()[6];
        mixture.retain(|example| ![1, 2, first, 30, 41].contains(example));
        let pools: Vec<_> = mixture.pools().iter().map(|pool| pool.examples.clone()).collect();
        assert_eq!((mixture.base(), pools), (4, vec![4..7, 7..9]));
        assert_eq!(mixture.pools()[0].per_epoch, 3);
        assert!((8..=9).contains(&mixture.pools()[1].per_epoch));
        assert_eq!((&mixture.examples()[..4], &mixture.examples()[7..]), (&[0, 3, 4, 5][..], &[40, 42][..]));
        mixture.retain(|_| false);
        assert_eq!((mixture.examples().len(), mixture.pools().len(), mixture.per_epoch()), (0, 0, 0));
    }

    #[test]
    fn shares_are_of_an_epoch() {
        let extra: Vec<u32> = (100..150).collect();
        let mut mixture = Mixture::from((0..70).collect::<Vec<u32>>());
        mixture.mix_in(extra.clone(), 0.1 / 0.8, Redraw::Never, 3).unwrap();
        mixture.mix_in(extra.clone(), 0.2, Redraw::EveryEpoch, 4).unwrap();
        // 70 task examples are 0.7 of 100: 10 and 20 come to them.
        let pools: Vec<_> = mixture.pools().iter().map(|pool| (pool.examples.clone(), pool.per_epoch)).collect();
        assert_eq!(pools, [(70..80, 10), (80..130, 20)], "ten that stay, and all fifty to draw from");
        assert_eq!((mixture.base(), mixture.per_epoch(), mixture.examples().len()), (70, 100, 130));
        for (extra, share) in [(&extra[..], 1.0), (&extra, -0.1), (&extra, f64::NAN), (&[], 0.5)] {
            mixture.mix_in(extra.to_vec(), share, Redraw::Never, 7).unwrap_err();
        }
        let before = mixture.clone();
        mixture.mix_in(Vec::new(), 0.0, Redraw::Never, 7).unwrap();
        assert_eq!(mixture, before);
    }
}
