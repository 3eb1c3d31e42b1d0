//! Linear layers: see `kernels/gemm.cu`, `gemm_sm90.cu`, `gemm_decode.cu` and `gemm_bias.cu`.

mod gated;
mod grouped;
mod plan;
mod wgmma;

pub(super) use gated::Gated;
pub use grouped::GemmMember;
pub(super) use grouped::{linear_backward_input_each, linear_backward_weight_each, linear_each};
pub(super) use plan::split_bytes;
pub use plan::{GemmLayout, GemmPlan, GemmShape, GemmVersion};

use super::device::{Device, Launch, args, blocks};
use super::memory::{Memory, Slice, SliceMut, slice, slice_mut};
use super::{Cuda, Precision};
use crate::backend::{Cost, Epilogue, FloatElement, In, LinearShape, ViewMut};
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

/// What a linear layer adds to its product: C = alpha·product + bias + residual (+ C).
#[derive(Clone, Copy)]
pub(super) struct Addends<'a> {
    pub(super) alpha: f32,
    pub(super) bias: Option<Slice<'a, bf16>>,
    pub(super) residual: Option<Slice<'a, bf16>>,
    pub(super) accumulate: bool,
}

impl Addends<'_> {
    fn scaled(alpha: f32, accumulate: bool) -> Self {
        Self { alpha, bias: None, residual: None, accumulate }
    }

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

fn size(count: usize) -> u32 {
    u32::try_from(count).expect("fewer than 2³² rows and columns")
}

impl<P: Precision> Cuda<P> {
    /// C = epilogue(A·B) by the version and the parts of `plan`, else by those chosen for this device and shape, which are
    /// returned. T is bf16, or f32 with [`GemmLayout::Nt`].
    ///
    /// # Errors
    /// Where the device fails or has no memory for the sums of parts.
    ///
    /// # Panics
    /// Where lengths do not fit, or the version does not support the operands ([`GemmVersion::supports`]).
    pub fn gemm<T: FloatElement>(
        &self,
        a: In<'_, Self>,
        b: In<'_, Self>,
        c: ViewMut<'_, Self, T>,
        shape: GemmShape,
        epilogue: Epilogue<'_, Self>,
        plan: Option<GemmPlan>,
    ) -> Result<GemmPlan> {
        let addends = Addends {
            alpha: epilogue.alpha,
            bias: epilogue.bias.as_ref().map(slice),
            residual: epilogue.residual.as_ref().map(slice),
            accumulate: epilogue.accumulate,
        };
        product(&self.device, slice(&a), slice(&b), slice_mut(c), shape, addends, plan)
    }
}

/// C = alpha·A·B + addends.
fn product<T: FloatElement>(
    device: &Arc<Device>,
    a: Slice<bf16>,
    b: Slice<bf16>,
    c: SliceMut<T>,
    shape: GemmShape,
    addends: Addends,
    plan: Option<GemmPlan>,
) -> Result<GemmPlan> {
    let GemmShape { layout, m, n, k } = shape;
    assert_eq!([a.len(), b.len(), c.len()], [m * k, n * k, m * n], "{shape:?}");
    assert!(addends.bias.is_none_or(|bias| bias.len() == n), "{shape:?}");
    assert!(addends.residual.is_none_or(|residual| residual.len() == m * n), "{shape:?}");
    let aligned = a.aligned(OPERAND_BYTES) && b.aligned(OPERAND_BYTES);
    let hopper = device.runs("gemm_sm90");
    let plan = plan.unwrap_or_else(|| plan::choose(shape, aligned, hopper, device.multiprocessors));
    let GemmPlan { version, splits } = plan;
    assert!(splits > 0 && version.supports(shape, aligned, hopper), "{plan:?} of {shape:?}");
    if m == 0 || n == 0 {
        return Ok(plan);
    }
    let whole = shape.cost(size_of::<T>()) + Cost::moved(addends.bytes(m * n, size_of::<T>()));
    let Some(tile) = version.tile() else {
        return untiled(device, a, b, c, shape, addends, plan, whole).map(|()| plan);
    };

    let mut memory = if splits > 1 { Some(Memory::<f32>::new(device, splits as usize * m * n)?) } else { None };
    let partials = memory.as_mut().map(|memory| memory.all(splits as usize * m * n));
    let cost = if splits > 1 { shape.cost(4 * splits as usize) } else { whole };
    if let GemmVersion::Wgmma128 | GemmVersion::Wgmma256 = version {
        let output = wgmma::Output { c: &c, partials: partials.as_ref(), addends, shape };
        wgmma::launch(device, &[wgmma::Operands { a, b, shape }], &[output], plan, cost)?;
    } else {
        let (kernel, grid) = (symbol::<T>(layout, version), [size(tile.count(shape)), splits, 1]);
        let launch = Launch { image: "gemm", kernel, grid, block: MMA_BLOCK, shared_bytes: 0, cost };
        let Addends { alpha, bias, residual, accumulate } = addends;
        let (accumulate, partials, [m, n, k]) = (accumulate as u32, partials.as_ref(), [m, n, k].map(size));
        let arguments = args![a, b, &c, bias, residual, partials, alpha, accumulate, m, n, k];
        // SAFETY: lengths fit the shape, operands are aligned as the version asks, `partials` holds the sums of all parts;
        // C is borrowed mutably.
        unsafe { device.launch(launch, arguments) }?;
    }
    if let Some(partials) = partials {
        combine(device, &partials, splits, &c, [m, n], addends)?;
    }
    Ok(plan)
}

/// The versions that do not cut C into tiles.
#[allow(clippy::too_many_arguments)]
fn untiled<T: FloatElement>(
    device: &Device,
    a: Slice<bf16>,
    b: Slice<bf16>,
    c: SliceMut<T>,
    shape: GemmShape,
    addends: Addends,
    plan: GemmPlan,
    cost: Cost,
) -> Result<()> {
    let GemmShape { layout, m, n, k } = shape;
    let accumulate = addends.accumulate as u32;
    let (m32, n32, k32) = (size(m), size(n), size(k));
    if plan.version == GemmVersion::Decode {
        assert!([1, 2, 4, 8].contains(&plan.splits) && T::NAME == "bf16", "{plan:?}");
        let kernel = match m {
            1 => "gemm_tn_decode1_bf16",
            2 => "gemm_tn_decode2_bf16",
            3..=4 => "gemm_tn_decode4_bf16",
            _ => "gemm_tn_decode8_bf16",
        };
        let grid = [blocks(n * plan.splits as usize, plan::DECODE_OUTPUTS), 1, 1];
        let launch = Launch { image: "gemm_decode", kernel, grid, block: BLOCK, shared_bytes: 0, cost };
        let (bias, residual) = (addends.bias, addends.residual);
        let arguments = args![a, b, &c, bias, residual, addends.alpha, accumulate, m32, n32, k32, plan.splits];
        // SAFETY: lengths fit the shape, which the version supports; C is borrowed mutably.
        return unsafe { device.launch(launch, arguments) };
    }
    assert_eq!(plan.splits, 1, "{plan:?}");
    let (kernel, grid) = (symbol::<T>(layout, plan.version), [blocks(m * n, BLOCK as usize), 1, 1]);
    let launch = Launch { image: "gemm", kernel, grid, block: BLOCK, shared_bytes: 0, cost };
    let (bias, residual, partials) = (addends.bias, addends.residual, 0_u64);
    let arguments = args![a, b, &c, bias, residual, partials, addends.alpha, accumulate, m32, n32, k32];
    // SAFETY: lengths fit the shape; C is borrowed mutably.
    unsafe { device.launch(launch, arguments) }
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
    let launch = Launch {
        image: "gemm",
        kernel,
        // A thread takes four elements where alignment allows.
        grid: [blocks(m * n, 4 * BLOCK as usize), 1, 1],
        block: BLOCK,
        shared_bytes: 0,
        cost: Cost { bytes: bytes as u64, flops: partials.len() as u64 },
    };
    let (alpha, accumulate) = (addends.alpha, addends.accumulate as u32);
    let arguments = args![partials, splits, c, addends.bias, addends.residual, alpha, accumulate, size(m), size(n)];
    // SAFETY: the lengths were checked above and by the caller; C is borrowed mutably.
    unsafe { device.launch(launch, arguments) }
}

/// Y [tokens, outputs] = alpha·X·Wᵀ + addends.
pub(super) fn linear(
    device: &Arc<Device>,
    x: Slice<bf16>,
    w: Slice<bf16>,
    y: SliceMut<bf16>,
    shape: LinearShape,
    addends: Addends,
) -> Result<()> {
    let shape = GemmShape { layout: GemmLayout::Tn, m: shape.tokens, n: shape.outputs, k: shape.inputs };
    product(device, x, w, y, shape, addends, None).map(|_| ())
}

/// dX [tokens, inputs] = alpha·dY·W (+ dX).
pub(super) fn linear_backward_input(
    device: &Arc<Device>,
    dy: Slice<bf16>,
    w: Slice<bf16>,
    dx: SliceMut<bf16>,
    shape: LinearShape,
    alpha: f32,
    accumulate: bool,
) -> Result<()> {
    let shape = GemmShape { layout: GemmLayout::Nn, m: shape.tokens, n: shape.inputs, k: shape.outputs };
    product(device, dy, w, dx, shape, Addends::scaled(alpha, accumulate), None).map(|_| ())
}

/// dW [outputs, inputs] = alpha·dYᵀ·X (+ dW).
pub(super) fn linear_backward_weight<G: FloatElement>(
    device: &Arc<Device>,
    dy: Slice<bf16>,
    x: Slice<bf16>,
    dw: SliceMut<G>,
    shape: LinearShape,
    alpha: f32,
    accumulate: bool,
) -> Result<()> {
    let shape = GemmShape { layout: GemmLayout::Nt, m: shape.outputs, n: shape.inputs, k: shape.tokens };
    product(device, dy, x, dw, shape, Addends::scaled(alpha, accumulate), None).map(|_| ())
}

/// dbias \[outputs\] = column sums of dY (+ dbias).
pub(super) fn linear_backward_bias<G: FloatElement>(
    device: &Arc<Device>,
    dy: Slice<bf16>,
    dbias: SliceMut<G>,
    outputs: usize,
    accumulate: bool,
) -> Result<()> {
    assert_eq!(dbias.len(), outputs);
    if outputs == 0 {
        return Ok(());
    }
    assert!(dy.len().is_multiple_of(outputs));
    let rows = dy.len() / outputs;
    let (columns, flops) = (blocks(outputs, BIAS_COLUMNS), dy.len() as u64);
    let launch = |kernel, parts, bytes| Launch {
        image: "gemm_bias",
        kernel,
        grid: [columns, parts, 1],
        block: BLOCK,
        shared_bytes: 0,
        cost: Cost { bytes: 2 * flops + bytes as u64, flops },
    };
    if rows <= BIAS_BASELINE_ROWS {
        let kernel = if G::NAME == "f32" { "gemm_bias_baseline_f32" } else { "gemm_bias_baseline_bf16" };
        let launch = launch(kernel, 1, (1 + accumulate as usize) * size_of::<G>() * outputs);
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
    combine(device, &sums, size(parts), &dbias, [1, outputs], Addends::scaled(1.0, accumulate))
}
