//! The launches of `kernels/gemm_sm90.cu`.

use super::super::device::Device;
use super::super::launch::{Arg, Launch, args};
use super::super::memory::{Slice, SliceMut};
use super::super::tensor_map::{slab_map, tensor_map};
use super::plan::{GemmLayout, GemmPlan, GemmShape, GemmVersion};
use super::{Addends, size};
use crate::backend::{Cost, FloatElement, LinearShape};
use crate::error::Result;
use cudarc::driver::sys;
use half::bf16;

pub(super) const BLOCK: u32 = 384;
/// Lines of a box of a bulk tensor copy: rows of A where k is contiguous, else depth.
const BOX_ROWS_A: usize = 128;
const BOX_DEPTH: usize = 64;
/// Alignment of a tensor and of its rows for bulk tensor copies.
const COPY_BYTES: usize = 16;
/// Alignment of a bias that is read by pairs.
const PAIR_BYTES: u64 = 4;
/// Most products of a launch.
const MEMBERS: usize = 3;
/// Parts of a depth that the kernels' 32-bit arithmetic allows.
const MAX_SPLITS: u32 = 64;

/// How a tile's sums become C. A group takes the latest variant that any member needs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Finish {
    /// Bulk copies: bf16, C = sum.
    Store,
    /// Bulk copies: bf16, C = alpha·sum + bias + residual, or + C.
    Add,
    /// Bulk copies: f32, C = sum or C += sum; or the sums of parts.
    StoreF32,
    /// Any alignment and any addends, into bf16, into f32.
    Any,
    AnyF32,
}

/// The kernels of a layout: `symbols![...][columns == 256][finish as usize]`.
macro_rules! symbols {
    ($layout:literal) => {
        [symbols!($layout, "128"), symbols!($layout, "256")]
    };
    ($layout:literal, $columns:literal) => {
        [
            concat!("gemm_", $layout, "_wgmma", $columns, "_bf16"),
            concat!("gemm_", $layout, "_wgmma", $columns, "_add_bf16"),
            concat!("gemm_", $layout, "_wgmma", $columns, "_f32"),
            concat!("gemm_", $layout, "_wgmma", $columns, "_any_bf16"),
            concat!("gemm_", $layout, "_wgmma", $columns, "_any_f32"),
        ]
    };
}

/// Whether bulk tensor copies reach C [.., n].
pub(super) fn copies<T>(c: Slice<T>, n: usize) -> bool {
    c.aligned(COPY_BYTES as u64) && (n * size_of::<T>()).is_multiple_of(COPY_BYTES)
}

fn finish<T: FloatElement>(c: Slice<T>, partials: Option<Slice<f32>>, n: usize, addends: &Addends) -> Finish {
    let Addends { alpha, bias, residual, accumulate } = *addends;
    let any = if T::NAME == "f32" { Finish::AnyF32 } else { Finish::Any };
    if let Some(partials) = partials {
        return if copies(partials, n) { Finish::StoreF32 } else { any };
    }
    let sum_alone = alpha == 1.0 && bias.is_none() && residual.is_none();
    match T::NAME {
        _ if !copies(c, n) => any,
        "f32" if sum_alone => Finish::StoreF32,
        "f32" => any,
        _ if sum_alone && !accumulate => Finish::Store,
        // The bulk copies load one addend at most.
        _ if accumulate && residual.is_some() => any,
        _ if residual.is_some_and(|residual| !copies(residual, n)) => any,
        _ if bias.is_some_and(|bias| !bias.aligned(PAIR_BYTES)) => any,
        _ => Finish::Add,
    }
}

/// A and B of a product.
pub(super) struct Operands<'a> {
    pub(super) a: Slice<'a, bf16>,
    pub(super) b: Slice<'a, bf16>,
    pub(super) shape: GemmShape,
}

/// C [m, n] of a product, or of a sum of products: C = alpha·sum + addends, or `partials` where there are parts.
pub(super) struct Output<'a, T> {
    pub(super) c: &'a SliceMut<'a, T>,
    pub(super) partials: Option<&'a SliceMut<'a, f32>>,
    pub(super) addends: Addends<'a>,
    pub(super) shape: GemmShape,
}

impl<T: FloatElement> Output<'_, T> {
    fn finish(&self) -> Finish {
        finish(**self.c, self.partials.map(|partials| **partials), self.shape.n, &self.addends)
    }

    /// Tensor map of C, or of the partial sums.
    fn map(&self, device: &Device, splits: usize) -> Result<sys::CUtensorMap> {
        let GemmShape { m, n, .. } = self.shape;
        match self.partials {
            Some(partials) => slab_map(device, **partials, [n, m, splits]),
            None => slab_map(device, **self.c, [n, m, 1]),
        }
    }

    /// Tensor map of the residual, else of C.
    fn source(&self, device: &Device) -> Result<sys::CUtensorMap> {
        let GemmShape { m, n, .. } = self.shape;
        match self.addends.residual {
            Some(residual) => slab_map(device, residual, [n, m, 1]),
            None => slab_map(device, **self.c, [n, m, 1]),
        }
    }
}

/// Whether one launch stores C's of a group: all by bulk copies.
pub(super) fn groups<T: FloatElement>(outputs: &[Output<T>]) -> bool {
    outputs.iter().all(|output| !matches!(output.finish(), Finish::Any | Finish::AnyF32))
}

/// The values of the members of a group, padded with the last one.
fn padded(values: Vec<Arg>) -> [Arg; MEMBERS] {
    std::array::from_fn(|i| values[i.min(values.len() - 1)])
}

/// The sizes of the members of a group, padded with 0.
fn sizes(values: impl Iterator<Item = usize>) -> [Arg; MEMBERS] {
    let mut all = [Arg::U32(0); MEMBERS];
    all.iter_mut().zip(values).for_each(|(to, value)| *to = Arg::U32(size(value)));
    all
}

/// Tensor maps of X, gate, up and Y, the first arguments of the SwiGLU kernels; a tile takes `columns` columns of gate
/// and of up.
pub(super) fn gated_maps(
    device: &Device,
    [x, gate, up]: [Slice<bf16>; 3],
    y: Slice<bf16>,
    LinearShape { tokens, inputs, outputs }: LinearShape,
    columns: usize,
) -> Result<[Arg; 4]> {
    Ok([
        tensor_map(device, x, inputs, BOX_ROWS_A)?.into(),
        tensor_map(device, gate, inputs, columns)?.into(),
        tensor_map(device, up, inputs, columns)?.into(),
        slab_map(device, y, [outputs, tokens, 1])?.into(),
    ])
}

/// Products of one layout by the version and the parts of `plan`, which the caller has checked as it has the lengths:
/// each with an output, or ([`GemmLayout::Nn`]) the terms of one. Several have alpha and `accumulate` in common, and
/// [`groups`].
pub(super) fn launch<T: FloatElement>(
    device: &Device,
    operands: &[Operands],
    outputs: &[Output<T>],
    plan: GemmPlan,
    cost: Cost,
) -> Result<()> {
    let (layout, splits) = (operands[0].shape.layout, plan.splits);
    let (tile, wide) = (plan.version.tile().expect("tiles"), plan.version == GemmVersion::Wgmma256);
    assert!(splits <= MAX_SPLITS, "{plan:?}");
    assert!(outputs.len() == if layout == GemmLayout::Nn { 1 } else { operands.len() } && operands.len() <= MEMBERS);
    let tiles: usize = outputs.iter().map(|output| tile.count(output.shape)).sum();
    let tiles = size(tiles).checked_mul(splits).expect("fewer than 2³² tiles");
    let (mut a, mut b) = (Vec::with_capacity(MEMBERS), Vec::with_capacity(MEMBERS));
    for Operands { a: matrix_a, b: matrix_b, shape: GemmShape { m, n, k, .. } } in operands {
        let [a_map, b_map] = match layout {
            GemmLayout::Tn => [(*k, BOX_ROWS_A), (*k, tile.columns)],
            GemmLayout::Nn => [(*k, BOX_ROWS_A), (*n, BOX_DEPTH)],
            GemmLayout::Nt => [(*m, BOX_DEPTH), (*n, BOX_DEPTH)],
        };
        a.push(tensor_map(device, *matrix_a, a_map.0, a_map.1)?.into());
        b.push(tensor_map(device, *matrix_b, b_map.0, b_map.1)?.into());
    }
    let single = outputs.len() == 1 && operands.len() == 1;
    assert!(single || groups(outputs), "{plan:?}");
    let finish = outputs.iter().map(Output::finish).max().expect("an output");
    let Addends { alpha, residual, accumulate, .. } = outputs[0].addends;
    let c = || outputs.iter().map(|output| output.map(device, splits as usize).map(Arg::from)).collect::<Result<_>>();
    let output = match finish {
        Finish::Store | Finish::StoreF32 => {
            let accumulate = accumulate && outputs[0].partials.is_none();
            [&padded(c()?)[..], args![accumulate as u32]].concat()
        }
        Finish::Add => {
            let source = outputs.iter().map(|output| output.source(device).map(Arg::from)).collect::<Result<_>>()?;
            let mut bias = [Arg::Pointer(0); MEMBERS];
            bias.iter_mut().zip(outputs).for_each(|(to, output)| *to = output.addends.bias.into());
            let has_source = (accumulate || residual.is_some()) as u32;
            [&padded(c()?)[..], &padded(source), args![has_source], &bias, args![alpha]].concat()
        }
        Finish::Any | Finish::AnyF32 => {
            let Output { c, partials, addends, .. } = &outputs[0];
            args![*c, addends.bias, residual, *partials, alpha, accumulate as u32].to_vec()
        }
    };
    let symbols = match layout {
        GemmLayout::Tn => symbols!("tn"),
        GemmLayout::Nn => symbols!("nn"),
        GemmLayout::Nt => symbols!("nt"),
    };
    let launch = Launch::new(
        "gemm_sm90",
        symbols[wide as usize][finish as usize],
        [tiles.min(device.multiprocessors)],
        BLOCK,
        cost,
    );
    let arguments = if matches!(finish, Finish::Any | Finish::AnyF32) {
        let GemmShape { m, n, k, .. } = operands[0].shape;
        [&a[..], &b, &output, args![size(m), size(n), size(k), splits]].concat()
    } else {
        let shapes = || operands.iter().map(|operands| operands.shape);
        let (m, n, k) = (sizes(shapes().map(|s| s.m)), sizes(shapes().map(|s| s.n)), sizes(shapes().map(|s| s.k)));
        [&padded(a)[..], &padded(b), &output, &m, &n, &k, args![splits]].concat()
    };
    // SAFETY: lengths fit the shapes, maps describe A, B and what is stored and added, `partials` hold the sums of all parts;
    // each C is borrowed mutably.
    unsafe { device.launch(launch, &arguments) }
}
