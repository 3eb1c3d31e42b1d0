//! Attention: see `kernels/attention.cu` (by the definition, any head_dim up to 256), `kernels/attention_flash.cu`,
//! `kernels/attention_flash_backward.cu` and `kernels/attention_decode.cu` (tensor cores), `kernels/attention_sm90.cu`
//! and `kernels/attention_backward_sm90.cu` (compute capability 9.0).
//!
//! | head_dim 64 or 128, tensors aligned to 16 bytes, scale > 0 | forward | backward | decode |
//! |---|---|---|---|
//! | yes, 9.0, at least a tile of 128 queries of a head a multiprocessor | `wgmma` | `wgmma` | `flash` |
//! | yes, at least two of them a multiprocessor | `flash128` | `flash` | `flash` |
//! | yes, fewer | `flash64` | `flash` | `flash` |
//! | no | `baseline` | `baseline` | `baseline` |
//!
//! Where blocks of dK and dV would leave multiprocessors idle, the heads of a group are shared among several. Forced by
//! name ([`super::with_version`]), `flash64` puts all heads of a group into one block, `flash128` each into its own.

use super::device::Device;
use super::launch::{Launch, args, blocks};
use super::memory::{Memory, Slice, SliceMut, slice, slice_mut};
use super::tensor_map::{slab_map, tensor_map};
use super::{Cuda, FLOAT, Precision, measure};
use crate::backend::{Attention, AttentionBackward, AttentionDecode, AttentionShape, Cost, Operator};
use crate::error::Result;
use cudarc::driver::sys::CUtensorMap;
use half::bf16;
use std::sync::Arc;

/// Threads of a block; of the baseline kernels, a warp a row.
const BLOCK: u32 = 128;
const BASELINE_ROWS: usize = 4;
/// Widest head of the baseline kernels.
const MOST_HEAD_DIM: usize = 256;
/// Keys of a tile of the flash kernels; queries of one backward.
const TILE: usize = 64;
/// Threads of a block of the wgmma kernels.
const WGMMA_BLOCK: u32 = 384;
/// Keys of a chunk of the decode form.
const DECODE_KEYS: usize = 256;
/// Query heads that a block of the decode form takes.
const DECODE_HEADS: usize = 16;
/// Blocks of the flash kernels that fill a multiprocessor (a wgmma kernel: one). At head_dim 128, an A100's 164 KiB of
/// shared memory hold only one block of flash128 and of the backward kernels.
const BLOCKS_MULTIPROCESSOR: usize = 2;
/// It needs more shared memory than the 99 KiB of compute capability 8.6 and 8.9.
const FLASH128_HD128: &str = "attention_forward_flash128_hd128_bf16";
/// Blocks that a grid may have in y and z.
const MOST_BLOCKS: usize = 65535;

impl AttentionShape {
    fn window(&self) -> u32 {
        self.window.and_then(|window| u32::try_from(window).ok()).unwrap_or(u32::MAX)
    }

    /// Whether the tensor-core kernels support a call on these tensors, and the baseline is not forced.
    fn flash(&self, tensors: &[Slice<bf16>], queries: usize) -> bool {
        assert!(self.head_dim <= MOST_HEAD_DIM, "heads of {}: the kernels take up to {MOST_HEAD_DIM}", self.head_dim);
        !measure::baseline()
            && tensors.iter().all(|tensor| tensor.aligned(16))
            && matches!(self.head_dim, 64 | 128)
            && self.scale > 0.0
            && queries.div_ceil(TILE) <= MOST_BLOCKS
            && u32::try_from(queries * self.heads * self.head_dim).is_ok()
    }

    /// One of two symbols, by head_dim.
    fn symbol(&self, hd64: &'static str, hd128: &'static str) -> &'static str {
        if self.head_dim == 64 { hd64 } else { hd128 }
    }

    /// Tensor map of \[tokens, heads·head_dim\] in boxes of `box_rows` rows.
    fn map(&self, device: &Device, tensor: Slice<bf16>, heads: usize, box_rows: usize) -> Result<CUtensorMap> {
        tensor_map(device, tensor, heads * self.head_dim, box_rows)
    }
}

/// A launch of a wgmma kernel: `count` blocks a tile of 128 of the tokens.
fn wgmma_launch(image: &'static str, kernel: &'static str, tokens: usize, count: u32, cost: Cost) -> Launch {
    let grid = [count, blocks(tokens, 2 * TILE), 1];
    Launch::new(image, kernel, grid, WGMMA_BLOCK, cost)
}

/// A launch of a baseline kernel: a warp a row and head.
fn baseline_launch(kernel: &'static str, tokens: usize, heads: usize, cost: Cost) -> Launch {
    let grid = [blocks(tokens, BASELINE_ROWS), heads as u32, 1];
    Launch::new("attention", kernel, grid, BLOCK, cost)
}

/// Tensor-core kernels.
#[derive(Clone, Copy)]
enum Version {
    Flash64,
    Flash128,
    Wgmma,
}

/// The versions that the device runs, the fastest for the shape first.
fn versions(
    device: &Device,
    shape: &AttentionShape,
    tokens: usize,
) -> Result<impl Iterator<Item = (&'static str, Version)> + use<>> {
    let count = blocks(tokens, 2 * TILE) as usize * shape.heads;
    let multiprocessors = device.multiprocessors as usize;
    let (flash64, flash128) = (("flash64", Version::Flash64), ("flash128", Version::Flash128));
    let wgmma = (count > 0 && device.runs("attention_sm90")).then_some(("wgmma", Version::Wgmma));
    let full = count >= BLOCKS_MULTIPROCESSOR * multiprocessors;
    let fits = shape.head_dim == 64 || device.fits("attention_flash", FLASH128_HD128)?;
    let (first, last) = if count >= multiprocessors { (wgmma, None) } else { (None, wgmma) };
    let flash = if full { [flash128, flash64] } else { [flash64, flash128] };
    let flash = flash.into_iter().filter(move |(name, _)| fits || *name == "flash64");
    Ok(first.into_iter().chain(flash).chain(last))
}

pub(super) fn attention<P: Precision>(device: &Arc<Device>, op: Attention<'_, Cuda<P>>) -> Result<()> {
    let (cost, shape, rows) = (op.cost(), op.shape, op.documents.tokens());
    let (q, k, v, o) = (slice(&op.q), slice(&op.k), slice(&op.v), slice_mut(op.o));
    let lse = op.lse.map(slice_mut);
    let (lse, starts) = (lse.as_ref(), slice(&op.documents.device.view()));
    let documents = starts.len() as u32 - 1;
    let (heads, kv_heads, head_dim) = (shape.heads as u32, shape.kv_heads as u32, shape.head_dim as u32);
    let (tokens, scale, window) = (rows as u32, shape.scale, shape.window());
    let version = match shape.flash(&[q, k, v, *o], rows) {
        true => measure::choose(versions(device, &shape, rows)?),
        false => None,
    };
    let Some(version) = version else {
        let launch = baseline_launch("attention_forward_baseline_bf16", rows, shape.heads, cost);
        let arguments = args![q, k, v, &o, lse, starts, documents, tokens, heads, kv_heads, head_dim, scale, window];
        // SAFETY: q, o [tokens, heads·head_dim], k, v [tokens, kv_heads·head_dim], lse [heads, tokens]; documents end with
        // tokens; o and lse are borrowed mutably.
        return unsafe { device.launch(launch, arguments) };
    };
    if let Version::Wgmma = version {
        let kernel = shape.symbol("attention_forward_wgmma_hd64_bf16", "attention_forward_wgmma_hd128_bf16");
        let q = shape.map(device, q, shape.heads, 64)?;
        let (k, v) = (shape.map(device, k, shape.kv_heads, 128)?, shape.map(device, v, shape.kv_heads, 128)?);
        let o = slab_map(device, *o, [shape.heads * shape.head_dim, rows, 1])?;
        let arguments = args![q, k, v, o, lse, starts, documents, tokens, heads, kv_heads, scale, window];
        let mut launch = wgmma_launch("attention_sm90", kernel, rows, heads, cost);
        let [x, y, _] = launch.grid;
        // Persistent blocks, which share the work tiles: one a multiprocessor.
        launch.grid = [device.multiprocessors.min(x * y), 1, 1];
        // SAFETY: as above, q, k, v and o by their maps, and no offset is beyond 32 bits.
        return unsafe { device.launch(launch, arguments) };
    }
    let (queries, kernel) = match version {
        Version::Flash128 => {
            let kernel = "attention_forward_flash128_hd64_bf16";
            (2 * TILE, shape.symbol(kernel, "attention_forward_flash128_hd128_bf16"))
        }
        _ => {
            let kernel = "attention_forward_flash64_hd64_bf16";
            (TILE, shape.symbol(kernel, "attention_forward_flash64_hd128_bf16"))
        }
    };
    let grid = [heads, blocks(rows, queries), 1];
    let launch = Launch::new("attention_flash", kernel, grid, BLOCK, cost);
    let arguments = args![q, k, v, &o, lse, starts, documents, tokens, heads, kv_heads, scale, window];
    // SAFETY: as above; all on 16 bytes, and no offset is beyond 32 bits.
    unsafe { device.launch(launch, arguments) }
}

pub(super) fn attention_backward<P: Precision>(device: &Arc<Device>, op: AttentionBackward<'_, Cuda<P>>) -> Result<()> {
    let (shape, rows) = (op.shape, op.documents.tokens());
    let size = shape.packed(op.documents);
    let [q, k, v, o, d_o] = [&op.q, &op.k, &op.v, &op.o, &op.d_o].map(slice);
    let (lse, [dq, dk, dv]) = (slice(&op.lse), [op.dq, op.dk, op.dv].map(slice_mut));
    let flash = shape.flash(&[q, k, v, o, d_o, *dq, *dk, *dv], rows);
    let (tokens, heads, head_dim) = (rows as u32, shape.heads as u32, shape.head_dim as u32);
    let (kv_heads, starts) = (shape.kv_heads as u32, slice(&op.documents.device.view()));
    let (documents, scale, window) = (starts.len() as u32 - 1, shape.scale, shape.window());

    let mut delta: Memory<f32> = Memory::workspace(device, lse.len())?;
    let delta = delta.all(lse.len());
    let cost = Cost { bytes: (q.len() * 4 + lse.len() * 4) as u64, flops: 2 * q.len() as u64 };
    let (kernel, grid, block) = match flash {
        true => ("attention_backward_delta_vec8_bf16", blocks(q.len(), 2048), 256),
        false => ("attention_backward_delta_baseline_bf16", blocks(lse.len(), BASELINE_ROWS), BLOCK),
    };
    let launch = Launch::new("attention", kernel, [grid], block, cost);
    // SAFETY: o, dO [tokens, heads·head_dim], on 16 bytes where the kernel asks for it; delta [heads, tokens] is this
    // call's own.
    unsafe { device.launch(launch, args![o, d_o, &delta, tokens, heads, head_dim]) }?;

    // The two kernels execute 14·d FLOPs a pair, of which 10·d are necessary: S and dP are computed twice.
    let (query_cost, key_cost) = (size.pass(3, 2, 2, 4, FLOAT), size.pass(2, 4, 2, 6, FLOAT));
    if !flash {
        let launch = baseline_launch("attention_backward_query_baseline_bf16", rows, shape.heads, query_cost);
        let (t, h, kh, d, s, w) = (tokens, heads, kv_heads, head_dim, scale, window);
        // SAFETY: as in `attention`; lse and delta [heads, tokens]; dQ, dK, dV like q, k, v and borrowed mutably.
        unsafe { device.launch(launch, args![q, k, v, d_o, lse, *delta, &dq, starts, documents, t, h, kh, d, s, w]) }?;
        let launch = baseline_launch("attention_backward_key_baseline_bf16", rows, shape.kv_heads, key_cost);
        let arguments = args![q, k, v, d_o, lse, *delta, &dk, &dv, starts, documents, t, h, kh, d, s, w];
        // SAFETY: as above.
        return unsafe { device.launch(launch, arguments) };
    }

    let wgmma = matches!(measure::choose(versions(device, &shape, rows)?), Some(Version::Wgmma));
    let [query, key] = match (wgmma, shape.head_dim) {
        (false, 64) => ["attention_backward_query_flash_hd64_bf16", "attention_backward_key_flash_hd64_bf16"],
        (false, _) => ["attention_backward_query_flash_hd128_bf16", "attention_backward_key_flash_hd128_bf16"],
        (true, 64) => ["attention_backward_query_wgmma_hd64_bf16", "attention_backward_key_wgmma_hd64_bf16"],
        (true, _) => ["attention_backward_query_wgmma_hd128_bf16", "attention_backward_key_wgmma_hd128_bf16"],
    };
    let tensors = match wgmma {
        true => {
            let map = |tensor, heads| shape.map(device, tensor, heads, 64);
            let (k, v) = (map(k, shape.kv_heads)?, map(v, shape.kv_heads)?);
            args![map(q, shape.heads)?, k, v, map(d_o, shape.heads)?].to_vec()
        }
        false => args![q, k, v, d_o].to_vec(),
    };
    let launch = |kernel, count: u32, cost| match wgmma {
        true => wgmma_launch("attention_backward_sm90", kernel, rows, count, cost),
        false => {
            let grid = [count, blocks(rows, TILE), 1];
            Launch::new("attention_flash_backward", kernel, grid, BLOCK, cost)
        }
    };
    let rest = args![lse, *delta, &dq, starts, documents, tokens, heads, kv_heads, scale, window];
    // SAFETY: as above; all on 16 bytes, those of the wgmma kernels by their maps, and no offset is beyond 32 bits.
    unsafe { device.launch(launch(query, heads, query_cost), &[&tensors[..], rest].concat()) }?;

    let (tile, resident) = if wgmma { (2 * TILE, 1) } else { (TILE, BLOCKS_MULTIPROCESSOR) };
    let parts = parts(device, &shape, blocks(rows, tile) as usize * shape.kv_heads, resident);
    let partial_len = if parts == 1 { 0 } else { 2 * parts * k.len() };
    let mut partial = Memory::workspace(device, partial_len)?;
    let partial: SliceMut<f32> = partial.all(partial_len);
    let (count, parts) = (kv_heads * parts as u32, parts as u32);
    let rest = args![lse, *delta, &dk, &dv, &partial, starts, documents, tokens, heads, kv_heads, parts, scale, window];
    // SAFETY: as above; the partial sums are [parts, 2, tokens, kv_heads·head_dim] where there are any.
    unsafe { device.launch(launch(key, count, key_cost), &[&tensors[..], rest].concat()) }?;
    if parts == 1 {
        return Ok(());
    }
    let cost = Cost { bytes: (partial_len + k.len()) as u64 * 4, flops: partial_len as u64 };
    let launch = Launch::new(
        "attention_flash_backward",
        "attention_backward_reduce_bf16",
        [blocks(k.len(), 1024), 2],
        256,
        cost,
    );
    // SAFETY: the sums that were just written; dK, dV as above.
    unsafe { device.launch(launch, args![&partial, &dk, &dv, k.len() as u64, parts]) }
}

/// Blocks among which dK and dV split the query heads of a group: as few as fill the device, each with at least one
/// head. There are `count` groups of tiles, and `resident` blocks fill a multiprocessor.
fn parts(device: &Device, shape: &AttentionShape, count: usize, resident: usize) -> usize {
    let wanted = match measure::asked() {
        Some("flash64") => 1,
        Some("flash128") => shape.group(),
        _ => (resident * device.multiprocessors as usize).div_ceil(count.max(1)),
    };
    let share = shape.group().div_ceil(wanted.clamp(1, shape.group()));
    shape.group().div_ceil(share)
}

pub(super) fn attention_decode<P: Precision>(device: &Arc<Device>, op: AttentionDecode<'_, Cuda<P>>) -> Result<()> {
    let (cost, shape, count) = (op.cost(), op.shape, op.spans.queries());
    let (q, k, v, o) = (slice(&op.q), slice(&op.k), slice(&op.v), slice_mut(op.o));
    let spans = slice(&op.spans.device);
    let seen = op.spans.longest().min(shape.window() as usize);
    let chunks = seen.div_ceil(DECODE_KEYS).max(1);
    let flash = shape.flash(&[q, k, v, *o], 1);
    let (image, kernel, grid_y) = if flash {
        let kernel = shape.symbol("attention_decode_flash_hd64_bf16", "attention_decode_flash_hd128_bf16");
        let grid_y = shape.kv_heads * shape.group().div_ceil(DECODE_HEADS);
        ("attention_decode", kernel, grid_y)
    } else {
        ("attention", "attention_decode_baseline_bf16", shape.heads.div_ceil(BASELINE_ROWS))
    };
    let rows = (count * shape.heads * shape.head_dim) as u64;
    // Spans in x, the only dimension that may exceed 65535: a sweep has members × prompts of them.
    let grid = [count as u32, grid_y as u32, chunks as u32];
    let launch = Launch::new(image, kernel, grid, BLOCK, cost);

    let parts = if chunks == 1 { 0 } else { count * shape.heads * chunks };
    let mut partial = Memory::workspace(device, parts * shape.head_dim)?;
    let mut stats = Memory::workspace(device, 2 * parts)?;
    let partial: SliceMut<f32> = partial.all(parts * shape.head_dim);
    let stats: SliceMut<f32> = stats.all(2 * parts);
    let (heads, kv_heads, head_dim) = (shape.heads as u32, shape.kv_heads as u32, shape.head_dim as u32);
    let (scale, window) = (shape.scale, shape.window());
    let arguments: &[_] = if flash {
        args![q, k, v, &o, &partial, &stats, spans, heads, kv_heads, scale, window]
    } else {
        args![q, k, v, &o, &partial, &stats, spans, heads, kv_heads, head_dim, scale, window]
    };
    // SAFETY: q, o [spans, heads·head_dim], on 16 bytes where the kernel asks for it; spans are rows of k and v; the partial sums [spans, heads, chunks, head_dim] and their (maximum, sum) are this call's own.
    unsafe { device.launch(launch, arguments) }?;
    if chunks == 1 {
        return Ok(());
    }
    let cost = Cost { bytes: (parts * (shape.head_dim + 2) * 4) as u64 + 2 * rows, flops: 2 * chunks as u64 * rows };
    let launch = Launch::new("attention", "attention_decode_combine_bf16", [count as u32, heads], BLOCK, cost);
    // SAFETY: the sums that were just written; spans and o as above.
    unsafe { device.launch(launch, args![&partial, &stats, spans, &o, chunks as u32, head_dim, window]) }
}
