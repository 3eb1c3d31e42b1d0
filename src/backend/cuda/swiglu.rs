//! SwiGLU: see `kernels/swiglu.cu`.

use super::device::Device;
use super::launch::{Launch, args, blocks};
use super::memory::{Slice, slice, slice_mut};
use super::{Cuda, Precision, measure};
use crate::backend::{Cost, Operator, SwiGlu, SwiGluBackward};
use crate::error::Result;
use half::bf16;

const BLOCK: u32 = 256;
/// Elements of a thread of the vector kernels, and the alignment of their pointers.
const VECTOR: usize = 8;
const VECTOR_BYTES: u64 = 16;
/// Blocks of a multiprocessor that the vector kernels are bounded to: the grid is one wave.
const RESIDENT: u32 = 6;
const RESIDENT_BACKWARD: u32 = 5;

/// The vector kernel where all three tensors allow 16-byte accesses, else the baseline.
fn choose(tensors: [Slice<bf16>; 3], [vec8, baseline]: [&'static str; 2], wave: u32, cost: Cost) -> Launch {
    let len = tensors[0].len();
    let aligned = tensors.iter().all(|tensor| tensor.aligned(VECTOR_BYTES));
    let (kernel, blocks) = match aligned && !measure::baseline() {
        true => (vec8, blocks(len, VECTOR * BLOCK as usize).min(wave)),
        false => (baseline, blocks(len, BLOCK as usize)),
    };
    Launch::new("swiglu", kernel, [blocks], BLOCK, cost)
}

pub(super) fn swiglu<P: Precision>(device: &Device, op: SwiGlu<'_, Cuda<P>>) -> Result<()> {
    let cost = op.cost();
    let (gate, up, y) = (slice(&op.gate), slice(&op.up), slice_mut(op.y));
    let kernels = ["swiglu_forward_vec8_bf16", "swiglu_forward_baseline_bf16"];
    let launch = choose([gate, up, *y], kernels, device.multiprocessors * RESIDENT, cost);
    // SAFETY: three tensors of `len` elements, aligned as the kernel asks; y is borrowed mutably.
    unsafe { device.launch(launch, args![gate, up, &y, y.len() as u64]) }
}

pub(super) fn swiglu_backward<P: Precision>(device: &Device, op: SwiGluBackward<'_, Cuda<P>>) -> Result<()> {
    let cost = op.cost();
    let (gate, up, dy) = (slice_mut(op.gate), slice_mut(op.up), slice(&op.dy));
    let kernels = ["swiglu_backward_vec8_bf16", "swiglu_backward_baseline_bf16"];
    let launch = choose([*gate, *up, dy], kernels, device.multiprocessors * RESIDENT_BACKWARD, cost);
    // SAFETY: three tensors of `len` elements, aligned as the kernel asks; gate and up are borrowed mutably.
    unsafe { device.launch(launch, args![&gate, &up, dy, dy.len() as u64]) }
}
