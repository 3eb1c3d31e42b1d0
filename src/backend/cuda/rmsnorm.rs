//! RMSNorm: see `kernels/rmsnorm.cu`.

use super::device::{Device, Launch, args, blocks};
use super::memory::{Memory, Slice, slice, slice_mut};
use super::{Cuda, FLOAT, Precision, measure};
use crate::backend::cost::{self, NormGradients};
use crate::backend::{Cost, Element, Operator, RmsNorm, RmsNormBackward};
use crate::error::Result;
use half::bf16;
use std::sync::Arc;

/// Threads of the lanes, warp and baseline kernels.
const BLOCK: u32 = 256;
/// Elements of a vector, and the alignment of every pointer that the vector kernels take.
const VECTOR: usize = 8;
const VECTOR_BYTES: u64 = 16;
/// Widest row of the lanes kernels.
const LANES_WIDTH: usize = 256;
/// Rows that a group of lanes has under way at once.
const FORWARD_ROWS: u32 = 4;
const BACKWARD_ROWS: u32 = 2;
/// Columns of a block of the column kernel, and its threads.
const COLUMNS: usize = 32;
const COLUMNS_BLOCK: u32 = 1024;
/// Parts of the rows in a sum of dweight: two, or four small blocks, for each of an H100's 132 multiprocessors. A
/// constant, so that the sums are the same on every device.
const PARTS: usize = 264;
const SMALL_PARTS: usize = 528;

/// Versions of the forward kernel.
#[derive(Clone, Copy, PartialEq)]
enum Forward {
    Baseline,
    Lanes,
    Warp,
    Row2048,
    Row4096,
    Row8192,
}

impl Forward {
    /// The first that takes rows of this width, or the one that is forced.
    fn choose(width: usize, tensors: &[Slice<bf16>]) -> Self {
        let versions = [
            ("lanes", LANES_WIDTH, Self::Lanes),
            ("warp", 1024, Self::Warp),
            ("row2048", 2048, Self::Row2048),
            ("row4096", 4096, Self::Row4096),
            ("row8192", 8192, Self::Row8192),
        ];
        let fitting = versions.into_iter().filter(|(_, widest, _)| aligned(width, tensors) && width <= *widest);
        measure::choose(fitting.map(|(name, _, version)| (name, version))).unwrap_or(Self::Baseline)
    }

    /// Symbol, blocks, and threads of a block.
    fn launch(self, rows: usize, width: usize) -> (&'static str, u32, u32) {
        let by_warps = blocks(rows, (BLOCK / 32) as usize);
        match self {
            Self::Baseline => ("rmsnorm_forward_baseline_bf16", by_warps, BLOCK),
            Self::Lanes => {
                let rows_a_block = BLOCK / lanes(width) * FORWARD_ROWS;
                ("rmsnorm_forward_lanes_bf16", blocks(rows, rows_a_block as usize), BLOCK)
            }
            Self::Warp => ("rmsnorm_forward_warp_bf16", by_warps, BLOCK),
            Self::Row2048 => ("rmsnorm_forward_row2048_bf16", blocks(rows, 1), 128),
            Self::Row4096 => ("rmsnorm_forward_row4096_bf16", blocks(rows, 1), 128),
            Self::Row8192 => ("rmsnorm_forward_row8192_bf16", blocks(rows, 1), 256),
        }
    }
}

/// Versions of the backward kernel.
#[derive(Clone, Copy, PartialEq)]
enum Backward {
    Baseline,
    Lanes,
    Row1024,
    Row2048,
    Row4096,
    Row8192,
}

impl Backward {
    /// The first that takes rows of this width, or the one that is forced.
    fn choose(width: usize, tensors: &[Slice<bf16>]) -> Self {
        let versions = [
            ("lanes", LANES_WIDTH, Self::Lanes),
            ("row1024", 1024, Self::Row1024),
            ("row2048", 2048, Self::Row2048),
            ("row4096", 4096, Self::Row4096),
            ("row8192", 8192, Self::Row8192),
        ];
        let fitting = versions.into_iter().filter(|(_, widest, _)| aligned(width, tensors) && width <= *widest);
        measure::choose(fitting.map(|(name, _, version)| (name, version))).unwrap_or(Self::Baseline)
    }

    /// Symbol of the kernel of dx and partial sums together, and threads of a block.
    fn kernel(self) -> Option<(&'static str, u32)> {
        match self {
            Self::Baseline => None,
            Self::Lanes => Some(("rmsnorm_backward_lanes_bf16", BLOCK)),
            Self::Row1024 => Some(("rmsnorm_backward_row1024_bf16", 128)),
            Self::Row2048 => Some(("rmsnorm_backward_row2048_bf16", 256)),
            Self::Row4096 => Some(("rmsnorm_backward_row4096_bf16", 512)),
            Self::Row8192 => Some(("rmsnorm_backward_row8192_bf16", 1024)),
        }
    }

    /// How rows are divided for the sums of dweight: rows a part, and parts.
    fn parts(self, rows: usize, width: usize) -> (usize, usize) {
        let (most, least) = match self {
            Self::Baseline | Self::Row1024 => (SMALL_PARTS, 1),
            Self::Lanes => (SMALL_PARTS, (BLOCK / lanes(width) * BACKWARD_ROWS) as usize),
            Self::Row2048 | Self::Row4096 | Self::Row8192 => (PARTS, 1),
        };
        let rows_a_part = rows.div_ceil(most).max(least);
        (rows_a_part, rows.div_ceil(rows_a_part))
    }
}

/// Whether rows of all tensors can be accessed by vectors.
fn aligned(width: usize, tensors: &[Slice<bf16>]) -> bool {
    width.is_multiple_of(VECTOR) && tensors.iter().all(|tensor| tensor.aligned(VECTOR_BYTES))
}

/// Lanes of a row of the lanes kernels.
fn lanes(width: usize) -> u32 {
    (width.div_ceil(VECTOR) as u32).next_power_of_two().max(2)
}

/// y = bf16(x·rstd)·weight.
pub(super) fn rmsnorm<P: Precision>(device: &Arc<Device>, op: RmsNorm<'_, Cuda<P>>) -> Result<()> {
    let (cost, eps) = (op.cost(), op.eps);
    let (x, weight, y, rstd) = (slice(&op.x), slice(&op.weight), slice_mut(op.y), op.rstd.map(slice_mut));
    let (width, rows) = (weight.len(), x.len() / weight.len());
    let version = Forward::choose(width, &[x, weight, *y]);
    let (kernel, blocks, block) = version.launch(rows, width);
    let launch = Launch { image: "rmsnorm", kernel, grid: [blocks, 1, 1], block, shared_bytes: 0, cost };
    let (rstd, rows, width32) = (rstd.as_ref(), rows as u64, width as u32);
    // SAFETY: x and y have `rows` rows of `width`, weight one, rstd an element a row; aligned as the kernel asks, which
    // also bounds the width; y and rstd are borrowed mutably.
    unsafe {
        match version {
            Forward::Lanes => device.launch(launch, args![x, weight, &y, rstd, rows, width32, eps, lanes(width)]),
            _ => device.launch(launch, args![x, weight, &y, rstd, rows, width32, eps]),
        }
    }
}

pub(super) fn rmsnorm_backward<P: Precision>(device: &Arc<Device>, op: RmsNormBackward<'_, Cuda<P>>) -> Result<()> {
    let (cost, dx_written) = (op.cost(), op.dx.as_ref().map(|_| op.accumulate_dx));
    let (dy, x, weight, rstd) = (slice(&op.dy), slice(&op.x), slice(&op.weight), slice(&op.rstd));
    let (dx, dweight) = (op.dx.map(slice_mut), op.dweight.map(slice_mut));
    let (width, rows) = (weight.len(), rstd.len());
    if dx.is_none() && dweight.is_none() {
        return Ok(());
    }
    let version = Backward::choose(width, &[dy, x, weight, dx.as_ref().map_or(x, |dx| **dx)]);
    let (rows_a_part, parts) = version.parts(rows, width);
    let mut workspace = Memory::<f32>::new(device, if dweight.is_some() { parts * width } else { 0 })?;
    let partial = dweight.as_ref().map(|_| workspace.all(parts * width));
    let (rows_a_part, parts, width32) = (rows_a_part as u32, parts as u32, width as u32);
    let alone = |wanted| cost::rmsnorm_backward(x.len(), width, wanted, FLOAT);
    let (rows64, accumulate_dx) = (rows as u64, op.accumulate_dx as u32);
    let launch = |kernel, grid, block, cost| Launch { image: "rmsnorm", kernel, grid, block, shared_bytes: 0, cost };
    // SAFETY: x, dy and dx have `rows` rows of `width`, weight one, rstd an element a row, `partial` `parts` rows,
    // and `parts` of `rows_a_part` rows cover all; aligned as the kernels ask, which also bounds the width; dx,
    // dweight and the workspace are borrowed mutably.
    unsafe {
        match version.kernel() {
            Some((kernel, block)) => {
                let launch = launch(kernel, [parts, 1, 1], block, cost);
                let (dx, partial) = (dx.as_ref(), partial.as_ref());
                if version == Backward::Lanes {
                    let lanes = lanes(width);
                    let arguments =
                        args![dy, x, weight, rstd, dx, partial, rows64, rows_a_part, width32, accumulate_dx, lanes];
                    device.launch(launch, arguments)?;
                } else {
                    let arguments =
                        args![dy, x, weight, rstd, dx, partial, rows64, rows_a_part, width32, accumulate_dx];
                    device.launch(launch, arguments)?;
                }
            }
            None => {
                if let Some(dx) = &dx {
                    let grid = [blocks(rows, (BLOCK / 32) as usize), 1, 1];
                    let launch = launch(
                        "rmsnorm_backward_input_baseline_bf16",
                        grid,
                        BLOCK,
                        alone(NormGradients { dx: dx_written, dweight: false }),
                    );
                    device.launch(launch, args![dy, x, weight, rstd, dx, rows64, width32, accumulate_dx])?;
                }
                if let Some(partial) = &partial {
                    let grid = [blocks(width, BLOCK as usize), parts, 1];
                    let launch = launch(
                        "rmsnorm_backward_weight_baseline_bf16",
                        grid,
                        BLOCK,
                        alone(NormGradients { dx: None, dweight: true }),
                    );
                    device.launch(launch, args![dy, x, rstd, partial, rows64, rows_a_part, width32])?;
                }
            }
        }
        let (Some(dweight), Some(partial)) = (&dweight, &partial) else { return Ok(()) };
        let kernel = match P::Grad::NAME {
            f32::NAME => "rmsnorm_backward_columns_f32",
            _ => "rmsnorm_backward_columns_bf16",
        };
        let sums = u64::from(parts) * width as u64;
        let cost = Cost { bytes: 4 * sums + (width * size_of::<P::Grad>()) as u64, flops: sums };
        let launch = launch(kernel, [blocks(width, COLUMNS), 1, 1], COLUMNS_BLOCK, cost);
        device.launch(launch, args![partial, dweight, parts, width32, op.accumulate_dweight as u32])
    }
}
