//! A setting of a study: its name and colour, and values over its training seeds.

use crate::report::chart::Measure;
use crate::report::format;
use crate::report::palette::Tone;
use crate::report::table::Entry;
use crate::secure::study::{Outcome, RunConfig, RunOutcome, SettingOutcome, TunedOutcome};
use crate::secure::{Base, Estimate, Evaluation, Mix, Rate, Recipe, SetSpec};
use std::collections::{BTreeMap, BTreeSet};

/// A rate of an evaluation.
pub(super) type RateOf = fn(&Evaluation) -> Option<Rate>;
pub(super) const ASR: RateOf = |e| e.asr;
pub(super) const STRICT_ASR: RateOf = |e| e.strict_asr;
pub(super) const OVER_REFUSAL: RateOf = |e| e.over_refusal;
pub(super) const TASK: RateOf = |e| e.task.as_ref().map(|task| task.overall);

/// A setting's outcome with its display name and colour.
#[derive(Clone)]
pub(super) struct Setting<'a> {
    pub spec: &'a Recipe,
    /// `plain, equal steps + 10 % refusals`
    pub name: String,
    pub tone: Tone,
    pub outcome: &'a SettingOutcome,
    /// One per training seed; a single one for the original model.
    pub runs: Vec<&'a RunOutcome>,
    /// Whether intervals are ranges over training seeds, else Wilson intervals over prompts.
    pub several: bool,
}

impl<'a> Setting<'a> {
    /// The settings of a study.
    pub fn all(outcome: &'a Outcome, config: &RunConfig) -> Vec<Self> {
        let several = outcome.settings.iter().any(|s| !s.more_seeds.is_empty());
        let setting = |outcome: &'a SettingOutcome| {
            let (name, tone) = label(&outcome.setting, config.evaluate.mix_share);
            Self { spec: &outcome.setting, name, tone, outcome, runs: outcome.runs().collect(), several }
        };
        outcome.settings.iter().map(setting).collect()
    }

    /// Every training run as a setting of its own, with intervals over prompts.
    pub fn each_run(&self) -> impl Iterator<Item = Self> {
        let tuned = self.runs.iter().filter(|run| run.tuned.is_some());
        tuned.map(|run| Self { runs: vec![*run], several: false, ..self.clone() })
    }

    /// Whether it has this base and no options of its own, whatever the task's data.
    pub fn is(&self, base: &Base) -> bool {
        self.spec.base == *base && self.spec.is_bare()
    }

    pub fn tuned(&self) -> impl Iterator<Item = &'a TunedOutcome> {
        self.runs.iter().filter_map(|run| run.tuned.as_ref())
    }

    /// Its training seeds.
    pub fn seeds(&self) -> Vec<u64> {
        self.tuned().map(|tuned| tuned.seed).collect()
    }

    /// Skipped steps of all runs and phases.
    pub(super) fn skipped(&self) -> u64 {
        let phases = self.tuned().flat_map(|tuned| &tuned.phases);
        phases.map(|phase| phase.skipped_non_finite + phase.skipped_empty).sum()
    }

    /// Optimiser steps of a run, the same with each training seed.
    pub fn steps(&self) -> u64 {
        self.tuned().next().map_or(0, |tuned| tuned.phases.iter().map(|phase| phase.steps).sum())
    }

    /// Mean and range of a value over the training seeds; `None` where a run lacks it.
    pub fn value(&self, of: impl Fn(&RunOutcome) -> Option<f64>) -> Option<Measure> {
        let values: Option<Vec<f64>> = self.runs.iter().map(|run| of(run)).collect();
        over_seeds(&values?)
    }

    /// A rate over the training seeds, with its Wilson interval in a study of one seed; `None` where a run lacks it or
    /// has no trials.
    pub fn rate(&self, of: RateOf) -> Option<Measure> {
        let rate = |run: &RunOutcome| of(&run.evaluation).filter(|rate| rate.total > 0);
        match self.runs.as_slice() {
            [run] if !self.several => {
                rate(run).map(|rate| Measure { value: rate.value, interval: Some((rate.low, rate.high)) })
            }
            _ => self.value(|run| rate(run).map(|rate| rate.value)),
        }
    }

    /// A measure over the training seeds, with its own interval in a study of one seed; `None` where a run lacks it.
    pub fn estimate(&self, of: impl Fn(&Evaluation) -> Option<Estimate>) -> Option<Measure> {
        match self.runs.as_slice() {
            [run] if !self.several => {
                of(&run.evaluation).map(|found| Measure { value: found.value, interval: Some((found.low, found.high)) })
            }
            _ => self.value(|run| of(&run.evaluation).map(|found| found.value)),
        }
    }
}

/// Display name and colour.
fn label(spec: &Recipe, mix_share: f64) -> (String, Tone) {
    let (name, tone) = match &spec.base {
        Base::Given => ("original".into(), Tone::Grey),
        Base::Plain => ("plain".into(), Tone::Vermilion),
        Base::PlainEqual => ("plain, equal steps".into(), Tone::Amber),
        Base::Swat => ("SWAT".into(), Tone::Blue),
        Base::Reversed => ("SWAT reversed".into(), Tone::Muted),
        Base::ModsOnly => ("Mods_Rob only".into(), Tone::Muted),
        Base::MlLr(beta) => (format!("ML-LR, the rest × {beta}"), Tone::Muted),
        Base::Rates(_) => ("rates by the map".into(), Tone::Muted),
        Base::Warmup(SetSpec::Random(seed)) => (format!("random set {seed}"), Tone::Green),
        Base::Warmup(SetSpec::RandomWithoutLayer0(seed)) => (format!("random set {seed} without layer 0"), Tone::Green),
        Base::Warmup(SetSpec::Complement) => ("complement".into(), Tone::Pink),
        Base::Warmup(SetSpec::Layer0) => ("layer 0".into(), Tone::Muted),
        Base::Warmup(SetSpec::Named(set)) => (format!("warm-up on {set}"), Tone::Muted),
    };
    let options = &spec.options;
    let mixed = |what: Mix| {
        let share = options.share_of(what)?.unwrap_or(mix_share);
        Some(format!("{} % {}", format::significant(100.0 * share, 2), what.name()))
    };
    let number = |name: &str, value: Option<f64>| Some(format!("{name} {}", format::significant(value?, 3)));
    let parts = [
        options.lr.map(|lr| format!("rate {lr:e}")),
        options.steps.map(|steps| format!("{} steps", format::count(steps))),
        options
            .lora
            .map(|lora| format!("LoRA {}{}", lora.rank, if lora.all_linear { " on all projections" } else { "" })),
        number("EMA", options.ema.map(f64::from)),
        mixed(Mix::Attack),
        mixed(Mix::Refusals),
        mixed(Mix::Replay),
        options.screen.then(|| "screened".into()),
        number("constrained", options.constrain.map(f64::from)),
        number("distilled", options.distil.map(f64::from)),
        number("proximal", options.prox.map(f64::from)),
        options.lisa.map(|lisa| format!("turns {lisa}")),
        options.by.map(|by| format!("by {}", by.name())),
        number("Vaccine", options.vaccine.map(f64::from)),
        options.merge.map(|step| format!("merge {step}")),
    ];
    let tone = if spec.is_bare() { tone } else { Tone::Sky };
    let parts = std::iter::once(name).chain(parts.into_iter().flatten());
    (parts.collect::<Vec<_>>().join(" + "), tone)
}

/// Whether the study has several training seeds.
pub(super) fn several(settings: &[Setting<'_>]) -> bool {
    settings.iter().any(|s| s.several)
}

/// `text` where values are means over several training seeds, else nothing.
pub(super) fn if_means(settings: &[Setting<'_>], text: &'static str) -> &'static str {
    if several(settings) { text } else { "" }
}

/// The training seeds of these settings.
pub(super) fn training_seeds<'s>(settings: impl IntoIterator<Item = &'s Setting<'s>>) -> Vec<u64> {
    let all: BTreeSet<u64> = settings.into_iter().flat_map(Setting::seeds).collect();
    all.into_iter().collect()
}

/// `seed 3`, `seeds 1–5`, `seeds 1, 4, 9`; empty for none.
pub(super) fn seeds_text(seeds: &[u64]) -> String {
    match seeds {
        [] => String::new(),
        [seed] => format!("seed {seed}"),
        _ => format!("seeds {}", seeds_list(seeds)),
    }
}

/// `3`, `1–5`, `1, 4, 9`
pub(super) fn seeds_list(seeds: &[u64]) -> String {
    match seeds {
        [first, .., last] if seeds.len() > 2 && seeds.windows(2).all(|p| p[0].checked_add(1) == Some(p[1])) => {
            format!("{first}–{last}")
        }
        _ => seeds.iter().map(u64::to_string).collect::<Vec<_>>().join(", "),
    }
}

/// The mean over training seeds, with the range as its interval where there are several.
pub(super) fn over_seeds(values: &[f64]) -> Option<Measure> {
    let (low, high) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(*v), h.max(*v)));
    let mean = values.iter().sum::<f64>() / values.len() as f64;
    let interval = (values.len() > 1 && mean.is_finite()).then_some((low, high));
    (!values.is_empty()).then_some(Measure { value: mean, interval })
}

/// Values by key, for the keys that all series have.
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

/// A table's entry: the value and, in brackets, its interval.
pub(super) fn entry(measure: Option<Measure>, decimals: usize) -> Entry {
    measure.map_or(Entry::missing(), |measure| Entry::interval(measure.value, measure.interval, decimals))
}

/// A share as an entry in percent.
pub(super) fn percent_entry(share: Option<Measure>) -> Entry {
    entry(share.map(|share| share.scaled(100.0)), 1)
}

/// Joins the parts of a note that are not empty with middle dots.
pub(super) fn join(parts: &[&str]) -> String {
    parts.iter().filter(|p| !p.is_empty()).copied().collect::<Vec<_>>().join(" · ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn several_values_have_a_mean_and_a_range_and_one_has_none() {
        assert_eq!(over_seeds(&[]), None);
        assert_eq!(over_seeds(&[0.5]), Some(Measure::new(0.5)));
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
