//! Cross-entropy: see `kernels/cross_entropy.cu`.

use super::FLOAT;
use super::device::{Device, Launch, args, blocks};
use super::measure;
use super::memory::{Slice, SliceMut};
use crate::backend::cost;
use crate::error::Result;
use half::bf16;

const BLOCK: u32 = 512;
const BASELINE_BLOCK: u32 = 256;
/// Bytes of a row that one step of a block covers; what is cached in shared memory is a multiple of it.
const SPAN_BYTES: u32 = 16 << 10;
/// Shared memory of a block beside its part of the row: static, and what the driver reserves; 1 KiB each.
const RESERVED_BYTES: u32 = 2 << 10;

/// Bytes of a row of `vocab` logits to cache: all where two blocks share a multiprocessor, else what one block may have:
/// 224 KiB on sm_90, 160 KiB on sm_80.
fn cached_bytes(device: &Device, vocab: usize) -> u32 {
    let row = (2 * vocab as u64 / u64::from(SPAN_BYTES) * u64::from(SPAN_BYTES)).min(u64::from(u32::MAX)) as u32;
    let whole = |bytes: u32| bytes / SPAN_BYTES * SPAN_BYTES;
    let most = whole(device.shared_bytes_block.saturating_sub(RESERVED_BYTES));
    let half = whole((device.shared_bytes_block / 2).saturating_sub(RESERVED_BYTES));
    if row <= half { row } else { row.min(most) }
}

/// losses [rows] of logits [rows, vocab]; with `scale`, the gradients replace the logits.
pub(super) fn cross_entropy(
    device: &Device,
    logits: SliceMut<bf16>,
    targets: Slice<u32>,
    losses: SliceMut<f32>,
    vocab: usize,
    scale: Option<f32>,
) -> Result<()> {
    assert_eq!([logits.len(), losses.len()], [targets.len() * vocab, targets.len()]);
    let grid = [blocks(targets.len(), 1), 1, 1];
    let cost = cost::cross_entropy(logits.len(), scale.is_some(), FLOAT);
    let launch =
        |kernel, shared_bytes| Launch { image: "cross_entropy", kernel, grid, block: BLOCK, shared_bytes, cost };
    if measure::baseline() {
        let launch = Launch { block: BASELINE_BLOCK, ..launch("cross_entropy_baseline_bf16", 0) };
        let (with_gradient, scale) = (u32::from(scale.is_some()), scale.unwrap_or(0.0));
        // SAFETY: as below.
        return unsafe { device.launch(launch, args![&logits, targets, &losses, vocab as u32, scale, with_gradient]) };
    }
    // SAFETY: logits has a row of `vocab` for each target and loss; the kernels ask for no alignment and check
    // targets; logits and losses are borrowed mutably. What the second caches is whole steps, in as much shared memory
    // as it is launched with.
    unsafe {
        match scale {
            None => {
                let launch = launch("cross_entropy_loss_vec8_bf16", 0);
                device.launch(launch, args![&logits, targets, &losses, vocab as u32])
            }
            Some(scale) => {
                let cached = cached_bytes(device, vocab);
                let launch = launch("cross_entropy_backward_vec8_bf16", cached);
                device.launch(launch, args![&logits, targets, &losses, vocab as u32, scale, cached / 16])
            }
        }
    }
}
