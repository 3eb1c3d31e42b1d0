//! What the numbers say, in sentences that say no more than they do.

use super::names::Named;
use super::seeds::{several, training};
use crate::report::format;
use crate::report::swat::Measure;
use crate::secure::{Evaluation, Rate};

type Of = fn(&Evaluation) -> Option<Rate>;

/// What is compared, most important first.
const MEASURES: [(&str, Of); 4] = [
    ("Attack success", |e| e.asr),
    ("Strict attack success", |e| e.strict_asr),
    ("Over-refusal", |e| e.over_refusal),
    ("The task score", |e| e.task.as_ref().map(|task| task.overall)),
];
const ASR: Of = MEASURES[0].1;
/// Means of other values may be equal up to this.
const ROUNDING: f64 = 1e-9;

/// Paragraphs parted by blank lines; empty where nothing was measured.
pub(super) fn findings(named: &[Named<'_>]) -> String {
    let mut paragraphs = Vec::new();
    for swat in named.iter().filter(|n| n.base == "swat") {
        paragraphs.push(against_plain(named, swat));
        let alike = |n: &&Named<'_>| n.mix == swat.mix && n.rate(ASR).is_some();
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

/// `53.8 % [48.1–59.4]`
fn text(Measure { value, interval }: Measure) -> String {
    let end = |share: f64| format::fixed(share * 100.0, 1);
    let interval = interval.map(|(low, high)| format!(" [{}–{}]", end(low), end(high)));
    format::percent(value, 1) + &interval.unwrap_or_default()
}

fn list(runs: &[&Named<'_>]) -> String {
    let item = |n: &&Named<'_>| Some(format!("{} {}", n.setting.name, text(n.rate(ASR)?)));
    runs.iter().filter_map(item).collect::<Vec<_>>().join("; ")
}

fn names(runs: &[&Named<'_>]) -> String {
    runs.iter().map(|n| n.setting.name.as_str()).collect::<Vec<_>>().join("; ")
}

fn rates(runs: &[&Named<'_>]) -> String {
    let list = list(runs);
    let several = runs.iter().any(|n| n.several);
    let what = if several { ", mean and range over training seeds" } else { " with 95 % intervals" };
    if list.is_empty() { list } else { format!("Attack success{what}: {list}.") }
}

/// The model as given, plain tuning and SWAT on the same data, and SWAT against the fairest plain run.
fn against_plain(named: &[Named<'_>], swat: &Named<'_>) -> String {
    let find = |base: &str, mix: &str| named.iter().find(|n| n.base == base && n.mix == mix);
    let (plain, equal) = (find("plain", swat.mix), find("plain-equal", swat.mix));
    let shown: Vec<&Named<'_>> = [find("given", ""), plain, equal, Some(swat)].into_iter().flatten().collect();
    let mut sentences = vec![rates(&shown)];
    if let Some(reference) = equal.or(plain) {
        sentences.extend(MEASURES.iter().filter_map(|(what, of)| compare(what, *of, swat, reference)));
        if swat.rate(ASR).zip(reference.rate(ASR)).is_some_and(|(a, b)| a.value > b.value - ROUNDING) {
            let (swat, reference) = (&swat.setting.name, &reference.setting.name);
            sentences.push(format!("By attack success {swat} is not better than {reference} here."));
        }
        if swat.steps() != reference.steps() {
            sentences.push(format!(
                "The two differ in length: {} steps of {}, {} of {}.",
                format::count(swat.steps()),
                swat.setting.name,
                format::count(reference.steps()),
                reference.setting.name
            ));
        }
    }
    sentences.retain(|sentence| !sentence.is_empty());
    sentences.join(" ")
}

/// One measure of `a` against that of `b`; none where one of them lacks it.
fn compare(what: &str, of: Of, a: &Named<'_>, b: &Named<'_>) -> Option<String> {
    let (x, y) = (a.rate(of)?, b.rate(of)?);
    let (own, other) = (&a.setting.name, &b.setting.name);
    if x == y {
        return Some(format!("{what} of {own} is the same as that of {other}: {}.", text(x)));
    }
    let points = format::fixed((x.value - y.value).abs() * 100.0, 1);
    let side = if x.value < y.value { "lower" } else { "higher" };
    let equal = (x.value - y.value).abs() < ROUNDING;
    let side = if equal { "as high as".into() } else { format!("{points} points {side} than") };
    let ends = |m: Measure| m.interval.unwrap_or((m.value, m.value));
    let ((low, high), (from, to)) = (ends(x), ends(y));
    let overlap = if low <= to && from <= high { "overlap" } else { "do not overlap" };
    let intervals = if a.several { "ranges over training seeds" } else { "intervals" };
    Some(format!(
        "{what} of {own} is {side} that of {other}: {} against {}; the {intervals} {overlap}.",
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
    if let Some(own) = swat.rate(ASR) {
        let at_most = |n: &&&Named<'_>| n.rate(ASR).is_some_and(|rate| rate.value < own.value + ROUNDING);
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
    let all = training(named);
    if all.is_empty() {
        return String::new();
    }
    let list = all.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    if several(named) {
        let count = all.len();
        let chance = ranges_apart(count).map(|one_in| {
            format!(
                " The ranges of two settings that do not differ would be apart in about one comparison of {one_in} by \
                 chance, and several are made here."
            )
        });
        return format!(
            "Each setting was trained with {count} seeds ({list}). Values are means over them, and ranges go from the \
             lowest to the highest; they do not cover the choice of prompts.{}",
            chance.unwrap_or_default()
        );
    }
    let plural = if all.len() == 1 { "seed" } else { "seeds" };
    format!(
        "Each setting was trained once ({plural} {list}). The intervals cover the choice of prompts, not that of the training \
         seed: how much another seed would change was not measured here."
    )
}

/// Of how many pairs of ranges of `n` draws each, all from one distribution without ties, one is apart: half of (2n over n).
/// None where that is so many that it goes without saying.
fn ranges_apart(n: usize) -> Option<u64> {
    let n = u64::try_from(n).ok().filter(|n| *n <= 10)?;
    Some((1..=n).fold(1, |ways, k| ways * (n + k) / k) / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_are_apart_by_chance() {
        assert_eq!([2, 3, 5, 11].map(ranges_apart), [Some(3), Some(10), Some(126), None]);
    }
}
