//! The next token: see `kernels/sampling.cu`.

use super::device::Device;
use super::launch::{Launch, args, blocks};
use super::memory::{slice, slice_mut};
use super::{Cuda, Precision, measure};
use crate::backend::{Operator, Sample};
use crate::error::Result;

const BLOCK: u32 = 1024;

pub(super) fn sample<P: Precision>(device: &Device, op: Sample<'_, Cuda<P>>) -> Result<()> {
    let (cost, vocab, sampling) = (op.cost(), op.vocab, op.sampling);
    let (logits, uniforms, tokens) = (slice(&op.logits), slice(&op.uniforms), slice_mut(op.tokens));
    let [greedy, nucleus] = match measure::baseline() {
        true => ["sampling_greedy_baseline_bf16", "sampling_nucleus_baseline_bf16"],
        false => ["sampling_greedy_vec8_bf16", "sampling_nucleus_vec8_bf16"],
    };
    let grid = [blocks(tokens.len(), 1), 1, 1];
    let launch = |kernel| Launch::new("sampling", kernel, grid, BLOCK, cost);
    // SAFETY: logits has a row of `vocab` for each uniform and token; the kernels ask for no alignment; tokens is
    // borrowed mutably.
    unsafe {
        if sampling.temperature > 0.0 {
            let arguments = args![logits, uniforms, &tokens, vocab as u32, sampling.exponent_scale(), sampling.top_p];
            device.launch(launch(nucleus), arguments)
        } else {
            device.launch(launch(greedy), args![logits, &tokens, vocab as u32])
        }
    }
}
