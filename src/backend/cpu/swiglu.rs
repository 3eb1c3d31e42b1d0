//! SwiGLU (Shazeer, arXiv 2002.05202): y = silu(gate)·up, silu(g) = g·σ(g).

use super::simd::{exp, simd_kernel};
use rayon::prelude::*;

/// Elements of one task.
const BLOCK: usize = 1 << 15;

/// y = silu(gate)·up.
pub(super) fn swiglu(gate: &[f32], up: &[f32], y: &mut [f32]) {
    gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)).zip(y.par_chunks_mut(BLOCK)).for_each(|((gate, up), y)| {
        forward(gate, up, y);
    });
}

simd_kernel! {
    fn forward(_simd, gate: &'a [f32], up: &'a [f32], y: &'a mut [f32]) {
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            *y = g / (1.0 + exp(-g)) * u;
        }
    }
}

/// In place: `gate` becomes dy·up·σ·(1 + gate·(1 − σ)), `up` becomes dy·silu(gate).
pub(super) fn swiglu_backward(gate: &mut [f32], up: &mut [f32], dy: &[f32]) {
    gate.par_chunks_mut(BLOCK).zip(up.par_chunks_mut(BLOCK)).zip(dy.par_chunks(BLOCK)).for_each(|((gate, up), dy)| {
        backward(gate, up, dy);
    });
}

simd_kernel! {
    fn backward(_simd, gate: &'a mut [f32], up: &'a mut [f32], dy: &'a [f32]) {
        for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
            let sigmoid = 1.0 / (1.0 + exp(-*gate));
            let silu = *gate * sigmoid;
            let dgate = dy * *up * (sigmoid + silu * (1.0 - sigmoid));
            *up = dy * silu;
            *gate = dgate;
        }
    }
}
