//! See `kernels/cross_entropy.cu`.

use super::device::Device;
use super::memory::{Slice, SliceMut};
use crate::error::Result;
use half::bf16;
use std::sync::Arc;

pub(super) fn cross_entropy(
    _: &Arc<Device>,
    _: SliceMut<bf16>,
    _: Slice<u32>,
    _: SliceMut<f32>,
    _: usize,
    _: Option<f32>,
) -> Result<()> {
    todo!()
}
