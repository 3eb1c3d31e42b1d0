//! Rotary position embedding.

use super::Cpu;
use super::simd::simd_kernel;
use super::storage::{slice, slice_mut};
use crate::backend::Rope;
use rayon::prelude::*;

/// Elements of one task.
const BLOCK: usize = 1 << 15;

pub(super) fn rope(op: Rope<'_, Cpu>) {
    let width = op.heads() * op.head_dim;
    let Rope { head_dim, inverse, .. } = op;
    let (x, table, positions) = (slice_mut(op.x), slice(&op.table), slice(&op.positions));
    let rows = (BLOCK / width.max(1)).max(1);
    let sign = if inverse { -1.0 } else { 1.0 };
    x.par_chunks_mut(rows * width).zip(positions.par_chunks(rows)).for_each(|(x, positions)| {
        rotate_rows(x, table, positions, head_dim, sign);
    });
}

simd_kernel! {
    fn rotate_rows(_simd, x: &'a mut [f32], table: &'a [f32], positions: &'a [u32], head_dim: usize, sign: f32) {
        let width = x.len() / positions.len();
        for (x, &position) in x.chunks_exact_mut(width).zip(positions) {
            let row = &table[position as usize * head_dim..][..head_dim];
            let (cosines, sines) = row.split_at(head_dim / 2);
            for x in x.chunks_exact_mut(head_dim) {
                let (low, high) = x.split_at_mut(head_dim / 2);
                rotate(low, high, cosines, sines, sign);
            }
        }
    }
}

#[inline(always)]
fn rotate(low: &mut [f32], high: &mut [f32], cosines: &[f32], sines: &[f32], sign: f32) {
    for (((a, b), c), s) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
        let s = s * sign;
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}
