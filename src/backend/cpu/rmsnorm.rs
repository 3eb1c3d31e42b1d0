//! RMSNorm.

use super::Cpu;
use super::simd::{dot, simd_kernel};
use super::storage::{slice, slice_mut};
use crate::backend::{RmsNorm, RmsNormBackward};
use rayon::prelude::*;

/// Elements of one task, and the rows of one partial sum of a weight gradient.
const BLOCK: usize = 1 << 15;

fn rows_a_block(width: usize) -> usize {
    (BLOCK / width).max(1)
}

pub(super) fn rmsnorm(RmsNorm { x, weight, y, rstd, eps }: RmsNorm<'_, Cpu>) {
    let (x, weight, y, rstd) = (slice(&x), slice(&weight), slice_mut(y), rstd.map(slice_mut));
    let width = weight.len();
    let rows = rows_a_block(width);
    let blocks = x.par_chunks(rows * width).zip(y.par_chunks_mut(rows * width));
    match rstd {
        Some(rstd) => {
            blocks
                .zip(rstd.par_chunks_mut(rows))
                .for_each(|((x, y), r)| forward_rows(x, weight, y, Some(r), width, eps));
        }
        None => blocks.for_each(|(x, y)| forward_rows(x, weight, y, None, width, eps)),
    }
}

simd_kernel! {
    fn forward_rows(simd, x: &'a [f32], weight: &'a [f32], y: &'a mut [f32], rstd: Option<&'a mut [f32]>, width: usize, eps: f32) {
        let mut rstd = rstd;
        for (i, (x, y)) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).enumerate() {
            let r = 1.0 / (dot(simd, x, x) / width as f32 + eps).sqrt();
            scale_row(x, weight, y, r);
            if let Some(rstd) = &mut rstd {
                rstd[i] = r;
            }
        }
    }
}

#[inline(always)]
fn scale_row(x: &[f32], weight: &[f32], y: &mut [f32], r: f32) {
    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
        *y = x * r * w;
    }
}

/// dweight is summed over fixed blocks of rows in their order.
pub(super) fn rmsnorm_backward(op: RmsNormBackward<'_, Cpu>) {
    let RmsNormBackward { accumulate_dx, accumulate_dweight, .. } = op;
    let (dy, x, weight, rstd) = (slice(&op.dy), slice(&op.x), slice(&op.weight), slice(&op.rstd));
    let (dx, dweight) = (op.dx.map(slice_mut), op.dweight.map(slice_mut));
    let width = weight.len();
    let rows = rows_a_block(width);
    let read = dy.par_chunks(rows * width).zip(x.par_chunks(rows * width)).zip(rstd.par_chunks(rows));
    let partial = |dy: &[f32], x: &[f32], rstd: &[f32]| {
        let mut sums = vec![0.0; width];
        weight_rows(dy, x, rstd, &mut sums);
        sums
    };
    let partials: Vec<Vec<f32>> = match (dx, &dweight) {
        (Some(dx), wanted) => read
            .zip(dx.par_chunks_mut(rows * width))
            .filter_map(|(((dy, x), rstd), dx)| {
                input_rows(dy, x, weight, rstd, dx, width, accumulate_dx);
                wanted.is_some().then(|| partial(dy, x, rstd))
            })
            .collect(),
        (None, Some(_)) => read.map(|((dy, x), rstd)| partial(dy, x, rstd)).collect(),
        (None, None) => return,
    };
    if let Some(dweight) = dweight {
        if !accumulate_dweight {
            dweight.fill(0.0);
        }
        for sums in &partials {
            dweight.iter_mut().zip(sums).for_each(|(d, s)| *d += s);
        }
    }
}

simd_kernel! {
    fn weight_rows(_simd, dy: &'a [f32], x: &'a [f32], rstd: &'a [f32], sums: &'a mut [f32]) {
        let width = sums.len();
        for ((dy, x), r) in dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(rstd) {
            for ((s, dy), x) in sums.iter_mut().zip(dy).zip(x) {
                *s += dy * (x * r);
            }
        }
    }
}

simd_kernel! {
    fn input_rows(
        simd,
        dy: &'a [f32],
        x: &'a [f32],
        weight: &'a [f32],
        rstd: &'a [f32],
        dx: &'a mut [f32],
        width: usize,
        accumulate: bool,
    ) {
        let rows = dy.chunks_exact(width).zip(x.chunks_exact(width)).zip(dx.chunks_exact_mut(width)).zip(rstd);
        for (((dy, x), dx), &r) in rows {
            let projection = dot3(simd, dy, weight, x) * r * r / width as f32;
            if accumulate {
                input_row::<true>(dy, x, weight, dx, r, projection);
            } else {
                input_row::<false>(dy, x, weight, dx, r, projection);
            }
        }
    }
}

#[inline(always)]
fn input_row<const ADD: bool>(dy: &[f32], x: &[f32], weight: &[f32], dx: &mut [f32], r: f32, projection: f32) {
    for (((dx, dy), x), w) in dx.iter_mut().zip(dy).zip(x).zip(weight) {
        let value = r * (dy * w - x * projection);
        *dx = if ADD { *dx + value } else { value };
    }
}

/// Σ aᵢ·bᵢ·cᵢ.
#[inline(always)]
fn dot3<S: pulp::Simd>(simd: S, a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let (a, a_tail) = S::as_simd_f32s(a);
    let (b, b_tail) = S::as_simd_f32s(b);
    let (c, c_tail) = S::as_simd_f32s(c);
    let mut even = simd.splat_f32s(0.0);
    let mut odd = even;
    let (a2, a1) = a.as_chunks::<2>();
    let (b2, b1) = b.as_chunks::<2>();
    let (c2, c1) = c.as_chunks::<2>();
    for ((a, b), c) in a2.iter().zip(b2).zip(c2) {
        even = simd.mul_add_f32s(simd.mul_f32s(a[0], b[0]), c[0], even);
        odd = simd.mul_add_f32s(simd.mul_f32s(a[1], b[1]), c[1], odd);
    }
    for ((a, b), c) in a1.iter().zip(b1).zip(c1) {
        even = simd.mul_add_f32s(simd.mul_f32s(*a, *b), *c, even);
    }
    let tail = simd.mul_f32s(simd.partial_load_f32s(a_tail), simd.partial_load_f32s(b_tail));
    odd = simd.mul_add_f32s(tail, simd.partial_load_f32s(c_tail), odd);
    simd.reduce_sum_f32s(simd.add_f32s(even, odd))
}
