//! Panels of pairs.

use super::lanes;
use super::strips::for_each;
use crate::backend::cpu::matrix::{Matrix, Threads};
use crate::backend::cpu::storage::Shared;
use half::bf16;
use std::arch::x86_64::*;
use std::ops::Range;

/// Rows `range` of `matrix` [.., k] as panels of `N` rows, `pairs` deep: pair p of row i is word p·N + i of its panel; rows
/// and elements that are missing are 0.
pub(super) fn pack<const N: usize>(
    matrix: Matrix<'_, bf16>,
    range: Range<usize>,
    k: usize,
    pairs: usize,
    packed: &mut Vec<u32>,
    threads: Threads,
) {
    let count = range.len().div_ceil(N);
    packed.resize(packed.len().max(count * N * pairs), 0);
    let shared = Shared::new(packed);
    for_each(count, threads, |i| {
        let rows = range.start + i * N..range.end.min(range.start + (i + 1) * N);
        // SAFETY: each panel is packed once.
        panels::<N>(matrix, rows, k, pairs, unsafe { shared.range(i * N * pairs..(i + 1) * N * pairs) });
    });
}

/// As [`pack`], on the calling thread.
///
/// # Panics
/// Where `packed` is shorter than the panels.
pub(super) fn panels<const N: usize>(
    matrix: Matrix<'_, bf16>,
    range: Range<usize>,
    k: usize,
    pairs: usize,
    packed: &mut [u32],
) {
    for (i, first) in range.clone().step_by(N).enumerate() {
        let panel = &mut packed[i * N * pairs..(i + 1) * N * pairs];
        let rows = N.min(range.end - first);
        let source = Matrix { data: &matrix.data[first * matrix.row_stride..], ..matrix };
        // SAFETY: the machine has the instructions, and `product` checked that the matrix has these rows.
        unsafe {
            if matrix.column_stride == 1 {
                pack_rows::<N>(source, rows, k, panel)
            } else {
                pack_columns::<N>(source, rows, k, panel)
            }
        }
    }
}

/// A pair of a row, element by element.
fn pair(matrix: Matrix<'_, bf16>, row: usize, pair: usize, k: usize) -> u32 {
    let element = |column: usize| {
        let inside = column < k;
        if inside { matrix.data[row * matrix.row_stride + column * matrix.column_stride].to_bits() as u32 } else { 0 }
    };
    element(2 * pair) | element(2 * pair + 1) << 16
}

/// A panel from rows that are contiguous in k: blocks of 16 × 16 pairs are transposed in registers.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_rows<const N: usize>(matrix: Matrix<'_, bf16>, rows: usize, k: usize, panel: &mut [u32]) {
    let whole = k / 2 / 16 * 16;
    for group in (0..N).step_by(16) {
        let mask = lanes(N - group);
        for first in (0..whole).step_by(16) {
            let mut block = [_mm512_setzero_si512(); 16];
            for (i, row) in block.iter_mut().take(rows.saturating_sub(group)).enumerate() {
                let from = &matrix.data[(group + i) * matrix.row_stride + 2 * first..][..32];
                // SAFETY: 32 elements, as just cut.
                *row = unsafe { _mm512_loadu_epi32(from.as_ptr().cast()) };
            }
            for (j, column) in transpose(block).into_iter().enumerate() {
                let to = &mut panel[(first + j) * N + group..];
                assert!(to.len() >= 16.min(N - group));
                // SAFETY: the lanes of the mask are inside of the panel, as just asserted.
                unsafe { _mm512_mask_storeu_epi32(to.as_mut_ptr().cast(), mask, column) };
            }
        }
    }
    for p in whole..panel.len() / N {
        for (i, to) in panel[p * N..][..N].iter_mut().enumerate() {
            *to = if i < rows { pair(matrix, i, p, k) } else { 0 };
        }
    }
}

/// A panel from rows that lie beside one another, element for element: two columns of k are interleaved.
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
unsafe fn pack_columns<const N: usize>(matrix: Matrix<'_, bf16>, rows: usize, k: usize, panel: &mut [u32]) {
    for (p, to) in panel.chunks_exact_mut(N).enumerate() {
        if matrix.row_stride != 1 || 2 * p + 1 >= k {
            to.iter_mut().enumerate().for_each(|(i, to)| *to = if i < rows { pair(matrix, i, p, k) } else { 0 });
            continue;
        }
        let low = &matrix.data[2 * p * matrix.column_stride..][..rows];
        let high = &matrix.data[(2 * p + 1) * matrix.column_stride..][..rows];
        for (i, to) in to.chunks_mut(16).enumerate() {
            let inside = lanes(rows.saturating_sub(16 * i));
            // SAFETY: lanes of `inside` are elements of both slices; those of `to` are its length.
            unsafe {
                let low = _mm256_maskz_loadu_epi16(inside, low.as_ptr().wrapping_add(16 * i).cast());
                let high = _mm256_maskz_loadu_epi16(inside, high.as_ptr().wrapping_add(16 * i).cast());
                let pairs =
                    _mm512_or_epi32(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high)));
                _mm512_mask_storeu_epi32(to.as_mut_ptr().cast(), lanes(to.len()), pairs);
            }
        }
    }
}

/// Turns each 16 pairs of a panel of 32 rows into two tiles of 16 rows of 16 pairs.
#[cfg(target_os = "linux")]
#[target_feature(enable = "avx512f")]
pub(super) fn turn(panel: &mut [u32]) {
    for step in panel.chunks_exact_mut(512) {
        let mut halves = [[_mm512_setzero_si512(); 16]; 2];
        for (p, pairs) in step.chunks_exact(32).enumerate() {
            for (half, vectors) in halves.iter_mut().enumerate() {
                // SAFETY: 16 of the 32 words.
                vectors[p] = unsafe { _mm512_loadu_epi32(pairs.as_ptr().add(16 * half).cast()) };
            }
        }
        for (half, vectors) in halves.into_iter().enumerate() {
            for (row, pairs) in transpose(vectors).into_iter().enumerate() {
                // SAFETY: 16 of the 512 words.
                unsafe { _mm512_storeu_epi32(step.as_mut_ptr().add(256 * half + 16 * row).cast(), pairs) };
            }
        }
    }
}

/// Word j of row i becomes word i of row j.
#[target_feature(enable = "avx512f")]
fn transpose(rows: [__m512i; 16]) -> [__m512i; 16] {
    let mut pairs = rows;
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // fours[4·g + c]: of rows 4g to 4g + 3 the words c, 4 + c, 8 + c and 12 + c, a group of four lanes each.
    let mut fours = pairs;
    for g in 0..4 {
        fours[4 * g] = _mm512_unpacklo_epi64(pairs[4 * g], pairs[4 * g + 2]);
        fours[4 * g + 1] = _mm512_unpackhi_epi64(pairs[4 * g], pairs[4 * g + 2]);
        fours[4 * g + 2] = _mm512_unpacklo_epi64(pairs[4 * g + 1], pairs[4 * g + 3]);
        fours[4 * g + 3] = _mm512_unpackhi_epi64(pairs[4 * g + 1], pairs[4 * g + 3]);
    }
    let mut columns = fours;
    for c in 0..4 {
        let [a, b] = [fours[c], fours[4 + c]];
        let [d, e] = [fours[8 + c], fours[12 + c]];
        let (even, odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (even_below, odd_below) = (_mm512_shuffle_i32x4::<0x88>(d, e), _mm512_shuffle_i32x4::<0xdd>(d, e));
        columns[c] = _mm512_shuffle_i32x4::<0x88>(even, even_below);
        columns[8 + c] = _mm512_shuffle_i32x4::<0xdd>(even, even_below);
        columns[4 + c] = _mm512_shuffle_i32x4::<0x88>(odd, odd_below);
        columns[12 + c] = _mm512_shuffle_i32x4::<0xdd>(odd, odd_below);
    }
    columns
}
