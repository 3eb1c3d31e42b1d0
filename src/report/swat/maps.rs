//! Layers × modules: robustness (figure 3) and Mods_Rob (figure 4).

use super::{CellScore, Mods, Robustness, seeds_text};
use crate::modules::{Cell, ModuleKind};
use crate::report::format;
use crate::report::heatmap::{Heatmap, Scale};
use crate::report::palette::Ramp;
use crate::report::table::{Entry, Table};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Where cells lie on the grid: rows of layers, those without a layer over the whole width.
struct Grid {
    rows: Vec<String>,
    columns: Vec<String>,
    wide_rows: Vec<usize>,
    /// Row by row; `None` where a layer has no such cell.
    cells: Vec<Option<Cell>>,
}

impl Grid {
    fn new(cells: impl Iterator<Item = Cell> + Clone) -> Self {
        let layers: BTreeSet<usize> = cells.clone().filter_map(Cell::layer).collect();
        let present: BTreeSet<Cell> = cells.collect();
        let norms = present.iter().any(|c| matches!(c, Cell::Norms(_)));
        let mut columns: Vec<String> =
            ModuleKind::ALL.iter().map(|k| k.name().trim_end_matches("_proj").to_owned()).collect();
        if norms {
            columns.push("norms".into());
        }
        let mut grid = Self { rows: Vec::new(), columns, wide_rows: Vec::new(), cells: Vec::new() };
        grid.wide(&present, Cell::Embedding, "embed");
        for layer in layers {
            grid.rows.push(layer.to_string());
            let kinds = ModuleKind::ALL.into_iter().map(|kind| Cell::module(layer, kind));
            let row = kinds.chain(norms.then_some(Cell::Norms(layer)));
            grid.cells.extend(row.map(|cell| Some(cell).filter(|c| present.contains(c))));
        }
        grid.wide(&present, Cell::FinalNorm, "final norm");
        grid.wide(&present, Cell::Head, "head");
        grid
    }

    fn wide(&mut self, present: &BTreeSet<Cell>, cell: Cell, name: &str) {
        if present.contains(&cell) {
            self.wide_rows.push(self.rows.len());
            self.rows.push(name.into());
            self.cells.extend(vec![Some(cell); self.columns.len()]);
        }
    }

    fn map(self, scale: impl FnOnce(&[Option<f64>]) -> Scale, value: impl Fn(Cell) -> Option<f64>) -> Heatmap {
        let values: Vec<Option<f64>> = self.cells.iter().map(|cell| cell.and_then(&value)).collect();
        Heatmap {
            title: String::new(),
            row_label: "layer".into(),
            rows: self.rows,
            columns: self.columns,
            scale: scale(&values),
            values,
            errors: Vec::new(),
            marks: Vec::new(),
            mark_label: String::new(),
            wide_rows: self.wide_rows,
            unit: String::new(),
            note: String::new(),
        }
    }
}

/// The heat map of robustness, Mods_Rob outlined.
pub fn robustness_map(robustness: &Robustness) -> Heatmap {
    let scores: HashMap<Cell, CellScore> = robustness.cells.iter().map(|s| (s.cell, *s)).collect();
    let grid = Grid::new(robustness.cells.iter().map(|s| s.cell));
    let of = |cell: &Option<Cell>| cell.and_then(|c| scores.get(&c));
    let errors = grid.cells.iter().map(|c| of(c).map(|s| s.std_error).filter(|e| e.is_finite())).collect();
    let marks = grid.cells.iter().map(|c| c.is_some_and(|c| robustness.mods.contains(c))).collect();
    let seeds = seeds_text(&robustness.seeds);
    let note = [robustness.perturbation.as_str(), seeds.as_str()];
    Heatmap {
        title: "Module robustness".into(),
        errors,
        marks,
        mark_label: "in Mods_Rob".into(),
        unit: format!("relative drop of {} (higher = more sensitive)", robustness.score),
        note: join(&note),
        ..grid.map(|values| Scale::fit(Ramp::Sequential, values), |cell| scores.get(&cell).map(|s| s.mean))
    }
}

/// Robustness by kind of module: mean over the layers, the most sensitive layer, how many are in Mods_Rob.
pub fn robustness_table(robustness: &Robustness) -> Table {
    let mut table = Table::new("By kind of module")
        .column("Module")
        .numbers("Mean drop", "± standard error over layers")
        .numbers("Largest drop", "and its layer")
        .numbers("Smallest drop", "and its layer")
        .numbers("In Mods_Rob", "of its layers");
    let kinds = ModuleKind::ALL.map(|kind| (kind.name(), Some(kind)));
    for (name, kind) in kinds.into_iter().chain([("norms", None)]) {
        let of_kind = |s: &&CellScore| match s.cell {
            Cell::Module(m) => Some(m.kind) == kind,
            Cell::Norms(_) => kind.is_none(),
            _ => false,
        };
        let scores: Vec<&CellScore> = robustness.cells.iter().filter(of_kind).filter(|s| s.mean.is_finite()).collect();
        if scores.is_empty() {
            continue;
        }
        let n = scores.len() as f64;
        let mean = scores.iter().map(|s| s.mean).sum::<f64>() / n;
        let squares = scores.iter().map(|s| (s.mean - mean).powi(2)).sum::<f64>();
        let error = if n > 1.0 { (squares / (n - 1.0) / n).sqrt() } else { f64::NAN };
        let extreme = |s: Option<&&CellScore>| {
            s.map_or(Entry::missing(), |s| Entry {
                detail: s.cell.layer().map(|l| format!("layer {l}")).unwrap_or_default(),
                ..Entry::fixed(s.mean, 3)
            })
        };
        let chosen = scores.iter().filter(|s| robustness.mods.contains(s.cell)).count();
        table.row([
            Entry::text(name),
            Entry::plus_minus(mean, error, 3),
            extreme(scores.iter().max_by(|a, b| a.mean.total_cmp(&b.mean))),
            extreme(scores.iter().min_by(|a, b| a.mean.total_cmp(&b.mean))),
            Entry::number(chosen as f64 / n, format!("{chosen} of {}", scores.len())),
        ]);
    }
    table.note = join(&[&format!("Relative drop of {}", robustness.score), &seeds_text(&robustness.seeds)]);
    table
}

/// Robustness by layer: mean over its projections, the most sensitive of them, how many are in Mods_Rob.
pub fn layers_table(robustness: &Robustness) -> Table {
    let mut table = Table::new("By layer")
        .column("Layer")
        .numbers("Mean drop", "of its projections")
        .numbers("Largest drop", "and its module")
        .numbers("In Mods_Rob", "of its projections");
    let mut layers: BTreeMap<usize, Vec<(ModuleKind, CellScore)>> = BTreeMap::new();
    for score in robustness.cells.iter().filter(|s| s.mean.is_finite()) {
        if let Cell::Module(module) = score.cell {
            layers.entry(module.layer).or_default().push((module.kind, *score));
        }
    }
    for (layer, scores) in &layers {
        let n = scores.len() as f64;
        let largest = scores.iter().max_by(|a, b| a.1.mean.total_cmp(&b.1.mean));
        let chosen = scores.iter().filter(|(_, s)| robustness.mods.contains(s.cell)).count();
        table.row([
            Entry::number(*layer as f64, layer.to_string()),
            Entry::fixed(scores.iter().map(|(_, s)| s.mean).sum::<f64>() / n, 3),
            largest.map_or(Entry::missing(), |(kind, s)| Entry {
                detail: kind.name().to_owned(),
                ..Entry::fixed(s.mean, 3)
            }),
            Entry::number(chosen as f64 / n, format!("{chosen} of {}", scores.len())),
        ]);
    }
    table.note = join(&[&format!("Relative drop of {}", robustness.score), &seeds_text(&robustness.seeds)]);
    table
}

/// The map of Mods_Rob: which cells are in the set, or how many of the searches chose them.
pub fn mods_map(mods: &Mods) -> Heatmap {
    let votes: HashMap<Cell, f64> = mods.agreement.iter().copied().collect();
    let grid = Grid::new(mods.all.iter().chain(mods.chosen.iter()).collect::<Vec<_>>().into_iter());
    let chosen = |cell: Cell| mods.chosen.contains(cell);
    let several = !votes.is_empty();
    let marks = if several { grid.cells.iter().map(|c| c.is_some_and(chosen)).collect() } else { Vec::new() };
    let count = format!("{} of {} cells", mods.chosen.len(), mods.all.len());
    let share = format!("{} of the projections' parameters", format::percent(mods.trainable_share, 1));
    let joint = mods.joint_score.map_or(String::new(), |(score, limit)| {
        format!("joint drop {} (limit {})", format::significant(score, 2), format::significant(limit, 2))
    });
    Heatmap {
        title: "Mods_Rob".into(),
        marks,
        mark_label: "in the set".into(),
        unit: if several { "share of the searches that chose the cell".into() } else { "in Mods_Rob".into() },
        note: join(&[&count, &share, &joint, &seeds_text(&mods.seeds)]),
        ..grid.map(
            |values| Scale::fit(Ramp::Share, values),
            |cell| {
                Some(if several { votes.get(&cell).copied().unwrap_or(0.0) } else { f64::from(u8::from(chosen(cell))) })
            },
        )
    }
}

/// Parts of a note with middle dots between them, empty ones left out.
pub(super) fn join(parts: &[&str]) -> String {
    parts.iter().filter(|p| !p.is_empty()).copied().collect::<Vec<_>>().join(" · ")
}
