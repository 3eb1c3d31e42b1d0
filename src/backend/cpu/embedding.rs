//! Rows chosen from a table, put into one, and added to one.

use super::Cpu;
use super::simd::simd_kernel;
use super::storage::{Shared, slice, slice_mut};
use crate::backend::{EmbeddingBackward, GatherRows, ScatterRows};
use rayon::prelude::*;
use std::ops::Range;

/// Elements of one task.
const BLOCK: usize = 1 << 15;
/// Columns of one task of the backward pass.
const COLUMNS: usize = 64;

pub(super) fn gather_rows(GatherRows { from, rows, to, width }: GatherRows<'_, Cpu>) {
    let (from, rows, to) = (slice(&from), slice(&rows), slice_mut(to));
    let count = (BLOCK / width).max(1);
    to.par_chunks_mut(count * width).zip(rows.par_chunks(count)).for_each(|(to, rows)| {
        for (to, &row) in to.chunks_exact_mut(width).zip(rows) {
            to.copy_from_slice(&from[row as usize * width..][..width]);
        }
    });
}

pub(super) fn scatter_rows(ScatterRows { from, rows, to, width }: ScatterRows<'_, Cpu>) {
    let to = slice_mut(to);
    for (from, &row) in slice(&from).chunks_exact(width).zip(slice(&rows)) {
        to[row as usize * width..][..width].copy_from_slice(from);
    }
}

/// In the order of rows: a task owns some columns and walks all rows.
pub(super) fn embedding_backward(EmbeddingBackward { dy, rows, dtable, width }: EmbeddingBackward<'_, Cpu>) {
    let (dy, rows, dtable) = (slice(&dy), slice(&rows), Shared::new(slice_mut(dtable)));
    (0..width.div_ceil(COLUMNS)).into_par_iter().for_each(|task| {
        let columns = task * COLUMNS..width.min((task + 1) * COLUMNS);
        add_columns(dy, rows, &dtable, width, columns);
    });
}

simd_kernel! {
    fn add_columns(_simd, dy: &'a [f32], rows: &'a [u32], dtable: &'a Shared<'a, f32>, width: usize, columns: Range<usize>) {
        for (dy, &row) in dy.chunks_exact(width).zip(rows) {
            let at = row as usize * width;
            // SAFETY: each task writes its own columns.
            let to = unsafe { dtable.range(at + columns.start..at + columns.end) };
            for (to, x) in to.iter_mut().zip(&dy[columns.clone()]) {
                *to += x;
            }
        }
    }
}
