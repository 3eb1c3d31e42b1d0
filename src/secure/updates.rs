//! How far training moved Mods_Rob against the rest (figure 5 of the paper).

use crate::modules::{Cell, ModuleSet};
use crate::train::{PhaseUpdates, Update};
use std::collections::BTreeMap;

/// Update of a group of cells, all their tensors together.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpdateGroup {
    /// Cells.
    pub cells: usize,
    /// ‖ΔW‖_F.
    pub delta_norm: f64,
    /// ‖W‖_F before.
    pub weight_norm: f64,
    /// ‖ΔW‖_F / ‖W‖_F; 0 for an empty group.
    pub relative: f64,
}

/// Mods_Rob against the other projections, and every cell.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UpdateComparison {
    /// Name of the phase.
    pub phase: String,
    /// Cells of the set.
    pub inside: UpdateGroup,
    /// Projections outside of it.
    pub outside: UpdateGroup,
    /// Embedding, norms and head outside of it.
    pub other: UpdateGroup,
    /// ‖ΔW‖_F / ‖W‖_F of each cell.
    pub cells: BTreeMap<Cell, f64>,
}

/// Groups one phase's updates by a set.
pub fn compare_updates(phase: &PhaseUpdates, set: &ModuleSet) -> UpdateComparison {
    let group = |wanted: &dyn Fn(Cell) -> bool| {
        let chosen: Vec<&Update> = phase.cells.iter().filter(|(c, _)| wanted(**c)).map(|(_, u)| u).collect();
        let norm = |part: &dyn Fn(&Update) -> f64| chosen.iter().map(|u| part(u).powi(2)).sum::<f64>().sqrt();
        let (delta_norm, weight_norm) = (norm(&|u| u.delta_norm.into()), norm(&|u| u.weight_norm.into()));
        UpdateGroup { cells: chosen.len(), delta_norm, weight_norm, relative: relative(delta_norm, weight_norm) }
    };
    let module = |c: Cell| matches!(c, Cell::Module(_));
    UpdateComparison {
        phase: phase.phase.clone(),
        inside: group(&|c| set.contains(c)),
        outside: group(&|c| !set.contains(c) && module(c)),
        other: group(&|c| !set.contains(c) && !module(c)),
        cells: phase.cells.iter().map(|(c, u)| (*c, relative(u.delta_norm.into(), u.weight_norm.into()))).collect(),
    }
}

fn relative(delta: f64, weight: f64) -> f64 {
    if weight > 0.0 { delta / weight } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modules::ModuleKind;

    #[test]
    fn groups_add_squares() {
        let update = |delta_norm, weight_norm| Update { delta_norm, weight_norm };
        let cells = [
            (Cell::module(0, ModuleKind::Q), update(3.0, 5.0)),
            (Cell::module(1, ModuleKind::Q), update(4.0, 12.0)),
            (Cell::module(1, ModuleKind::V), update(1.0, 2.0)),
            (Cell::Embedding, update(0.0, 9.0)),
        ];
        let phase = PhaseUpdates { phase: "warm-up".into(), cells: cells.into_iter().collect() };
        let set = [Cell::module(0, ModuleKind::Q), Cell::module(1, ModuleKind::Q)].into_iter().collect();
        let found = compare_updates(&phase, &set);
        assert_eq!(found.inside, UpdateGroup { cells: 2, delta_norm: 5.0, weight_norm: 13.0, relative: 5.0 / 13.0 });
        assert_eq!((found.outside.cells, found.outside.relative), (1, 0.5));
        assert_eq!((found.other.cells, found.other.relative), (1, 0.0));
        assert_eq!(found.cells[&Cell::module(0, ModuleKind::Q)], 3.0 / 5.0);
    }
}
