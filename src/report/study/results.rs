//! Tiles, table and charts of the evaluations.

use super::setting::{
    ASR, OVER_REFUSAL, RateOf, STRICT_ASR, Setting, TASK, entry, join, percent_entry, seeds_list, seeds_text, several,
    training_seeds,
};
use super::verdict::recommended;
use crate::report::chart::{BarChart, BarPanel, BarSeries, Dot, DotGroup, Scatter};
use crate::report::format;
use crate::report::page::Highlight;
use crate::report::palette::Tone;
use crate::report::table::{Entry, Table};
use crate::secure::study::{Conclusion, RunConfig};
use crate::secure::{Base, SetSpec};

/// Tiles: attack success of the original model, plain tuning, SWAT and the recommended setting.
pub(super) fn highlights(settings: &[Setting<'_>], conclusion: &Conclusion) -> Vec<Highlight> {
    let shown = [Base::Given, Base::Plain, Base::PlainEqual, Base::Swat];
    let shown = shown.iter().filter_map(|base| settings.iter().find(|s| s.is(base)));
    let mut shown: Vec<&Setting<'_>> = shown.collect();
    let recommended = recommended(settings, conclusion);
    shown.extend(recommended.filter(|own| shown.iter().all(|setting| setting.spec.text != own.spec.text)));
    let tile = |s: &Setting<'_>| {
        let asr = s.rate(ASR)?.scaled(100.0);
        let what = if s.seeds().len() > 1 { "seeds" } else { "interval" };
        let interval =
            asr.interval.map(|(low, high)| format!("\n{what} {}–{}", format::fixed(low, 1), format::fixed(high, 1)));
        let task = s.rate(TASK).map(|task| format!("\ntask score {}", format::percent(task.value, 1)));
        Some(Highlight {
            label: s.name.clone(),
            value: format!("{} %", format::fixed(asr.value, 1)),
            detail: ["attack success", &interval.unwrap_or_default(), &task.unwrap_or_default()].concat(),
            tone: s.tone,
        })
    };
    shown.into_iter().filter_map(tile).collect()
}

/// One row per setting; the note explains the intervals.
pub(super) fn results_table(settings: &[Setting<'_>], conclusion: &Conclusion, config: &RunConfig) -> Table {
    let mut table = Table::new("All settings")
        .column("Setting")
        .numbers("ASR %", "lower is safer")
        .numbers("Strict ASR %", "lower is safer")
        .numbers("Over-refusal %", "lower is better")
        .numbers("J", "higher is better")
        .numbers("AUROC", "higher is better")
        .numbers("Task %", "higher is better")
        .numbers("Perplexity", "lower is better")
        .numbers("Steps", "all phases")
        .numbers("Set %", "of projections")
        .column("Seeds");
    for (i, s) in settings.iter().enumerate() {
        let rate = |of: RateOf| percent_entry(s.rate(of));
        table.row([
            Entry::text(&s.name),
            rate(ASR),
            rate(STRICT_ASR),
            rate(OVER_REFUSAL),
            entry(s.estimate(|e| e.youden()).map(|j| j.scaled(100.0)), 1),
            entry(s.estimate(|e| e.auroc), 3),
            rate(TASK),
            entry(s.value(|run| run.evaluation.perplexity.map(|p| p.perplexity)), 2),
            steps(s),
            Entry::fixed(s.outcome.share.map(|share| share * 100.0), 1),
            Entry::text(seeds_list(&s.seeds())),
        ]);
        if conclusion.recommended.as_ref().map_or(s.is(&Base::Swat), |name| *name == s.spec.text) {
            table.emphasized.push(i);
        }
    }
    table.note = intervals(settings, config);
    table
}

/// Note on the intervals and the numbers of prompts, which are the same for all settings.
fn intervals(settings: &[Setting<'_>], config: &RunConfig) -> String {
    let asked = |(of, what): (RateOf, &str)| {
        let mut rates = settings.iter().flat_map(|s| &s.runs).filter_map(|run| of(&run.evaluation));
        let total = rates.next().map(|rate| rate.total as u64).filter(|n| *n > 0);
        total.map(|n| format!("{} {what}", format::count(n)))
    };
    let asked = [(ASR, "harmful prompts"), (OVER_REFUSAL, "benign prompts"), (TASK, "tasks")].map(asked);
    let asked = asked.into_iter().flatten().collect::<Vec<_>>().join(", ");
    if asked.is_empty() {
        return asked;
    }
    let brackets = if several(settings) {
        let untrained = settings.iter().any(|s| s.seeds().is_empty());
        let given = if untrained { " The original model has one value." } else { "" };
        format!(
            "Over {asked}. Values are means over the training seeds. In brackets: the lowest and the highest of them; \
             they do not cover the choice of prompts.{given}"
        )
    } else {
        format!(
            "In brackets: 95 % Wilson intervals over {asked}, Newcombe's for J and AUROC; they do not cover the choice of training seed."
        )
    };
    format!(
        "ASR: share of harmful prompts whose answer, of at most {} tokens, holds no refusal expression. J: refused \
         harmful − refused benign, points. AUROC: of the refusal log-odds. Neither depends on the threshold at which a \
         model refuses. {brackets}",
        config.evaluate.answer_tokens
    )
}

/// Steps of a setting, and how many of them were skipped.
fn steps(setting: &Setting<'_>) -> Entry {
    let entry = Entry::count(setting.steps());
    match setting.skipped() {
        0 => entry,
        skipped => Entry { detail: format!("({} skipped)", format::count(skipped)), ..entry },
    }
}

/// Attack success, strict attack success and task score of each setting.
pub(super) fn results_chart(settings: &[Setting<'_>]) -> BarChart {
    let percent = |of: RateOf| settings.iter().map(|s| Some(s.rate(of)?.scaled(100.0))).collect::<Vec<_>>();
    let series =
        [("ASR", Tone::Vermilion, ASR), ("strict ASR", Tone::Amber, STRICT_ASR), ("task score", Tone::Blue, TASK)]
            .map(|(name, tone, of)| BarSeries { name: name.into(), tone, bars: percent(of) });
    let series = series.into_iter().filter(|series| series.bars.iter().any(Option::is_some)).collect();
    BarChart {
        title: "Attack success and task score".into(),
        value_label: "%".into(),
        categories: settings.iter().map(|s| s.name.clone()).collect(),
        panels: vec![BarPanel { heading: String::new(), series }],
        at_least: 100.0,
        note: join(&["intervals as in the table", &seeds_text(&training_seeds(settings))]),
        ..BarChart::default()
    }
}

/// Scatter plot of joint drop against attack success after tuning, over warm-up sets that differ in nothing else: the
/// schedule of `swat` and one list of options, the first that occurs. `None` without such settings.
pub(super) fn sets_chart(settings: &[Setting<'_>]) -> Option<Scatter> {
    let warmups = || settings.iter().filter(|s| matches!(s.spec.base, Base::Swat | Base::Warmup(_)));
    let first = warmups().next()?.spec;
    let mut sets: Vec<&Setting<'_>> = Vec::new();
    let mut groups: Vec<DotGroup> = Vec::new();
    for s in warmups().filter(|s| s.spec.has_options_of(first)) {
        let Some((x, asr)) = s.outcome.joint.zip(s.rate(ASR)) else { continue };
        let name = match &s.spec.base {
            Base::Warmup(SetSpec::Random(_) | SetSpec::RandomWithoutLayer0(_)) => "random sets",
            Base::Warmup(SetSpec::Complement) => "complement",
            Base::Warmup(_) => "other",
            _ => "Mods_Rob",
        };
        let dot = Dot { name: s.name.clone(), x, y: asr.scaled(100.0) };
        match groups.iter_mut().find(|group| group.name == name) {
            Some(group) => group.dots.push(dot),
            None => groups.push(DotGroup { name: name.into(), tone: s.tone, dots: vec![dot] }),
        }
        sets.push(s);
    }
    (!sets.is_empty()).then(|| Scatter {
        title: "Joint noise score and attack success".into(),
        x_label: "joint drop in score under noise".into(),
        y_label: "ASR after tuning, %".into(),
        groups,
        y_at_least: 100.0,
        note: seeds_text(&training_seeds(sets)),
    })
}
