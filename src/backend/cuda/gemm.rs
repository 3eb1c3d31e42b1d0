//! See `kernels/gemm.cu`.

use super::device::Device;
use super::memory::{Slice, SliceMut};
use crate::backend::{FloatElement, LinearShape};
use crate::error::Result;
use half::bf16;
use std::sync::Arc;

/// What a linear layer adds to its product.
pub(super) struct Addends<'a> {
    pub(super) alpha: f32,
    pub(super) bias: Option<Slice<'a, bf16>>,
    pub(super) residual: Option<Slice<'a, bf16>>,
    pub(super) accumulate: bool,
}
pub(super) fn linear(
    _: &Arc<Device>,
    _: Slice<bf16>,
    _: Slice<bf16>,
    _: SliceMut<bf16>,
    _: LinearShape,
    _: Addends,
) -> Result<()> {
    todo!()
}
pub(super) fn linear_backward_input(
    _: &Arc<Device>,
    _: Slice<bf16>,
    _: Slice<bf16>,
    _: SliceMut<bf16>,
    _: LinearShape,
    _: f32,
    _: bool,
) -> Result<()> {
    todo!()
}
pub(super) fn linear_backward_weight<G: FloatElement>(
    _: &Arc<Device>,
    _: Slice<bf16>,
    _: Slice<bf16>,
    _: SliceMut<G>,
    _: LinearShape,
    _: f32,
    _: bool,
) -> Result<()> {
    todo!()
}
pub(super) fn linear_backward_bias<G: FloatElement>(
    _: &Arc<Device>,
    _: Slice<bf16>,
    _: SliceMut<G>,
    _: usize,
    _: bool,
) -> Result<()> {
    todo!()
}
