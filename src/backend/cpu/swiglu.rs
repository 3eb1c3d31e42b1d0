//! SwiGLU.

use super::Cpu;
use super::simd::{exp, simd_kernel};
use super::storage::{slice, slice_mut};
use crate::backend::{SwiGlu, SwiGluBackward};
use rayon::prelude::*;

/// Elements of one task.
const BLOCK: usize = 1 << 15;

pub(super) fn swiglu(SwiGlu { gate, up, y }: SwiGlu<'_, Cpu>) {
    let (gate, up, y) = (slice(&gate), slice(&up), slice_mut(y));
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

pub(super) fn swiglu_backward(SwiGluBackward { gate, up, dy }: SwiGluBackward<'_, Cpu>) {
    let (gate, up, dy) = (slice_mut(gate), slice_mut(up), slice(&dy));
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
