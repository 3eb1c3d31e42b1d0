//! Cross-entropy of rows of logits, the gradient in place.

use super::simd::{exp, max, simd_kernel, sum};
use super::storage::{slice, slice_mut};
use super::wide::{widen, with_f32};
use super::{Cpu, Elements};
use crate::backend::{CrossEntropy, FloatElement, IGNORE};
use rayon::prelude::*;

/// Exponentials summed in f32 before they join the f64 sum of a row.
const BLOCK: usize = 1024;

/// losses[row] = log Σ exp(logits) − logits[target]; with `scale`, logits become scale·(softmax − onehot).
pub(super) fn cross_entropy<E: Elements>(op: CrossEntropy<'_, Cpu<E>>) {
    let CrossEntropy { logits, targets, losses, vocab, scale } = op;
    let (logits, targets, losses) = (slice_mut(logits), slice(&targets), slice_mut(losses));
    let rows = logits.par_chunks_mut(vocab).zip(targets).zip(losses);
    rows.for_each_init(Vec::new, |space, ((row, &target), loss)| {
        if target == IGNORE {
            *loss = 0.0;
            if scale.is_some() {
                row.fill(bytemuck::Zeroable::zeroed());
            }
            return;
        }
        let target = target as usize;
        let chosen = row[target].to_f32();
        let (top, total) = match scale {
            None => log_sum_exp(widen(row, space)),
            Some(scale) => with_f32(row, space, |row| {
                let (top, total) = exponentials(row);
                scale_row(row, (scale as f64 / total) as f32);
                row[target] -= scale;
                (top, total)
            }),
        };
        *loss = (total.ln() - (chosen as f64 - top as f64)) as f32;
    });
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
