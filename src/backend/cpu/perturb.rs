//! Perturbed copies of a weight at equal relative norm. The generator runs twice, once for ‖n‖ and once for the copies:
//! noise is stored only a block at a time.

use super::adamw::{squared_norm, squared_norm_block};
use super::matrix::{Matrix, Product};
use super::noise::{BLOCK, NoiseBlock};
use super::simd::simd_kernel;
use super::storage::{slice, slice_mut};
use super::wide::{as_type_mut, convert};
use super::{Cpu, Elements};
use crate::backend::{Direction, FloatElement, MoveAlong, NoiseKey, Perturb};
use rayon::prelude::*;

/// Elements of one task.
const TASK: usize = 1 << 15;
pub(super) fn perturb<E: Elements>(op: Perturb<'_, Cpu<E>>) {
    let Perturb { w, squares: known, direction, epsilon, plus, minus } = op;
    let (w, plus, minus) = (slice(&w), slice_mut(plus), minus.map(slice_mut));
    let factor = |squares_n: f64| {
        let squares_w = known.as_ref().map_or_else(|| squared_norm(w), |known| slice(known)[0]);
        let ratio = epsilon as f64 * (squares_w / squares_n).sqrt();
        if squares_n > 0.0 { ratio as f32 } else { 0.0 }
    };
    match direction {
        Direction::Scale => combine(w, plus, minus, |_, _, w, n| convert(w, n), epsilon),
        Direction::Given(n) => {
            let n = slice(&n);
            combine(w, plus, minus, |_, at, w, to| convert(&n[at..at + w.len()], to), factor(squared_norm(n)));
        }
        Direction::Rademacher(key) => {
            combine(w, plus, minus, |draw, at, _, n| draw.signs(key, at, n), factor(w.len() as f64))
        }
        Direction::Gaussian(key) => {
            let squares: Vec<f64> =
                (0..w.len().div_ceil(TASK)).into_par_iter().map(|t| squares(key, t, w.len())).collect();
            combine(w, plus, minus, |draw, at, _, n| draw.normals(key, at, n), factor(squares.iter().sum()));
        }
        Direction::LowRank { key, rank, rows } => {
            let columns = w.len() / rows;
            let (a, b) = low_rank_factors(key, rank, rows, columns);
            let factor = factor(low_rank_squares(&a, &b, rank));
            let (a, b) = (Matrix::rows(&a, rank), Matrix::rows(&b, rank).t());
            // f32 has room for n where the copy goes.
            let mut apart = Vec::new();
            let n = match as_type_mut(plus) {
                Some(n) => n,
                None => {
                    apart.resize(w.len(), 0.0);
                    &mut apart[..]
                }
            };
            Product::new(n, columns, a, b, (rows, columns, rank)).run();
            if apart.is_empty() {
                combine_in_place(w, plus, minus, factor);
            } else {
                let fill = |_: &mut NoiseBlock, at: usize, w: &[E::Float], to: &mut [f32]| {
                    to.copy_from_slice(&apart[at..at + w.len()])
                };
                combine(w, plus, minus, fill, factor);
            }
        }
    }
}

/// Both copies; `fill(buffers, first element, w, n)` fills a block of n.
fn combine<T: FloatElement>(
    w: &[T],
    plus: &mut [T],
    minus: Option<&mut [T]>,
    fill: impl Fn(&mut NoiseBlock, usize, &[T], &mut [f32]) + Sync,
    factor: f32,
) {
    let block = |draw: &mut NoiseBlock, at: usize, w: &[T], plus: &mut [T], minus: Option<&mut [T]>| {
        let mut n = [0.0; BLOCK];
        let n = &mut n[..w.len()];
        fill(draw, at, w, n);
        match minus {
            Some(minus) => add_and_subtract(w, n, plus, minus, factor),
            None => add(w, n, plus, factor),
        }
    };
    let tasks = w.par_chunks(TASK).zip(plus.par_chunks_mut(TASK)).enumerate();
    match minus {
        Some(minus) => tasks.zip(minus.par_chunks_mut(TASK)).for_each(|((t, (w, plus)), minus)| {
            let mut draw = NoiseBlock::new();
            let blocks = w.chunks(BLOCK).zip(plus.chunks_mut(BLOCK)).zip(minus.chunks_mut(BLOCK));
            blocks
                .enumerate()
                .for_each(|(i, ((w, plus), minus))| block(&mut draw, t * TASK + i * BLOCK, w, plus, Some(minus)));
        }),
        None => tasks.for_each(|(t, (w, plus))| {
            let mut draw = NoiseBlock::new();
            let blocks = w.chunks(BLOCK).zip(plus.chunks_mut(BLOCK));
            blocks.enumerate().for_each(|(i, (w, plus))| block(&mut draw, t * TASK + i * BLOCK, w, plus, None));
        }),
    }
}

/// Both copies where `plus` holds n.
fn combine_in_place<T: FloatElement>(w: &[T], plus: &mut [T], minus: Option<&mut [T]>, factor: f32) {
    if let Some(minus) = minus {
        let tasks = w.par_chunks(TASK).zip(plus.par_chunks(TASK)).zip(minus.par_chunks_mut(TASK));
        tasks.for_each(|((w, n), minus)| {
            add(w, n, minus, -factor);
        });
    }
    w.par_chunks(TASK).zip(plus.par_chunks_mut(TASK)).for_each(|(w, n)| {
        add_to_noise(w, n, factor);
    });
}

simd_kernel! {
    fn add<T: FloatElement, N: FloatElement>(_simd, w: &'a [T], n: &'a [N], to: &'a mut [T], factor: f32) {
        for ((to, w), n) in to.iter_mut().zip(w).zip(n) {
            *to = T::from_f32(n.to_f32().mul_add(factor, w.to_f32()));
        }
    }
}

simd_kernel! {
    fn add_to_noise<T: FloatElement>(_simd, w: &'a [T], n: &'a mut [T], factor: f32) {
        for (n, w) in n.iter_mut().zip(w) {
            *n = T::from_f32(n.to_f32().mul_add(factor, w.to_f32()));
        }
    }
}

simd_kernel! {
    fn add_and_subtract<T: FloatElement>(
        _simd,
        w: &'a [T],
        n: &'a [f32],
        plus: &'a mut [T],
        minus: &'a mut [T],
        factor: f32,
    ) {
        for (((plus, minus), w), n) in plus.iter_mut().zip(minus).zip(w).zip(n) {
            *plus = T::from_f32(n.mul_add(factor, w.to_f32()));
            *minus = T::from_f32(n.mul_add(-factor, w.to_f32()));
        }
    }
}

/// Σ n² over one task.
fn squares(key: NoiseKey, task: usize, len: usize) -> f64 {
    let mut draw = NoiseBlock::new();
    let mut n = [0.0; BLOCK];
    let end = len.min((task + 1) * TASK);
    (task * TASK..end)
        .step_by(BLOCK)
        .map(|at| {
            let n = &mut n[..BLOCK.min(end - at)];
            draw.normals(key, at, n);
            squared_norm_block(n)
        })
        .sum()
}

/// A [rows, rank] = elements 0.. of the stream; B [columns, rank] = elements from the next multiple of 4.
fn low_rank_factors(key: NoiseKey, rank: usize, rows: usize, columns: usize) -> (Vec<f32>, Vec<f32>) {
    let draw = |first: usize, len: usize| {
        let mut values = vec![0.0; len];
        values
            .par_chunks_mut(BLOCK)
            .enumerate()
            .for_each(|(i, to)| NoiseBlock::new().normals(key, first + i * BLOCK, to));
        values
    };
    let a = draw(0, rows * rank);
    let b = draw((rows * rank).next_multiple_of(4), columns * rank);
    (a, b)
}

/// ‖A·Bᵀ‖² = Σ (AᵀA)∘(BᵀB).
fn low_rank_squares(a: &[f32], b: &[f32], rank: usize) -> f64 {
    let gram = |m: &[f32]| {
        let mut gram = vec![0.0f64; rank * rank];
        for row in m.chunks_exact(rank) {
            for (gram, x) in gram.chunks_exact_mut(rank).zip(row) {
                gram.iter_mut().zip(row).for_each(|(g, y)| *g += *x as f64 * *y as f64);
            }
        }
        gram
    };
    gram(a).iter().zip(gram(b)).map(|(a, b)| a * b).sum()
}

pub(super) fn move_along<E: Elements>(MoveAlong { x, direction, squares, rho }: MoveAlong<'_, Cpu<E>>) {
    let squares = f64::from(slice(&squares)[0]);
    let factor = if squares > 0.0 { (f64::from(rho) / squares.sqrt()) as f32 } else { 0.0 };
    let parts = slice_mut(x).par_chunks_mut(TASK).zip(slice(&direction).par_chunks(TASK));
    parts.for_each(|(x, direction)| add_scaled(x, direction, factor));
}

simd_kernel! {
    fn add_scaled<T: FloatElement>(_simd, x: &'a mut [T], direction: &'a [T], factor: f32) {
        for (x, direction) in x.iter_mut().zip(direction) {
            *x = T::from_f32(x.to_f32() + factor * direction.to_f32());
        }
    }
}
