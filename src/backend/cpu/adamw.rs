//! Masked AdamW over a module table, and the sums of squares that clip it.

use super::noise::{BLOCK as NOISE, Quads, fill_words};
use super::simd::simd_kernel;
use super::storage::{slice, slice_mut};
use super::wide::{as_type, as_type_mut, convert};
use super::{Cpu, Elements};
use crate::backend::{
    AdamW, AdamWMasked, AdamWModule, FloatElement, MeanRow, ProximalGradients, ProximalRow, Rounding, SumSquares,
    UpdateMeans,
};
use half::bf16;
use rayon::prelude::*;

/// Elements of one task, and of one partial sum.
const BLOCK: usize = 1 << 16;
/// Elements per inner block: one block of Philox words rounds two elements per word.
const AT_HAND: usize = 2 * NOISE;

pub(super) fn sum_squares<E: Elements, T: FloatElement>(SumSquares { parts, squares }: SumSquares<'_, Cpu<E>, T>) {
    let parts: Vec<&[T]> = parts.iter().map(slice).collect();
    let blocks: Vec<&[T]> = parts.iter().flat_map(|part| part.chunks(BLOCK)).collect();
    let partials: Vec<f64> = blocks.into_par_iter().map(squared_norm_block).collect();
    let mut partials = partials.into_iter();
    for (part, square) in parts.iter().zip(slice_mut(squares)) {
        *square = partials.by_ref().take(part.len().div_ceil(BLOCK)).sum::<f64>() as f32;
    }
}

/// Σ x² in f64: fixed blocks, added in their order.
pub(super) fn squared_norm<T: FloatElement>(x: &[T]) -> f64 {
    let partials: Vec<f64> = x.par_chunks(BLOCK).map(squared_norm_block).collect();
    partials.iter().sum()
}

/// Σ x² of one block in f64.
pub(super) fn squared_norm_block<T: FloatElement>(x: &[T]) -> f64 {
    x.chunks(2048).map(squares_f64).sum()
}

simd_kernel! {
    fn squares_f64<T: FloatElement>(_simd, x: &'a [T]) -> f64 {
        // Squares of f32 are exact in f64, and each sum has its own elements: the same bits on every instruction set.
        let mut sums = [0.0; 32];
        let (rows, tail) = x.as_chunks::<32>();
        for row in rows {
            for (sum, x) in sums.iter_mut().zip(row) {
                *sum += f64::from(x.to_f32()) * f64::from(x.to_f32());
            }
        }
        for (sum, x) in sums.iter_mut().zip(tail) {
            *sum += f64::from(x.to_f32()) * f64::from(x.to_f32());
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

pub(super) fn adamw_masked<E: Elements>(AdamWMasked { table, squares, hyper }: AdamWMasked<'_, '_, Cpu<E>>) {
    let Some(clip) = clip_factor(slice(&squares), hyper.max_grad_norm) else { return };
    table.iter_mut().enumerate().for_each(|(row, module)| step(row, module, clip, &hyper));
}

/// One module's step in the order of `torch.optim.AdamW`.
fn step<E: Elements>(row: usize, module: &mut AdamWModule<'_, Cpu<E>>, clip: f32, hyper: &AdamW) {
    let AdamWModule { weight, grad, m, v, lr, weight_decay } = module;
    let (weight, grad) = (slice_mut(weight.reborrow()), slice(grad));
    let [m, v] = [m, v].map(|tensor| slice_mut(tensor.reborrow()));
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
    let stream = |tensor: u64| u64::from(hyper.step) << 32 | tensor << 30 | row as u64;
    let draws = [0, 1, 2].map(|tensor| {
        (hyper.rounding == Rounding::Stochastic).then_some(Draws { seed: hyper.seed, stream: stream(tensor) })
    });
    let written = weight.par_chunks_mut(BLOCK).zip(m.par_chunks_mut(BLOCK)).zip(v.par_chunks_mut(BLOCK));
    written.zip(grad.par_chunks(BLOCK)).enumerate().for_each(|(block, (((w, m), v), g))| {
        let [mut wide_w, mut wide_m, mut wide_v, mut wide_g] = [[0.0; AT_HAND]; 4];
        let parts = w.chunks_mut(AT_HAND).zip(m.chunks_mut(AT_HAND)).zip(v.chunks_mut(AT_HAND)).zip(g.chunks(AT_HAND));
        for (i, (((w, m), v), g)) in parts.enumerate() {
            step_block(
                load(w, &mut wide_w),
                as_type(g).unwrap_or_else(|| {
                    convert(g, &mut wide_g[..g.len()]);
                    &wide_g[..g.len()]
                }),
                load(m, &mut wide_m),
                load(v, &mut wide_v),
                factors,
            );
            let first = block * BLOCK + i * AT_HAND;
            store(&wide_w, w, draws[0], first);
            store(&wide_m, m, draws[1], first);
            store(&wide_v, v, draws[2], first);
        }
    });
}

/// f32 where it lies, bf16 widened; [`store`] puts the latter back.
#[inline(always)]
fn load<'s, T: FloatElement>(x: &'s mut [T], space: &'s mut [f32; AT_HAND]) -> &'s mut [f32] {
    let len = x.len();
    if as_type::<T, f32>(x).is_none() {
        convert(x, &mut space[..len]);
        return &mut space[..len];
    }
    as_type_mut(x).expect("f32")
}

/// Rounds bf16 by the `draws` of elements from `first` on, or to nearest without; f32 is in its place already.
#[inline(always)]
fn store<T: FloatElement>(from: &[f32; AT_HAND], to: &mut [T], draws: Option<Draws>, first: usize) {
    let Some(to) = as_type_mut::<T, bf16>(to) else { return };
    let from = &from[..to.len()];
    match draws {
        Some(draws) => draws.round(from, to, first),
        None => convert(from, to),
    }
}

/// Random numbers by which a tensor's elements are rounded: 16 bits an element, block = element / 8, word j of which
/// serves elements 2j (low half) and 2j + 1.
#[derive(Clone, Copy)]
struct Draws {
    seed: u64,
    stream: u64,
}

impl Draws {
    /// Up with the probability of what is cut off over the distance of the neighbours. At most [`AT_HAND`] elements;
    /// `first` is a multiple of 8.
    fn round(self, from: &[f32], to: &mut [bf16], first: usize) {
        let mut words: Quads<u32> = [[0; NOISE / 4]; 4];
        fill_words(&mut words, self.seed, self.stream, first as u64 / 8);
        round_by(&words, from, to);
    }
}

simd_kernel! {
    fn round_by(_simd, words: &'a Quads<u32>, from: &'a [f32], to: &'a mut [bf16]) {
        let mut bits = [[0u16; 8]; NOISE / 4];
        for (block, bits) in bits.iter_mut().enumerate() {
            for (j, words) in words.iter().enumerate() {
                bits[2 * j] = words[block] as u16;
                bits[2 * j + 1] = (words[block] >> 16) as u16;
            }
        }
        for ((to, x), bits) in to.iter_mut().zip(from).zip(bits.as_flattened()) {
            let rounded = x.to_bits().wrapping_add(u32::from(*bits));
            *to = bf16::from_bits((if x.is_nan() { x.to_bits() | 0x40_0000 } else { rounded } >> 16) as u16);
        }
    }
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

pub(super) fn update_means<E: Elements>(UpdateMeans { table, decay }: UpdateMeans<'_, '_, Cpu<E>>) {
    for MeanRow { mean, weight } in table {
        let (mean, weight) = (slice_mut(mean.reborrow()), slice(weight));
        mean.par_chunks_mut(BLOCK)
            .zip(weight.par_chunks(BLOCK))
            .for_each(|(mean, weight)| mean_block(mean, weight, decay));
    }
}

simd_kernel! {
    fn mean_block<T: FloatElement>(_simd, mean: &'a mut [f32], weight: &'a [T], decay: f32) {
        let rest = 1.0 - decay;
        for (mean, weight) in mean.iter_mut().zip(weight) {
            *mean = decay * *mean + rest * weight.to_f32();
        }
    }
}

pub(super) fn proximal_gradients<E: Elements>(op: ProximalGradients<'_, '_, Cpu<E>>) {
    let ProximalGradients { table, rho } = op;
    for ProximalRow { grad, weight, anchor } in table {
        let (grad, weight, anchor) = (slice_mut(grad.reborrow()), slice(weight), slice(anchor));
        let rows = grad.par_chunks_mut(BLOCK).zip(weight.par_chunks(BLOCK)).zip(anchor.par_chunks(BLOCK));
        rows.for_each(|((grad, weight), anchor)| pull_block(grad, weight, anchor, rho));
    }
}

simd_kernel! {
    fn pull_block<G: FloatElement, T: FloatElement>(_simd, grad: &'a mut [G], weight: &'a [T], anchor: &'a [T], rho: f32) {
        for ((grad, weight), anchor) in grad.iter_mut().zip(weight).zip(anchor) {
            *grad = G::from_f32(grad.to_f32() + rho * (weight.to_f32() - anchor.to_f32()));
        }
    }
}
