//! Rows chosen from a table, put into one, and added to one.

use super::simd::simd_kernel;
use super::storage::Shared;
use rayon::prelude::*;
use std::ops::Range;

/// Elements of one task.
const BLOCK: usize = 1 << 15;
/// Columns of one task of the backward pass.
const COLUMNS: usize = 64;

/// to[i] = from[rows[i]].
pub(super) fn gather_rows(from: &[f32], rows: &[u32], to: &mut [f32], width: usize) {
    let count = (BLOCK / width).max(1);
    to.par_chunks_mut(count * width).zip(rows.par_chunks(count)).for_each(|(to, rows)| {
        for (to, &row) in to.chunks_exact_mut(width).zip(rows) {
            to.copy_from_slice(&from[row as usize * width..][..width]);
        }
    });
}

/// to[rows[i]] = from[i].
pub(super) fn scatter_rows(from: &[f32], rows: &[u32], to: &mut [f32], width: usize) {
    for (from, &row) in from.chunks_exact(width).zip(rows) {
        to[row as usize * width..][..width].copy_from_slice(from);
    }
}

/// dtable[rows[i]] += dy[i] in the order of i: a task owns some columns and walks all rows.
pub(super) fn embedding_backward(dy: &[f32], rows: &[u32], dtable: &mut [f32], width: usize) {
    let dtable = Shared::new(dtable);
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
