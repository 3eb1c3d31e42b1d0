//! Findings: sentences that claim no more than the numbers show.

use super::setting::{ASR, OVER_REFUSAL, RateOf, STRICT_ASR, Setting, TASK, several, training_seeds};
use crate::report::chart::Measure;
use crate::report::format;
use crate::secure::{Base, Mix, Recipe};

/// Compared measures, most important first.
const MEASURES: [(&str, RateOf); 4] = [
    ("Attack success", ASR),
    ("Strict attack success", STRICT_ASR),
    ("Over-refusal", OVER_REFUSAL),
    ("The task score", TASK),
];
/// Means closer than this count as equal: they differ by rounding alone.
const ROUNDING: f64 = 1e-9;

/// Paragraphs separated by blank lines; empty where nothing was measured.
pub(super) fn findings(settings: &[Setting<'_>]) -> String {
    let mut paragraphs = Vec::new();
    for swat in settings.iter().filter(|setting| setting.spec.base == Base::Swat) {
        paragraphs.push(against_plain(settings, swat));
        let alike = |setting: &&Setting<'_>| setting.spec.has_options_of(swat.spec) && setting.rate(ASR).is_some();
        let sets: Vec<&Setting<'_>> =
            settings.iter().filter(alike).filter(|setting| matches!(setting.spec.base, Base::Warmup(_))).collect();
        paragraphs.push(beside("Warm-ups on other sets", &sets, swat));
        let variant =
            |setting: &&Setting<'_>| matches!(setting.spec.base, Base::Reversed | Base::ModsOnly | Base::MlLr(_));
        let variants: Vec<&Setting<'_>> = settings.iter().filter(alike).filter(variant).collect();
        paragraphs.push(beside("Variants of the schedule", &variants, swat));
    }
    match settings.iter().find(|setting| setting.is(&Base::Swat) && setting.spec.options.mixes.is_empty()) {
        Some(swat) => paragraphs.extend(with_safety_data(settings, swat)),
        None if paragraphs.is_empty() => paragraphs.push(rates(&settings.iter().collect::<Vec<_>>())),
        None => {}
    }
    paragraphs.push(seeds(settings));
    paragraphs.retain(|paragraph| !paragraph.is_empty());
    paragraphs.join("\n\n")
}

/// `53.8 % [48.1–59.4]`
fn text(Measure { value, interval }: Measure) -> String {
    let end = |share: f64| format::fixed(share * 100.0, 1);
    let interval = interval.map(|(low, high)| format!(" [{}–{}]", end(low), end(high)));
    format::percent(value, 1) + &interval.unwrap_or_default()
}

fn list(runs: &[&Setting<'_>]) -> String {
    let item = |setting: &&Setting<'_>| Some(format!("{} {}", setting.name, text(setting.rate(ASR)?)));
    runs.iter().filter_map(item).collect::<Vec<_>>().join("; ")
}

fn names(runs: &[&Setting<'_>]) -> String {
    runs.iter().map(|setting| setting.name.as_str()).collect::<Vec<_>>().join("; ")
}

fn rates(runs: &[&Setting<'_>]) -> String {
    let list = list(runs);
    let several = runs.iter().any(|setting| setting.several);
    let what = if several { ", mean and range over training seeds" } else { " with 95 % intervals" };
    if list.is_empty() { list } else { format!("Attack success{what}: {list}.") }
}

/// Original model, plain tuning and SWAT on the same data, and SWAT against the fairest plain run.
fn against_plain(settings: &[Setting<'_>], swat: &Setting<'_>) -> String {
    let find =
        |base: Base| settings.iter().find(|other| other.spec.base == base && other.spec.has_options_of(swat.spec));
    let (plain, equal) = (find(Base::Plain), find(Base::PlainEqual));
    let given = settings.iter().find(|setting| setting.spec.is_given());
    let shown: Vec<&Setting<'_>> = [given, plain, equal, Some(swat)].into_iter().flatten().collect();
    let mut sentences = vec![rates(&shown)];
    if let Some(reference) = equal.or(plain) {
        sentences.extend(MEASURES.iter().filter_map(|(what, of)| compare(what, *of, swat, reference)));
        if swat.rate(ASR).zip(reference.rate(ASR)).is_some_and(|(a, b)| a.value > b.value - ROUNDING) {
            let (swat, reference) = (&swat.name, &reference.name);
            sentences.push(format!("By attack success, {swat} is no better than {reference}."));
        }
        if swat.steps() != reference.steps() {
            sentences.push(format!(
                "The two differ in length: {} steps for {}, {} for {}.",
                format::count(swat.steps()),
                swat.name,
                format::count(reference.steps()),
                reference.name
            ));
        }
    }
    sentences.retain(|sentence| !sentence.is_empty());
    sentences.join(" ")
}

/// Compares a measure of two settings; `None` where one of them lacks it.
fn compare(what: &str, of: RateOf, a: &Setting<'_>, b: &Setting<'_>) -> Option<String> {
    let (x, y) = (a.rate(of)?, b.rate(of)?);
    let (own, other) = (&a.name, &b.name);
    if x == y {
        return Some(format!("{what} is the same with {own} and {other}: {}.", text(x)));
    }
    let points = format::fixed((x.value - y.value).abs() * 100.0, 1);
    let side = if x.value < y.value { "lower" } else { "higher" };
    let equal = (x.value - y.value).abs() < ROUNDING;
    let side = if equal { "the same as".into() } else { format!("{points} points {side} than") };
    let ends = |m: Measure| m.interval.unwrap_or((m.value, m.value));
    let ((low, high), (from, to)) = (ends(x), ends(y));
    let overlap = if low <= to && from <= high { "overlap" } else { "do not overlap" };
    let intervals = if a.several { "ranges over training seeds" } else { "intervals" };
    Some(format!(
        "{what} with {own} is {side} with {other}: {} against {}; the {intervals} {overlap}.",
        text(x),
        text(y)
    ))
}

/// Attack success of other settings, and how many of them are above SWAT.
fn beside(what: &str, runs: &[&Setting<'_>], swat: &Setting<'_>) -> String {
    if runs.is_empty() {
        return String::new();
    }
    let mut sentences = vec![format!("{what}, attack success: {}.", list(runs))];
    if let Some(own) = swat.rate(ASR) {
        let at_most = |setting: &&&Setting<'_>| setting.rate(ASR).is_some_and(|rate| rate.value < own.value + ROUNDING);
        let better: Vec<&Setting<'_>> = runs.iter().filter(at_most).copied().collect();
        let (name, lower, all) = (&swat.name, runs.len() - better.len(), runs.len());
        sentences.push(match (lower, all) {
            (0, 1) => format!("{name} is no better."),
            (0, _) => format!("{name} is no better than any of them."),
            (1, 1) => format!("{name} is lower."),
            _ if lower == all => format!("{name} is lower than all of them."),
            _ => format!("{name} is lower than {lower} of these {all}. It is no better than: {}.", names(&better)),
        });
    }
    sentences.join(" ")
}

/// Plain tuning and others with refusals or replay mixed in, against SWAT without.
fn with_safety_data(settings: &[Setting<'_>], swat: &Setting<'_>) -> Vec<String> {
    let safe = |recipe: &Recipe| recipe.options.mixes.iter().any(|mix| mix.what != Mix::Attack);
    let mixed = settings.iter().filter(|setting| safe(setting.spec) && setting.spec.base != Base::Swat);
    let sentences =
        |run: &Setting<'_>| MEASURES.iter().filter_map(|(what, of)| compare(what, *of, run, swat)).collect::<Vec<_>>();
    mixed.map(|run| sentences(run).join(" ")).collect()
}

fn seeds(settings: &[Setting<'_>]) -> String {
    let all = training_seeds(settings);
    if all.is_empty() {
        return String::new();
    }
    let list = all.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    if several(settings) {
        let count = all.len();
        let chance = ranges_apart(count).map(|one_in| {
            format!(
                " By chance, the ranges of two equivalent settings are disjoint in about one comparison of {one_in}, and \
                 several are made here."
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
        "Each setting was trained once ({plural} {list}). The intervals cover the choice of prompts; variation between \
         training seeds was not measured."
    )
}

/// Reciprocal probability that the ranges of two samples of `n` draws from one continuous distribution are disjoint:
/// half of the binomial coefficient (2n over n). `None` above 10 draws, where it is negligible.
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
