//! Runs side by side: results, sets, updates (figure 5), drift, loss.

use super::maps::join;
use super::{
    Drift, EpochDrift, Measure, Results, SetOutcome, SettingKind, SettingLoss, SettingResult, Updates, all_seeds,
    seeds_text,
};
use crate::report::chart::{
    Bar, BarChart, BarPanel, BarSeries, Direction, Dot, DotGroup, LineChart, LinePanel, LineSeries, Point, Scatter,
};
use crate::report::format;
use crate::report::html::Highlight;
use crate::report::palette::Tone;
use crate::report::table::{Entry, Table};
use std::collections::BTreeMap;

/// Attack success of the model as given, of plain tuning and of SWAT, as tiles.
pub(super) fn highlights(results: &Results) -> Vec<Highlight> {
    let shown = [SettingKind::AsGiven, SettingKind::Plain, SettingKind::PlainEqualSteps, SettingKind::Swat];
    let row = |kind: SettingKind| results.rows.iter().find(|row| row.setting.kind == kind);
    let tile = |row: &SettingResult| {
        let asr = row.asr?;
        let what = if row.seeds.len() > 1 { "seeds" } else { "interval" };
        let interval = asr.interval.map(|(low, high)| {
            format!("\n{what} {}–{}", format::fixed(low * 100.0, 1), format::fixed(high * 100.0, 1))
        });
        let task = row.task.map(|task| format!("\ntask score {}", format::percent(task.value, 1)));
        Some(Highlight {
            label: row.setting.name.clone(),
            value: format::percent(asr.value, 1),
            detail: ["attack success", &interval.unwrap_or_default(), &task.unwrap_or_default()].concat(),
            tone: row.setting.kind.tone(),
        })
    };
    shown.into_iter().filter_map(row).filter_map(tile).collect()
}

/// The table of results: one row a setting, every number with its interval, and the seeds.
pub fn results_table(results: &Results) -> Table {
    let mut table = Table::new("All settings")
        .column("Setting")
        .numbers("ASR %", "lower is safer")
        .numbers("Strict ASR %", "lower is safer")
        .numbers("Over-refusal %", "lower is better")
        .numbers("Task %", "higher is better")
        .numbers("Perplexity", "lower is better")
        .numbers("Steps", "all phases")
        .numbers("Set %", "of projections")
        .column("Seeds");
    for (i, row) in results.rows.iter().enumerate() {
        let share = |measure: Option<Measure>| entry(measure, 100.0, 1);
        table.row([
            Entry::text(row.setting.name.as_str()),
            share(row.asr),
            share(row.strict_asr),
            share(row.over_refusal),
            share(row.task),
            entry(row.perplexity, 1.0, 2),
            Entry::number(row.steps as f64, format::count(row.steps)),
            row.trainable_share.map_or(Entry::missing(), |s| Entry::fixed(s * 100.0, 1)),
            seeds_entry(&row.seeds),
        ]);
        if row.setting.kind == SettingKind::Swat {
            table.emphasized.push(i);
        }
    }
    table.note = results.intervals.clone();
    table
}

/// Attack success, strict attack success and task score of each setting, as bars with intervals.
pub fn results_chart(results: &Results) -> BarChart {
    type Of = fn(&SettingResult) -> Option<Measure>;
    let measures: [(&str, Tone, Of); 3] = [
        ("ASR", Tone::Vermilion, |row| row.asr),
        ("strict ASR", Tone::Amber, |row| row.strict_asr),
        ("task score", Tone::Blue, |row| row.task),
    ];
    let percent = |m: Measure| Bar {
        value: m.value * 100.0,
        interval: m.interval.map(|(low, high)| (low * 100.0, high * 100.0)),
    };
    let series = measures
        .into_iter()
        .filter(|(_, _, of)| results.rows.iter().any(|row| of(row).is_some()))
        .map(|(name, tone, of)| BarSeries {
            name: name.into(),
            tone,
            bars: results.rows.iter().map(|row| of(row).map(percent)).collect(),
        })
        .collect();
    BarChart {
        title: "Attack success and task score".into(),
        value_label: "%".into(),
        categories: results.rows.iter().map(|row| row.setting.name.clone()).collect(),
        panels: vec![BarPanel { heading: String::new(), series }],
        direction: Direction::Lying,
        at_least: 100.0,
        decimals: 1,
        note: join(&["intervals as in the table", &all_seeds(results.rows.iter().map(|row| &row.seeds))]),
        ..BarChart::default()
    }
}

/// Joint noise score of warm-up sets against attack success after tuning.
pub fn sets_chart(sets: &[SetOutcome]) -> Scatter {
    let mut groups: Vec<(SettingKind, DotGroup)> = Vec::new();
    for set in sets {
        let kind = set.setting.kind;
        let dot = Dot {
            name: set.setting.name.clone(),
            x: set.joint_score,
            y: set.asr.value * 100.0,
            interval: set.asr.interval.map(|(low, high)| (low * 100.0, high * 100.0)),
        };
        match groups.iter_mut().find(|(k, _)| *k == kind) {
            Some((_, group)) => group.dots.push(dot),
            None => groups.push((kind, DotGroup { name: group_name(kind).into(), tone: kind.tone(), dots: vec![dot] })),
        }
    }
    Scatter {
        title: "Joint noise score and attack success".into(),
        x_label: "joint drop of the score under noise".into(),
        y_label: "ASR after tuning, %".into(),
        groups: groups.into_iter().map(|(_, group)| group).collect(),
        y_at_least: Some((0.0, 100.0)),
        note: all_seeds(sets.iter().map(|set| &set.seeds)),
    }
}

fn group_name(kind: SettingKind) -> &'static str {
    match kind {
        SettingKind::AsGiven => "as given",
        SettingKind::Plain => "plain",
        SettingKind::PlainEqualSteps => "plain, equal steps",
        SettingKind::Swat => "Mods_Rob",
        SettingKind::Random => "random sets",
        SettingKind::Complement => "complement",
        SettingKind::Refusals => "with refusals",
        SettingKind::Other => "other",
    }
}

/// Mean update of Mods_Rob and of the rest, layer by layer, one panel a run.
pub fn updates_chart(updates: &Updates) -> BarChart {
    let mut layers: Vec<usize> =
        updates.settings.iter().flat_map(|s| &s.relative).filter_map(|(cell, _)| cell.layer()).collect();
    layers.sort_unstable();
    layers.dedup();
    let panels = updates.settings.iter().map(|setting| {
        // Sum and count, by layer and side.
        let mut sums: BTreeMap<(usize, bool), (f64, f64)> = BTreeMap::new();
        for (cell, relative) in setting.relative.iter().filter(|(_, r)| r.is_finite()) {
            if let Some(layer) = cell.layer() {
                let (sum, count) = sums.entry((layer, updates.mods.contains(*cell))).or_default();
                *sum += relative;
                *count += 1.0;
            }
        }
        let bars = |chosen: bool| {
            let mean = |layer: &usize| {
                sums.get(&(*layer, chosen)).map(|(sum, n)| Bar { value: 100.0 * sum / n, interval: None })
            };
            layers.iter().map(mean).collect()
        };
        BarPanel {
            heading: join(&[&setting.setting.name, &seeds_text(&setting.seeds)]),
            series: vec![
                BarSeries { name: "in Mods_Rob".into(), tone: Tone::Blue, bars: bars(true) },
                BarSeries { name: "the rest".into(), tone: Tone::Amber, bars: bars(false) },
            ],
        }
    });
    BarChart {
        title: "Update magnitude by layer".into(),
        value_label: "mean ‖ΔW‖ / ‖W‖ of the modules, %".into(),
        category_label: "layer".into(),
        panels: panels.collect(),
        categories: layers.iter().map(usize::to_string).collect(),
        direction: Direction::Upright,
        wide: true,
        ..BarChart::default()
    }
}

/// Mean update of Mods_Rob and of the rest over all layers, one row a run.
pub fn updates_table(updates: &Updates) -> Table {
    let mut table = Table::new("Mean update, all layers")
        .column("Setting")
        .numbers("Mods_Rob %", "‖ΔW‖ / ‖W‖")
        .numbers("The rest %", "‖ΔW‖ / ‖W‖")
        .numbers("Rest ÷ Mods_Rob", "")
        .column("Seeds");
    for setting in &updates.settings {
        let mean = |chosen: bool| {
            let side =
                |(cell, r): &&(crate::modules::Cell, f64)| updates.mods.contains(*cell) == chosen && r.is_finite();
            let values: Vec<f64> = setting.relative.iter().filter(side).map(|(_, r)| *r).collect();
            if values.is_empty() { f64::NAN } else { values.iter().sum::<f64>() / values.len() as f64 }
        };
        let (chosen, rest) = (mean(true), mean(false));
        table.row([
            Entry::text(setting.setting.name.as_str()),
            Entry::fixed(chosen * 100.0, 3),
            Entry::fixed(rest * 100.0, 3),
            Entry::fixed(rest / chosen, 2),
            seeds_entry(&setting.seeds),
        ]);
    }
    table
}

/// The frozen probe's score by epoch.
pub fn drift_probe_chart(drift: &Drift) -> LineChart {
    drift_chart(drift, "Frozen probe", &drift.probe_score, |epoch| epoch.probe)
}

/// The refusal log-odds by epoch.
pub fn drift_refusal_chart(drift: &Drift) -> LineChart {
    drift_chart(drift, "Refusal", "refusal log-odds, harmful minus benign", |epoch| epoch.refusal)
}

fn drift_chart(drift: &Drift, title: &str, y_label: &str, of: fn(&EpochDrift) -> Option<Measure>) -> LineChart {
    let series = drift.settings.iter().map(|setting| LineSeries {
        name: setting.setting.name.clone(),
        tone: setting.setting.kind.tone(),
        points: setting
            .epochs
            .iter()
            .filter_map(|epoch| of(epoch).map(|m| Point { x: epoch.epoch, y: m.value, interval: m.interval }))
            .collect(),
    });
    LineChart {
        title: title.into(),
        x_label: "epoch".into(),
        whole_x: true,
        panels: vec![LinePanel { y_label: y_label.into(), series: series.collect(), at_least: None }],
        wide: false,
        note: drift.note.clone(),
    }
}

/// Loss by step.
pub fn loss_chart(losses: &[SettingLoss]) -> LineChart {
    let series = losses.iter().map(|loss| LineSeries {
        name: loss.setting.name.clone(),
        tone: loss.setting.kind.tone(),
        points: loss.points.iter().map(|(step, loss)| Point::new(*step as f64, *loss)).collect(),
    });
    LineChart {
        title: "Training loss".into(),
        x_label: "step".into(),
        whole_x: true,
        panels: vec![LinePanel {
            y_label: "cross-entropy of the answers, nats a token".into(),
            series: series.collect(),
            at_least: Some((0.0, 0.0)),
        }],
        wide: true,
        note: all_seeds(losses.iter().map(|loss| &loss.seeds)),
    }
}

/// A measure times `factor`, with its interval.
pub(in crate::report) fn entry(measure: Option<Measure>, factor: f64, decimals: usize) -> Entry {
    let Some(Measure { value, interval }) = measure else { return Entry::missing() };
    let (low, high) = interval.unwrap_or((f64::NAN, f64::NAN));
    Entry::interval(value * factor, low * factor, high * factor, decimals)
}

fn seeds_entry(seeds: &[u64]) -> Entry {
    let text = seeds_text(seeds);
    Entry::text(text.trim_start_matches("seeds ").trim_start_matches("seed "))
}
