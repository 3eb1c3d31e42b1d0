//! RMSNorm.

use super::matrix::Store;
use super::simd::{dot, simd_kernel};
use super::storage::{slice, slice_mut};
use super::wide::{widen, with_f32};
use super::{Cpu, Elements};
use crate::backend::{FloatElement, RmsNorm, RmsNormBackward};
use rayon::prelude::*;

/// Elements of one task, and the rows of one partial sum of a weight gradient.
const BLOCK: usize = 1 << 15;

fn rows_a_block(width: usize) -> usize {
    (BLOCK / width).max(1)
}

pub(super) fn rmsnorm<E: Elements>(RmsNorm { x, weight, y, rstd, eps }: RmsNorm<'_, Cpu<E>>) {
    let (x, weight, y, rstd) = (slice(&x), slice(&weight), slice_mut(y), rstd.map(slice_mut));
    let width = weight.len();
    let rows = rows_a_block(width);
    let blocks = x.par_chunks(rows * width).zip(y.par_chunks_mut(rows * width));
    let task = |x: &[E::Float], y: &mut [E::Float], mut rstd: Option<&mut [f32]>| {
        let mut space = Vec::new();
        for (i, (x, y)) in x.chunks_exact(width).zip(y.chunks_exact_mut(width)).enumerate() {
            let r = forward_row(widen(x, &mut space), weight, y, eps);
            if let Some(rstd) = &mut rstd {
                rstd[i] = r;
            }
        }
    };
    match rstd {
        Some(rstd) => blocks.zip(rstd.par_chunks_mut(rows)).for_each(|((x, y), rstd)| task(x, y, Some(rstd))),
        None => blocks.for_each(|(x, y)| task(x, y, None)),
    }
}

simd_kernel! {
    /// Gives 1/rms. The normalised value is rounded before the weight multiplies it.
    fn forward_row<T: FloatElement>(simd, x: &'a [f32], weight: &'a [T], y: &'a mut [T], eps: f32) -> f32 {
        let r = 1.0 / (dot(simd, x, x) / x.len() as f32 + eps).sqrt();
        scale_row(x, weight, y, r);
        r
    }
}

#[inline(always)]
fn scale_row<T: FloatElement>(x: &[f32], weight: &[T], y: &mut [T], r: f32) {
    for ((y, x), w) in y.iter_mut().zip(x).zip(weight) {
        *y = T::from_f32(T::from_f32(x * r).to_f32() * w.to_f32());
    }
}

/// dweight is summed over fixed blocks of rows in their order.
pub(super) fn rmsnorm_backward<E: Elements>(op: RmsNormBackward<'_, Cpu<E>>) {
    let (store_dx, accumulate_dweight) = (Store::of(op.accumulate_dx), op.accumulate_dweight);
    let (dy, x, weight, rstd) = (slice(&op.dy), slice(&op.x), slice(&op.weight), slice(&op.rstd));
    let (dx, dweight) = (op.dx.map(slice_mut), op.dweight.map(slice_mut));
    let width = weight.len();
    let rows = rows_a_block(width);
    let mut space = Vec::new();
    let weight = widen(weight, &mut space);
    let wanted = dweight.is_some();
    let task = |dy: &[E::Float], x: &[E::Float], rstd: &[f32], mut dx: Option<&mut [E::Float]>| {
        let mut sums = vec![0.0; if wanted { width } else { 0 }];
        let [mut dy_space, mut x_space, mut dx_space] = [const { Vec::new() }; 3];
        for (i, (dy, x)) in dy.chunks_exact(width).zip(x.chunks_exact(width)).enumerate() {
            let (dy, x) = (widen(dy, &mut dy_space), widen(x, &mut x_space));
            if let Some(dx) = &mut dx {
                let dx = &mut dx[i * width..][..width];
                with_f32(dx, &mut dx_space, |dx| input_row(dy, x, weight, rstd[i], dx, store_dx));
            }
            if wanted {
                weight_row(dy, x, rstd[i], &mut sums);
            }
        }
        sums
    };
    let read = dy.par_chunks(rows * width).zip(x.par_chunks(rows * width)).zip(rstd.par_chunks(rows));
    let partials: Vec<Vec<f32>> = match dx {
        Some(dx) => {
            let blocks = read.zip(dx.par_chunks_mut(rows * width));
            blocks.map(|(((dy, x), rstd), dx)| task(dy, x, rstd, Some(dx))).collect()
        }
        None if wanted => read.map(|((dy, x), rstd)| task(dy, x, rstd, None)).collect(),
        None => return,
    };
    if let Some(dweight) = dweight {
        for (i, dweight) in dweight.iter_mut().enumerate() {
            let before = if accumulate_dweight { dweight.to_f32() } else { 0.0 };
            *dweight = E::Grad::from_f32(partials.iter().fold(before, |sum, partial| sum + partial[i]));
        }
    }
}

simd_kernel! {
    fn weight_row(_simd, dy: &'a [f32], x: &'a [f32], r: f32, sums: &'a mut [f32]) {
        for ((s, dy), x) in sums.iter_mut().zip(dy).zip(x) {
            *s += dy * (x * r);
        }
    }
}

simd_kernel! {
    fn input_row(simd, dy: &'a [f32], x: &'a [f32], weight: &'a [f32], r: f32, dx: &'a mut [f32], store: Store) {
        let projection = dot3(simd, dy, weight, x) * r * r / x.len() as f32;
        match store {
            Store::Add => store_input_row::<true>(dy, x, weight, dx, r, projection),
            Store::Overwrite => store_input_row::<false>(dy, x, weight, dx, r, projection),
        }
    }
}

#[inline(always)]
fn store_input_row<const ADD: bool>(dy: &[f32], x: &[f32], weight: &[f32], dx: &mut [f32], r: f32, projection: f32) {
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
