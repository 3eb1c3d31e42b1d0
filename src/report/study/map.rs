//! Layers × modules: robustness (figure 3 of the paper) and Mods_Rob (figure 4).

use super::setting::{join, seeds_text};
use crate::modules::{Cell, ModuleKind, ModuleSet};
use crate::report::format;
use crate::report::heatmap::{Heatmap, Row, Tile};
use crate::report::palette::Ramp;
use crate::report::table::{Entry, Table};
use crate::secure::study::Outcome;
use crate::secure::{By, CellRobustness, Noise, RobustnessMap, ScoreKind, Stat, share};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// How a map was made: its perturbation, `gaussian, ε = 1.2`; an update's directory is shown by its name alone.
pub fn perturbation(map: &RobustnessMap) -> String {
    let kind = match &map.kind {
        Noise::Step => {
            let how = if map.by == By::Conflict { "the planned step, to first order" } else { "the planned step" };
            let options = map.step.as_ref().map(|step| &step.options);
            let steps = options.map_or(String::new(), |o| format!(" ({} steps at {:e})", o.steps, o.lr));
            format!("{how}{steps}")
        }
        Noise::Zero => return "zero".into(),
        Noise::Update(path) => {
            format!("update towards {}", path.file_name().unwrap_or_default().to_string_lossy())
        }
        kind => kind.to_string(),
    };
    format!("{kind}, ε = {}", format::significant(f64::from(map.epsilon), 3))
}

/// What happens to a cell of a map, and what its value is, in a sentence.
pub(super) fn how(by: By) -> &'static str {
    match by {
        By::Noise => {
            "Its weights are perturbed by noise of equal relative norm, and the security score is measured again."
        }
        By::Conflict => {
            "Its value is what its part of the planned training step costs the refusal log-odds, to first order, from \
             gradients."
        }
        By::Update => {
            "Its weights are moved by their part of the planned training step, and the security score is measured again."
        }
    }
}

/// A grid with one row per layer that occurs; embedding, final norm and head span the whole width.
fn grid(cells: impl IntoIterator<Item = Cell>, tile: impl Fn(Cell) -> Tile) -> Heatmap {
    let cells: BTreeSet<Cell> = cells.into_iter().collect();
    let norms = cells.iter().any(|c| matches!(c, Cell::Norms(_)));
    let kinds = ModuleKind::ALL.iter().map(|kind| kind.name().trim_end_matches("_proj"));
    let layers: BTreeSet<usize> = cells.iter().filter_map(|c| c.layer()).collect();
    let wide =
        |cell: Cell, name: &str| cells.contains(&cell).then(|| Row { name: name.into(), tiles: vec![tile(cell)] });
    let row = |layer: usize| {
        let kinds = ModuleKind::ALL.into_iter().map(|kind| Cell::module(layer, kind));
        let row = kinds.chain(norms.then_some(Cell::Norms(layer)));
        let tiles = row.map(|cell| if cells.contains(&cell) { tile(cell) } else { Tile::default() });
        Row { name: layer.to_string(), tiles: tiles.collect() }
    };
    let rows = wide(Cell::Embedding, "embed").into_iter().chain(layers.into_iter().map(row));
    let last = [(Cell::FinalNorm, "final norm"), (Cell::Head, "head")];
    Heatmap {
        row_label: "layer".into(),
        columns: kinds.chain(norms.then_some("norms")).map(str::to_owned).collect(),
        rows: rows.chain(last.into_iter().filter_map(|(cell, name)| wide(cell, name))).collect(),
        ..Heatmap::default()
    }
}

/// Heat map of the relative drop of a score, with the cells of `mods` outlined.
pub fn robustness_map(map: &RobustnessMap, score: ScoreKind, mods: &ModuleSet) -> Heatmap {
    let cells: HashMap<Cell, &CellRobustness> = map.cells.iter().map(|c| (c.cell, c)).collect();
    let tile = |cell: Cell| {
        let drop = cells.get(&cell).and_then(|c| c.drop.get(&score));
        // Embedding and norms may carry many times the drop of a projection, which would flatten the map.
        let apart = !matches!(cell, Cell::Module(_));
        Tile { value: drop.map(|d| d.mean), error: drop.and_then(|d| d.error), marked: mods.contains(cell), apart }
    };
    Heatmap {
        title: "Module robustness".into(),
        apart_label: "embedding, norms and head".into(),
        mark_label: "in Mods_Rob".into(),
        unit: format!("relative drop of {score} (higher = more sensitive)"),
        note: join(&[&perturbation(map), &seeds_text(&map.seeds)]),
        ..grid(cells.keys().copied(), tile)
    }
}

/// Cells with the drop of a score, where that is finite.
fn drops(map: &RobustnessMap, score: ScoreKind) -> impl Iterator<Item = (Cell, f64)> {
    let drop = move |c: &CellRobustness| Some((c.cell, c.drop.get(&score)?.mean));
    map.cells.iter().filter_map(drop).filter(|(_, drop)| drop.is_finite())
}

/// The map, if it has drops of the score: the clean score was above 0.
pub(super) fn drawn(outcome: &Outcome, score: ScoreKind) -> Option<&RobustnessMap> {
    outcome.map.as_ref().filter(|map| drops(map, score).next().is_some())
}

/// `5 of 30`, sorted by the share of the cells that `mods` holds.
fn chosen(cells: &[(Cell, f64)], mods: &ModuleSet) -> Entry {
    let chosen = cells.iter().filter(|(cell, _)| mods.contains(*cell)).count();
    Entry::number(chosen as f64 / cells.len() as f64, format!("{chosen} of {}", cells.len()))
}

/// Mean drop and its standard error over the cells.
fn stat(cells: &[(Cell, f64)]) -> Option<Stat> {
    Stat::of(&cells.iter().map(|(_, drop)| *drop).collect::<Vec<_>>())
}

fn note(map: &RobustnessMap, score: ScoreKind) -> String {
    join(&[&format!("Relative drop of {score}"), &seeds_text(&map.seeds)])
}

/// By kind of module: mean and extremes over the layers, and how many of them are in `mods`.
pub fn robustness_table(map: &RobustnessMap, score: ScoreKind, mods: &ModuleSet) -> Table {
    let mut table = Table::new("By kind of module")
        .column("Module")
        .numbers("Mean drop", "± standard error over layers")
        .numbers("Largest drop", "and its layer")
        .numbers("Smallest drop", "and its layer")
        .numbers("In Mods_Rob", "of its layers");
    let kinds = ModuleKind::ALL.map(|kind| (kind.name(), Some(kind)));
    for (name, kind) in kinds.into_iter().chain([("norms", None)]) {
        let of_kind = |cell: Cell| match cell {
            Cell::Module(m) => Some(m.kind) == kind,
            Cell::Norms(_) => kind.is_none(),
            _ => false,
        };
        let cells: Vec<(Cell, f64)> = drops(map, score).filter(|(cell, _)| of_kind(*cell)).collect();
        let extreme = |(cell, drop): &(Cell, f64)| Entry {
            detail: cell.layer().map(|l| format!("layer {l}")).unwrap_or_default(),
            ..Entry::fixed(*drop, 3)
        };
        let by_drop = |a: &&(Cell, f64), b: &&(Cell, f64)| a.1.total_cmp(&b.1);
        let (largest, least) = (cells.iter().max_by(by_drop), cells.iter().min_by(by_drop));
        if let (Some(stat), Some(largest), Some(least)) = (stat(&cells), largest, least) {
            let mean = Entry::plus_minus(stat.mean, stat.error, 3);
            table.row([Entry::text(name), mean, extreme(largest), extreme(least), chosen(&cells, mods)]);
        }
    }
    table.note = note(map, score);
    table
}

/// By layer: mean and most sensitive of its projections, and how many of them are in `mods`.
pub(super) fn layers_table(map: &RobustnessMap, score: ScoreKind, mods: &ModuleSet) -> Table {
    let mut table = Table::new("By layer")
        .column("Layer")
        .numbers("Mean drop", "of its projections")
        .numbers("Largest drop", "and its module")
        .numbers("In Mods_Rob", "of its projections");
    let mut layers: BTreeMap<usize, Vec<(Cell, f64)>> = BTreeMap::new();
    for (cell, drop) in drops(map, score) {
        if let Cell::Module(module) = cell {
            layers.entry(module.layer).or_default().push((cell, drop));
        }
    }
    for (layer, cells) in &layers {
        let largest = cells.iter().max_by(|a, b| a.1.total_cmp(&b.1));
        let largest = largest.map_or(Entry::missing(), |(cell, drop)| Entry {
            detail: if let Cell::Module(m) = cell { m.kind.name().into() } else { String::new() },
            ..Entry::fixed(*drop, 3)
        });
        let layer = Entry::number(*layer as f64, layer.to_string());
        table.row([layer, Entry::fixed(stat(cells).map(|stat| stat.mean), 3), largest, chosen(cells, mods)]);
    }
    table.note = note(map, score);
    table
}

/// Candidate cells of the choice of `mods`, and its share of the projections' parameters.
pub(super) fn choice(outcome: &Outcome, mods: &ModuleSet) -> (ModuleSet, f64) {
    if let Some(search) = &outcome.search {
        return (search.single.keys().copied().chain(mods.iter()).collect(), search.share);
    }
    let parameters: BTreeMap<Cell, u64> =
        outcome.map.iter().flat_map(|map| &map.cells).map(|c| (c.cell, c.parameters)).collect();
    let projections = parameters.keys().copied().filter(|cell| matches!(cell, Cell::Module(_)));
    (projections.chain(mods.iter()).collect(), share(mods, &parameters))
}

/// Heat map of Mods_Rob; of the vote shares of its cells where the search had several seeds.
pub(super) fn mods_map(outcome: &Outcome, mods: &ModuleSet) -> Heatmap {
    let (all, share) = choice(outcome, mods);
    let search = outcome.search.as_ref();
    let several = search.filter(|search| search.seeds.len() > 1);
    let tile = |cell: Cell| {
        let chosen = mods.contains(cell);
        let value = match several {
            Some(search) => search.votes.get(&cell).copied().unwrap_or(0) as f64 / search.seeds.len() as f64,
            None => f64::from(u8::from(chosen)),
        };
        Tile { value: Some(value), marked: chosen && several.is_some(), ..Tile::default() }
    };
    let count = format!("{} of {} cells", mods.len(), all.len());
    let share = format!("{} of the projections' parameters", format::percent(share, 1));
    let joint = search.map_or(String::new(), |s| {
        format!("joint drop {} (limit {})", format::significant(s.joint, 2), format::significant(s.tau, 2))
    });
    let unit = if several.is_some() { "share of the searches that chose the cell" } else { "in Mods_Rob" };
    Heatmap {
        title: "Mods_Rob".into(),
        ramp: Ramp::Share,
        mark_label: "in the set".into(),
        unit: unit.into(),
        note: join(&[&count, &share, &joint, &search.map_or(String::new(), |s| seeds_text(&s.seeds))]),
        ..grid(all.iter(), tile)
    }
}
