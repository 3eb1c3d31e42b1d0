//! Tables beside the figures: updates by phase, the frozen probe, controls of the map, time.

use super::names::Named;
use crate::modules::{Cell, ModuleKind};
use crate::report::format;
use crate::report::table::{Entry, Table};
use crate::secure::run::{Outcome, RunConfig};
use crate::secure::{CellRobustness, RobustnessMap, ScoreKind, Stat, UpdateGroup, compare_updates};
use std::time::Duration;

/// Those that have rows.
pub(super) fn details(outcome: &Outcome, config: &RunConfig) -> Vec<Table> {
    let named: Vec<Named<'_>> = outcome.settings.iter().map(|s| Named::new(s, config.evaluate.mix_share)).collect();
    let controls = outcome.map.as_ref().map(|map| controls(map, config.search.score));
    let tables = [Some(updates(outcome, &named)), Some(drift(&named)), controls, Some(times(outcome, &named))];
    tables.into_iter().flatten().filter(|table| !table.rows.is_empty()).collect()
}

/// Each phase, as [`compare_updates`] groups it.
fn updates(outcome: &Outcome, named: &[Named<'_>]) -> Table {
    let mut table = Table::new("Updates by phase")
        .column("Setting")
        .column("Phase")
        .numbers("Mods_Rob %", "‖ΔW‖ / ‖W‖")
        .numbers("The rest %", "‖ΔW‖ / ‖W‖")
        .numbers("Embedding, norms, head %", "‖ΔW‖ / ‖W‖")
        .numbers("Rest ÷ Mods_Rob", "");
    let set = outcome.mods.clone().unwrap_or_default();
    for n in named {
        for phase in n.outcome.tuned.iter().flat_map(|tuned| &tuned.updates.phases) {
            let found = compare_updates(phase, &set);
            let relative = |group: UpdateGroup| if group.cells > 0 { group.relative } else { f64::NAN };
            let (inside, outside) = (relative(found.inside), relative(found.outside));
            table.row([
                Entry::text(n.setting.name.as_str()),
                Entry::text(found.phase.as_str()),
                Entry::fixed(inside * 100.0, 3),
                Entry::fixed(outside * 100.0, 3),
                Entry::fixed(relative(found.other) * 100.0, 3),
                Entry::fixed(outside / inside, 2),
            ]);
        }
    }
    table.note = "Norms of all tensors of a group together. The rest: the other projections.".into();
    table
}

/// The frozen probe after tuning, on the splits that no probe was fitted on.
fn drift(named: &[Named<'_>]) -> Table {
    let mut table = Table::new("Frozen probe after tuning")
        .column("Setting")
        .column("Split")
        .numbers("Gap as given", "")
        .numbers("Gap", "after tuning")
        .numbers("Gap lost %", "of the gap as given")
        .numbers("AUROC", "after tuning")
        .numbers("Refusal as given", "log-odds")
        .numbers("Refusal", "log-odds after tuning");
    for n in named {
        for (split, drift) in n.outcome.drift.iter().flat_map(|drift| &drift.splits) {
            if !matches!(split.name(), "test" | "ood") {
                continue;
            }
            let optional = |value: Option<&f64>, factor: f64, decimals| {
                value.map_or(Entry::missing(), |v| Entry::fixed(v * factor, decimals))
            };
            table.row([
                Entry::text(n.setting.name.as_str()),
                Entry::text(split.name()),
                Entry::fixed(drift.base.gap, 2),
                Entry::fixed(drift.tuned.gap, 2),
                optional(drift.drop.get(&ScoreKind::Gap), 100.0, 1),
                Entry::fixed(drift.tuned.auroc, 3),
                optional(drift.base.refusal.as_ref(), 1.0, 2),
                optional(drift.tuned.refusal.as_ref(), 1.0, 2),
            ]);
        }
    }
    table.note = "Refusal: log-odds of refusing, harmful minus benign prompts.".into();
    table
}

/// Whether a drop is one of security or of anything: the map's controls, by kind of module.
fn controls(map: &RobustnessMap, score: ScoreKind) -> Table {
    let mut table = Table::new("Controls of the map")
        .column("Module")
        .numbers(format!("Drop of {score}"), "mean over layers")
        .numbers("Drop of the control", "gap of a probe on a label that has nothing to do with security")
        .numbers("Beyond the control", "drop of gap minus that of the control")
        .numbers("Drop per shift", "drop of gap over the relative shift of the output")
        .numbers("AUROC, probe trained anew", "");
    let mean = |cells: &[&CellRobustness], of: &dyn Fn(&CellRobustness) -> Option<Stat>| {
        let values: Vec<f64> = cells.iter().filter_map(|c| of(c)).map(|stat| stat.mean).collect();
        Stat::of(&values).map_or(Entry::missing(), |s| Entry::plus_minus(s.mean, s.error.unwrap_or(f64::NAN), 3))
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
    let clean = map.clean_retrained_auroc.map(|auroc| {
        format!(" A probe trained anew on the model as given has an AUROC of {}.", format::fixed(auroc, 3))
    });
    table.note = format!("Means over layers with their standard errors.{}", clean.unwrap_or_default());
    table
}

fn times(outcome: &Outcome, named: &[Named<'_>]) -> Table {
    let mut table = Table::new("Wall times")
        .column("Stage")
        .numbers("Time", "")
        .numbers("Steps", "")
        .numbers("Tokens", "with those of prompts")
        .numbers("Tokens a second", "")
        .numbers("Memory", "largest resident");
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
    for n in named {
        let Some(tuned) = &n.outcome.tuned else { continue };
        let sum = |of: fn(&crate::train::PhaseSummary) -> u64| tuned.phases.iter().map(of).sum::<u64>();
        let (steps, tokens) = (sum(|p| p.steps), sum(|p| p.tokens));
        let seconds: f64 = tuned.phases.iter().map(|p| p.seconds).sum();
        let speed = tokens as f64 / seconds;
        table.row([
            Entry::text(format!("tuning: {}", n.setting.name)),
            time(seconds),
            Entry::number(steps as f64, format::count(steps)),
            Entry::number(tokens as f64, format::compact(tokens)),
            Entry::number(speed, format::compact(speed as u64)),
            Entry::number(tuned.peak_bytes as f64, format::bytes(tuned.peak_bytes)),
        ]);
    }
    table.row([Entry::text("last invocation, all that was not kept"), time(outcome.seconds)]);
    table
}
