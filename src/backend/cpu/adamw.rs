//! Masked AdamW over a module table, and the sums of squares that clip it.

use super::Cpu;
use super::simd::simd_kernel;
use super::storage::{slice, slice_mut};
use crate::backend::{AdamW, AdamWMasked, AdamWModule, FloatElement, SumSquares};
use rayon::prelude::*;

/// Elements of one task, and of one partial sum.
const BLOCK: usize = 1 << 16;

pub(super) fn sum_squares<T: FloatElement>(SumSquares { parts, squares }: SumSquares<'_, Cpu, T>) {
    for (part, square) in parts.iter().zip(slice_mut(squares)) {
        *square = squared_norm(slice(part)) as f32;
    }
}

/// Σ x² in f64: fixed blocks, added in their order.
pub(super) fn squared_norm<T: FloatElement>(x: &[T]) -> f64 {
    let partials: Vec<f64> = x.par_chunks(BLOCK).map(squared_norm_block).collect();
    partials.iter().sum()
}

/// Σ x² of one block in f64.
pub(super) fn squared_norm_block<T: FloatElement>(x: &[T]) -> f64 {
    const AT_HAND: usize = 2048;
    let mut wide = [0.0; AT_HAND];
    let mut total = 0.0;
    for x in x.chunks(AT_HAND) {
        let wide = &mut wide[..x.len()];
        wide.iter_mut().zip(x).for_each(|(wide, x)| *wide = x.to_f32());
        total += squares_f64(wide);
    }
    total
}

simd_kernel! {
    fn squares_f64(_simd, x: &'a [f32]) -> f64 {
        // Squares of f32 are exact in f64, and each sum has its own elements: the same bits on every instruction set.
        let mut sums = [0.0; 32];
        let (rows, tail) = x.as_chunks::<32>();
        for row in rows {
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum += f64::from(*x) * f64::from(*x);
            }
        }
        for (sum, x) in sums.iter_mut().zip(tail) {
            *sum += f64::from(*x) * f64::from(*x);
        }
        sums.iter().sum()
    }
}

/// The factor on all gradients; `None` where the sum of `squares` is not finite.
fn clip_factor(squares: &[f32], max_grad_norm: Option<f32>) -> Option<f32> {
    let total: f64 = squares.iter().map(|s| *s as f64).sum();
    if !total.is_finite() {
        return None;
    }
    Some(max_grad_norm.map_or(1.0, |most| (most as f64 / (total.sqrt() + 1e-6)).min(1.0)) as f32)
}

/// Factors of one module's step.
#[derive(Clone, Copy)]
struct Factors {
    clip: f32,
    beta1: f32,
    beta2: f32,
    keep: f32,
    step_size: f32,
    root_correction2: f32,
    eps: f32,
}

pub(super) fn adamw_masked(AdamWMasked { table, squares, hyper }: AdamWMasked<'_, '_, Cpu>) {
    let Some(clip) = clip_factor(slice(&squares), hyper.max_grad_norm) else { return };
    table.iter_mut().for_each(|module| step(module, clip, &hyper));
}

/// One module's step in the order of `torch.optim.AdamW`.
fn step(module: &mut AdamWModule<'_, Cpu>, clip: f32, hyper: &AdamW) {
    let AdamWModule { weight, grad, m, v, lr, weight_decay } = module;
    let [weight, m, v] = [weight, m, v].map(|tensor| slice_mut(tensor.reborrow()));
    let power = |beta: f32| 1.0 - (beta as f64).powi(hyper.step as i32);
    let factors = Factors {
        clip,
        beta1: hyper.beta1,
        beta2: hyper.beta2,
        keep: (1.0 - *lr as f64 * *weight_decay as f64) as f32,
        step_size: (*lr as f64 / power(hyper.beta1)) as f32,
        root_correction2: power(hyper.beta2).sqrt() as f32,
        eps: hyper.eps,
    };
    let written = weight.par_chunks_mut(BLOCK).zip(m.par_chunks_mut(BLOCK)).zip(v.par_chunks_mut(BLOCK));
    written.zip(slice(grad).par_chunks(BLOCK)).for_each(|(((w, m), v), g)| {
        step_block(w, g, m, v, factors);
    });
}

simd_kernel! {
    fn step_block(_simd, w: &'a mut [f32], g: &'a [f32], m: &'a mut [f32], v: &'a mut [f32], f: Factors) {
        let (rest1, rest2) = (1.0 - f.beta1, 1.0 - f.beta2);
        for (((w, g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
            let g = g * f.clip;
            *m += rest1 * (g - *m);
            *v = f.beta2 * *v + rest2 * g * g;
            let denominator = v.sqrt() / f.root_correction2 + f.eps;
            *w = *w * f.keep - f.step_size * (*m / denominator);
        }
    }
}
