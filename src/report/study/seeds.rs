//! Values over the training seeds of a setting.

use super::names::Named;
use crate::report::swat::Measure;
use crate::secure::study::{RunOutcome, TunedOutcome};
use crate::secure::{Evaluation, Rate};
use std::collections::{BTreeMap, BTreeSet};

impl<'a> Named<'a> {
    /// Its tuning runs, one a training seed.
    pub fn tuned(&self) -> impl Iterator<Item = &'a TunedOutcome> {
        self.runs.iter().filter_map(|run| run.tuned.as_ref())
    }

    /// Its training seeds.
    pub fn seeds(&self) -> Vec<u64> {
        self.tuned().map(|tuned| tuned.seed).collect()
    }

    /// Optimiser steps of a run, the same with each training seed.
    pub fn steps(&self) -> u64 {
        self.tuned().next().map_or(0, |tuned| tuned.phases.iter().map(|phase| phase.steps).sum())
    }

    /// A value over the training seeds; none where a run lacks it.
    pub fn value(&self, of: impl Fn(&RunOutcome) -> Option<f64>) -> Option<Measure> {
        let values: Option<Vec<f64>> = self.runs.iter().map(|run| of(run)).collect();
        over_seeds(&values?)
    }

    /// A rate over the training seeds, with its own interval in a study of one seed; none where a run lacks it, and of
    /// nothing.
    pub fn rate(&self, of: impl Fn(&Evaluation) -> Option<Rate>) -> Option<Measure> {
        let rate = |run: &RunOutcome| of(&run.evaluation).filter(|rate| rate.total > 0);
        match self.runs.as_slice() {
            [run] if !self.several => {
                rate(run).map(|rate| Measure { value: rate.value, interval: Some((rate.low, rate.high)) })
            }
            _ => self.value(|run| rate(run).map(|rate| rate.value)),
        }
    }
}

/// Whether a study has several training seeds.
pub(super) fn several(named: &[Named<'_>]) -> bool {
    named.iter().any(|n| n.several)
}

/// The training seeds of a study.
pub(super) fn training(named: &[Named<'_>]) -> Vec<u64> {
    let all: BTreeSet<u64> = named.iter().flat_map(Named::seeds).collect();
    all.into_iter().collect()
}

/// The mean of one value a training seed; where there are several, lowest and highest as its interval.
pub(super) fn over_seeds(values: &[f64]) -> Option<Measure> {
    let (low, high) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let interval = (values.len() > 1 && mean.is_finite()).then_some((low, high));
    (!values.is_empty()).then_some(Measure { value: mean, interval })
}

/// Series by their keys: the values of each key that all of them hold.
pub(super) fn by_key<K: Ord, V>(series: impl IntoIterator<Item = Vec<(K, V)>>) -> BTreeMap<K, Vec<V>> {
    let mut all: BTreeMap<K, Vec<V>> = BTreeMap::new();
    let mut count = 0;
    for one in series {
        one.into_iter().for_each(|(key, value)| all.entry(key).or_default().push(value));
        count += 1;
    }
    all.retain(|_, values| values.len() == count);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_values_have_a_mean_and_a_range_and_one_has_none() {
        assert_eq!(over_seeds(&[]), None);
        assert_eq!(over_seeds(&[0.5]), Some(Measure { value: 0.5, interval: None }));
        assert_eq!(over_seeds(&[0.5, 0.25, 0.75]), Some(Measure { value: 0.5, interval: Some((0.25, 0.75)) }));
        let odd = over_seeds(&[0.5, f64::NAN]).unwrap();
        assert!(odd.value.is_nan() && odd.interval.is_none());
    }

    #[test]
    fn series_meet_where_all_have_a_value() {
        let met = by_key([vec![(0, 1.0), (2, 2.0), (4, 3.0)], vec![(0, 5.0), (4, 7.0), (6, 8.0)]]);
        assert_eq!(met.into_iter().collect::<Vec<_>>(), [(0, vec![1.0, 5.0]), (4, vec![3.0, 7.0])]);
    }
}
