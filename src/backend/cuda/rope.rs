//! Rotary position embedding: see `kernels/rope.cu`.

use super::device::Device;
use super::launch::{Launch, args, blocks};
use super::memory::{slice, slice_mut};
use super::{Cuda, Precision, measure};
use crate::backend::{Operator, Rope};
use crate::error::Result;

const BLOCK: usize = 256;
/// Heads of a thread of the vector kernel.
const HEADS: usize = 4;
/// Alignment of x and of the table, and the factor of head_dim, that the vector kernel takes.
const VECTOR_BYTES: u64 = 16;
const HEAD_DIM_STEP: usize = 16;

pub(super) fn rope<P: Precision>(device: &Device, op: Rope<'_, Cuda<P>>) -> Result<()> {
    let (cost, heads, head_dim) = (op.cost(), op.heads(), op.head_dim);
    let (x, table, positions) = (slice_mut(op.x), slice(&op.table), slice(&op.positions));
    let tokens = positions.len();
    let aligned = x.aligned(VECTOR_BYTES) && table.aligned(VECTOR_BYTES);
    let vectors = head_dim.is_multiple_of(HEAD_DIM_STEP) && aligned && !measure::baseline();
    let (kernel, threads) = match vectors {
        true => ("rope_forward_vec8_bf16", tokens * heads.div_ceil(HEADS) * head_dim / HEAD_DIM_STEP),
        false => ("rope_forward_baseline_bf16", x.len() / 2),
    };
    let launch = Launch::new("rope", kernel, [blocks(threads, BLOCK)], BLOCK as u32, cost);
    let length = (table.len() / head_dim) as u32;
    let sign = if op.inverse { -1f32 } else { 1.0 };
    // SAFETY: x has `tokens` rows of `heads·head_dim`, aligned as the kernel asks, and is borrowed mutably; positions
    // has one element a token; the kernel skips positions from `length`, the rows of the table, on.
    unsafe {
        device.launch(launch, args![&x, table, positions, tokens as u64, length, heads as u32, head_dim as u32, sign])
    }
}
