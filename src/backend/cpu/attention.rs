//! Causal grouped-query attention inside packed documents.
//!
//! A task is one block of queries of one document and one key-value head; the query heads that share it are stacked, so
//! that one product gives the scores of all of them against the keys that the block may see. The softmax is exact over
//! the whole row (no running maximum), because a row of scores fits the cache at the block sizes chosen here.
//! Backward works document by document and key-value head by key-value head: one task owns its rows of dK and dV, so
//! sums have one order.

use super::gemm::{Matrix, product};
use super::simd::{dot, exp, max, simd_kernel, sum};
use super::storage::Shared;
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// Most queries of a block.
const QUERIES: usize = 64;
/// Most scores of a block (512 KiB), as long as at least 8 queries fit.
const SCORES: usize = 1 << 17;

/// Sizes of an attention call, views taken apart.
#[derive(Clone, Copy)]
pub(super) struct Shape<'a> {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub scale: f32,
    pub window: Option<usize>,
    pub starts: &'a [u32],
}

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

impl Shape<'_> {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    fn documents(&self) -> impl Iterator<Item = Range<usize>> {
        self.starts.windows(2).map(|w| w[0] as usize..w[1] as usize).filter(|d| !d.is_empty())
    }

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

/// Gives `f` this thread's scratch, cut into pieces of the lengths asked for. Contents are whatever was there.
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
fn stack(from: &[f32], shape: &Shape<'_>, kv_head: usize, rows: &Range<usize>, factor: f32, to: &mut [f32]) {
    let Shape { heads, head_dim, .. } = *shape;
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
        shape: &'a Shape<'a>,
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

pub(super) fn attention(q: &[f32], k: &[f32], v: &[f32], o: &mut [f32], lse: Option<&mut [f32]>, shape: Shape<'_>) {
    let Shape { heads, kv_heads, head_dim, .. } = shape;
    let tokens = q.len() / (heads * head_dim);
    let group = shape.group();
    let o = Shared::new(o);
    let lse = lse.map(Shared::new);
    let blocks: Vec<Block> = shape.documents().flat_map(|d| shape.blocks(d)).collect();
    (0..blocks.len() * kv_heads).into_par_iter().for_each(|task| {
        let (block, kv_head) = (&blocks[task / kv_heads], task % kv_heads);
        let (queries, keys) = (block.rows.len(), block.keys());
        let stacked = group * queries;
        let lengths = [stacked * head_dim, stacked * keys, stacked * head_dim, stacked, stacked];
        with_scratch(lengths, |[qs, scores, os, inverse, tops]| {
            stack(q, &shape, kv_head, &block.rows, shape.scale, qs);
            let kv_width = kv_heads * head_dim;
            let from = block.first_key * kv_width + kv_head * head_dim;
            product(
                scores,
                keys,
                Matrix::rows(qs, head_dim),
                Matrix::rows(&k[from..], kv_width).t(),
                (stacked, keys, head_dim),
                1.0,
                false,
                false,
            );
            softmax_rows(scores, &shape, block, inverse, tops);
            if let Some(lse) = &lse {
                for (i, (inverse, top)) in inverse.iter().zip(&*tops).enumerate() {
                    let at = (kv_head * group + i / queries) * tokens + block.rows.start + i % queries;
                    // SAFETY: each task writes the queries of its own block and heads.
                    unsafe { lse.range(at..at + 1)[0] = top - inverse.ln() };
                }
            }
            product(
                os,
                head_dim,
                Matrix::rows(scores, keys),
                Matrix::rows(&v[from..], kv_width),
                (stacked, head_dim, keys),
                1.0,
                false,
                false,
            );
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

/// What the backward pass reads.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a> {
    pub q: &'a [f32],
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub o: &'a [f32],
    pub lse: &'a [f32],
    pub d_o: &'a [f32],
}

/// Gradients of [`attention`], by the recomputation of FlashAttention (Dao et al., arXiv 2205.14135, appendix B.4):
/// P = exp(S − lse), dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P ∘ (dP − rowsum(dO ∘ O)), dQ = scale·dS·K, dK = scale·dSᵀ·Q.
pub(super) fn attention_backward(saved: Saved<'_>, dq: &mut [f32], dk: &mut [f32], dv: &mut [f32], shape: Shape<'_>) {
    let Shape { kv_heads, .. } = shape;
    let (dq, dk, dv) = (Shared::new(dq), Shared::new(dk), Shared::new(dv));
    let documents: Vec<Range<usize>> = shape.documents().collect();
    (0..documents.len() * kv_heads).into_par_iter().for_each(|task| {
        let (document, kv_head) = (documents[task / kv_heads].clone(), task % kv_heads);
        backward_head(saved, [&dq, &dk, &dv], document, kv_head, &shape);
    });
}

fn backward_head(
    saved: Saved<'_>,
    [dq, dk, dv]: [&Shared<'_, f32>; 3],
    document: Range<usize>,
    kv_head: usize,
    shape: &Shape<'_>,
) {
    let Shape { heads, kv_heads, head_dim, scale, .. } = *shape;
    let group = shape.group();
    let tokens = saved.q.len() / (heads * head_dim);
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
            stack(saved.q, shape, kv_head, &block.rows, scale, qs);
            stack(saved.d_o, shape, kv_head, &block.rows, 1.0, dos);
            let from = block.first_key * kv_width + column;
            let k = Matrix::rows(&saved.k[from..], kv_width);
            let v = Matrix::rows(&saved.v[from..], kv_width);
            let (qm, dom) = (Matrix::rows(qs, head_dim), Matrix::rows(dos, head_dim));
            product(p, keys, qm, k.t(), (stacked, keys, head_dim), 1.0, false, false);
            product(ds, keys, dom, v.t(), (stacked, keys, head_dim), 1.0, false, false);
            for (i, (p, ds)) in p.chunks_exact_mut(keys).zip(ds.chunks_exact_mut(keys)).enumerate() {
                let query = block.rows.start + i % queries;
                let head = kv_head * group + i / queries;
                let at = (query * heads + head) * head_dim;
                let delta = inner(&saved.o[at..at + head_dim], &saved.d_o[at..at + head_dim]);
                let visible = shape.visible(&block, query);
                for row in [&mut *p, &mut *ds] {
                    row[..visible.start].fill(0.0);
                    row[visible.end..].fill(0.0);
                }
                let lse = saved.lse[head * tokens + query];
                let (p, ds) = (&mut p[visible.clone()], &mut ds[visible]);
                probabilities_and_gradient(p, ds, lse, delta);
            }
            let (p, ds) = (Matrix::rows(p, keys), Matrix::rows(ds, keys));
            let within = (block.first_key - document.start) * head_dim;
            let (dks, dvs) = (&mut dks[within..], &mut dvs[within..]);
            product(dvs, head_dim, p.t(), dom, (keys, head_dim, stacked), 1.0, true, false);
            product(dks, head_dim, ds.t(), qm, (keys, head_dim, stacked), 1.0, true, false);
            product(dqs, head_dim, ds, k, (stacked, head_dim, keys), scale, false, false);
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

/// One query a span of keys; see [`crate::backend::Backend::attention_decode`].
pub(super) fn attention_decode(q: &[f32], k: &[f32], v: &[f32], o: &mut [f32], spans: &[u32], shape: Shape<'_>) {
    let Shape { heads, kv_heads, head_dim, .. } = shape;
    let group = shape.group();
    let o = Shared::new(o);
    (0..spans.len() / 2 * kv_heads).into_par_iter().for_each(|task| {
        let (query, kv_head) = (task / kv_heads, task % kv_heads);
        let (start, len) = (spans[2 * query] as usize, spans[2 * query + 1] as usize);
        let seen = len.min(shape.window.unwrap_or(usize::MAX));
        let rows = start + len - seen..start + len;
        let at = (query * heads + kv_head * group) * head_dim;
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
