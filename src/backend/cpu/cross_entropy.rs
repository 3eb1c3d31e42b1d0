//! Cross-entropy of rows of logits, the gradient in place.

use super::simd::{exp, max, simd_kernel, sum};
use super::storage::{slice, slice_mut};
use super::wide::{widen, with_f32};
use super::{Cpu, Elements};
use crate::backend::{CrossEntropy, FloatElement, IGNORE, LossTerms};
use rayon::prelude::*;

/// Exponentials summed in f32 before they join the f64 sum of a row.
const BLOCK: usize = 1024;

/// losses[row] = log Σ exp(logits) − logits[target]; with `scale`, logits become scale·(softmax − onehot), or what the
/// terms make of it.
pub(super) fn cross_entropy<E: Elements>(op: CrossEntropy<'_, Cpu<E>>) {
    let CrossEntropy { logits, targets, losses, vocab, scale, terms } = op;
    let (logits, targets, losses) = (slice_mut(logits), slice(&targets), slice_mut(losses));
    let rows = logits.par_chunks_mut(vocab).zip(targets).zip(losses).enumerate();
    rows.for_each_init(Vec::new, |space, (i, ((row, &target), loss))| {
        if target == IGNORE {
            *loss = 0.0;
            if scale.is_some() {
                row.fill(bytemuck::Zeroable::zeroed());
            }
            return;
        }
        let target = target as usize;
        let chosen = row[target].to_f32();
        let loss_of = |top: f32, total: f64| (total.ln() - (chosen as f64 - top as f64)) as f32;
        let (top, total) = match scale {
            None => log_sum_exp(widen(row, space)),
            Some(scale) => with_f32(row, space, |row| {
                let (top, total) = exponentials(row);
                let terms = terms.as_ref().map(|terms| RowTerms::new(terms, i, loss_of(top, total)));
                let none = RowTerms { weight: 1.0, divergence: 0.0, ids: &[], probs: &[] };
                let RowTerms { weight, divergence, ids, probs } = terms.unwrap_or(none);
                let softmax = weight + divergence * probs.iter().map(|p| f64::from(*p)).sum::<f64>();
                scale_row(row, (scale as f64 * softmax / total) as f32);
                row[target] -= (f64::from(scale) * weight) as f32;
                for (id, p) in ids.iter().zip(probs).filter(|(_, p)| **p != 0.0) {
                    row[*id as usize] -= (f64::from(scale) * divergence * f64::from(*p)) as f32;
                }
                (top, total)
            }),
        };
        *loss = loss_of(top, total);
    });
}

/// [`LossTerms`] of a row.
struct RowTerms<'a> {
    /// Of the cross-entropy's gradient.
    weight: f64,
    /// Of the divergence from the teacher.
    divergence: f64,
    ids: &'a [u32],
    probs: &'a [f32],
}

impl<'a> RowTerms<'a> {
    fn new<E: Elements>(terms: &'a LossTerms<'_, Cpu<E>>, row: usize, loss: f32) -> Self {
        let (beta, reference) = (f64::from(slice(&terms.beta)[row]), f64::from(slice(&terms.reference)[row]));
        let own = row * terms.width()..(row + 1) * terms.width();
        Self {
            weight: 2.0 / (1.0 + (beta * (reference - f64::from(loss))).exp()),
            divergence: f64::from(terms.distil),
            ids: &slice(&terms.ids)[own.clone()],
            probs: &slice(&terms.probs)[own],
        }
    }
}

simd_kernel! {
    /// (maximum, Σ exp(x − maximum)).
    fn log_sum_exp(simd, row: &'a [f32]) -> (f32, f64) {
        let top = max(simd, row);
        let mut total = 0.0;
        let mut block = [0.0; BLOCK];
        for row in row.chunks(BLOCK) {
            let block = &mut block[..row.len()];
            exp_into(row, block, top);
            total += sum(simd, block) as f64;
        }
        (top, total)
    }
}

simd_kernel! {
    /// The same, leaving the exponentials in the row.
    fn exponentials(simd, row: &'a mut [f32]) -> (f32, f64) {
        let top = max(simd, row);
        let mut total = 0.0;
        for block in row.chunks_mut(BLOCK) {
            for x in block.iter_mut() {
                *x = exp(*x - top);
            }
            total += sum(simd, block) as f64;
        }
        (top, total)
    }
}

simd_kernel! {
    fn scale_row(_simd, row: &'a mut [f32], factor: f32) {
        row.iter_mut().for_each(|x| *x *= factor);
    }
}

#[inline(always)]
fn exp_into(from: &[f32], to: &mut [f32], offset: f32) {
    for (to, x) in to.iter_mut().zip(from) {
        *to = exp(x - offset);
    }
}
