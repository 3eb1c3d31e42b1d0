//! Masked AdamW over a module table, and the sums of squares that clip it.

use super::simd::vectorized;
use crate::backend::{AdamW, FloatElement};
use rayon::prelude::*;

/// Elements of one task, and of one partial sum.
const BLOCK: usize = 1 << 16;
/// Sums that advance side by side.
const LANES: usize = 64;

/// Σ x² in f64: fixed blocks, added in their order.
pub(super) fn sum_squares<T: FloatElement>(x: &[T]) -> f64 {
    let partials: Vec<f64> = x.par_chunks(BLOCK).map(|x| vectorized(|| sum_squares_block(x))).collect();
    partials.iter().sum()
}

/// Σ x² of one block.
#[inline(always)]
pub(super) fn sum_squares_block<T: FloatElement>(x: &[T]) -> f64 {
    let mut sums = [0.0f64; LANES];
    let (chunks, tail) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (s, x) in sums.iter_mut().zip(chunk) {
            let x = x.to_f32() as f64;
            *s += x * x;
        }
    }
    for (s, x) in sums.iter_mut().zip(tail) {
        let x = x.to_f32() as f64;
        *s += x * x;
    }
    sums.iter().sum()
}

/// The factor on all gradients; `None` where the sum of `squares` is not finite.
pub(super) fn clip_factor(squares: &[f32], max_grad_norm: Option<f32>) -> Option<f32> {
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

/// One module's step in the order of `torch.optim.AdamW`: w ·= 1 − lr·decay; m, v; w −= lr/(1−β₁ᵗ) · m / (√v/√(1−β₂ᵗ) + ε).
#[allow(clippy::too_many_arguments)]
pub(super) fn step(
    weight: &mut [f32],
    grad: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    lr: f32,
    weight_decay: f32,
    clip: f32,
    hyper: &AdamW,
) {
    let power = |beta: f32| 1.0 - (beta as f64).powi(hyper.step as i32);
    let factors = Factors {
        clip,
        beta1: hyper.beta1,
        beta2: hyper.beta2,
        keep: (1.0 - lr as f64 * weight_decay as f64) as f32,
        step_size: (lr as f64 / power(hyper.beta1)) as f32,
        root_correction2: power(hyper.beta2).sqrt() as f32,
        eps: hyper.eps,
    };
    let written = weight.par_chunks_mut(BLOCK).zip(m.par_chunks_mut(BLOCK)).zip(v.par_chunks_mut(BLOCK));
    written.zip(grad.par_chunks(BLOCK)).for_each(|(((w, m), v), g)| {
        vectorized(
            #[inline(always)]
            || step_block(w, g, m, v, factors),
        );
    });
}

#[inline(always)]
fn step_block(w: &mut [f32], g: &[f32], m: &mut [f32], v: &mut [f32], f: Factors) {
    let (rest1, rest2) = (1.0 - f.beta1, 1.0 - f.beta2);
    for (((w, g), m), v) in w.iter_mut().zip(g).zip(m).zip(v) {
        let g = g * f.clip;
        *m += rest1 * (g - *m);
        *v = f.beta2 * *v + rest2 * g * g;
        let denominator = v.sqrt() / f.root_correction2 + f.eps;
        *w = *w * f.keep - f.step_size * (*m / denominator);
    }
}
