//! The products of gate and up that end in SwiGLU: neither is written to memory.

use super::plan::{self, GemmLayout, GemmPlan, GemmShape, GemmSupport, GemmVersion};
use super::{MMA_BLOCK, offer, size, wgmma};
use crate::backend::cuda::device::Device;
use crate::backend::cuda::launch::{Arg, Launch, args};
use crate::backend::cuda::memory::{Slice, SliceMut, slice, slice_mut};
use crate::backend::cuda::{Cuda, FLOAT, Precision};
use crate::backend::{GatedLinear, LinearShape, cost};
use crate::error::Result;
use half::bf16;

/// X [tokens, inputs], the weights of gate and up [outputs, inputs], and Y [tokens, outputs].
struct Gated<'a> {
    x: Slice<'a, bf16>,
    gate: Slice<'a, bf16>,
    up: Slice<'a, bf16>,
    y: SliceMut<'a, bf16>,
    shape: LinearShape,
}

/// `false` where no version has a kernel for these tensors.
pub(in crate::backend::cuda) fn gated_linear<P: Precision>(
    device: &Device,
    op: GatedLinear<'_, Cuda<P>>,
) -> Result<bool> {
    let shape = op.shape();
    let gated = Gated { x: slice(&op.x), gate: slice(&op.gate), up: slice(&op.up), y: slice_mut(op.y), shape };
    match gated.choose(device) {
        Some(version) => gated.launch(device, version).map(|()| true),
        None => Ok(false),
    }
}

impl Gated<'_> {
    /// Of gate and up as one layer.
    fn both(&self) -> GemmShape {
        let LinearShape { tokens, inputs, outputs } = self.shape;
        GemmShape { layout: GemmLayout::Tn, m: tokens, n: 2 * outputs, k: inputs }
    }

    fn offer(&self, device: &Device) -> GemmSupport {
        offer(device, [self.x, self.gate, self.up])
    }

    fn supports(&self, device: &Device, version: GemmVersion) -> bool {
        let offer = self.offer(device);
        let hopper = offer.hopper && wgmma::copies(*self.y, self.shape.outputs);
        version.supports(self.both(), GemmSupport { hopper, ..offer }) && kernel(version).is_some()
    }

    /// The version that gate and up side by side would take, where there is a kernel of it that ends in SwiGLU and the
    /// depth is not split: the sums are then the same bits. The forced one, if any.
    fn choose(&self, device: &Device) -> Option<GemmVersion> {
        let both = self.both();
        if both.m * both.n == 0 {
            return None;
        }
        if let Some(plan) = plan::forced() {
            return Some(plan.version);
        }
        let GemmPlan { version, splits } = plan::choose(both, self.offer(device), device.multiprocessors);
        (splits == 1 && self.supports(device, version)).then_some(version)
    }

    fn launch(&self, device: &Device, version: GemmVersion) -> Result<()> {
        let Self { x, gate, up, y, shape } = self;
        let LinearShape { tokens, inputs, outputs } = *shape;
        let lengths = [x.len(), gate.len(), up.len(), y.len()];
        assert_eq!(lengths, [tokens * inputs, outputs * inputs, outputs * inputs, tokens * outputs], "{shape:?}");
        assert!(tokens * outputs > 0 && self.supports(device, version), "{version:?} of {shape:?}");
        let ((image, kernel), tile) = (kernel(version).expect("supported"), version.tile().expect("tiles"));
        // Half of a tile's columns are gate's, half up's.
        let columns = tile.columns / 2;
        let tiles = size(tokens.div_ceil(tile.rows) * outputs.div_ceil(columns));
        let cost = cost::gated_linear(*shape, FLOAT);
        let sizes: &[Arg] = args![size(tokens), size(outputs), size(inputs)];
        if image == "gemm_sm90" {
            let grid = [tiles.min(device.multiprocessors), 1, 1];
            let launch = Launch::new(image, kernel, grid, wgmma::BLOCK, cost);
            let maps = wgmma::gated_maps(device, [*x, *gate, *up], **y, *shape, columns)?;
            // SAFETY: lengths fit the shape, and maps describe X, the weights and Y, which is borrowed mutably.
            return unsafe { device.launch(launch, &[&maps, sizes].concat()) };
        }
        let launch = Launch::new(image, kernel, [tiles], MMA_BLOCK, cost);
        // SAFETY: lengths fit the shape, operands are aligned as the version asks; Y is borrowed mutably.
        unsafe { device.launch(launch, &[args![*x, *gate, *up, y].as_slice(), sizes].concat()) }
    }
}

/// The kernel of a version, and its image.
fn kernel(version: GemmVersion) -> Option<(&'static str, &'static str)> {
    match version {
        GemmVersion::Mma64 => Some(("gemm", "gemm_tn_swiglu_mma64_bf16")),
        GemmVersion::Mma128 => Some(("gemm", "gemm_tn_swiglu_mma128_bf16")),
        GemmVersion::Wgmma128 => Some(("gemm_sm90", "gemm_tn_wgmma128_swiglu_bf16")),
        GemmVersion::Wgmma256 => Some(("gemm_sm90", "gemm_tn_wgmma256_swiglu_bf16")),
        GemmVersion::Baseline | GemmVersion::Scalar64 | GemmVersion::Decode => None,
    }
}
