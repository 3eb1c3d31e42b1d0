//! See `kernels/perturb.cu`.

use super::device::Device;
use super::memory::{Slice, SliceMut};
use crate::backend::NoiseKey;
use crate::error::Result;
use half::bf16;
use std::sync::Arc;

/// A direction.
pub(super) enum Noise<'a> {
    Gaussian(NoiseKey),
    Rademacher(NoiseKey),
    LowRank { key: NoiseKey, rank: usize, rows: usize },
    Scale,
    Given(Slice<'a, bf16>),
}
pub(super) fn perturb(
    _: &Arc<Device>,
    _: Slice<bf16>,
    _: Noise,
    _: f32,
    _: SliceMut<bf16>,
    _: Option<SliceMut<bf16>>,
) -> Result<()> {
    todo!()
}
