//! See `kernels/attention.cu`.

use super::device::Device;
use super::memory::{Slice, SliceMut};
use super::{Cuda, Precision, slice};
use crate::backend::Attention;
use crate::error::Result;
use half::bf16;
use std::sync::Arc;

/// The sizes of a call.
pub(super) struct Shape<'a> {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) scale: f32,
    pub(super) window: Option<usize>,
    pub(super) starts: &'a [u32],
    pub(super) starts_device: Slice<'a, u32>,
}
impl<'a> Shape<'a> {
    pub(super) fn new<P: Precision>(shape: &Attention<'a, Cuda<P>>) -> Self {
        let Attention { heads, kv_heads, head_dim, scale, window, documents } = *shape;
        Self {
            heads,
            kv_heads,
            head_dim,
            scale,
            window,
            starts: &documents.starts,
            starts_device: slice(&documents.device.view()),
        }
    }
}
/// What forward keeps for backward.
pub(super) struct Saved<'a> {
    pub(super) q: Slice<'a, bf16>,
    pub(super) k: Slice<'a, bf16>,
    pub(super) v: Slice<'a, bf16>,
    pub(super) o: Slice<'a, bf16>,
    pub(super) lse: Slice<'a, f32>,
    pub(super) d_o: Slice<'a, bf16>,
}
pub(super) fn attention(
    _: &Arc<Device>,
    _: Slice<bf16>,
    _: Slice<bf16>,
    _: Slice<bf16>,
    _: SliceMut<bf16>,
    _: Option<SliceMut<f32>>,
    _: Shape,
) -> Result<()> {
    todo!()
}
pub(super) fn attention_backward(
    _: &Arc<Device>,
    _: Saved,
    _: SliceMut<bf16>,
    _: SliceMut<bf16>,
    _: SliceMut<bf16>,
    _: Shape,
) -> Result<()> {
    todo!()
}
pub(super) fn attention_decode(
    _: &Arc<Device>,
    _: Slice<bf16>,
    _: Slice<bf16>,
    _: Slice<bf16>,
    _: SliceMut<bf16>,
    _: &[(u32, u32)],
    _: Shape,
) -> Result<()> {
    todo!()
}
