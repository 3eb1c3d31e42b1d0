//! The next token from a row of logits. Draws are exact: the CUDA backend takes the same token of the same logits
//! (`kernels/sampling.cu`).

use super::simd::simd_kernel;
use super::storage::{slice, slice_mut};
use super::wide::widen;
use super::{Cpu, Elements};
use crate::backend::{Sample, Sampling};
use rayon::prelude::*;

pub(super) fn sample<E: Elements>(Sample { logits, uniforms, tokens, vocab, sampling }: Sample<'_, Cpu<E>>) {
    let (logits, uniforms, tokens) = (slice(&logits), slice(&uniforms), slice_mut(tokens));
    logits.par_chunks(vocab).zip(uniforms).zip(tokens).for_each_init(Vec::new, |space, ((row, &uniform), token)| {
        let row = widen(row, space);
        *token = if sampling.temperature > 0.0 { draw(row, uniform, sampling) } else { greedy(row) };
    });
}

/// The largest logit; −∞ where all are NaN.
fn largest(row: &[f32]) -> f32 {
    let mut tops = [f32::NEG_INFINITY; 16];
    for chunk in row.chunks(tops.len()) {
        for (top, x) in tops.iter_mut().zip(chunk) {
            *top = if *x > *top { *x } else { *top };
        }
    }
    tops.into_iter().fold(f32::NEG_INFINITY, f32::max)
}

/// The first of the largest logits; 0 where all are NaN.
fn greedy(row: &[f32]) -> u32 {
    let top = largest(row);
    row.iter().position(|x| *x == top).unwrap_or(0) as u32
}

/// Orders logits as numbers: −0 is 0, NaN is below −∞.
fn key(x: f32) -> u32 {
    let bits = (x + 0.0).to_bits();
    match (x.is_nan(), x < 0.0) {
        (true, _) => 0,
        (_, true) => !bits,
        _ => bits | 1 << 31,
    }
}

/// log₂ of the weight of the most probable token.
const WEIGHT_BITS: i32 = 40;

simd_kernel! {
    fn weigh(_simd, row: &'a [f32], top: f32, scale: f32, weights: &'a mut [u64]) {
        for (weight, x) in weights.iter_mut().zip(row) {
            *weight = weight_of(*x, top, scale);
        }
    }
}

/// A probability as an integer: the whole part of 2⁴⁰·2^((x − top)·scale), so that sums are exact and the same in any
/// order. 2^z = 2ⁿ·2^f, n the nearest integer; 2^f by its Taylor series, to 1.2e-7. 0 for NaN.
#[inline(always)]
#[allow(clippy::approx_constant, clippy::excessive_precision)] // Coefficients, in decimal.
fn weight_of(x: f32, top: f32, scale: f32) -> u64 {
    /// Added and subtracted, it rounds to an integer, ties to even.
    const ROUND: f32 = 12_582_912.0;
    let z = (x - top) * scale;
    if z.is_nan() || z < -WEIGHT_BITS as f32 {
        return 0;
    }
    let n = (z + ROUND) - ROUND;
    let f = z - n;
    let power = 1.540_353e-4_f32
        .mul_add(f, 1.333_355_8e-3)
        .mul_add(f, 9.618_129e-3)
        .mul_add(f, 5.550_410_9e-2)
        .mul_add(f, 2.402_265_1e-1)
        .mul_add(f, 6.931_471_8e-1)
        .mul_add(f, 1.0);
    (power * f32::from_bits(((127 + WEIGHT_BITS + n as i32) as u32) << 23)) as u64
}

/// Of the smallest set of most probable tokens (of equals, the lower ids) whose probability reaches `top_p`, the first
/// in the order of the ids at which the sum of probabilities exceeds uniform · (probability of the set). Greedy where
/// the largest logit is not finite.
fn draw(row: &[f32], uniform: f32, sampling: Sampling) -> u32 {
    let mut weights = vec![0; row.len()];
    weigh(row, largest(row), sampling.exponent_scale(), &mut weights);
    let total: u64 = weights.iter().sum();
    if total == 0 {
        return greedy(row);
    }
    if sampling.top_p >= 1.0 {
        return pick(0..row.len() as u32, &weights, uniform, total);
    }
    let wanted = ((sampling.top_p as f64 * total as f64).ceil() as u64).clamp(1, total);
    let by_rank = |a: &u32, b: &u32| key(row[*b as usize]).cmp(&key(row[*a as usize])).then(a.cmp(b));
    let mut order: Vec<u32> = (0..row.len() as u32).collect();
    // The nucleus is nearly always small: sort a growing head of the ranking until it holds the wanted mass.
    let mut head = 256;
    loop {
        head = head.min(order.len());
        if head < order.len() {
            order.select_nth_unstable_by(head, by_rank);
        }
        order[..head].sort_unstable_by(by_rank);
        let mut mass = 0;
        let reached = order[..head].iter().position(|&token| {
            mass += weights[token as usize];
            mass >= wanted
        });
        if let Some(last) = reached {
            let members = &mut order[..=last];
            members.sort_unstable();
            return pick(members.iter().copied(), &weights, uniform, mass);
        }
        head *= 8;
    }
}

/// The first token at which the sum of weights exceeds uniform · mass, where `mass` is the sum of them all.
fn pick(mut tokens: impl Iterator<Item = u32>, weights: &[u64], uniform: f32, mass: u64) -> u32 {
    let goal = ((uniform as f64 * mass as f64) as u64).min(mass - 1);
    let mut sum = 0;
    let drawn = tokens.find(|&token| {
        sum += weights[token as usize];
        sum > goal
    });
    drawn.expect("a goal below the sum")
}
