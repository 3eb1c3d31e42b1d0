//! Rows chosen from a table, put into one, and added to one.

use super::simd::simd_kernel;
use super::storage::{Shared, slice, slice_mut};
use super::{Cpu, Elements};
use crate::backend::{AddRows, EmbeddingBackward, FloatElement, GatherRows, ScatterRows};
use rayon::prelude::*;
use std::ops::Range;

/// Elements of one task.
const BLOCK: usize = 1 << 15;
/// Columns of one task of the backward pass.
const COLUMNS: usize = 64;

pub(super) fn gather_rows<E: Elements>(GatherRows { from, rows, to, width }: GatherRows<'_, Cpu<E>>) {
    let (from, rows, to) = (slice(&from), slice(&rows), slice_mut(to));
    let count = (BLOCK / width).max(1);
    to.par_chunks_mut(count * width).zip(rows.par_chunks(count)).for_each(|(to, rows)| {
        for (to, &row) in to.chunks_exact_mut(width).zip(rows) {
            to.copy_from_slice(&from[row as usize * width..][..width]);
        }
    });
}

pub(super) fn scatter_rows<E: Elements>(ScatterRows { from, rows, to, width }: ScatterRows<'_, Cpu<E>>) {
    let to = slice_mut(to);
    for (from, &row) in slice(&from).chunks_exact(width).zip(slice(&rows)) {
        to[row as usize * width..][..width].copy_from_slice(from);
    }
}

pub(super) fn add_rows<E: Elements>(AddRows { from, rows, to, width }: AddRows<'_, Cpu<E>>) {
    add(slice(&from), slice(&rows), slice_mut(to), width);
}

pub(super) fn embedding_backward<E: Elements>(op: EmbeddingBackward<'_, Cpu<E>>) {
    let EmbeddingBackward { dy, rows, dtable, width } = op;
    add(slice(&dy), slice(&rows), slice_mut(dtable), width);
}

/// A task owns some columns. Terms of one row of the table are added in their order, in f32, and rounded once.
fn add<T: FloatElement, G: FloatElement>(from: &[T], rows: &[u32], to: &mut [G], width: usize) {
    let to = Shared::new(to);
    let mut terms: Vec<(u32, u32)> = rows.iter().zip(0..).map(|(row, term)| (*row, term)).collect();
    terms.sort_unstable();
    (0..width.div_ceil(COLUMNS)).into_par_iter().for_each(|task| {
        let columns = task * COLUMNS..width.min((task + 1) * COLUMNS);
        add_columns(from, &terms, &to, width, columns);
    });
}

simd_kernel! {
    /// `terms`: rows of the table, ascending, and of `from`.
    fn add_columns<T: FloatElement, G: FloatElement>(
        _simd,
        from: &'a [T],
        terms: &'a [(u32, u32)],
        table: &'a Shared<'a, G>,
        width: usize,
        columns: Range<usize>,
    ) {
        let mut sums = [0.0; COLUMNS];
        let sums = &mut sums[..columns.len()];
        for terms in terms.chunk_by(|a, b| a.0 == b.0) {
            let at = terms[0].0 as usize * width;
            // SAFETY: each task writes its own columns.
            let to = unsafe { table.range(at + columns.start..at + columns.end) };
            for (sum, to) in sums.iter_mut().zip(&*to) {
                *sum = to.to_f32();
            }
            for (_, term) in terms {
                let row = &from[*term as usize * width..][..width];
                for (sum, x) in sums.iter_mut().zip(&row[columns.clone()]) {
                    *sum += x.to_f32();
                }
            }
            for (to, sum) in to.iter_mut().zip(&*sums) {
                *to = G::from_f32(*sum);
            }
        }
    }
}
