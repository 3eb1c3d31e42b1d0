//! Rotary position embedding.

use super::simd::simd_kernel;
use super::storage::{slice, slice_mut};
use super::{Cpu, Elements};
use crate::backend::{FloatElement, Rope};
use rayon::prelude::*;

/// Elements of one task.
const BLOCK: usize = 1 << 15;

pub(super) fn rope<E: Elements>(op: Rope<'_, Cpu<E>>) {
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
    fn rotate_rows<T: FloatElement>(
        _simd,
        x: &'a mut [T],
        table: &'a [f32],
        positions: &'a [u32],
        head_dim: usize,
        sign: f32,
    ) {
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
fn rotate<T: FloatElement>(low: &mut [T], high: &mut [T], cosines: &[f32], sines: &[f32], sign: f32) {
    for (((low, high), c), s) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
        let (a, b, s) = (low.to_f32(), high.to_f32(), s * sign);
        (*low, *high) = (T::from_f32(a * c - b * s), T::from_f32(b * c + a * s));
    }
}
