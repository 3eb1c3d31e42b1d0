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
    let bare = |setting: &&Setting<'_>| setting.is(&Base::Swat) && setting.spec.options.mixes.is_empty();
    if let Some(swat) = settings.iter().find(bare) {
        paragraphs.extend(with_safety_data(settings, swat));
    }
    paragraphs.push(seeds(settings));
    paragraphs.retain(|paragraph| !paragraph.is_empty());
    paragraphs.join("\n\n")
}

fn names(runs: &[&Setting<'_>]) -> String {
    runs.iter().map(|setting| setting.name.as_str()).collect::<Vec<_>>().join("; ")
}

/// SWAT against the fairest plain run on the same data; empty without one.
fn against_plain(settings: &[Setting<'_>], swat: &Setting<'_>) -> String {
    let find =
        |base: Base| settings.iter().find(|other| other.spec.base == base && other.spec.has_options_of(swat.spec));
    let Some(plain) = find(Base::PlainEqual).or_else(|| find(Base::Plain)) else { return String::new() };
    let mut sentences = vec![compare(swat, plain)];
    if swat.rate(ASR).zip(plain.rate(ASR)).is_some_and(|(a, b)| a.value > b.value - ROUNDING) {
        sentences.push(format!("By attack success, {} is no better than {}.", swat.name, plain.name));
    }
    if swat.steps() != plain.steps() {
        let longer = if swat.steps() > plain.steps() { swat } else { plain };
        sentences.push(format!("The two differ in length: {} takes more steps.", longer.name));
    }
    sentences.retain(|sentence| !sentence.is_empty());
    sentences.join(" ")
}

/// Compares two settings, a sentence a measure; empty where they have none in common.
fn compare(a: &Setting<'_>, b: &Setting<'_>) -> String {
    let intervals = if a.several { "ranges over training seeds" } else { "intervals" };
    let sentence = |(what, of): &(&str, RateOf)| {
        let (x, y) = a.rate(*of).zip(b.rate(*of))?;
        if (x.value - y.value).abs() < ROUNDING {
            return Some(format!("{what} is the same."));
        }
        let points = format::fixed((x.value - y.value).abs() * 100.0, 1);
        let side = if x.value < y.value { "lower" } else { "higher" };
        let ends = |m: Measure| m.interval.unwrap_or((m.value, m.value));
        let ((low, high), (from, to)) = (ends(x), ends(y));
        let overlap = if low <= to && from <= high { "overlap" } else { "do not overlap" };
        Some(format!("{what} is {points} points {side}; the {intervals} {overlap}."))
    };
    let sentences: Vec<String> = MEASURES.iter().filter_map(sentence).collect();
    if sentences.is_empty() { String::new() } else { format!("{} against {}: {}", a.name, b.name, sentences.join(" ")) }
}

/// Which of other settings SWAT is below in attack success.
fn beside(what: &str, runs: &[&Setting<'_>], swat: &Setting<'_>) -> String {
    let Some(own) = swat.rate(ASR).filter(|_| !runs.is_empty()) else { return String::new() };
    let at_most = |setting: &&&Setting<'_>| setting.rate(ASR).is_some_and(|rate| rate.value < own.value + ROUNDING);
    let better: Vec<&Setting<'_>> = runs.iter().filter(at_most).copied().collect();
    let (name, lower, all) = (&swat.name, runs.len() - better.len(), runs.len());
    let found = match (lower, all) {
        (0, 1) => format!("no better than {}", names(runs)),
        (0, _) => "no better than any of them".into(),
        (1, 1) => format!("lower than {}", names(runs)),
        _ if lower == all => "lower than all of them".into(),
        _ => format!("lower than {lower} of these {all}, and no better than: {}", names(&better)),
    };
    format!("{what}, by attack success: {name} is {found}.")
}

/// Plain tuning and others with refusals or replay mixed in, against SWAT without.
fn with_safety_data(settings: &[Setting<'_>], swat: &Setting<'_>) -> Vec<String> {
    let safe = |recipe: &Recipe| recipe.options.mixes.iter().any(|mix| mix.what != Mix::Attack);
    let mixed = settings.iter().filter(|setting| safe(setting.spec) && setting.spec.base != Base::Swat);
    mixed.map(|run| compare(run, swat)).collect()
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
