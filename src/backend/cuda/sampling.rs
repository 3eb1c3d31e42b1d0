//! The next token: see `kernels/sampling.cu`.

use super::FLOAT;
use super::device::{Device, Launch, args, blocks};
use super::measure;
use super::memory::{Slice, SliceMut};
use crate::backend::{Sampling, cost};
use crate::error::Result;
use half::bf16;

const BLOCK: u32 = 1024;

/// tokens [rows] of logits [rows, vocab].
pub(super) fn sample(
    device: &Device,
    logits: Slice<bf16>,
    uniforms: Slice<f32>,
    tokens: SliceMut<u32>,
    vocab: usize,
    sampling: Sampling,
) -> Result<()> {
    assert_eq!([logits.len(), uniforms.len()], [tokens.len() * vocab, tokens.len()]);
    let [greedy, nucleus] = match measure::baseline() {
        true => ["sampling_greedy_baseline_bf16", "sampling_nucleus_baseline_bf16"],
        false => ["sampling_greedy_vec8_bf16", "sampling_nucleus_vec8_bf16"],
    };
    let grid = [blocks(tokens.len(), 1), 1, 1];
    let cost = cost::sample(logits.len(), sampling, FLOAT);
    let launch = |kernel| Launch { image: "sampling", kernel, grid, block: BLOCK, shared_bytes: 0, cost };
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
