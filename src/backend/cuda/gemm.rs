//! Linear layers: see `kernels/gemm.cu`, `gemm_sm90.cu`, `gemm_decode.cu` and `gemm_bias.cu`.

mod gated;
mod grouped;
mod plan;
mod wgmma;

pub(super) use gated::gated_linear;
pub(super) use grouped::{linear_backward_input_each, linear_backward_weight_each, linear_each};
pub(super) use plan::split_bytes;
pub use plan::{GemmLayout, GemmPlan, GemmShape, GemmSupport, GemmVersion, with_plan};

use super::device::Device;
use super::launch::{Launch, args, blocks};
use super::memory::{Memory, Slice, SliceMut, slice, slice_mut};
use super::{Cuda, Precision};
use crate::backend::{
    Cost, Element, Epilogue, FloatElement, In, Linear, LinearBackwardBias, LinearBackwardInput, LinearBackwardWeight,
    ViewMut,
};
use crate::error::Result;
use half::bf16;
use std::sync::Arc;

const BLOCK: u32 = 256;
/// Threads of the tiled kernels.
const MMA_BLOCK: u32 = 128;
/// What operands must be aligned to by all versions but `Baseline` and `Scalar64`.
const OPERAND_BYTES: u64 = 16;
/// Rows of dY up to which one thread sums a column; beyond, the least rows of a part and the most parts.
const BIAS_BASELINE_ROWS: usize = 64;
const BIAS_PART_ROWS: usize = 128;
const BIAS_PARTS: usize = 64;
/// Columns of a block of the kernel that sums parts.
const BIAS_COLUMNS: usize = 256;

/// Addends of a product in device memory.
type Addends<'a> = Epilogue<Slice<'a, bf16>>;

impl Addends<'_> {
    /// Bytes that they read, for a C of `size` elements of `element_bytes`.
    fn bytes(&self, size: usize, element_bytes: usize) -> usize {
        let bias = self.bias.map_or(0, |bias| 2 * bias.len());
        let residual = self.residual.map_or(0, |residual| 2 * residual.len());
        bias + residual + if self.accumulate { element_bytes * size } else { 0 }
    }
}

/// A kernel of a layout that is not for Hopper: `symbols![...][version as usize]`.
macro_rules! symbols {
    ($layout:literal, $dtype:literal) => {
        [
            concat!("gemm_", $layout, "_baseline_", $dtype),
            concat!("gemm_", $layout, "_scalar64_", $dtype),
            concat!("gemm_", $layout, "_mma64_", $dtype),
            concat!("gemm_", $layout, "_mma128_", $dtype),
        ]
    };
}

fn symbol<T: FloatElement>(layout: GemmLayout, version: GemmVersion) -> &'static str {
    let symbols = match (layout, T::NAME) {
        (GemmLayout::Tn, "bf16") => symbols!("tn", "bf16"),
        (GemmLayout::Nn, "bf16") => symbols!("nn", "bf16"),
        (GemmLayout::Nt, "bf16") => symbols!("nt", "bf16"),
        (GemmLayout::Nt, "f32") => symbols!("nt", "f32"),
        _ => panic!("{layout:?} into {}", T::NAME),
    };
    symbols[version as usize]
}

/// What operands and the device offer.
fn offer<const N: usize>(device: &Device, operands: [Slice<bf16>; N]) -> GemmSupport {
    let aligned = operands.iter().all(|operand| operand.aligned(OPERAND_BYTES));
    GemmSupport { aligned, hopper: device.runs("gemm_sm90") }
}

fn size(count: usize) -> u32 {
    u32::try_from(count).expect("fewer than 2³² rows and columns")
}

impl<P: Precision> Cuda<P> {
    /// C = epilogue(A·B) by the plan of [`with_plan`], else by that chosen for this device and shape, which is
    /// returned. T is bf16, or f32 with [`GemmLayout::Nt`].
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] and [`crate::error::Error::Memory`] where the device fails or has no memory for
    /// the sums of parts.
    ///
    /// # Panics
    /// Where lengths do not fit, or the version does not support the operands ([`GemmVersion::supports`]).
    pub fn gemm<T: FloatElement>(
        &self,
        a: In<'_, Self>,
        b: In<'_, Self>,
        c: ViewMut<'_, Self, T>,
        shape: GemmShape,
        epilogue: Epilogue<In<'_, Self>>,
    ) -> Result<GemmPlan> {
        let (a, b, c) = (slice(&a), slice(&b), slice_mut(c));
        Product { a, b, c, shape, addends: epilogue.map(slice) }.run(&self.device)
    }
}

/// C = alpha·A·B + addends.
struct Product<'a, T> {
    a: Slice<'a, bf16>,
    b: Slice<'a, bf16>,
    c: SliceMut<'a, T>,
    shape: GemmShape,
    addends: Addends<'a>,
}

impl<T: FloatElement> Product<'_, T> {
    fn check(&self) {
        let Self { a, b, c, shape, addends } = self;
        let GemmShape { m, n, k, .. } = *shape;
        assert_eq!([a.len(), b.len(), c.len()], [m * k, n * k, m * n], "{shape:?}");
        assert!(addends.bias.is_none_or(|bias| bias.len() == n), "{shape:?}");
        assert!(addends.residual.is_none_or(|residual| residual.len() == m * n), "{shape:?}");
    }

    /// Computes it by the forced plan, else by that chosen for the device and the shape, and returns the plan.
    fn run(&self, device: &Arc<Device>) -> Result<GemmPlan> {
        self.check();
        let Self { a, b, c, shape, addends } = self;
        let (shape, addends, GemmShape { layout, m, n, k }) = (*shape, *addends, *shape);
        let offer = offer(device, [*a, *b]);
        let plan = plan::forced().unwrap_or_else(|| plan::choose(shape, offer, device.multiprocessors));
        let GemmPlan { version, splits } = plan;
        assert!(splits > 0 && version.supports(shape, offer), "{plan:?} of {shape:?}");
        if m == 0 || n == 0 {
            return Ok(plan);
        }
        let whole = shape.cost(size_of::<T>()) + Cost::moved(addends.bytes(m * n, size_of::<T>()));
        let Some(tile) = version.tile() else { return self.untiled(device, plan, whole).map(|()| plan) };

        let mut memory = if splits > 1 { Some(Memory::<f32>::new(device, splits as usize * m * n)?) } else { None };
        let partials = memory.as_mut().map(|memory| memory.all(splits as usize * m * n));
        let cost = if splits > 1 { shape.cost(4 * splits as usize) } else { whole };
        if let GemmVersion::Wgmma128 | GemmVersion::Wgmma256 = version {
            let operands = wgmma::Operands { a: *a, b: *b, shape };
            let output = wgmma::Output { c, partials: partials.as_ref(), addends, shape };
            wgmma::launch(device, &[operands], &[output], plan, cost)?;
        } else {
            let (kernel, grid) = (symbol::<T>(layout, version), [size(tile.count(shape)), splits, 1]);
            let launch = Launch::new("gemm", kernel, grid, MMA_BLOCK, cost);
            let Addends { alpha, bias, residual, accumulate } = addends;
            let (accumulate, partials, [m, n, k]) = (accumulate as u32, partials.as_ref(), [m, n, k].map(size));
            let arguments = args![*a, *b, c, bias, residual, partials, alpha, accumulate, m, n, k];
            // SAFETY: lengths fit the shape, operands are aligned as the version asks, `partials` holds the sums of all
            // parts; C is borrowed mutably.
            unsafe { device.launch(launch, arguments) }?;
        }
        if let Some(partials) = partials {
            combine(device, &partials, splits, c, [m, n], addends)?;
        }
        Ok(plan)
    }

    /// The versions that do not cut C into tiles.
    fn untiled(&self, device: &Device, plan: GemmPlan, cost: Cost) -> Result<()> {
        let Self { a, b, c, shape, addends } = self;
        let GemmShape { layout, m, n, k } = *shape;
        let Addends { alpha, bias, residual, accumulate } = *addends;
        let (accumulate, m32, n32, k32) = (accumulate as u32, size(m), size(n), size(k));
        if plan.version == GemmVersion::Decode {
            assert!([1, 2, 4, 8].contains(&plan.splits) && T::NAME == "bf16", "{plan:?}");
            let kernel = match m {
                1 => "gemm_tn_decode1_bf16",
                2 => "gemm_tn_decode2_bf16",
                3..=4 => "gemm_tn_decode4_bf16",
                _ => "gemm_tn_decode8_bf16",
            };
            let grid = [blocks(n * plan.splits as usize, plan::DECODE_OUTPUTS), 1, 1];
            let launch = Launch::new("gemm_decode", kernel, grid, BLOCK, cost);
            let arguments = args![*a, *b, c, bias, residual, alpha, accumulate, m32, n32, k32, plan.splits];
            // SAFETY: lengths fit the shape, which the version supports; C is borrowed mutably.
            return unsafe { device.launch(launch, arguments) };
        }
        assert_eq!(plan.splits, 1, "{plan:?}");
        let (kernel, grid) = (symbol::<T>(layout, plan.version), [blocks(m * n, BLOCK as usize), 1, 1]);
        let launch = Launch::new("gemm", kernel, grid, BLOCK, cost);
        let arguments = args![*a, *b, c, bias, residual, 0_u64, alpha, accumulate, m32, n32, k32];
        // SAFETY: lengths fit the shape; C is borrowed mutably.
        unsafe { device.launch(launch, arguments) }
    }
}

/// Adds the parts of C [m, n] in order, and the addends.
fn combine<T: FloatElement>(
    device: &Device,
    partials: &SliceMut<f32>,
    splits: u32,
    c: &SliceMut<T>,
    [m, n]: [usize; 2],
    addends: Addends,
) -> Result<()> {
    assert_eq!(partials.len(), splits as usize * m * n);
    let kernel = if T::NAME == "f32" { "gemm_combine_f32" } else { "gemm_combine_bf16" };
    let bytes = 4 * partials.len() + size_of::<T>() * c.len() + addends.bytes(m * n, size_of::<T>());
    let cost = Cost { bytes: bytes as u64, flops: partials.len() as u64 };
    // A thread takes four elements where alignment allows.
    let launch = Launch::new("gemm", kernel, [blocks(m * n, 4 * BLOCK as usize)], BLOCK, cost);
    let (alpha, accumulate) = (addends.alpha, addends.accumulate as u32);
    let arguments = args![partials, splits, c, addends.bias, addends.residual, alpha, accumulate, size(m), size(n)];
    // SAFETY: the lengths were checked above and by the caller; C is borrowed mutably.
    unsafe { device.launch(launch, arguments) }
}

pub(super) fn linear<P: Precision>(device: &Arc<Device>, op: Linear<'_, Cuda<P>>) -> Result<()> {
    let addends = op.epilogue.map(slice);
    let (layout, m, n, k) = (GemmLayout::Tn, op.shape.tokens, op.shape.outputs, op.shape.inputs);
    let (a, b, c) = (slice(&op.x), slice(&op.w), slice_mut(op.y));
    Product { a, b, c, shape: GemmShape { layout, m, n, k }, addends }.run(device).map(|_| ())
}

pub(super) fn linear_backward_input<P: Precision>(
    device: &Arc<Device>,
    op: LinearBackwardInput<'_, Cuda<P>>,
) -> Result<()> {
    let addends = Addends { alpha: op.alpha, accumulate: op.accumulate, ..Addends::default() };
    let (layout, m, n, k) = (GemmLayout::Nn, op.shape.tokens, op.shape.inputs, op.shape.outputs);
    let (a, b, c) = (slice(&op.dy), slice(&op.w), slice_mut(op.dx));
    Product { a, b, c, shape: GemmShape { layout, m, n, k }, addends }.run(device).map(|_| ())
}

pub(super) fn linear_backward_weight<P: Precision>(
    device: &Arc<Device>,
    op: LinearBackwardWeight<'_, Cuda<P>>,
) -> Result<()> {
    let addends = Addends { alpha: op.alpha, accumulate: op.accumulate, ..Addends::default() };
    let (layout, m, n, k) = (GemmLayout::Nt, op.shape.outputs, op.shape.inputs, op.shape.tokens);
    let (a, b, c) = (slice(&op.dy), slice(&op.x), slice_mut(op.dw));
    Product { a, b, c, shape: GemmShape { layout, m, n, k }, addends }.run(device).map(|_| ())
}

pub(super) fn linear_backward_bias<P: Precision>(
    device: &Arc<Device>,
    op: LinearBackwardBias<'_, Cuda<P>>,
) -> Result<()> {
    let (dy, dbias, accumulate) = (slice(&op.dy), slice_mut(op.dbias), op.accumulate);
    let (outputs, element_bytes) = (dbias.len(), size_of::<P::Grad>());
    if outputs == 0 {
        return Ok(());
    }
    let rows = dy.len() / outputs;
    let (columns, flops) = (blocks(outputs, BIAS_COLUMNS), dy.len() as u64);
    let launch = |kernel, parts, bytes| {
        Launch::new("gemm_bias", kernel, [columns, parts], BLOCK, Cost { bytes: 2 * flops + bytes as u64, flops })
    };
    if rows <= BIAS_BASELINE_ROWS {
        let kernel = if P::Grad::NAME == "f32" { "gemm_bias_baseline_f32" } else { "gemm_bias_baseline_bf16" };
        let launch = launch(kernel, 1, (1 + accumulate as usize) * element_bytes * outputs);
        let arguments = args![dy, &dbias, accumulate as u32, size(rows), size(outputs)];
        // SAFETY: dY has `rows` × `outputs` elements, dbias one a column; it is borrowed mutably.
        return unsafe { device.launch(launch, arguments) };
    }
    let part = BIAS_PART_ROWS.max(rows.div_ceil(BIAS_PARTS));
    let parts = rows.div_ceil(part);
    let mut memory = Memory::<f32>::new(device, parts * outputs)?;
    let sums = memory.all(parts * outputs);
    let arguments = args![dy, &sums, size(rows), size(outputs), size(part)];
    // SAFETY: as above, and `sums` holds a row for each part.
    unsafe { device.launch(launch("gemm_bias_vec8_f32", size(parts), 4 * sums.len()), arguments) }?;
    combine(device, &sums, size(parts), &dbias, [1, outputs], Addends { accumulate, ..Addends::default() })
}
