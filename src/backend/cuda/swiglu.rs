//! SwiGLU: see `kernels/swiglu.cu`.

use super::FLOAT;
use super::device::{Device, Launch, args, blocks};
use super::measure;
use super::memory::{Slice, SliceMut};
use crate::backend::{Cost, cost};
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
fn choose(len: usize, aligned: bool, kernels: [&'static str; 2], wave: u32, cost: Cost) -> Launch {
    let [vec8, baseline] = kernels;
    let (kernel, blocks) = match aligned && !measure::baseline() {
        true => (vec8, blocks(len, VECTOR * BLOCK as usize).min(wave)),
        false => (baseline, blocks(len, BLOCK as usize)),
    };
    Launch { image: "swiglu", kernel, grid: [blocks, 1, 1], block: BLOCK, shared_bytes: 0, cost }
}

/// y = silu(gate) · up.
pub(super) fn swiglu(device: &Device, gate: Slice<bf16>, up: Slice<bf16>, y: SliceMut<bf16>) -> Result<()> {
    assert_eq!([gate.len(), up.len()], [y.len(); 2]);
    let aligned = gate.aligned(VECTOR_BYTES) && up.aligned(VECTOR_BYTES) && y.aligned(VECTOR_BYTES);
    let kernels = ["swiglu_forward_vec8_bf16", "swiglu_forward_baseline_bf16"];
    let wave = device.multiprocessors * RESIDENT;
    let launch = choose(y.len(), aligned, kernels, wave, cost::swiglu(y.len(), FLOAT));
    // SAFETY: three tensors of `len` elements, aligned as the kernel asks; y is borrowed mutably.
    unsafe { device.launch(launch, args![gate, up, &y, y.len() as u64]) }
}

/// In place: `gate` becomes dgate, `up` becomes dup.
pub(super) fn swiglu_backward(
    device: &Device,
    gate: SliceMut<bf16>,
    up: SliceMut<bf16>,
    dy: Slice<bf16>,
) -> Result<()> {
    assert_eq!([gate.len(), up.len()], [dy.len(); 2]);
    let aligned = gate.aligned(VECTOR_BYTES) && up.aligned(VECTOR_BYTES) && dy.aligned(VECTOR_BYTES);
    let kernels = ["swiglu_backward_vec8_bf16", "swiglu_backward_baseline_bf16"];
    let wave = device.multiprocessors * RESIDENT_BACKWARD;
    let launch = choose(dy.len(), aligned, kernels, wave, cost::swiglu_backward(dy.len(), FLOAT));
    // SAFETY: three tensors of `len` elements, aligned as the kernel asks; gate and up are borrowed mutably.
    unsafe { device.launch(launch, args![&gate, &up, dy, dy.len() as u64]) }
}
