//! Update magnitudes of each cell: ‖ΔW‖_F and ‖W‖_F (figure 5 of the paper).

use crate::error::Result;
use crate::modules::{Cell, ModuleId, ParamId};
use std::collections::BTreeMap;

/// Content of `updates.json`.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Updates {
    /// One entry per phase.
    pub phases: Vec<PhaseUpdates>,
}

/// The updates of one phase.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PhaseUpdates {
    /// Name of the phase.
    pub phase: String,
    /// Every cell of the model; a frozen one has an update of 0.
    pub cells: BTreeMap<Cell, Update>,
}

impl PhaseUpdates {
    /// ‖ΔW‖_F / ‖W‖_F over all tensors of the cells that `wanted` admits; `None` for no cells, 0 for a norm of 0.
    pub fn relative(&self, wanted: impl Fn(Cell) -> bool) -> Option<f64> {
        let updates: Vec<&Update> = self.cells.iter().filter(|(cell, _)| wanted(**cell)).map(|(_, u)| u).collect();
        let norm = |of: fn(&Update) -> f32| updates.iter().map(|u| f64::from(of(u)).powi(2)).sum::<f64>().sqrt();
        let (delta, weight) = (norm(|u| u.delta_norm), norm(|u| u.weight_norm));
        (!updates.is_empty()).then(|| if weight > 0.0 { delta / weight } else { 0.0 })
    }
}

/// Update of one cell, over all its tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Update {
    /// ‖W_end − W_start‖_F. With adapters, W is the base weight plus scale · B·A.
    pub delta_norm: f32,
    /// ‖W_start‖_F, of the base weights.
    pub weight_norm: f32,
}

/// Updates of the cells of `params` (ids with shapes), from the values of each tensor `before` and `after`, adapters
/// included. One tensor at a time is held, in f32; sums are in f64. `lora_scale` is the scale of a projection's adapter.
///
/// # Errors
/// What `before` and `after` return.
pub fn cell_updates(
    params: &[(ParamId, Vec<usize>)],
    lora_scale: impl Fn(ModuleId) -> f64,
    mut before: impl FnMut(ParamId) -> Result<Vec<f32>>,
    mut after: impl FnMut(ParamId) -> Result<Vec<f32>>,
) -> Result<BTreeMap<Cell, Update>> {
    // Squares of the change and of the weight.
    let mut cells: BTreeMap<Cell, (f64, f64)> = BTreeMap::new();
    for (id, shape) in params {
        let (delta, weight) = cells.entry(id.cell()).or_default();
        match *id {
            ParamId::LoraB(_) => {}
            ParamId::LoraA(module) => {
                let rank = shape.first().copied().unwrap_or(0);
                let b = ParamId::LoraB(module);
                let change = product_change(rank, &before(*id)?, &before(b)?, &after(*id)?, &after(b)?);
                *delta += lora_scale(module).powi(2) * change;
            }
            _ => {
                for (old, new) in before(*id)?.into_iter().zip(after(*id)?) {
                    let (old, new) = (f64::from(old), f64::from(new));
                    *delta += (new - old) * (new - old);
                    *weight += old * old;
                }
            }
        }
    }
    let norms =
        |(delta, weight): (f64, f64)| Update { delta_norm: delta.sqrt() as f32, weight_norm: weight.sqrt() as f32 };
    Ok(cells.into_iter().map(|(cell, squares)| (cell, norms(squares))).collect())
}

/// ‖B₁A₁ − B₀A₀‖_F² of A [rank, inputs] and B [outputs, rank], from the Gram matrices of the stacked factors
/// M = [B₁, −B₀] and N = [A₁; A₀]: ‖MN‖² = Σ (MᵀM) ∘ (NNᵀ).
fn product_change(rank: usize, a0: &[f32], b0: &[f32], a1: &[f32], b1: &[f32]) -> f64 {
    // Exactly 0 without a change, however the sums below round.
    if rank == 0 || (a0 == a1 && b0 == b1) {
        return 0.0;
    }
    let inputs = a0.len() / rank;
    let row = |i: usize| if i < rank { &a1[i * inputs..][..inputs] } else { &a0[(i - rank) * inputs..][..inputs] };
    let column = |i: usize| {
        let (b, sign, at) = if i < rank { (b1, 1.0, i) } else { (b0, -1.0, i - rank) };
        b.chunks_exact(rank).map(move |outputs| sign * f64::from(outputs[at]))
    };
    let mut sum = 0.0;
    for i in 0..2 * rank {
        for j in 0..2 * rank {
            let n: f64 = row(i).iter().zip(row(j)).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
            let m: f64 = column(i).zip(column(j)).map(|(x, y)| x * y).sum();
            sum += m * n;
        }
    }
    sum.max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::modules::ModuleKind;

    fn values(seed: usize, len: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 37 + seed * 101) % 23) as f32 / 11.0 - 1.0).collect()
    }

    #[test]
    fn adapters_move_their_product() {
        let (rank, inputs, outputs) = (2, 5, 3);
        let (a0, b0) = (values(1, rank * inputs), values(2, outputs * rank));
        let (a1, b1) = (values(3, rank * inputs), values(4, outputs * rank));
        let product = |a: &[f32], b: &[f32], o: usize, i: usize| -> f64 {
            (0..rank).map(|r| f64::from(b[o * rank + r]) * f64::from(a[r * inputs + i])).sum()
        };
        let mut expected = 0.0;
        for o in 0..outputs {
            for i in 0..inputs {
                expected += (product(&a1, &b1, o, i) - product(&a0, &b0, o, i)).powi(2);
            }
        }
        let found = product_change(rank, &a0, &b0, &a1, &b1);
        assert!((found - expected).abs() < 1e-9 * expected, "{found} {expected}");
        assert_eq!(product_change(rank, &a0, &b0, &a0, &b0), 0.0);
    }

    #[test]
    fn tensors_of_a_cell_count_together() {
        let q = ModuleId { layer: 0, kind: ModuleKind::Q };
        let params = [(ParamId::Weight(q), vec![2, 1]), (ParamId::Bias(q), vec![1]), (ParamId::FinalNorm, vec![1])];
        let before = |id| Ok(if id == ParamId::Weight(q) { vec![3.0, 0.0] } else { vec![4.0] });
        let after = |id| {
            Ok(if id == ParamId::Weight(q) {
                vec![4.0, 2.0]
            } else {
                vec![if id == ParamId::FinalNorm { 4.0 } else { 6.0 }]
            })
        };
        let cells = cell_updates(&params, |_| 1.0, before, after).unwrap();
        assert_eq!(cells[&Cell::Module(q)], Update { delta_norm: 3.0, weight_norm: 5.0 });
        assert_eq!(cells[&Cell::FinalNorm], Update { delta_norm: 0.0, weight_norm: 4.0 });
        let text = serde_json::to_string(&PhaseUpdates { phase: "all".into(), cells: cells.clone() }).unwrap();
        assert!(text.contains("\"layers.0.q_proj\":{"), "{text}");
        let phase = serde_json::from_str::<PhaseUpdates>(&text).unwrap();
        assert_eq!(phase.cells, cells);
        assert_eq!(phase.relative(|_| true), Some(3.0 / 41f64.sqrt()));
        assert_eq!((phase.relative(|cell| cell == Cell::FinalNorm), phase.relative(|_| false)), (Some(0.0), None));
    }
}
