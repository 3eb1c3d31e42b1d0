//! Rows of a table: see `kernels/embedding.cu`.

use super::FLOAT;
use super::device::{Device, Launch, args, blocks};
use super::measure;
use super::memory::{self, Memory, Slice, SliceMut};
use crate::backend::{Cost, Element, FloatElement, cost};
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

/// to[i] = from[rows[i]].
pub(super) fn gather_rows(
    device: &Device,
    from: Slice<bf16>,
    rows: Slice<u32>,
    to: SliceMut<bf16>,
    width: usize,
) -> Result<()> {
    assert_eq!(to.len(), rows.len() * width);
    let table_rows = from.len() / width;
    // SAFETY: `from` has `table_rows` rows, `to` one for each index; `to` is borrowed mutably.
    unsafe { move_rows(device, from, rows, to, table_rows, width, false) }
}

/// to[rows[i]] = from[i].
pub(super) fn scatter_rows(
    device: &Device,
    from: Slice<bf16>,
    rows: Slice<u32>,
    to: SliceMut<bf16>,
    width: usize,
) -> Result<()> {
    assert_eq!(from.len(), rows.len() * width);
    let table_rows = to.len() / width;
    // SAFETY: `to` has `table_rows` rows, `from` one for each index; `to` is borrowed mutably.
    unsafe { move_rows(device, from, rows, to, table_rows, width, true) }
}

/// # Safety
/// The table, `to` where `scatter`, has `table_rows` rows of `width`; the other side has one for each index.
unsafe fn move_rows(
    device: &Device,
    from: Slice<bf16>,
    rows: Slice<u32>,
    to: SliceMut<bf16>,
    table_rows: usize,
    width: usize,
    scatter: bool,
) -> Result<()> {
    let aligned = width.is_multiple_of(VECTOR) && from.aligned(VECTOR_BYTES) && to.aligned(VECTOR_BYTES);
    let elements = rows.len() * width;
    let (kernel, elements_a_block) = match aligned && !measure::baseline() {
        true => ("embedding_move_vec8_bf16", BLOCK as usize * VECTORS * VECTOR),
        false => ("embedding_move_baseline_bf16", BLOCK as usize),
    };
    let cost = cost::move_rows(rows.len(), width, FLOAT);
    let grid = [blocks(elements, elements_a_block), 1, 1];
    let launch = Launch { image: "embedding", kernel, grid, block: BLOCK, shared_bytes: 0, cost };
    let shape = (rows.len() as u64, table_rows as u32, width as u32);
    // SAFETY: the caller's lengths; aligned as the kernel asks, which skips rows outside the table.
    unsafe { device.launch(launch, args![from, rows, &to, shape.0, shape.1, shape.2, scatter as u32]) }
}

/// dtable[rows[i]] += dy[i].
pub(super) fn embedding_backward<G: FloatElement>(
    device: &Arc<Device>,
    dy: Slice<bf16>,
    rows: Slice<u32>,
    dtable: SliceMut<G>,
    width: usize,
) -> Result<()> {
    assert_eq!(dy.len(), rows.len() * width);
    let (count, table_rows) = (rows.len(), dtable.len() / width);
    if count == 0 {
        return Ok(());
    }
    let [baseline, short, long] = match G::NAME {
        f32::NAME => ["embedding_backward_baseline_f32", "embedding_backward_short_f32", "embedding_backward_long_f32"],
        _ => ["embedding_backward_baseline_bf16", "embedding_backward_short_bf16", "embedding_backward_long_bf16"],
    };
    let launch = |kernel, blocks, block, cost| Launch {
        image: "embedding",
        kernel,
        grid: [blocks, 1, 1],
        block,
        shared_bytes: 0,
        cost,
    };
    let sums = cost::embedding_backward(count, width, FLOAT, size_of::<G>());
    let (count32, table_rows32, width32) = (count as u32, table_rows as u32, width as u32);
    let aligned = width.is_multiple_of(VECTOR) && dy.aligned(VECTOR_BYTES) && dtable.aligned(VECTOR_BYTES);
    if count <= FEW || !aligned || measure::baseline() {
        let launch = launch(baseline, count32, BLOCK, sums);
        // SAFETY: dy has a row of `width` for each index, dtable `table_rows` of them, and is borrowed mutably; the
        // kernel skips rows outside.
        return unsafe { device.launch(launch, args![dy, rows, &dtable, count32, table_rows32, width32]) };
    }
    let list = |len| Memory::<u32>::new(device, len);
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
