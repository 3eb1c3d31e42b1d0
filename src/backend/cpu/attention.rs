//! Causal grouped-query attention inside packed documents.
//!
//! A task is one block of queries of one document and one key-value head; the query heads that share it are stacked, so
//! that one product gives the scores of all of them against the keys that the block may see. The softmax is exact over
//! the whole row (no running maximum), because a row of scores fits the cache at the block sizes chosen here.
//! Backward works document by document and key-value head by key-value head: one task owns its rows of dK and dV, so
//! sums have one order.

use super::Cpu;
use super::matrix::{Matrix, Product};
use super::simd::{dot, exp, max, simd_kernel, sum};
use super::storage::{Shared, slice, slice_mut};
use crate::backend::{Attention, AttentionBackward, AttentionDecode, AttentionShape, Documents};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Most queries of a block.
const QUERIES: usize = 64;
/// Most scores of a block (512 KiB), as long as at least 8 queries fit.
const SCORES: usize = 1 << 17;

/// Queries `rows` of a document whose first visible key is row `first_key` of the batch.
#[derive(Clone)]
struct Block {
    rows: Range<usize>,
    first_key: usize,
}

impl Block {
    /// Keys that some query of the block sees.
    #[inline(always)]
    fn keys(&self) -> usize {
        self.rows.end - self.first_key
    }
}

/// Rows of the documents that have any.
fn ranges(documents: &Documents<Cpu>) -> Vec<Range<usize>> {
    let ranges = documents.starts.windows(2).map(|w| w[0] as usize..w[1] as usize);
    ranges.filter(|document| !document.is_empty()).collect()
}

impl AttentionShape {
    /// The query blocks of a document, equal in size but for the last.
    fn blocks(&self, document: Range<usize>) -> impl Iterator<Item = Block> + use<> {
        let reach = self.window.unwrap_or(usize::MAX);
        let widest = document.len().min(reach.saturating_add(QUERIES));
        let most = (SCORES / (self.group() * widest)).clamp(8, QUERIES);
        let size = document.len().div_ceil(document.len().div_ceil(most));
        document.clone().step_by(size).map(move |start| Block {
            rows: start..(start + size).min(document.end),
            first_key: document.start.max((start + 1).saturating_sub(reach)),
        })
    }

    /// Which keys, counted from the block's first, the query `row` sees.
    #[inline(always)]
    fn visible(&self, block: &Block, row: usize) -> Range<usize> {
        let from = match self.window {
            Some(window) => (row + 1).saturating_sub(window).max(block.first_key),
            None => block.first_key,
        };
        from - block.first_key..row + 1 - block.first_key
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// Calls `f` with this thread's scratch, cut into pieces of these lengths, of unspecified content.
fn with_scratch<const N: usize, R>(lengths: [usize; N], f: impl FnOnce([&mut [f32]; N]) -> R) -> R {
    SCRATCH.with_borrow_mut(|scratch| {
        let total = lengths.iter().sum();
        if scratch.len() < total {
            scratch.resize(total, 0.0);
        }
        let mut rest = &mut scratch[..];
        f(lengths.map(|len| {
            let (piece, tail) = std::mem::take(&mut rest).split_at_mut(len);
            rest = tail;
            piece
        }))
    })
}

/// Rows of one key-value head's query heads, stacked head by head: [group · rows, head_dim], times `factor`.
fn stack(from: &[f32], shape: &AttentionShape, kv_head: usize, rows: &Range<usize>, factor: f32, to: &mut [f32]) {
    let AttentionShape { heads, head_dim, .. } = *shape;
    let group = shape.group();
    for (h, to) in to.chunks_exact_mut(rows.len() * head_dim).take(group).enumerate() {
        let column = (kv_head * group + h) * head_dim;
        let from = &from[rows.start * heads * head_dim + column..];
        scaled_rows(from, heads * head_dim, to, head_dim, factor);
    }
}

simd_kernel! {
    /// Rows of `width` that are `stride` apart, times `factor`, one after another.
    fn scaled_rows(_simd, from: &'a [f32], stride: usize, to: &'a mut [f32], width: usize, factor: f32) {
        for (i, to) in to.chunks_exact_mut(width).enumerate() {
            for (to, x) in to.iter_mut().zip(&from[i * stride..][..width]) {
                *to = x * factor;
            }
        }
    }
}

simd_kernel! {
    /// Turns rows of scores into exponentials, 0 where a query does not see a key. Gives 1 / the sum and
    /// the maximum of each row.
    fn softmax_rows(
        simd,
        scores: &'a mut [f32],
        shape: &'a AttentionShape,
        block: &'a Block,
        inverse: &'a mut [f32],
        tops: &'a mut [f32],
    ) {
        let rows = scores.chunks_exact_mut(block.keys()).zip(inverse).zip(tops);
        for (i, ((row, inverse), top)) in rows.enumerate() {
            let visible = shape.visible(block, block.rows.start + i % block.rows.len());
            row[..visible.start].fill(0.0);
            row[visible.end..].fill(0.0);
            let row = &mut row[visible];
            *top = max(simd, row);
            exp_minus(row, *top);
            *inverse = 1.0 / sum(simd, row);
        }
    }
}

#[inline(always)]
fn exp_minus(row: &mut [f32], offset: f32) {
    for x in row {
        *x = exp(*x - offset);
    }
}

pub(super) fn attention(op: Attention<'_, Cpu>) {
    let shape = op.shape;
    let AttentionShape { heads, kv_heads, head_dim, .. } = shape;
    let (tokens, group) = (op.documents.tokens(), shape.group());
    let (q, k, v) = (slice(&op.q), slice(&op.k), slice(&op.v));
    let (o, lse) = (Shared::new(slice_mut(op.o)), op.lse.map(|lse| Shared::new(slice_mut(lse))));
    let blocks: Vec<Block> = ranges(op.documents).into_iter().flat_map(|d| shape.blocks(d)).collect();
    (0..blocks.len() * kv_heads).into_par_iter().for_each(|task| {
        let (block, kv_head) = (&blocks[task / kv_heads], task % kv_heads);
        let (queries, keys) = (block.rows.len(), block.keys());
        let stacked = group * queries;
        let lengths = [stacked * head_dim, stacked * keys, stacked * head_dim, stacked, stacked];
        with_scratch(lengths, |[qs, scores, os, inverse, tops]| {
            stack(q, &shape, kv_head, &block.rows, shape.scale, qs);
            let kv_width = kv_heads * head_dim;
            let from = block.first_key * kv_width + kv_head * head_dim;
            let (qs, k) = (Matrix::rows(qs, head_dim), Matrix::rows(&k[from..], kv_width).t());
            Product::serial(scores, keys, qs, k, (stacked, keys, head_dim)).run();
            softmax_rows(scores, &shape, block, inverse, tops);
            if let Some(lse) = &lse {
                for (i, (inverse, top)) in inverse.iter().zip(&*tops).enumerate() {
                    let at = (kv_head * group + i / queries) * tokens + block.rows.start + i % queries;
                    // SAFETY: each task writes the queries of its own block and heads.
                    unsafe { lse.range(at..at + 1)[0] = top - inverse.ln() };
                }
            }
            let (scores, v) = (Matrix::rows(scores, keys), Matrix::rows(&v[from..], kv_width));
            Product::serial(os, head_dim, scores, v, (stacked, head_dim, keys)).run();
            for (i, (row, inverse)) in os.chunks_exact(head_dim).zip(inverse.iter()).enumerate() {
                let column = (kv_head * group + i / queries) * head_dim;
                let at = (block.rows.start + i % queries) * heads * head_dim + column;
                // SAFETY: each task writes the queries of its own block and heads.
                let to = unsafe { o.range(at..at + head_dim) };
                scaled_rows(row, head_dim, to, head_dim, *inverse);
            }
        });
    });
}

simd_kernel! {
    fn inner(simd, a: &'a [f32], b: &'a [f32]) -> f32 { dot(simd, a, b) }
}

/// Slices of q, k, v, o, lse and d_o.
type Saved<'a> = [&'a [f32]; 6];

pub(super) fn attention_backward(op: AttentionBackward<'_, Cpu>) {
    let (shape, kv_heads) = (op.shape, op.shape.kv_heads);
    let saved = [&op.q, &op.k, &op.v, &op.o, &op.lse, &op.d_o].map(slice);
    let [dq, dk, dv] = [op.dq, op.dk, op.dv].map(|gradient| Shared::new(slice_mut(gradient)));
    let documents = ranges(op.documents);
    (0..documents.len() * kv_heads).into_par_iter().for_each(|task| {
        let (document, kv_head) = (documents[task / kv_heads].clone(), task % kv_heads);
        backward_head(saved, [&dq, &dk, &dv], document, kv_head, &shape);
    });
}

fn backward_head(
    [q, k, v, o, lse, d_o]: Saved<'_>,
    [dq, dk, dv]: [&Shared<'_, f32>; 3],
    document: Range<usize>,
    kv_head: usize,
    shape: &AttentionShape,
) {
    let AttentionShape { heads, kv_heads, head_dim, scale, .. } = *shape;
    let group = shape.group();
    let tokens = q.len() / (heads * head_dim);
    let kv_width = kv_heads * head_dim;
    let column = kv_head * head_dim;
    let len = document.len();
    let largest = shape.blocks(document.clone()).map(|b| group * b.rows.len() * b.keys()).max().unwrap_or(0);
    let stacked = group * len.min(QUERIES);
    let lengths =
        [stacked * head_dim, stacked * head_dim, stacked * head_dim, largest, largest, len * head_dim, len * head_dim];
    with_scratch(lengths, |[qs, dos, dqs, p, ds, dks, dvs]| {
        dks.fill(0.0);
        dvs.fill(0.0);
        for block in shape.blocks(document.clone()) {
            let (queries, keys) = (block.rows.len(), block.keys());
            let stacked = group * queries;
            let (p, ds) = (&mut p[..stacked * keys], &mut ds[..stacked * keys]);
            stack(q, shape, kv_head, &block.rows, scale, qs);
            stack(d_o, shape, kv_head, &block.rows, 1.0, dos);
            let from = block.first_key * kv_width + column;
            let (k, v) = (Matrix::rows(&k[from..], kv_width), Matrix::rows(&v[from..], kv_width));
            let (qm, dom) = (Matrix::rows(qs, head_dim), Matrix::rows(dos, head_dim));
            Product::serial(p, keys, qm, k.t(), (stacked, keys, head_dim)).run();
            Product::serial(ds, keys, dom, v.t(), (stacked, keys, head_dim)).run();
            for (i, (p, ds)) in p.chunks_exact_mut(keys).zip(ds.chunks_exact_mut(keys)).enumerate() {
                let query = block.rows.start + i % queries;
                let head = kv_head * group + i / queries;
                let at = (query * heads + head) * head_dim;
                let delta = inner(&o[at..at + head_dim], &d_o[at..at + head_dim]);
                let visible = shape.visible(&block, query);
                for row in [&mut *p, &mut *ds] {
                    row[..visible.start].fill(0.0);
                    row[visible.end..].fill(0.0);
                }
                let (p, ds) = (&mut p[visible.clone()], &mut ds[visible]);
                probabilities_and_gradient(p, ds, lse[head * tokens + query], delta);
            }
            let (p, ds) = (Matrix::rows(p, keys), Matrix::rows(ds, keys));
            let within = (block.first_key - document.start) * head_dim;
            let (dks, dvs) = (&mut dks[within..], &mut dvs[within..]);
            let by_keys = |c, a, b| Product::serial(c, head_dim, a, b, (keys, head_dim, stacked));
            Product { accumulate: true, ..by_keys(dvs, p.t(), dom) }.run();
            Product { accumulate: true, ..by_keys(dks, ds.t(), qm) }.run();
            Product { alpha: scale, ..Product::serial(dqs, head_dim, ds, k, (stacked, head_dim, keys)) }.run();
            for (i, row) in dqs.chunks_exact(head_dim).take(stacked).enumerate() {
                let at = ((block.rows.start + i % queries) * heads + kv_head * group + i / queries) * head_dim;
                // SAFETY: each task writes the queries of its own document and heads.
                unsafe { dq.range(at..at + head_dim) }.copy_from_slice(row);
            }
        }
        for (to, from) in [(dk, &*dks), (dv, &*dvs)] {
            for (row, from) in document.clone().zip(from.chunks_exact(head_dim)) {
                let at = row * kv_width + column;
                // SAFETY: each task writes the keys of its own document and head.
                unsafe { to.range(at..at + head_dim) }.copy_from_slice(from);
            }
        }
    });
}

simd_kernel! {
    /// Scores become P, dP becomes dS.
    fn probabilities_and_gradient(_simd, p: &'a mut [f32], ds: &'a mut [f32], lse: f32, delta: f32) {
        exp_minus(p, lse);
        times_difference(ds, p, delta);
    }
}

#[inline(always)]
fn times_difference(ds: &mut [f32], p: &[f32], delta: f32) {
    for (ds, p) in ds.iter_mut().zip(p) {
        *ds = p * (*ds - delta);
    }
}

pub(super) fn attention_decode(op: AttentionDecode<'_, Cpu>) {
    let shape = op.shape;
    let AttentionShape { kv_heads, head_dim, .. } = shape;
    let group = shape.group();
    let (q, k, v, o) = (slice(&op.q), slice(&op.k), slice(&op.v), Shared::new(slice_mut(op.o)));
    let spans = op.spans.host;
    (0..spans.len() / 2 * kv_heads).into_par_iter().for_each(|task| {
        let (query, kv_head) = (task / kv_heads, task % kv_heads);
        let (start, len) = (spans[2 * query] as usize, spans[2 * query + 1] as usize);
        let seen = len.min(shape.window.unwrap_or(usize::MAX));
        let rows = start + len - seen..start + len;
        let at = query * shape.q_width() + kv_head * group * head_dim;
        let range = at..at + group * head_dim;
        // SAFETY: each task writes the heads of its own query.
        let o = unsafe { o.range(range.clone()) };
        with_scratch([group * seen], |[scores]| {
            decode_head(
                &q[range],
                k,
                v,
                o,
                scores,
                rows,
                (kv_heads * head_dim, kv_head * head_dim),
                head_dim,
                shape.scale,
            );
        });
    });
}

simd_kernel! {
    /// The query heads of one key-value head (at `column` of rows `width` wide) against keys `rows`.
    fn decode_head(
        simd,
        q: &'a [f32],
        k: &'a [f32],
        v: &'a [f32],
        o: &'a mut [f32],
        scores: &'a mut [f32],
        rows: Range<usize>,
        place: (usize, usize),
        head_dim: usize,
        scale: f32,
    ) {
        let (width, column) = place;
        let seen = rows.len();
        for (i, row) in rows.clone().enumerate() {
            let key = &k[row * width + column..][..head_dim];
            for (h, q) in q.chunks_exact(head_dim).enumerate() {
                scores[h * seen + i] = dot(simd, q, key) * scale;
            }
        }
        for scores in scores.chunks_exact_mut(seen.max(1)) {
            let top = max(simd, scores);
            exp_minus(scores, top);
            let inverse = 1.0 / sum(simd, scores);
            scores.iter_mut().for_each(|s| *s *= inverse);
        }
        o.fill(0.0);
        for (i, row) in rows.enumerate() {
            let value = &v[row * width + column..][..head_dim];
            for (h, o) in o.chunks_exact_mut(head_dim).enumerate() {
                add_scaled(o, value, scores[h * seen + i]);
            }
        }
    }
}

#[inline(always)]
fn add_scaled(y: &mut [f32], x: &[f32], factor: f32) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = x.mul_add(factor, *y);
    }
}
