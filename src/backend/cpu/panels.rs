//! Products with many rows on the vector units: B is packed once into panels, A is read where it lies.
//!
//! A panel is two vectors wide and as deep as the product, depth by depth: `panel[l] = B[l, columns]`. A task takes a
//! block of rows of A, which stays in the second-level cache, through some panels; a tile of C (6 or 12 rows by one
//! panel) is summed in registers. On AVX2 this is 15–20 % faster than the crate `gemm` at the shapes of a layer.
//! An element of C is one sum over the depths in their order, whatever the other rows, columns and threads.

use super::gemm::{Addends, Matrix};
use super::simd::simd_kernel;
use super::storage::{Line, Shared};
use pulp::Simd;
use rayon::prelude::*;
use std::cell::Cell;
use std::ops::Range;

/// Most depths of one pass over C.
const DEPTH: usize = 576;
/// Rows of A of one task: with [`DEPTH`] depths 108 KiB.
const ROWS: usize = 48;
/// Widest panel.
const WIDEST: usize = 32;
/// Fewest rows that repay packing B.
const FEWEST: usize = 24;

thread_local! {
    /// Panels of this thread's last product, for the next; taken while in use.
    static SPACE: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Whether the product pays here.
pub(super) fn suits(a: Matrix<'_>, (m, n, k): (usize, usize, usize)) -> bool {
    a.column_stride == 1 && m >= FEWEST && n >= WIDEST && k >= WIDEST
}

/// C [m, n], rows `stride` apart, = alpha·A [m, k]·B [k, n] + what is to be added. The caller has checked that all fit
/// their slices, and that [`suits`] holds.
pub(super) fn product(
    c: &mut [f32],
    stride: usize,
    a: Matrix<'_>,
    b: Matrix<'_>,
    (m, n, k): (usize, usize, usize),
    addends: Addends<'_>,
) {
    let width = panel_width();
    let panels = n.div_ceil(width);
    let mut space = SPACE.take();
    let lines = (panels * width * k).div_ceil(Line::FLOATS);
    if space.len() < lines {
        space.resize(lines, Line::default());
    }
    let packed = &mut bytemuck::cast_slice_mut::<_, f32>(&mut space)[..panels * width * k];
    packed.par_chunks_mut(width * k).enumerate().for_each(|(panel, to)| {
        let columns = panel * width..n.min((panel + 1) * width);
        pack(b, columns, k, width, to);
    });
    let packed = &*packed;
    let blocks = m.div_ceil(ROWS);
    // Cutting columns too gives few rows to all threads.
    let cuts = (4 * rayon::current_num_threads()).div_ceil(blocks).min(panels);
    let per_cut = panels.div_ceil(cuts);
    let c = Shared::new(c);
    (0..blocks * cuts).into_par_iter().with_max_len(1).for_each(|task| {
        let (block, cut) = (task / cuts, task % cuts);
        let work = Work {
            rows: block * ROWS..m.min((block + 1) * ROWS),
            panels: (cut * per_cut).min(panels)..((cut + 1) * per_cut).min(panels),
            columns: n,
            depths: k,
            stride,
        };
        compute(&c, a, packed, &work, addends);
    });
    SPACE.set(space);
}

simd_kernel! {
    fn panel_width(_simd) -> usize { 2 * S::F32_LANES }
}

/// One panel: `columns` of B, depth by depth, padded with zeros to `width`.
fn pack(b: Matrix<'_>, columns: Range<usize>, depths: usize, width: usize, to: &mut [f32]) {
    /// Depths that are read of each column before the next: a cache line.
    const STRIP: usize = 16;
    if b.column_stride == 1 {
        for (l, to) in to.chunks_exact_mut(width).enumerate() {
            let (own, padding) = to.split_at_mut(columns.len());
            own.copy_from_slice(&b.data[l * b.row_stride + columns.start..][..columns.len()]);
            padding.fill(0.0);
        }
        return;
    }
    for (strip, to) in to.chunks_mut(STRIP * width).enumerate() {
        let first = strip * STRIP;
        let count = STRIP.min(depths - first);
        for i in 0..width {
            if i >= columns.len() {
                to.iter_mut().skip(i).step_by(width).for_each(|to| *to = 0.0);
                continue;
            }
            let at = (columns.start + i) * b.column_stride + first * b.row_stride;
            let from = &b.data[at..at + (count - 1) * b.row_stride + 1];
            for (to, x) in to.iter_mut().skip(i).step_by(width).zip(from.iter().step_by(b.row_stride)) {
                *to = *x;
            }
        }
    }
}

/// A task's part of C, and the sizes of the whole.
struct Work {
    rows: Range<usize>,
    panels: Range<usize>,
    columns: usize,
    depths: usize,
    stride: usize,
}

simd_kernel! {
    fn compute(
        simd,
        c: &'a Shared<'a, f32>,
        a: Matrix<'a>,
        packed: &'a [f32],
        work: &'a Work,
        addends: Addends<'a>,
    ) {
        // Sums take two vectors a row: 24 of 32 registers, or 12 of 16.
        if S::F32_LANES >= 16 {
            tiles::<S, 12>(simd, c, a, packed, work, addends);
        } else {
            tiles::<S, 6>(simd, c, a, packed, work, addends);
        }
    }
}

#[inline(always)]
fn tiles<S: Simd, const R: usize>(
    simd: S,
    c: &Shared<'_, f32>,
    a: Matrix<'_>,
    packed: &[f32],
    work: &Work,
    addends: Addends<'_>,
) {
    let width = 2 * S::F32_LANES;
    let depth = work.depths.div_ceil(work.depths.div_ceil(DEPTH));
    for first in (0..work.depths).step_by(depth) {
        let depth = depth.min(work.depths - first);
        for panel in work.panels.clone() {
            let from = &packed[panel * width * work.depths + first * width..][..depth * width];
            let vectors = S::as_simd_f32s(from).0.as_chunks::<2>().0;
            let columns = panel * width..work.columns.min((panel + 1) * width);
            for row in work.rows.clone().step_by(R) {
                // Behind the last row it is taken again, for nothing.
                let rows = std::array::from_fn(|r| {
                    let row = (row + r).min(work.rows.end - 1);
                    &a.data[row * a.row_stride + first..][..depth]
                });
                let mut sums = [[0.0; WIDEST]; R];
                multiply::<S, R>(simd, rows, vectors, &mut sums);
                for (r, sums) in sums.iter().take(work.rows.end - row).enumerate() {
                    let at = (row + r) * work.stride + columns.start;
                    // SAFETY: each task writes its own block of C.
                    let to = unsafe { c.range(at..at + columns.len()) };
                    if first > 0 {
                        add_scaled(to, sums, addends.alpha);
                    } else {
                        store(to, sums, at, columns.clone(), addends);
                    }
                }
            }
        }
    }
}

/// A [R, depth] · panel [depth, 2 vectors].
#[inline(always)]
fn multiply<S: Simd, const R: usize>(
    simd: S,
    a: [&[f32]; R],
    panel: &[[S::f32s; 2]],
    sums: &mut [[f32; WIDEST]; R],
) {
    assert!(a.iter().all(|a| a.len() == panel.len()));
    let mut partial = [[simd.splat_f32s(0.0); 2]; R];
    for (l, b) in panel.iter().enumerate() {
        for r in 0..R {
            // SAFETY: each row is as long as the panel is deep.
            let x = simd.splat_f32s(unsafe { *a[r].get_unchecked(l) });
            partial[r][0] = simd.mul_add_f32s(x, b[0], partial[r][0]);
            partial[r][1] = simd.mul_add_f32s(x, b[1], partial[r][1]);
        }
    }
    for (sums, partial) in sums.iter_mut().zip(&partial) {
        let to = S::as_mut_simd_f32s(sums).0;
        to[0] = partial[0];
        to[1] = partial[1];
    }
}

#[inline(always)]
fn add_scaled(to: &mut [f32], sums: &[f32; WIDEST], alpha: f32) {
    for (to, sum) in to.iter_mut().zip(sums) {
        *to += alpha * sum;
    }
}

/// A row of a tile with all addends; `at` is where it lies in C.
#[inline(always)]
fn store(to: &mut [f32], sums: &[f32; WIDEST], at: usize, columns: Range<usize>, addends: Addends<'_>) {
    let Addends { alpha, bias, residual, accumulate } = addends;
    if accumulate {
        add_scaled(to, sums, alpha);
    } else {
        to.iter_mut().zip(sums).for_each(|(to, sum)| *to = alpha * sum);
    }
    let len = to.len();
    for addend in [bias.map(|b| &b[columns]), residual.map(|r| &r[at..at + len])].into_iter().flatten() {
        to.iter_mut().zip(addend).for_each(|(to, x)| *to += x);
    }
}
