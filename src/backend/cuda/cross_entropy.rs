//! Cross-entropy: see `kernels/cross_entropy.cu`.

use super::device::{Device, constant};
use super::launch::{Launch, args, blocks};
use super::memory::{slice, slice_mut};
use super::{Cuda, Precision, measure};
use crate::backend::{CrossEntropy, Operator};
use crate::error::Result;

const BLOCK: u32 = 512;
const BASELINE_BLOCK: u32 = 256;
const BACKWARD: &str = "cross_entropy_backward_vec8_bf16";
/// The backward pass with [`LossTerms`], of one version.
const TERMS: &str = "cross_entropy_terms_vec8_bf16";

/// Bytes of a row of `vocab` logits to cache: all where two blocks share a multiprocessor, else what one block may
/// have.
fn cached_bytes(device: &Device, kernel: &'static str, vocab: usize) -> Result<u32> {
    let span = constant("cross_entropy_span_bytes");
    let whole = |bytes: u32| bytes / span * span;
    let row = whole(u32::try_from(2 * vocab).unwrap_or(u32::MAX));
    let [most, half] = [1, 2].map(|blocks| device.shared_room("cross_entropy", kernel, blocks).map(whole));
    Ok(if row <= half? { row } else { row.min(most?) })
}

pub(super) fn cross_entropy<P: Precision>(device: &Device, op: CrossEntropy<'_, Cuda<P>>) -> Result<()> {
    let (cost, vocab, scale) = (op.cost(), op.vocab, op.scale);
    let (logits, targets, losses) = (slice_mut(op.logits), slice(&op.targets), slice_mut(op.losses));
    let grid = [blocks(targets.len(), 1), 1, 1];
    let launch =
        |kernel, shared_bytes| Launch { image: "cross_entropy", kernel, grid, block: BLOCK, shared_bytes, cost };
    if let (Some(scale), Some(terms)) = (scale, &op.terms) {
        let cached = cached_bytes(device, TERMS, vocab)?;
        let launch = launch(TERMS, cached);
        let (reference, beta) = (slice(&terms.reference), slice(&terms.beta));
        let (ids, probs, width) = (slice(&terms.ids), slice(&terms.probs), terms.width() as u32);
        let (vocab, cached, distil) = (vocab as u32, cached / 16, terms.distil);
        let arguments =
            args![&logits, targets, &losses, vocab, scale, cached, reference, beta, ids, probs, width, distil];
        // SAFETY: as below; `reference` and `beta` have an element a row, `ids` and `probs` `width` of them, no more
        // than a block has threads. The kernel checks ids.
        return unsafe { device.launch(launch, arguments) };
    }
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
                let cached = cached_bytes(device, BACKWARD, vocab)?;
                let launch = launch(BACKWARD, cached);
                device.launch(launch, args![&logits, targets, &losses, vocab as u32, scale, cached / 16])
            }
        }
    }
}
