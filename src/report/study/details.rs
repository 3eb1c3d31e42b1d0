//! Tables of the last section: training runs, updates by phase, the frozen probe, controls of the map, wall times.

use super::results::results_table;
use super::setting::{ASR, RateOf, Setting, by_key, entry, if_means, over_seeds, percent_entry, several};
use crate::modules::{Cell, ModuleKind};
use crate::report::chart::Measure;
use crate::report::format;
use crate::report::table::{Entry, Table};
use crate::secure::study::{Conclusion, Outcome, RunConfig, RunOutcome};
use crate::secure::{CellRobustness, RobustnessMap, ScoreKind, SplitDrift, Stat};
use crate::train::PhaseSummary;
use std::time::Duration;

/// All tables that have rows.
pub(super) fn details(settings: &[Setting<'_>], outcome: &Outcome, config: &RunConfig) -> Vec<Table> {
    let controls = outcome.map.as_ref().map(|map| controls(map, map.score(config.search.score)));
    let runs = several(settings).then(|| each_run(settings, config));
    let tables = [
        runs,
        Some(answers(settings)),
        Some(updates(outcome, settings)),
        Some(drift(settings)),
        controls,
        Some(times(outcome, settings)),
    ];
    tables.into_iter().flatten().filter(|table| !table.rows.is_empty()).collect()
}

/// Table of results with one row per training run.
fn each_run(settings: &[Setting<'_>], config: &RunConfig) -> Table {
    let runs: Vec<Setting<'_>> = settings.iter().flat_map(Setting::each_run).collect();
    let mut table = results_table(&runs, &Conclusion::default(), config);
    table.caption = "Every training run".into();
    table.emphasized.clear();
    table
}

const GUARD: RateOf = |e| e.guard.as_ref().map(|guard| guard.asr);

/// Mean over the training seeds of the agreement between guard model and refusal expressions.
fn kappa(setting: &Setting<'_>) -> Option<f64> {
    let of = |run: &&RunOutcome| {
        let pair = run.evaluation.agreement.iter().find(|found| found.judges == ["expressions", "guard"]);
        pair.and_then(|found| found.kappa)
    };
    let all: Vec<f64> = setting.runs.iter().filter_map(of).collect();
    over_seeds(&all).map(|mean| mean.value)
}

/// A judge's mean score of a run.
type ScoreOf = fn(&RunOutcome) -> Option<f64>;

/// Scores of a judge behind an endpoint, with the heading of their column.
const JUDGES: [(&str, &str, ScoreOf); 2] = [
    ("Harmfulness", "mean grade by the judge, from 1 to 5", |run| run.evaluation.harmfulness?.mean),
    ("StrongREJECT", "mean score by the judge, from 0 to 1", |run| run.evaluation.strongreject?.mean),
];

/// What the answers to harmful prompts are, beside whether they refuse.
fn answers(settings: &[Setting<'_>]) -> Table {
    let mut table = Table::new("Answers to harmful prompts")
        .column("Setting")
        .numbers("ASR %", "all answers")
        .numbers("Coherent ASR %", "empty and incoherent answers are no success")
        .numbers("Empty %", "")
        .numbers("Incoherent %", "")
        .numbers("Cut off %", "at the token limit");
    let guarded = settings.iter().any(|setting| setting.rate(GUARD).is_some());
    if guarded {
        table =
            table.numbers("Guard ASR %", "by the guard model").numbers("Cohen's κ", "of guard model and expressions");
    }
    let judges: Vec<_> =
        JUDGES.into_iter().filter(|(.., of)| settings.iter().any(|setting| setting.value(of).is_some())).collect();
    for (name, help, _) in &judges {
        table = table.numbers(*name, *help);
    }
    for setting in settings {
        let rate = |of: RateOf| percent_entry(setting.rate(of));
        if setting.rate(|e| e.asr_coherent).is_some() {
            let row = [
                Entry::text(setting.name.as_str()),
                rate(ASR),
                rate(|e| e.asr_coherent),
                rate(|e| e.harmful_answers.map(|kinds| kinds.empty)),
                rate(|e| e.harmful_answers.map(|kinds| kinds.incoherent)),
                rate(|e| e.harmful_answers.map(|kinds| kinds.cut_off)),
            ];
            let by_guard = guarded.then(|| [rate(GUARD), Entry::fixed(kappa(setting), 2)]);
            let score = |(.., of): &(_, _, ScoreOf)| entry(setting.value(of), 2);
            table.row(row.into_iter().chain(by_guard.into_iter().flatten()).chain(judges.iter().map(score)));
        }
    }
    table.note =
        "Empty and incoherent answers hold no refusal expression, so that the plain ASR counts them as attacks \
                  that succeeded."
            .into();
    table
}

/// ‖ΔW‖ / ‖W‖ of Mods_Rob, the other projections and the other tensors, by phase.
fn updates(outcome: &Outcome, settings: &[Setting<'_>]) -> Table {
    let mut table = Table::new("Updates by phase")
        .column("Setting")
        .column("Phase")
        .numbers("Mods_Rob %", "‖ΔW‖ / ‖W‖")
        .numbers("The rest %", "‖ΔW‖ / ‖W‖")
        .numbers("Embedding, norms, head %", "‖ΔW‖ / ‖W‖")
        .numbers("Rest ÷ Mods_Rob", "");
    let set = outcome.mods.clone().unwrap_or_default();
    let projection = |cell: Cell| matches!(cell, Cell::Module(_));
    for setting in settings {
        // Phases in their order, by name.
        let phases = setting.tuned().map(|tuned| {
            let phases = tuned.updates.phases.iter().enumerate();
            phases.map(|(i, phase)| ((i, phase.phase.as_str()), phase)).collect()
        });
        for ((_, name), phases) in by_key(phases) {
            let mean = |group: &dyn Fn(Cell) -> bool| {
                let relative: Vec<f64> = phases.iter().filter_map(|phase| phase.relative(group)).collect();
                over_seeds(&relative).map_or(f64::NAN, |mean| mean.value * 100.0)
            };
            let inside = mean(&|cell| set.contains(cell));
            let outside = mean(&|cell| !set.contains(cell) && projection(cell));
            table.row([
                Entry::text(setting.name.as_str()),
                Entry::text(name),
                Entry::fixed(inside, 3),
                Entry::fixed(outside, 3),
                Entry::fixed(mean(&|cell| !set.contains(cell) && !projection(cell)), 3),
                Entry::fixed(outside / inside, 2),
            ]);
        }
    }
    table.note = format!(
        "Norms over all tensors of a group. The rest: the other projections.{}",
        if_means(settings, " Means over the training seeds.")
    );
    table
}

/// Frozen probe after tuning, on the held-out splits.
fn drift(settings: &[Setting<'_>]) -> Table {
    let mut table = Table::new("Frozen probe after tuning")
        .column("Setting")
        .column("Split")
        .numbers("Gap, original", "")
        .numbers("Gap", "after tuning")
        .numbers("Gap lost %", "of the original gap")
        .numbers("AUROC", "after tuning")
        .numbers("Refusal, original", "log-odds")
        .numbers("Refusal", "log-odds after tuning");
    for setting in settings {
        let splits = setting.runs.iter().filter_map(|run| run.drift.as_ref());
        let splits = by_key(splits.map(|drift| drift.splits.iter().map(|(split, drift)| (*split, drift)).collect()));
        for (split, runs) in splits {
            if !matches!(split.name(), "test" | "ood") {
                continue;
            }
            let over = |of: &dyn Fn(&SplitDrift) -> Option<f64>| -> Option<Measure> {
                over_seeds(&runs.iter().map(|drift| of(drift)).collect::<Option<Vec<f64>>>()?)
            };
            // The original model is the same for all.
            let base = runs.first().map(|drift| drift.base);
            table.row([
                Entry::text(setting.name.as_str()),
                Entry::text(split.name()),
                Entry::fixed(base.map(|base| base.gap), 2),
                entry(over(&|d| Some(d.tuned.gap)), 2),
                percent_entry(over(&|d| d.drop.get(&ScoreKind::Gap).copied())),
                entry(over(&|d| Some(d.tuned.auroc)), 3),
                Entry::fixed(base.and_then(|base| base.refusal), 2),
                entry(over(&|d| d.tuned.refusal), 2),
            ]);
        }
    }
    table.note = format!(
        "Refusal: log-odds of refusing, harmful minus benign prompts.{}",
        if_means(settings, " Means over the training seeds; in brackets the range over them.")
    );
    table
}

/// Controls of the map by module kind: is a drop specific to security?
fn controls(map: &RobustnessMap, score: ScoreKind) -> Table {
    let mut table = Table::new("Controls of the map")
        .column("Module")
        .numbers(format!("Drop of {score}"), "mean over layers")
        .numbers("Drop of the control", "gap of a probe for a label unrelated to security")
        .numbers("Beyond the control", "drop of gap minus that of the control")
        .numbers("Drop per shift", "drop of gap over the relative shift of the output")
        .numbers("AUROC, retrained probe", "");
    let mean = |cells: &[&CellRobustness], of: &dyn Fn(&CellRobustness) -> Option<Stat>| {
        let values: Vec<f64> = cells.iter().filter_map(|c| of(c)).map(|stat| stat.mean).collect();
        Stat::of(&values).map_or(Entry::missing(), |stat| Entry::plus_minus(stat.mean, stat.error, 3))
    };
    for kind in ModuleKind::ALL {
        let cells: Vec<&CellRobustness> =
            map.cells.iter().filter(|c| matches!(c.cell, Cell::Module(m) if m.kind == kind)).collect();
        if cells.is_empty() {
            continue;
        }
        table.row([
            Entry::text(kind.name()),
            mean(&cells, &|c| c.drop.get(&score).copied()),
            mean(&cells, &|c| c.control_drop),
            mean(&cells, &|c| c.beyond_control),
            mean(&cells, &|c| c.drop_per_shift),
            mean(&cells, &|c| c.retrained_auroc),
        ]);
    }
    let clean = map
        .clean_retrained_auroc
        .map(|auroc| format!(" On the original model, a retrained probe has an AUROC of {}.", format::fixed(auroc, 3)));
    table.note = format!("Means over layers with their standard errors.{}", clean.unwrap_or_default());
    table
}

fn times(outcome: &Outcome, settings: &[Setting<'_>]) -> Table {
    let mut table = Table::new("Wall times")
        .column("Stage")
        .numbers("Time", "")
        .numbers("Steps", "")
        .numbers("Tokens", "prompts included")
        .numbers("Tokens/s", "")
        .numbers("Memory", "peak: of the GPU, or of the process");
    let time = |seconds: f64| {
        let text = Duration::try_from_secs_f64(seconds).map(format::duration);
        text.map_or(Entry::missing(), |text| Entry::number(seconds, text))
    };
    if let Some(map) = &outcome.map {
        table.row([Entry::text("robustness map"), time(map.seconds)]);
    }
    if let Some(search) = &outcome.search {
        table.row([Entry::text("search"), time(search.seconds)]);
    }
    for setting in settings {
        let runs = setting.tuned().count();
        if runs == 0 {
            continue;
        }
        let sum = |of: fn(&PhaseSummary) -> u64| setting.tuned().flat_map(|tuned| &tuned.phases).map(of).sum::<u64>();
        let (steps, tokens) = (sum(|p| p.steps), sum(|p| p.tokens));
        let seconds: f64 = setting.tuned().flat_map(|tuned| &tuned.phases).map(|p| p.seconds).sum();
        let memory = setting.tuned().map(|tuned| tuned.peak_bytes).max().unwrap_or(0);
        let times = if runs > 1 { format!(", {runs} runs") } else { String::new() };
        let speed = tokens as f64 / seconds;
        table.row([
            Entry::text(format!("tuning: {}{times}", setting.name)),
            time(seconds),
            Entry::count(steps),
            Entry::number(tokens as f64, format::compact(tokens)),
            Entry::number(speed, format::compact(speed as u64)),
            Entry::number(memory as f64, format::bytes(memory)),
        ]);
    }
    table.row([Entry::text("last invocation, without cached stages"), time(outcome.seconds)]);
    table
}
