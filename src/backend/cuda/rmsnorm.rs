//! RMSNorm: see `kernels/rmsnorm.cu`.

use super::device::Device;
use super::launch::{Arg, Launch, args, blocks};
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

/// A version of the forward kernel, or of the backward kernel of dx and partial sums together.
#[derive(Clone, Copy)]
struct Version {
    name: &'static str,
    kernel: &'static str,
    /// Widest row.
    widest: usize,
    /// Threads of a block.
    block: u32,
    /// Rows that a block has under way; of the lanes kernels, rows that a group of lanes has.
    rows: u32,
}

const fn version(name: &'static str, kernel: &'static str, widest: usize, block: u32, rows: u32) -> Version {
    Version { name, kernel, widest, block, rows }
}

const FORWARD: [Version; 5] = [
    version("lanes", "rmsnorm_forward_lanes_bf16", LANES_WIDTH, BLOCK, FORWARD_ROWS),
    version("warp", "rmsnorm_forward_warp_bf16", 1024, BLOCK, BLOCK / 32),
    version("row2048", "rmsnorm_forward_row2048_bf16", 2048, 128, 1),
    version("row4096", "rmsnorm_forward_row4096_bf16", 4096, 128, 1),
    version("row8192", "rmsnorm_forward_row8192_bf16", 8192, 256, 1),
];
const FORWARD_BASELINE: Version = version("baseline", "rmsnorm_forward_baseline_bf16", usize::MAX, BLOCK, BLOCK / 32);
const BACKWARD: [Version; 5] = [
    version("lanes", "rmsnorm_backward_lanes_bf16", LANES_WIDTH, BLOCK, BACKWARD_ROWS),
    version("row1024", "rmsnorm_backward_row1024_bf16", 1024, 128, 1),
    version("row2048", "rmsnorm_backward_row2048_bf16", 2048, 256, 1),
    version("row4096", "rmsnorm_backward_row4096_bf16", 4096, 512, 1),
    version("row8192", "rmsnorm_backward_row8192_bf16", 8192, 1024, 1),
];

impl Version {
    /// The first that takes rows of this width, or the one that is forced; `None`: the baseline.
    fn choose(versions: [Self; 5], width: usize, tensors: &[Slice<bf16>]) -> Option<Self> {
        let aligned = width.is_multiple_of(VECTOR) && tensors.iter().all(|tensor| tensor.aligned(VECTOR_BYTES));
        let fitting = versions.into_iter().filter(|version| aligned && width <= version.widest);
        measure::choose(fitting.map(|version| (version.name, version)))
    }

    /// Lanes of a row, in the lanes kernels.
    fn lanes(&self, width: usize) -> Option<u32> {
        let lanes = (width.div_ceil(VECTOR) as u32).next_power_of_two().max(2);
        (self.widest == LANES_WIDTH).then_some(lanes)
    }

    /// Rows that a block has under way.
    fn rows(&self, width: usize) -> usize {
        (self.lanes(width).map_or(1, |lanes| BLOCK / lanes) * self.rows) as usize
    }
}

/// How rows are divided for the sums of dweight: rows a part, and parts. `None`: by the baseline.
fn parts(version: Option<&Version>, rows: usize, width: usize) -> (usize, usize) {
    let most = if version.is_some_and(|version| version.widest > 1024) { PARTS } else { SMALL_PARTS };
    let rows_a_part = rows.div_ceil(most).max(version.map_or(1, |version| version.rows(width)));
    (rows_a_part, rows.div_ceil(rows_a_part))
}

/// y = bf16(x·rstd)·weight.
pub(super) fn rmsnorm<P: Precision>(device: &Arc<Device>, op: RmsNorm<'_, Cuda<P>>) -> Result<()> {
    let (cost, eps) = (op.cost(), op.eps);
    let (x, weight, y, rstd) = (slice(&op.x), slice(&op.weight), slice_mut(op.y), op.rstd.map(slice_mut));
    let (width, rows) = (weight.len(), x.len() / weight.len());
    let version = Version::choose(FORWARD, width, &[x, weight, *y]).unwrap_or(FORWARD_BASELINE);
    let launch = Launch::new("rmsnorm", version.kernel, [blocks(rows, version.rows(width))], version.block, cost);
    let arguments = args![x, weight, &y, rstd.as_ref(), rows as u64, width as u32, eps];
    let lanes = version.lanes(width).map(Arg::from);
    // SAFETY: x and y have `rows` rows of `width`, weight one, rstd an element a row; aligned as the kernel asks, which
    // also bounds the width; y and rstd are borrowed mutably.
    unsafe { device.launch(launch, &[arguments, lanes.as_slice()].concat()) }
}

pub(super) fn rmsnorm_backward<P: Precision>(device: &Arc<Device>, op: RmsNormBackward<'_, Cuda<P>>) -> Result<()> {
    let (cost, dx_written) = (op.cost(), op.dx.as_ref().map(|_| op.accumulate_dx));
    let (dy, x, weight, rstd) = (slice(&op.dy), slice(&op.x), slice(&op.weight), slice(&op.rstd));
    let (dx, dweight) = (op.dx.map(slice_mut), op.dweight.map(slice_mut));
    let (width, rows) = (weight.len(), rstd.len());
    if dx.is_none() && dweight.is_none() {
        return Ok(());
    }
    let version = Version::choose(BACKWARD, width, &[dy, x, weight, dx.as_ref().map_or(x, |dx| **dx)]);
    let (rows_a_part, parts) = parts(version.as_ref(), rows, width);
    let mut workspace = Memory::<f32>::workspace(device, if dweight.is_some() { parts * width } else { 0 })?;
    let partial = dweight.as_ref().map(|_| workspace.all(parts * width));
    let (rows_a_part, parts, width32) = (rows_a_part as u32, parts as u32, width as u32);
    let alone = |wanted| cost::rmsnorm_backward(x.len(), width, wanted, FLOAT);
    let (rows64, accumulate_dx) = (rows as u64, op.accumulate_dx as u32);
    let launch = |kernel, grid, block, cost| Launch::new("rmsnorm", kernel, grid, block, cost);
    // SAFETY: x, dy and dx have `rows` rows of `width`, weight one, rstd an element a row, `partial` `parts` rows,
    // and `parts` of `rows_a_part` rows cover all; aligned as the kernels ask, which also bounds the width; dx,
    // dweight and the workspace are borrowed mutably.
    unsafe {
        if let Some(version) = version {
            let launch = launch(version.kernel, [parts, 1], version.block, cost);
            let (dx, partial) = (dx.as_ref(), partial.as_ref());
            let arguments = args![dy, x, weight, rstd, dx, partial, rows64, rows_a_part, width32, accumulate_dx];
            let lanes = version.lanes(width).map(Arg::from);
            device.launch(launch, &[arguments, lanes.as_slice()].concat())?;
        } else {
            if let Some(dx) = &dx {
                let cost = alone(NormGradients { dx: dx_written, dweight: false });
                let grid = [blocks(rows, (BLOCK / 32) as usize), 1];
                let launch = launch("rmsnorm_backward_input_baseline_bf16", grid, BLOCK, cost);
                device.launch(launch, args![dy, x, weight, rstd, dx, rows64, width32, accumulate_dx])?;
            }
            if let Some(partial) = &partial {
                let cost = alone(NormGradients { dx: None, dweight: true });
                let grid = [blocks(width, BLOCK as usize), parts];
                let launch = launch("rmsnorm_backward_weight_baseline_bf16", grid, BLOCK, cost);
                device.launch(launch, args![dy, x, rstd, partial, rows64, rows_a_part, width32])?;
            }
        }
        let (Some(dweight), Some(partial)) = (&dweight, &partial) else { return Ok(()) };
        let kernel = match P::Grad::NAME {
            f32::NAME => "rmsnorm_backward_columns_f32",
            _ => "rmsnorm_backward_columns_bf16",
        };
        let sums = u64::from(parts) * width as u64;
        let cost = Cost { bytes: 4 * sums + (width * size_of::<P::Grad>()) as u64, flops: sums };
        let launch = launch(kernel, [blocks(width, COLUMNS), 1], COLUMNS_BLOCK, cost);
        device.launch(launch, args![partial, dweight, parts, width32, op.accumulate_dweight as u32])
    }
}
