//! Weight updates (figure 5 of the paper), drift and training loss.

use super::setting::{Setting, by_key, join, over_seeds, seeds_list, seeds_text, several, training_seeds};
use crate::modules::{Cell, ModuleSet};
use crate::report::chart::{BarChart, BarPanel, BarSeries, Direction, LineChart, LineSeries, Measure, Point};
use crate::report::palette::Tone;
use crate::report::table::{Entry, Table};
use crate::secure::study::{Outcome, TunedOutcome};
use std::collections::{BTreeMap, BTreeSet};

/// ‖ΔW‖_F / ‖W‖_F of the projections in each setting that tunes, means over training seeds.
pub(super) struct Updates<'a> {
    settings: Vec<(&'a Setting<'a>, Vec<(Cell, f64)>)>,
    mods: &'a ModuleSet,
}

/// Inside or outside of Mods_Rob.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Inside,
    Outside,
}

impl<'a> Updates<'a> {
    /// `None` where there is no set or nothing was tuned.
    pub fn new(settings: &'a [Setting<'a>], outcome: &'a Outcome) -> Option<Self> {
        let relative = |s: &Setting<'_>| {
            let cells = by_key(s.tuned().map(relative_updates)).into_iter();
            let mean = |(cell, values): (Cell, Vec<f64>)| Some((cell, over_seeds(&values)?.value));
            cells.filter(|(cell, _)| matches!(cell, Cell::Module(_))).filter_map(mean).collect()
        };
        let tuned = settings.iter().filter(|s| s.tuned().next().is_some());
        let settings: Vec<_> = tuned.map(|s| (s, relative(s))).collect();
        Some(Self { mods: outcome.mods.as_ref().filter(|_| !settings.is_empty())?, settings })
    }

    /// Mean over the cells of a side, of one layer or of all.
    fn mean(&self, cells: &[(Cell, f64)], side: Side, layer: Option<usize>) -> Option<f64> {
        let inside = side == Side::Inside;
        let wanted = |cell: &Cell| self.mods.contains(*cell) == inside && (layer.is_none() || cell.layer() == layer);
        let values = cells.iter().filter(|(cell, value)| wanted(cell) && value.is_finite()).map(|(_, value)| *value);
        over_seeds(&values.collect::<Vec<_>>()).map(|mean| mean.value)
    }

    /// By layer, one panel per setting.
    pub fn chart(&self) -> BarChart {
        let cells = self.settings.iter().flat_map(|(_, cells)| cells);
        let layers: BTreeSet<usize> = cells.filter_map(|(cell, _)| cell.layer()).collect();
        let panel = |(setting, cells): &(&Setting<'_>, Vec<(Cell, f64)>)| {
            let series = |name: &str, tone, side| {
                let bar = |layer: &usize| Some(Measure::new(100.0 * self.mean(cells, side, Some(*layer))?));
                BarSeries { name: name.into(), tone, bars: layers.iter().map(bar).collect() }
            };
            BarPanel {
                heading: join(&[&setting.name, &seeds_text(&setting.seeds())]),
                series: vec![
                    series("in Mods_Rob", Tone::Blue, Side::Inside),
                    series("the rest", Tone::Amber, Side::Outside),
                ],
            }
        };
        BarChart {
            title: "Update magnitude by layer".into(),
            value_label: "mean ‖ΔW‖ / ‖W‖ of the modules, %".into(),
            category_label: "layer".into(),
            panels: self.settings.iter().map(panel).collect(),
            categories: layers.iter().map(usize::to_string).collect(),
            direction: Direction::Upright,
            ..BarChart::default()
        }
    }

    /// Over all layers, one row per setting.
    pub fn table(&self) -> Table {
        let mut table = Table::new("Mean update, all layers")
            .column("Setting")
            .numbers("Mods_Rob %", "‖ΔW‖ / ‖W‖")
            .numbers("The rest %", "‖ΔW‖ / ‖W‖")
            .numbers("Rest ÷ Mods_Rob", "")
            .column("Seeds");
        for (setting, cells) in &self.settings {
            let mean = |chosen| self.mean(cells, chosen, None).unwrap_or(f64::NAN);
            let (chosen, rest) = (mean(Side::Inside), mean(Side::Outside));
            table.row([
                Entry::text(&setting.name),
                Entry::fixed(chosen * 100.0, 3),
                Entry::fixed(rest * 100.0, 3),
                Entry::fixed(rest / chosen, 2),
                Entry::text(seeds_list(&setting.seeds())),
            ]);
        }
        table
    }
}

/// √(Σ ‖ΔW‖² over phases) / ‖W before the first phase‖ of each cell: ‖ΔW‖ / ‖W‖ of the whole run where only one phase
/// moves the cell, or the phases' updates are orthogonal.
fn relative_updates(tuned: &TunedOutcome) -> Vec<(Cell, f64)> {
    let mut squares: BTreeMap<Cell, f64> = BTreeMap::new();
    for (cell, update) in tuned.updates.phases.iter().flat_map(|phase| &phase.cells) {
        *squares.entry(*cell).or_default() += f64::from(update.delta_norm).powi(2);
    }
    let Some(first) = tuned.updates.phases.first() else { return Vec::new() };
    let relative = |(cell, square): (Cell, f64)| {
        let weight = f64::from(first.cells.get(&cell)?.weight_norm);
        (weight > 0.0).then(|| (cell, square.sqrt() / weight))
    };
    squares.into_iter().filter_map(relative).collect()
}

/// A score by step.
type Steps = Vec<(u64, Option<f64>)>;

/// Frozen probe and refusal log-odds by epoch; `None` where nothing was tuned. The probe's gap is relative to the
/// original model where that is above 0 in every run, else absolute.
pub(super) fn drift_charts(settings: &[Setting<'_>], outcome: &Outcome) -> Option<[LineChart; 2]> {
    let drawn = |s: &&Setting<'_>| s.tuned().next().is_some() && s.tuned().all(|tuned| !tuned.points.is_empty());
    let shown: Vec<&Setting<'_>> = settings.iter().filter(drawn).collect();
    let first_gap = |tuned: &TunedOutcome| {
        tuned.points.iter().find(|p| p.step == 0).map(|p| p.scores.gap).filter(|gap| *gap > 1e-9)
    };
    let relative = shown.iter().flat_map(|s| s.tuned()).all(|tuned| first_gap(tuned).is_some());
    let gaps = |tuned: &TunedOutcome| {
        let unit = first_gap(tuned).filter(|_| relative).unwrap_or(1.0);
        tuned.points.iter().map(|p| (p.step, Some(p.scores.gap / unit))).collect()
    };
    let refusals = |tuned: &TunedOutcome| tuned.points.iter().map(|p| (p.step, p.scores.refusal)).collect();
    let seeds = seeds_text(&training_seeds(settings));
    let runs = if several(settings) {
        format!("means over training {seeds}, bars from the lowest to the highest")
    } else {
        "one training run per setting".into()
    };
    let chart = |title: &str, y_label: String, of: &dyn Fn(&TunedOutcome) -> Steps| {
        let series = shown.iter().map(|s| {
            let steps_per_epoch = s.tuned().next().map_or(1, |tuned| tuned.steps_per_epoch.max(1));
            let point = |(step, values): (u64, Vec<Option<f64>>)| {
                let y = over_seeds(&values.into_iter().collect::<Option<Vec<f64>>>()?)?;
                Some(Point { x: step as f64 / steps_per_epoch as f64, y })
            };
            let points = by_key(s.tuned().map(of)).into_iter().filter_map(point).collect();
            LineSeries { name: s.name.clone(), tone: s.tone, points }
        });
        LineChart {
            title: title.into(),
            x_label: "epoch".into(),
            y_label,
            series: series.collect(),
            note: format!("Test split of the security prompts; {runs}."),
            ..LineChart::default()
        }
    };
    let unit = if relative { " (original model = 1)" } else { "" };
    let gap = format!("gap of the probe at hidden state {}{unit}", outcome.probe.metric_layer);
    let refusal = "refusal log-odds, harmful minus benign".into();
    (!shown.is_empty()).then(|| [chart("Frozen probe", gap, &gaps), chart("Refusal", refusal, &refusals)])
}

/// Loss by step; `None` where nothing was tuned.
pub(super) fn loss_chart(settings: &[Setting<'_>]) -> Option<LineChart> {
    let line = |s: &Setting<'_>| {
        let losses = by_key(s.tuned().map(|tuned| tuned.losses.clone())).into_iter();
        let point = |(step, values): (u64, Vec<f64>)| {
            Some(Point { x: step as f64, y: Measure::new(over_seeds(&values)?.value) })
        };
        LineSeries { name: s.name.clone(), tone: s.tone, points: losses.filter_map(point).collect() }
    };
    let series: Vec<LineSeries> = settings.iter().map(line).filter(|line| !line.points.is_empty()).collect();
    (!series.is_empty()).then(|| LineChart {
        title: "Training loss".into(),
        x_label: "step".into(),
        y_label: "answer cross-entropy, nats per token".into(),
        from_zero: true,
        series,
        wide: true,
        note: seeds_text(&training_seeds(settings)),
    })
}
