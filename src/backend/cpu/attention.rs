//! Causal grouped-query attention inside packed documents.
//!
//! A task is one block of queries of one document and one key-value head; the query heads that share it are stacked, so
//! that one product gives the scores of all of them against the keys that the block may see. The softmax is exact over
//! the whole row (no running maximum), because a row of scores fits the cache at the block sizes chosen here.
//! Backward works document by document and key-value head by key-value head: one task owns its rows of dK and dV, so
//! sums have one order.
//!
//! Of bf16, products take P and dS rounded to bf16 where the head width is one of those at which the CUDA kernels do so
//! and the machine has instructions for such products; else everything is widened first.

use super::gemm::bf16_products;
use super::matrix::{Matrix, Product, Store};
use super::simd::{dot, exp, max, simd_kernel, sum};
use super::storage::{Shared, slice, slice_mut};
use super::wide::{as_type, convert, convert_all, widen};
use super::{Cpu, Elements};
use crate::backend::{Attention, AttentionBackward, AttentionDecode, AttentionShape, Documents, Element, FloatElement};
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
fn ranges<E: Elements>(documents: &Documents<Cpu<E>>) -> Vec<Range<usize>> {
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

/// f32s of scratch that hold `len` elements.
const fn room<T>(len: usize) -> usize {
    (len * size_of::<T>()).div_ceil(size_of::<f32>())
}

/// Scratch as elements of another type.
fn as_elements<T: Element>(scratch: &mut [f32]) -> &mut [T] {
    bytemuck::cast_slice_mut(scratch)
}

/// f32s as operands of products of `T`: themselves, or rounded into `space`.
fn operands<'s, T: FloatElement>(x: &'s [f32], space: &'s mut [f32]) -> &'s [T] {
    if let Some(x) = as_type(x) {
        return x;
    }
    let to = &mut as_elements(space)[..x.len()];
    convert(x, to);
    to
}

/// Whether products take operands of `T` as they are.
fn direct<T: FloatElement>(head_dim: usize) -> bool {
    T::NAME == "f32" || matches!(head_dim, 64 | 128) && bf16_products()
}

/// The scale of scores as a factor on stacked queries, and what is left of it for the products: bf16 queries stay as
/// they are.
fn divided_scale<T: FloatElement>(scale: f32) -> (f32, f32) {
    if T::NAME == "f32" { (scale, 1.0) } else { (1.0, scale) }
}

/// f32s of all elements.
fn widened<T: FloatElement>(x: &[T]) -> Vec<f32> {
    let mut wide = vec![0.0; x.len()];
    convert_all(x, &mut wide);
    wide
}

/// Rows of one key-value head's query heads, stacked head by head: [group · rows, head_dim], times `factor`.
fn stack<T: FloatElement>(
    from: &[T],
    shape: &AttentionShape,
    kv_head: usize,
    rows: &Range<usize>,
    factor: f32,
    to: &mut [T],
) {
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
    fn scaled_rows<F: FloatElement, T: FloatElement>(
        _simd,
        from: &'a [F],
        stride: usize,
        to: &'a mut [T],
        width: usize,
        factor: f32,
    ) {
        for (i, to) in to.chunks_exact_mut(width).enumerate() {
            for (to, x) in to.iter_mut().zip(&from[i * stride..][..width]) {
                *to = T::from_f32(x.to_f32() * factor);
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

pub(super) fn attention<E: Elements>(op: Attention<'_, Cpu<E>>) {
    let (shape, documents) = (op.shape, ranges(op.documents));
    let (q, k, v, o) = (slice(&op.q), slice(&op.k), slice(&op.v), slice_mut(op.o));
    let lse = op.lse.map(slice_mut);
    if direct::<E::Float>(shape.head_dim) {
        return attend([q, k, v], o, lse, &shape, &documents);
    }
    let [q, k, v] = [q, k, v].map(widened);
    let mut wide = vec![0.0; o.len()];
    attend([&q, &k, &v], &mut wide, lse, &shape, &documents);
    convert_all(&wide, o);
}

fn attend<T: FloatElement>(
    [q, k, v]: [&[T]; 3],
    o: &mut [T],
    lse: Option<&mut [f32]>,
    shape: &AttentionShape,
    documents: &[Range<usize>],
) {
    let AttentionShape { heads, kv_heads, head_dim, .. } = *shape;
    let (tokens, group) = (q.len() / shape.q_width(), shape.group());
    let (factor, alpha) = divided_scale::<T>(shape.scale);
    let (o, lse) = (Shared::new(o), lse.map(Shared::new));
    let blocks: Vec<Block> = documents.iter().flat_map(|d| shape.blocks(d.clone())).collect();
    (0..blocks.len() * kv_heads).into_par_iter().for_each(|task| {
        let (block, kv_head) = (&blocks[task / kv_heads], task % kv_heads);
        let (queries, keys) = (block.rows.len(), block.keys());
        let stacked = group * queries;
        let rounded = if T::NAME == "f32" { 0 } else { room::<T>(stacked * keys) };
        let lengths = [room::<T>(stacked * head_dim), stacked * keys, rounded, stacked * head_dim, stacked, stacked];
        with_scratch(lengths, |[qs, scores, p, os, inverse, tops]| {
            let qs = &mut as_elements(qs)[..stacked * head_dim];
            stack(q, shape, kv_head, &block.rows, factor, qs);
            let kv_width = kv_heads * head_dim;
            let from = block.first_key * kv_width + kv_head * head_dim;
            let (qs, k) = (Matrix::rows(qs, head_dim), Matrix::rows(&k[from..], kv_width).t());
            Product::serial(scores, keys, qs, k, (stacked, keys, head_dim)).with(alpha, Store::Overwrite).run();
            softmax_rows(scores, shape, block, inverse, tops);
            if let Some(lse) = &lse {
                for (i, (inverse, top)) in inverse.iter().zip(&*tops).enumerate() {
                    let at = (kv_head * group + i / queries) * tokens + block.rows.start + i % queries;
                    // SAFETY: each task writes the queries of its own block and heads.
                    unsafe { lse.range(at..at + 1)[0] = top - inverse.ln() };
                }
            }
            let (p, v) = (Matrix::rows(operands(scores, p), keys), Matrix::rows(&v[from..], kv_width));
            Product::serial(os, head_dim, p, v, (stacked, head_dim, keys)).run();
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

/// q, k, v, o and d_o, and lse.
type Saved<'a, T> = ([&'a [T]; 5], &'a [f32]);

pub(super) fn attention_backward<E: Elements>(op: AttentionBackward<'_, Cpu<E>>) {
    let (shape, documents, lse) = (op.shape, ranges(op.documents), slice(&op.lse));
    let saved = [&op.q, &op.k, &op.v, &op.o, &op.d_o].map(slice);
    let gradients = [op.dq, op.dk, op.dv].map(slice_mut);
    if direct::<E::Float>(shape.head_dim) {
        return attend_backward((saved, lse), gradients, &shape, &documents);
    }
    let saved = saved.map(widened);
    let mut wide = gradients.each_ref().map(|gradient| vec![0.0; gradient.len()]);
    let saved = (saved.each_ref().map(Vec::as_slice), lse);
    attend_backward(saved, wide.each_mut().map(Vec::as_mut_slice), &shape, &documents);
    for (gradient, wide) in gradients.into_iter().zip(&wide) {
        convert_all(wide, gradient);
    }
}

fn attend_backward<T: FloatElement>(
    saved: Saved<'_, T>,
    gradients: [&mut [T]; 3],
    shape: &AttentionShape,
    documents: &[Range<usize>],
) {
    let [dq, dk, dv] = gradients.map(Shared::new);
    (0..documents.len() * shape.kv_heads).into_par_iter().for_each(|task| {
        let (document, kv_head) = (documents[task / shape.kv_heads].clone(), task % shape.kv_heads);
        backward_head(saved, [&dq, &dk, &dv], document, kv_head, shape);
    });
}

fn backward_head<T: FloatElement>(
    ([q, k, v, o, d_o], lse): Saved<'_, T>,
    [dq, dk, dv]: [&Shared<'_, T>; 3],
    document: Range<usize>,
    kv_head: usize,
    shape: &AttentionShape,
) {
    let AttentionShape { heads, kv_heads, head_dim, scale, .. } = *shape;
    let (factor, alpha) = divided_scale::<T>(scale);
    let group = shape.group();
    let tokens = q.len() / (heads * head_dim);
    let kv_width = kv_heads * head_dim;
    let column = kv_head * head_dim;
    let len = document.len();
    let largest = shape.blocks(document.clone()).map(|b| group * b.rows.len() * b.keys()).max().unwrap_or(0);
    let stacked = group * len.min(QUERIES);
    let rounded = if T::NAME == "f32" { 0 } else { room::<T>(largest) };
    let rows = room::<T>(stacked * head_dim);
    let (own, all) = (stacked * head_dim, len * head_dim);
    let lengths = [rows, rows, own, largest, largest, rounded, rounded, all, all];
    let (mut o_space, mut d_o_space) = (Vec::new(), Vec::new());
    with_scratch(lengths, |[qs, dos, dqs, p, ds, rounded_p, rounded_ds, dks, dvs]| {
        let [qs, dos] = [qs, dos].map(as_elements);
        dks.fill(0.0);
        dvs.fill(0.0);
        for block in shape.blocks(document.clone()) {
            let (queries, keys) = (block.rows.len(), block.keys());
            let stacked = group * queries;
            let (p, ds) = (&mut p[..stacked * keys], &mut ds[..stacked * keys]);
            stack(q, shape, kv_head, &block.rows, factor, qs);
            stack(d_o, shape, kv_head, &block.rows, 1.0, dos);
            let from = block.first_key * kv_width + column;
            let (k, v) = (Matrix::rows(&k[from..], kv_width), Matrix::rows(&v[from..], kv_width));
            let (qm, dom) = (Matrix::rows(qs, head_dim), Matrix::rows(dos, head_dim));
            Product::serial(p, keys, qm, k.t(), (stacked, keys, head_dim)).with(alpha, Store::Overwrite).run();
            Product::serial(ds, keys, dom, v.t(), (stacked, keys, head_dim)).run();
            for (i, (p, ds)) in p.chunks_exact_mut(keys).zip(ds.chunks_exact_mut(keys)).enumerate() {
                let query = block.rows.start + i % queries;
                let head = kv_head * group + i / queries;
                let at = (query * heads + head) * head_dim;
                let (o, d_o) = (&o[at..at + head_dim], &d_o[at..at + head_dim]);
                let delta = inner(widen(o, &mut o_space), widen(d_o, &mut d_o_space));
                let visible = shape.visible(&block, query);
                for row in [&mut *p, &mut *ds] {
                    row[..visible.start].fill(0.0);
                    row[visible.end..].fill(0.0);
                }
                let (p, ds) = (&mut p[visible.clone()], &mut ds[visible]);
                probabilities_and_gradient(p, ds, lse[head * tokens + query], delta);
            }
            let p: Matrix<'_, T> = Matrix::rows(operands(p, rounded_p), keys);
            let ds = Matrix::rows(operands(ds, rounded_ds), keys);
            let within = (block.first_key - document.start) * head_dim;
            let (dks, dvs) = (&mut dks[within..], &mut dvs[within..]);
            let by_keys = (keys, head_dim, stacked);
            Product::serial(dvs, head_dim, p.t(), dom, by_keys).with(1.0, Store::Add).run();
            Product::serial(dks, head_dim, ds.t(), qm, by_keys).with(alpha, Store::Add).run();
            Product::serial(dqs, head_dim, ds, k, (stacked, head_dim, keys)).with(scale, Store::Overwrite).run();
            for (i, row) in dqs.chunks_exact(head_dim).take(stacked).enumerate() {
                let at = ((block.rows.start + i % queries) * heads + kv_head * group + i / queries) * head_dim;
                // SAFETY: each task writes the queries of its own document and heads.
                convert(row, unsafe { dq.range(at..at + head_dim) });
            }
        }
        for (to, from) in [(dk, &*dks), (dv, &*dvs)] {
            for (row, from) in document.clone().zip(from.chunks_exact(head_dim)) {
                let at = row * kv_width + column;
                // SAFETY: each task writes the keys of its own document and head.
                convert(from, unsafe { to.range(at..at + head_dim) });
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

pub(super) fn attention_decode<E: Elements>(op: AttentionDecode<'_, Cpu<E>>) {
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
        with_scratch([group * seen, group * head_dim, group * head_dim], |[scores, qs, os]| {
            let place = (kv_heads * head_dim, kv_head * head_dim);
            convert(&q[range], qs);
            decode_head(qs, k, v, os, scores, rows, place, head_dim, shape.scale);
            convert(os, o);
        });
    });
}

simd_kernel! {
    /// The query heads of one key-value head (at `column` of rows `width` wide) against keys `rows`.
    fn decode_head<T: FloatElement>(
        simd,
        q: &'a [f32],
        k: &'a [T],
        v: &'a [T],
        o: &'a mut [f32],
        scores: &'a mut [f32],
        rows: Range<usize>,
        place: (usize, usize),
        head_dim: usize,
        scale: f32,
    ) {
        let (width, column) = place;
        let seen = rows.len();
        let mut space = Vec::new();
        for (i, row) in rows.clone().enumerate() {
            let key = widen(&k[row * width + column..][..head_dim], &mut space);
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
fn add_scaled<T: FloatElement>(y: &mut [f32], x: &[T], factor: f32) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = x.to_f32().mul_add(factor, *y);
    }
}
