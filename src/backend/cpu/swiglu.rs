//! SwiGLU.

use super::simd::{exp, simd_kernel};
use super::storage::{slice, slice_mut};
use super::{Cpu, Elements};
use crate::backend::{FloatElement, SwiGlu, SwiGluBackward};
use rayon::prelude::*;

/// Elements of one task.
const BLOCK: usize = 1 << 15;

pub(super) fn swiglu<E: Elements>(SwiGlu { gate, up, y }: SwiGlu<'_, Cpu<E>>) {
    let (gate, up, y) = (slice(&gate), slice(&up), slice_mut(y));
    gate.par_chunks(BLOCK).zip(up.par_chunks(BLOCK)).zip(y.par_chunks_mut(BLOCK)).for_each(|((gate, up), y)| {
        forward(gate, up, y);
    });
}

simd_kernel! {
    fn forward<T: FloatElement>(_simd, gate: &'a [T], up: &'a [T], y: &'a mut [T]) {
        for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
            let g = g.to_f32();
            *y = T::from_f32(g / (1.0 + exp(-g)) * u.to_f32());
        }
    }
}

pub(super) fn swiglu_backward<E: Elements>(SwiGluBackward { gate, up, dy }: SwiGluBackward<'_, Cpu<E>>) {
    let (gate, up, dy) = (slice_mut(gate), slice_mut(up), slice(&dy));
    gate.par_chunks_mut(BLOCK).zip(up.par_chunks_mut(BLOCK)).zip(dy.par_chunks(BLOCK)).for_each(|((gate, up), dy)| {
        backward(gate, up, dy);
    });
}

simd_kernel! {
    fn backward<T: FloatElement>(_simd, gate: &'a mut [T], up: &'a mut [T], dy: &'a [T]) {
        for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
            let (g, u, dy) = (gate.to_f32(), up.to_f32(), dy.to_f32());
            let sigmoid = 1.0 / (1.0 + exp(-g));
            let silu = g * sigmoid;
            *gate = T::from_f32(dy * u * (sigmoid + silu * (1.0 - sigmoid)));
            *up = T::from_f32(dy * silu);
        }
    }
}
