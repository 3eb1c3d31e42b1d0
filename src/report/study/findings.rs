//! What the numbers say, in sentences that say no more than they do.

use super::names::Named;
use super::steps;
use crate::report::format;
use crate::secure::run::SettingOutcome;
use crate::secure::{Evaluation, Rate};
use std::collections::BTreeSet;

type Of = fn(&Evaluation) -> Option<Rate>;

/// What is compared, most important first.
const MEASURES: [(&str, Of); 4] = [
    ("Attack success", |e| e.asr),
    ("Strict attack success", |e| e.strict_asr),
    ("Over-refusal", |e| e.over_refusal),
    ("The task score", |e| e.task.as_ref().map(|task| task.overall)),
];
const ASR: Of = MEASURES[0].1;

/// Paragraphs parted by blank lines; empty where nothing was measured.
pub(super) fn findings(named: &[Named<'_>]) -> String {
    let mut paragraphs = Vec::new();
    for swat in named.iter().filter(|n| n.base == "swat") {
        paragraphs.push(against_plain(named, swat));
        let alike = |n: &&Named<'_>| n.mix == swat.mix && value(n, ASR).is_some();
        let sets: Vec<&Named<'_>> = named.iter().filter(alike).filter(|n| n.base.starts_with("warmup:")).collect();
        paragraphs.push(beside("Warm-ups on other sets", &sets, swat));
        let variant = |n: &&Named<'_>| matches!(n.base, "reversed" | "mods-only") || n.base.starts_with("ml-lr:");
        let variants: Vec<&Named<'_>> = named.iter().filter(alike).filter(variant).collect();
        paragraphs.push(beside("Variants of the schedule", &variants, swat));
    }
    match named.iter().find(|n| n.base == "swat" && n.mix.is_empty()) {
        Some(swat) => paragraphs.extend(with_refusals(named, swat)),
        None if paragraphs.is_empty() => paragraphs.push(rates(&named.iter().collect::<Vec<_>>())),
        None => {}
    }
    paragraphs.push(seeds(named));
    paragraphs.retain(|paragraph| !paragraph.is_empty());
    paragraphs.join("\n\n")
}

fn value(named: &Named<'_>, of: Of) -> Option<Rate> {
    of(&named.outcome.evaluation).filter(|rate| rate.total > 0)
}

/// `53.8 % [48.1–59.4]`
fn text(rate: Rate) -> String {
    let end = |share: f64| format::fixed(share * 100.0, 1);
    format!("{} [{}–{}]", format::percent(rate.value, 1), end(rate.low), end(rate.high))
}

fn list(runs: &[&Named<'_>]) -> String {
    let item = |n: &&Named<'_>| Some(format!("{} {}", n.setting.name, text(value(n, ASR)?)));
    runs.iter().filter_map(item).collect::<Vec<_>>().join("; ")
}

fn names(runs: &[&Named<'_>]) -> String {
    runs.iter().map(|n| n.setting.name.as_str()).collect::<Vec<_>>().join("; ")
}

fn rates(runs: &[&Named<'_>]) -> String {
    let list = list(runs);
    if list.is_empty() { list } else { format!("Attack success with 95 % intervals: {list}.") }
}

/// The model as given, plain tuning and SWAT on the same data, and SWAT against the fairest plain run.
fn against_plain(named: &[Named<'_>], swat: &Named<'_>) -> String {
    let find = |base: &str, mix: &str| named.iter().find(|n| n.base == base && n.mix == mix);
    let (plain, equal) = (find("plain", swat.mix), find("plain-equal", swat.mix));
    let shown: Vec<&Named<'_>> = [find("given", ""), plain, equal, Some(swat)].into_iter().flatten().collect();
    let mut sentences = vec![rates(&shown)];
    if let Some(reference) = equal.or(plain) {
        sentences.extend(MEASURES.iter().filter_map(|(what, of)| compare(what, *of, swat, reference)));
        if value(swat, ASR).zip(value(reference, ASR)).is_some_and(|(a, b)| a.value >= b.value) {
            let (swat, reference) = (&swat.setting.name, &reference.setting.name);
            sentences.push(format!("By attack success {swat} is not better than {reference} here."));
        }
        let length = |n: &Named<'_>| n.outcome.tuned.as_ref().map_or(0, steps);
        if length(swat) != length(reference) {
            sentences.push(format!(
                "The two differ in length: {} steps of {}, {} of {}.",
                format::count(length(swat)),
                swat.setting.name,
                format::count(length(reference)),
                reference.setting.name
            ));
        }
    }
    sentences.retain(|sentence| !sentence.is_empty());
    sentences.join(" ")
}

/// One measure of `a` against that of `b`; none where one of them lacks it.
fn compare(what: &str, of: Of, a: &Named<'_>, b: &Named<'_>) -> Option<String> {
    let (x, y) = (value(a, of)?, value(b, of)?);
    let (own, other) = (&a.setting.name, &b.setting.name);
    if x == y {
        return Some(format!("{what} of {own} is the same as that of {other}: {}.", text(x)));
    }
    let points = format::fixed((x.value - y.value).abs() * 100.0, 1);
    let side = if x.value < y.value { "lower" } else { "higher" };
    let overlap = if x.low <= y.high && y.low <= x.high { "overlap" } else { "do not overlap" };
    Some(format!(
        "{what} of {own} is {points} points {side} than that of {other}: {} against {}; the intervals {overlap}.",
        text(x),
        text(y)
    ))
}

/// Attack success of other runs, and which of them SWAT undercuts.
fn beside(what: &str, runs: &[&Named<'_>], swat: &Named<'_>) -> String {
    if runs.is_empty() {
        return String::new();
    }
    let mut sentences = vec![format!("{what}, attack success: {}.", list(runs))];
    if let Some(own) = value(swat, ASR) {
        let at_most = |n: &&&Named<'_>| value(n, ASR).is_some_and(|rate| rate.value <= own.value);
        let better: Vec<&Named<'_>> = runs.iter().filter(at_most).copied().collect();
        let (name, lower, all) = (&swat.setting.name, runs.len() - better.len(), runs.len());
        sentences.push(format!("That of {name} is lower than {lower} of these {all}."));
        if !better.is_empty() {
            sentences.push(format!("{name} is not better here than: {}.", names(&better)));
        }
    }
    sentences.join(" ")
}

/// Plain tuning and others with refusals mixed in, against SWAT without.
fn with_refusals(named: &[Named<'_>], swat: &Named<'_>) -> Vec<String> {
    let mixed = named.iter().filter(|n| n.mix == "+refusals" && n.base != "swat");
    let sentences =
        |run: &Named<'_>| MEASURES.iter().filter_map(|(what, of)| compare(what, *of, run, swat)).collect::<Vec<_>>();
    mixed.map(|run| sentences(run).join(" ")).collect()
}

fn seeds(named: &[Named<'_>]) -> String {
    let all: BTreeSet<u64> = named.iter().map(|n| n.outcome).flat_map(training_seed).collect();
    if all.is_empty() {
        return String::new();
    }
    let plural = if all.len() == 1 { "seed" } else { "seeds" };
    let list = all.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    format!(
        "Each setting was trained once ({plural} {list}). The intervals cover the choice of prompts, not that of the training \
         seed: how much another seed would change was not measured here."
    )
}

fn training_seed(setting: &SettingOutcome) -> Option<u64> {
    setting.tuned.as_ref().map(|tuned| tuned.seed)
}
