//! Tiles of 14 rows × 32 columns in 28 vector registers, by `vdpbf16ps`.

use super::{COLUMNS, Kernel, Layout, Output, Place, Product, Rows, pack};
use crate::backend::cpu::matrix::{Matrix, Threads};
use half::bf16;
use std::arch::x86_64::*;
use std::ops::Range;

const ROWS: usize = 14;

pub(super) struct Vectors;

impl Kernel for Vectors {
    const ROWS: usize = ROWS;
    const PAIRS: usize = 1;

    fn pack_a(a: Matrix<'_, bf16>, range: Range<usize>, k: usize, packed: &mut Vec<u32>, threads: Threads) {
        pack::pack::<ROWS>(a, range, k, k.div_ceil(2), packed, threads);
    }

    unsafe fn tile<T: Output>(product: &Product<'_, T>, a: Rows, b: &[u32], place: Place) {
        // SAFETY: the caller's.
        unsafe {
            match a.layout {
                Layout::Matrix => tile::<T, 1>(product, a.first, a.stride, b, place),
                Layout::Packed => tile::<T, ROWS>(product, a.first, 2, b, place),
            }
        }
    }
}

/// Pair p of row i of A is at `a + i·stride + 2·STEP·p`; rows behind the last are not read. Each pair goes to all lanes.
///
/// # Safety
/// That of [`Kernel::tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn tile<T: Output, const STEP: usize>(
    product: &Product<'_, T>,
    a: *const bf16,
    stride: usize,
    b: &[u32],
    place: Place,
) {
    let rows: [*const bf16; ROWS] = std::array::from_fn(|i| a.wrapping_add(i.min(place.rows - 1) * stride));
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    // Of rows that are contiguous in k, the last of an odd depth has no partner.
    let whole = if STEP == 1 { product.depth / 2 } else { product.depth.div_ceil(2) };
    for p in 0..whole {
        // SAFETY: the panel has a pair of 32 columns for each p, A one of each row.
        unsafe {
            let columns = load_pairs(b.as_ptr().add(p * COLUMNS));
            for (sums, row) in sums.iter_mut().zip(rows) {
                let pair = row.add(2 * STEP * p).cast::<u32>().read_unaligned();
                add_products(sums, pair, columns);
            }
        }
    }
    if 2 * whole < product.depth {
        // SAFETY: as above, and element depth − 1 is the last of a row.
        unsafe {
            let columns = load_pairs(b.as_ptr().add(whole * COLUMNS));
            for (sums, row) in sums.iter_mut().zip(rows) {
                add_products(sums, u32::from((*row.add(product.depth - 1)).to_bits()), columns);
            }
        }
    }
    for (i, sums) in sums.iter().enumerate().take(place.rows) {
        // SAFETY: the row is one of C.
        unsafe { product.store_row(place.row + i, place.column, *sums) };
    }
}

/// 16 pairs of two groups of columns.
///
/// # Safety
/// `from` holds 32 words.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
unsafe fn load_pairs(from: *const u32) -> [__m512bh; 2] {
    // SAFETY: as the function's; the types have the same bits.
    unsafe { std::mem::transmute([_mm512_loadu_epi32(from.cast()), _mm512_loadu_epi32(from.add(16).cast())]) }
}

/// Adds to each column's sum the products of its pair and `pair`.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn add_products(sums: &mut [__m512; 2], pair: u32, columns: [__m512bh; 2]) {
    // SAFETY: the types have the same bits.
    let pair: __m512bh = unsafe { std::mem::transmute(_mm512_set1_epi32(pair as i32)) };
    for (sum, columns) in sums.iter_mut().zip(columns) {
        *sum = _mm512_dpbf16_ps(*sum, pair, columns);
    }
}
