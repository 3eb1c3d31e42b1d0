//! Rows of a table: see `kernels/embedding.cu`.

use super::device::Device;
use super::launch::{Launch, args, blocks};
use super::memory::{self, Memory, Slice, SliceMut, slice, slice_mut};
use super::{Cuda, Precision, measure};
use crate::backend::{AddRows, Cost, Element, EmbeddingBackward, GatherRows, Operator, ScatterRows};
use crate::error::Result;
use half::bf16;
use std::sync::Arc;

const BLOCK: u32 = 256;
/// Elements of a vector, and the alignment of every pointer that the vector kernels take.
const VECTOR: usize = 8;
const VECTOR_BYTES: u64 = 16;
/// Vectors of a thread of the vector kernel that moves rows.
const VECTORS: usize = 4;
/// Most indices for which a search for equals in one launch is cheaper than six launches.
const FEW: usize = 128;
/// Threads of a block that sums a row of many indices.
const LONG_BLOCK: u32 = 1024;
/// Blocks a multiprocessor of the kernels that sum rows of few and of many indices.
const SHORT_BLOCKS: u32 = 8;
const LONG_BLOCKS: u32 = 1;
/// Words of a run, and of the totals.
const RUN: usize = 3;
const TOTALS: usize = 3;

/// Which side of a move is the table.
#[derive(Clone, Copy, PartialEq)]
enum Table {
    From,
    To,
}

pub(super) fn gather_rows<P: Precision>(device: &Device, op: GatherRows<'_, Cuda<P>>) -> Result<()> {
    let (cost, from, rows, to) = (op.cost(), slice(&op.from), slice(&op.rows), slice_mut(op.to));
    // SAFETY: `to` has a row for each index, and is borrowed mutably.
    unsafe { move_rows(device, from, rows, to, Table::From, op.width, cost) }
}

pub(super) fn scatter_rows<P: Precision>(device: &Device, op: ScatterRows<'_, Cuda<P>>) -> Result<()> {
    let (cost, from, rows, to) = (op.cost(), slice(&op.from), slice(&op.rows), slice_mut(op.to));
    // SAFETY: `from` has a row for each index; `to` is borrowed mutably.
    unsafe { move_rows(device, from, rows, to, Table::To, op.width, cost) }
}

/// # Safety
/// The side that is not the table has a row of `width` for each index.
unsafe fn move_rows(
    device: &Device,
    from: Slice<bf16>,
    rows: Slice<u32>,
    to: SliceMut<bf16>,
    table: Table,
    width: usize,
    cost: Cost,
) -> Result<()> {
    let aligned = width.is_multiple_of(VECTOR) && from.aligned(VECTOR_BYTES) && to.aligned(VECTOR_BYTES);
    let table_rows = if table == Table::To { to.len() } else { from.len() } / width;
    let elements = rows.len() * width;
    let (kernel, elements_a_block) = match aligned && !measure::baseline() {
        true => ("embedding_move_vec8_bf16", BLOCK as usize * VECTORS * VECTOR),
        false => ("embedding_move_baseline_bf16", BLOCK as usize),
    };
    let grid = [blocks(elements, elements_a_block), 1, 1];
    let launch = Launch::new("embedding", kernel, grid, BLOCK, cost);
    let shape = (rows.len() as u64, table_rows as u32, width as u32);
    // SAFETY: the caller's lengths; aligned as the kernel asks, which skips rows outside the table.
    unsafe { device.launch(launch, args![from, rows, &to, shape.0, shape.1, shape.2, (table == Table::To) as u32]) }
}

pub(super) fn add_rows<P: Precision>(device: &Arc<Device>, op: AddRows<'_, Cuda<P>>) -> Result<()> {
    let (cost, from, rows, to) = (op.cost(), slice(&op.from), slice(&op.rows), slice_mut(op.to));
    // SAFETY: `from` has a row for each index; `to` is borrowed mutably.
    unsafe { add(device, from, rows, to, op.width, cost) }
}

pub(super) fn embedding_backward<P: Precision>(device: &Arc<Device>, op: EmbeddingBackward<'_, Cuda<P>>) -> Result<()> {
    let (cost, dy, rows, dtable) = (op.cost(), slice(&op.dy), slice(&op.rows), slice_mut(op.dtable));
    // SAFETY: `dy` has a row for each index; `dtable` is borrowed mutably.
    unsafe { add(device, dy, rows, dtable, op.width, cost) }
}

/// # Safety
/// `dy` has a row of `width` for each index; `dtable` is borrowed mutably.
unsafe fn add<T: Element>(
    device: &Arc<Device>,
    dy: Slice<bf16>,
    rows: Slice<u32>,
    dtable: SliceMut<T>,
    width: usize,
    sums: Cost,
) -> Result<()> {
    let (count, table_rows) = (rows.len(), dtable.len() / width);
    if count == 0 {
        return Ok(());
    }
    let [baseline, short, long] = match T::NAME {
        f32::NAME => ["embedding_backward_baseline_f32", "embedding_backward_short_f32", "embedding_backward_long_f32"],
        _ => ["embedding_backward_baseline_bf16", "embedding_backward_short_bf16", "embedding_backward_long_bf16"],
    };
    let launch = |kernel, blocks, block, cost| Launch::new("embedding", kernel, [blocks], block, cost);
    let (count32, table_rows32, width32) = (count as u32, table_rows as u32, width as u32);
    let aligned = width.is_multiple_of(VECTOR) && dy.aligned(VECTOR_BYTES) && dtable.aligned(VECTOR_BYTES);
    if count <= FEW || !aligned || measure::baseline() {
        let launch = launch(baseline, count32, BLOCK, sums);
        // SAFETY: dy has a row of `width` for each index, dtable `table_rows` of them, and is borrowed mutably; the
        // kernel skips rows outside.
        return unsafe { device.launch(launch, args![dy, rows, &dtable, count32, table_rows32, width32]) };
    }
    let list = |len| Memory::<u32>::workspace(device, len);
    let mut lists = [list(TOTALS)?, list(table_rows)?, list(table_rows)?, list(count)?, list(count)?, list(count)?];
    let [totals, counts, starts, places, unsorted, sorted] = &mut lists;
    let mut runs = list(RUN * count)?;
    let (totals, counts, starts) = (totals.all(TOTALS), counts.all(table_rows), starts.all(table_rows));
    let (places, unsorted, sorted) = (places.all(count), unsorted.all(count), sorted.all(count));
    let runs = runs.all(RUN * count);
    memory::clear(device, &totals)?;
    memory::clear(device, &counts)?;
    let words = |words: usize| Cost { bytes: 4 * words as u64, flops: 0 };
    let grid = blocks(count, BLOCK as usize);
    // SAFETY: each list is as long as the kernels index it: `counts` and `starts` by rows of the table, the others by
    // indices or places, of which there are at most `count`; rows outside the table get no place and no run. dy has a
    // row of `width` for each index, dtable `table_rows` of them, aligned as the kernels ask; dtable and the lists
    // are borrowed mutably.
    unsafe {
        let step = |kernel, cost| launch(kernel, grid, BLOCK, cost);
        let link = step("embedding_link_count", words(3 * count));
        device.launch(link, args![rows, &counts, &places, count32, table_rows32])?;
        let link = step("embedding_link_allot", words(4 * count));
        device.launch(link, args![rows, &counts, &places, &starts, &runs, &totals, count32])?;
        let link = step("embedding_link_fill", words(4 * count));
        device.launch(link, args![rows, &starts, &places, &unsorted, count32])?;
        let link = step("embedding_link_sort", words(6 * count));
        device.launch(link, args![rows, &counts, &starts, &places, &unsorted, &sorted, count32])?;
        let sum = launch(short, device.multiprocessors * SHORT_BLOCKS, BLOCK, sums);
        device.launch(sum, args![dy, &sorted, &runs, &totals, &dtable, width32])?;
        let sum = launch(long, device.multiprocessors * LONG_BLOCKS, LONG_BLOCK, Cost::default());
        device.launch(sum, args![dy, &sorted, &runs, &totals, &dtable, count32, width32])
    }
}
