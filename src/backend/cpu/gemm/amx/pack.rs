//! Operands cut into bf16 parts and laid out in tiles.

use super::{EMPTY, PANEL, STEP, Step};
use crate::backend::cpu::matrix::Matrix;
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::ops::Range;

/// What a packed operand is for.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Side {
    A,
    B,
}

/// A, or Bᵀ: rows by depths.
#[derive(Clone, Copy)]
pub(super) struct Operand<'a> {
    pub from: Matrix<'a>,
    pub rows: usize,
    pub factor: f32,
    pub side: Side,
}

impl Operand<'_> {
    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Packs some rows and depths, padded with zeros to whole panels.
    pub(super) fn pack<'s>(
        &self,
        space: &'s mut Vec<Step>,
        rows: Range<usize>,
        depths: &Range<usize>,
        threads: usize,
    ) -> &'s [Step] {
        let steps = depths.len().div_ceil(STEP);
        let len = rows.len().div_ceil(PANEL) * steps;
        if space.len() < len {
            space.resize(len, EMPTY);
        }
        let pack_step = |(i, to): (usize, &mut Step)| {
            let row = rows.start + i / steps * PANEL;
            let depth = depths.start + i % steps * STEP;
            for half in 0..2 {
                let row = row + 16 * half;
                let rows = rows.end.saturating_sub(row).min(16);
                let window = Window { row, rows, depth, depths: (depths.end - depth).min(STEP) };
                // SAFETY: `available` has seen AVX-512.
                unsafe { pack_tiles(self.from, window, self.factor, self.side, half, to) };
            }
        };
        let space = &mut space[..len];
        if threads > 1 {
            space.par_iter_mut().with_min_len(16).enumerate().for_each(pack_step);
        } else {
            space.iter_mut().enumerate().for_each(pack_step);
        }
        space
    }
}

/// Up to 16 rows and 32 depths of an operand.
#[derive(Clone, Copy)]
struct Window {
    row: usize,
    rows: usize,
    depth: usize,
    depths: usize,
}

/// Fills a tile of each part. Row r of it takes two vectors of 16 elements, one for the low and one for the high halves
/// of its words: of A, depths 0.. and 16.. of row r; of B, depths r and 16 + r of 16 columns.
///
/// Plain loops throughout: a closure handed to a function of the standard library would not be inlined here, where the
/// vector instructions are.
#[target_feature(enable = "avx512f,avx512bw")]
fn pack_tiles(from: Matrix<'_>, window: Window, factor: f32, side: Side, half: usize, to: &mut Step) {
    let Window { row, rows, depth, depths } = window;
    let factor = _mm512_set1_ps(factor);
    let mut vectors = [[_mm512_setzero_ps(); 16]; 2];
    let along_depth = from.column_stride == 1;
    for (h, x) in vectors.iter_mut().enumerate() {
        let depths = depths.saturating_sub(16 * h).min(16);
        let start = row * from.row_stride + (depth + 16 * h) * from.column_stride;
        let (count, lanes, next) =
            if along_depth { (rows, depths, from.row_stride) } else { (depths, rows, from.column_stride) };
        if count > 0 && lanes > 0 {
            load(&from.data[start..start + (count - 1) * next + lanes], next, lanes, x);
        }
        if along_depth != (side == Side::A) {
            *x = transpose(x);
        }
    }
    #[allow(clippy::needless_range_loop)]
    for row in 0..16 {
        let low = _mm512_mul_ps(vectors[0][row], factor);
        let high = _mm512_mul_ps(vectors[1][row], factor);
        let [first, second, third] = split(low, high);
        // SAFETY: a row of a tile is 16 words.
        unsafe {
            _mm512_store_si512(to.0[0][half].0[row].as_mut_ptr().cast(), first);
            _mm512_store_si512(to.0[1][half].0[row].as_mut_ptr().cast(), second);
            _mm512_store_si512(to.0[2][half].0[row].as_mut_ptr().cast(), third);
        }
    }
}

/// Vectors that begin `next` elements apart, of `lanes` elements each, then zeros.
#[inline]
#[target_feature(enable = "avx512f")]
fn load(data: &[f32], next: usize, lanes: usize, x: &mut [__m512; 16]) {
    let mask = ((1u32 << lanes) - 1) as u16;
    let mut at = 0;
    for x in x.iter_mut() {
        if at + lanes > data.len() {
            break;
        }
        // SAFETY: the slice holds the elements that the mask lets through.
        *x = unsafe { _mm512_maskz_loadu_ps(mask, data.as_ptr().add(at)) };
        at += next;
    }
}

/// The transpose of 16 × 16 elements.
#[inline]
#[target_feature(enable = "avx512f")]
fn transpose(x: &[__m512; 16]) -> [__m512; 16] {
    let mut y = *x;
    for i in 0..8 {
        y[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    let mut z = y;
    for i in 0..4 {
        for (j, to) in [(0, 0), (1, 2)] {
            let (even, odd) = (_mm512_castps_pd(y[4 * i + j]), _mm512_castps_pd(y[4 * i + j + 2]));
            z[4 * i + to] = _mm512_castpd_ps(_mm512_unpacklo_pd(even, odd));
            z[4 * i + to + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd));
        }
    }
    for i in 0..4 {
        y[i] = _mm512_shuffle_f32x4::<0x88>(z[i], z[i + 4]);
        y[i + 4] = _mm512_shuffle_f32x4::<0xdd>(z[i], z[i + 4]);
        y[i + 8] = _mm512_shuffle_f32x4::<0x88>(z[i + 8], z[i + 12]);
        y[i + 12] = _mm512_shuffle_f32x4::<0xdd>(z[i + 8], z[i + 12]);
    }
    for i in 0..8 {
        z[i] = _mm512_shuffle_f32x4::<0x88>(y[i], y[i + 8]);
        z[i + 8] = _mm512_shuffle_f32x4::<0xdd>(y[i], y[i + 8]);
    }
    z
}

/// The three parts of 16 pairs, a pair a word. A part is rounded to 8 bits; what it leaves is exact in f32.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn split(low: __m512, high: __m512) -> [__m512i; 3] {
    let (low1, high1) = (part(low), part(high));
    let (low, high) = (rest(low, low1), rest(high, high1));
    let (low2, high2) = (part(low), part(high));
    let (low, high) = (rest(low, low2), rest(high, high2));
    [words(low1, high1), words(low2, high2), words(part(low), part(high))]
}

#[inline]
#[target_feature(enable = "avx512f")]
fn part(x: __m512) -> __m512i {
    let rounded = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000));
    _mm512_and_si512(rounded, _mm512_set1_epi32(0xffff_0000u32 as i32))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn rest(x: __m512, part: __m512i) -> __m512 {
    _mm512_sub_ps(x, _mm512_castsi512_ps(part))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn words(low: __m512i, high: __m512i) -> __m512i {
    _mm512_or_si512(_mm512_srli_epi32::<16>(low), high)
}
