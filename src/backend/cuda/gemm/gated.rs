//! The products of gate and up that end in SwiGLU: neither is written to memory.

use super::plan::{self, GemmLayout, GemmPlan, GemmShape, GemmVersion};
use super::{MMA_BLOCK, OPERAND_BYTES, size, wgmma};
use crate::backend::cuda::device::{Arg, Device, Launch, args};
use crate::backend::cuda::memory::{Slice, SliceMut, slice, slice_mut};
use crate::backend::cuda::{Cuda, FLOAT, Precision};
use crate::backend::{GatedLinear, In, LinearShape, Out, cost};
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

impl<P: Precision> Cuda<P> {
    /// [`GatedLinear`] in one launch by the kernel of this version.
    ///
    /// # Errors
    /// Where the device fails.
    ///
    /// # Panics
    /// Where lengths do not fit, or the version has no kernel for these tensors.
    pub fn gemm_gated(
        &self,
        x: In<'_, Self>,
        [gate, up]: [In<'_, Self>; 2],
        y: Out<'_, Self>,
        shape: LinearShape,
        version: GemmVersion,
    ) -> Result<()> {
        let gated = Gated { x: slice(&x), gate: slice(&gate), up: slice(&up), y: slice_mut(y), shape };
        gated.launch(&self.device, version)
    }
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

    fn aligned(&self) -> bool {
        [self.x, self.gate, self.up].iter().all(|operand| operand.aligned(OPERAND_BYTES))
    }

    fn supports(&self, device: &Device, version: GemmVersion) -> bool {
        let copies = wgmma::copies(*self.y, self.shape.outputs);
        version.supports(self.both(), self.aligned(), device.runs("gemm_sm90") && copies) && kernel(version).is_some()
    }

    /// The version that gate and up side by side would take, where there is a kernel of it that ends in SwiGLU and the
    /// depth is not split: the sums are then the same bits.
    fn choose(&self, device: &Device) -> Option<GemmVersion> {
        let both = self.both();
        if both.m * both.n == 0 {
            return None;
        }
        let hopper = device.runs("gemm_sm90");
        let GemmPlan { version, splits } = plan::choose(both, self.aligned(), hopper, device.multiprocessors);
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
            let launch = Launch { image, kernel, grid, block: wgmma::BLOCK, shared_bytes: 0, cost };
            let maps = wgmma::gated_maps(device, [*x, *gate, *up], **y, *shape, columns)?;
            // SAFETY: lengths fit the shape, and maps describe X, the weights and Y, which is borrowed mutably.
            return unsafe { device.launch(launch, &[&maps, sizes].concat()) };
        }
        let launch = Launch { image, kernel, grid: [tiles, 1, 1], block: MMA_BLOCK, shared_bytes: 0, cost };
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
