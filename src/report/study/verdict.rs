//! What a reader looks for first: the verdict, and the front of safety against usefulness.

use super::setting::{ASR, Setting, TASK, seeds_text, training_seeds};
use crate::report::chart::{Dot, DotGroup, Measure, Scatter};
use crate::report::check::add_gates;
use crate::report::page::{Highlight, Section};
use crate::report::palette::Tone;
use crate::report::table::{Entry, Table};
use crate::secure::study::{Claim, Conclusion, Distance, Distances, Holds, is_plain};
use crate::secure::{Base, Gate};

/// Name of the recommended setting's group in the drawings.
const RECOMMENDED: &str = "recommended";

/// The recommended setting, if there is one.
pub(super) fn recommended<'s, 'a>(settings: &'s [Setting<'a>], conclusion: &Conclusion) -> Option<&'s Setting<'a>> {
    settings.iter().find(|setting| Some(&setting.spec.text) == conclusion.recommended.as_ref())
}

/// Whether a study can come to a verdict at all: it compares something with the original model.
pub(super) fn has_verdict(settings: &[Setting<'_>]) -> bool {
    settings.iter().any(|setting| setting.spec.is_given()) && settings.iter().any(|setting| !setting.spec.is_given())
}

/// The verdict as a tile.
pub(super) fn tile(settings: &[Setting<'_>], conclusion: &Conclusion) -> Highlight {
    let (value, tone) = match (conclusion.recommended.is_some(), conclusion.verdict.held) {
        (false, _) => ("no recipe holds", Tone::Vermilion),
        (true, true) => ("held", Tone::Green),
        (true, false) => ("not held", Tone::Vermilion),
    };
    let detail = recommended(settings, conclusion).map_or_else(String::new, |setting| setting.name.clone());
    Highlight { label: "Verdict".into(), value: value.into(), detail, tone }
}

/// The section of the verdict: the recommended setting and its gates.
pub(super) fn section(settings: &[Setting<'_>], conclusion: &Conclusion) -> Section {
    let name = recommended(settings, conclusion).map(|setting| setting.name.as_str());
    let held = if conclusion.verdict.held { "held" } else { "not held" };
    let text = match name {
        Some(name) => format!("Recommended: {name}, {}. Against the original model: {held}.", conclusion.reason),
        None => format!("No recipe is recommended: {}.", conclusion.reason),
    };
    let tables = if conclusion.verdict.gates.is_empty() { Vec::new() } else { vec![gates(conclusion)] };
    Section { heading: "Verdict".into(), text, tables, ..Section::default() }
}

fn gates(conclusion: &Conclusion) -> Table {
    let mut table = Table::new("Gates of the recommended recipe, in points")
        .column("Gate")
        .numbers("Change", "against the original model")
        .numbers("Limit", "")
        .column("Verdict");
    add_gates(&mut table, &conclusion.verdict);
    table.note =
        "In brackets: 95 % intervals of the change over the same prompts. A gate fails where its whole interval lies \
                  above the limit."
            .into();
    table
}

/// What the study shows of each recipe: at equal task score, at equal held-out loss where there is one, and for equally many
/// trained tokens of the task. None without recipes beside plain tuning.
pub(super) fn claims(settings: &[Setting<'_>], claims: &[Claim]) -> Vec<Table> {
    let at = |title: &str, note: &str, of: &dyn Fn(&Claim) -> Option<Distances>| -> Option<Table> {
        let found: Vec<(&str, Distances)> =
            claims.iter().filter_map(|claim| Some((claim.name.as_str(), of(claim)?))).collect();
        (!found.is_empty()).then(|| claims_table(settings, &found, title, note))
    };
    let note = "Distance to the front of plain tuning (its runs over rates and steps, and the original model) at the \
                recipe's own task score, paired by training seed; in brackets 95 % intervals over seeds. Not established: \
                the interval includes 0. Not tested: one training seed, or no front.";
    let tables = [
        at("Claim: safer than plain tuning at the same task score", note, &|claim| Some(claim.score)),
        at(
            "Claim: safer than plain tuning at the same held-out loss",
            "The same at the recipe's own loss on the held-out conversations of the task.",
            &|claim| claim.at_loss,
        ),
        at(
            "Claim: safer than plain tuning for the same trained tokens of the task",
            "The same for as many trained tokens of the task's own data; what a recipe mixes in does not count.",
            &|claim| claim.at_tokens,
        ),
    ];
    tables.into_iter().flatten().collect()
}

fn claims_table(settings: &[Setting<'_>], claims: &[(&str, Distances)], title: &str, note: &str) -> Table {
    let mut table = Table::new(title)
        .column("Recipe")
        .numbers("ASR", "points from the front; below 0 is safer")
        .numbers("Over-refusal", "points from the front")
        .numbers("1 − J", "points from the front")
        .numbers("1 − AUROC", "points from the front")
        .numbers("− log-odds", "nats from the front, refusal")
        .column("By ASR")
        .column("By J");
    let distance = |distance: Option<Distance>| match distance {
        Some(Distance { value, interval }) => {
            let detail = interval.map(|(low, high)| format!("({low:.1} to {high:.1})")).unwrap_or_default();
            Entry { detail, ..Entry::fixed(value, 1) }
        }
        None => Entry::missing(),
    };
    let verdict = |holds: Holds| match holds {
        Holds::Holds => "holds",
        Holds::DoesNotHold => "does not hold",
        Holds::NotEstablished => "not established",
        Holds::NotTested => "not tested",
    };
    for (text, found) in claims {
        let name = settings.iter().find(|setting| setting.spec.text == *text).map_or("", |s| s.name.as_str());
        table.row([
            Entry::text(name),
            distance(found.asr),
            distance(found.over_refusal),
            distance(found.j),
            distance(found.auroc),
            distance(found.refusal),
            Entry::text(verdict(found.holds)),
            Entry::text(verdict(found.holds_by_j)),
        ]);
    }
    table.note = note.into();
    table
}

/// Attack success and refusal log-odds against the task score and the held-out loss; without those that lack points.
pub(super) fn fronts(settings: &[Setting<'_>], conclusion: &Conclusion) -> Vec<(&'static str, Scatter, &'static str)> {
    let refusal = |setting: &Setting<'_>| {
        let own = setting.value(|run| run.drift.as_ref()?.splits.get(&crate::data::Split::Test)?.tuned.refusal);
        // The original model's is the same in every comparison with it.
        let base = || {
            let drifts = settings.iter().flat_map(|other| &other.runs).filter_map(|run| run.drift.as_ref());
            drifts.filter_map(|drift| drift.splits.get(&crate::data::Split::Test)?.base.refusal).next()
        };
        if setting.spec.is_given() { base().map(Measure::new) } else { own }
    };
    let asr = |setting: &Setting<'_>| setting.rate(ASR).map(|asr| asr.scaled(100.0));
    let score = |setting: &Setting<'_>| Some(100.0 * setting.rate(TASK)?.value);
    let loss = |setting: &Setting<'_>| Some(setting.value(|run| Some(run.evaluation.perplexity?.nll))?.value);
    let score: (&str, Of<'_, f64>) = ("task score, %", &score);
    let loss: (&str, Of<'_, f64>) = ("held-out loss, nats a token", &loss);
    let asr: (&str, f64, Of<'_, Measure>) = ("ASR, %", 100.0, &asr);
    let refusal: (&str, f64, Of<'_, Measure>) = ("refusal log-odds, harmful minus benign", 0.0, &refusal);
    let chart = |title: &str, x: (&str, Of<'_, f64>), y: (&str, f64, Of<'_, Measure>)| Scatter {
        title: title.into(),
        x_label: x.0.into(),
        y_label: y.0.into(),
        groups: groups(settings, conclusion, x.1, y.2),
        y_at_least: y.1,
        note: seeds_text(&training_seeds(settings)),
    };
    let all = [
        (
            "front",
            chart("Attack success against the task score", score, asr),
            "Best is the lower right corner: few harmful prompts answered, many tasks solved.",
        ),
        (
            "front-refusal",
            chart("Refusal log-odds against the task score", score, refusal),
            "Difference of the mean log-odds of a refusal as first token. Models differ in its scale: read it beside the AUROC.",
        ),
        (
            "front-loss",
            chart("Attack success against the held-out loss", loss, asr),
            "Best is the lower left corner: few harmful prompts answered, a low loss on held-out conversations of the task.",
        ),
        (
            "front-refusal-loss",
            chart("Refusal log-odds against the held-out loss", loss, refusal),
            "Best is the upper left corner.",
        ),
    ];
    let drawn = |scatter: &Scatter| scatter.groups.iter().map(|group| group.dots.len()).sum::<usize>() > 1;
    all.into_iter().filter(|(_, scatter, _)| drawn(scatter)).collect()
}

/// A coordinate of a setting.
type Of<'f, T> = &'f dyn Fn(&Setting<'_>) -> Option<T>;

/// Settings by kind, the recommended one apart.
fn groups(settings: &[Setting<'_>], conclusion: &Conclusion, x: Of<'_, f64>, y: Of<'_, Measure>) -> Vec<DotGroup> {
    let mut groups: Vec<DotGroup> = Vec::new();
    for setting in settings {
        let Some((x, y)) = x(setting).zip(y(setting)) else { continue };
        let (name, tone) = match &setting.spec.base {
            _ if Some(&setting.spec.text) == conclusion.recommended.as_ref() => (RECOMMENDED, Tone::Green),
            Base::Given => ("original", Tone::Grey),
            // At every rate and length: the front.
            _ if is_plain(setting.spec) => ("plain", Tone::Vermilion),
            _ if !setting.spec.is_bare() => ("other recipes", Tone::Sky),
            Base::Swat => ("SWAT", Tone::Blue),
            _ => ("controls", Tone::Pink),
        };
        let dot = Dot { name: setting.name.clone(), x, y };
        match groups.iter_mut().find(|group| group.name == name) {
            Some(group) => group.dots.push(dot),
            None => groups.push(DotGroup { name: name.into(), tone, dots: vec![dot] }),
        }
    }
    groups
}

/// `plain + 20 % replay: held`, for a terminal.
pub(super) fn line(settings: &[Setting<'_>], conclusion: &Conclusion) -> String {
    match recommended(settings, conclusion) {
        Some(setting) => {
            let held = if conclusion.verdict.held { "held" } else { "not held" };
            let gates: Vec<String> = conclusion.verdict.gates.iter().map(Gate::text).collect();
            format!("Recommended: {}. Verdict: {held} ({}).", setting.name, gates.join("; "))
        }
        None => format!("No recipe is recommended: {}.", conclusion.reason),
    }
}
