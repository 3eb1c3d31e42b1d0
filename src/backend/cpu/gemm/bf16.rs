//! Products of bf16 matrices with f32 sums, by `vdpbf16ps` (AVX-512 BF16: Cooper Lake, Zen 4 and later).
//!
//! A tile of C, 14 rows × 32 columns, is summed in 28 vector registers over the whole depth and written once, so a
//! result is rounded once. The instruction adds a pair of products to each f32 sum: B is packed into panels [k / 2, 32]
//! of pairs (k, k + 1); A gives one pair to all lanes, read from its rows where these are contiguous in k, else from
//! panels [k / 2, 14]. The depth is not blocked: a panel of B streams from L2 at 5 bytes a cycle, of 32 that it
//! delivers. Subnormal operands and results count as 0; sums round to nearest even, in an order that depends on k
//! alone.

mod dots;
mod pack;

pub(super) use dots::dots;

use crate::backend::Epilogue;
use crate::backend::cpu::matrix::{self, Threads};
use half::bf16;
use pack::pack;
use rayon::prelude::*;
use std::arch::x86_64::*;
use std::cell::Cell;

/// Rows and columns of a tile of C.
const TILE: (usize, usize) = (14, 32);
/// Tiles per task, down and across: about 100 µs of work at k = 1024.
const TASK: (usize, usize) = (8, 4);
/// Bytes of a matrix packed at once: they stay in the last-level cache until they are read.
const PACKED_BYTES: usize = 4 << 20;

/// Whether the CPU has AVX-512 BF16.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bf16")
}

/// Computes a product whose matrices fit their slices.
///
/// # Panics
/// Where the machine lacks the instructions.
pub(super) fn product<T: Output>(product: matrix::Product<'_, bf16, T>) {
    assert!(available());
    let matrix::Product { c, stride, a, b, size: (m, n, k), epilogue, threads } = product;
    let product = Product { c: c.as_mut_ptr(), stride, columns: n, depth: k, epilogue };
    let pairs = k.div_ceil(2);
    let packed_at_once = |panel: usize| (PACKED_BYTES / 4 / (panel * pairs.max(1))).max(1) * panel;
    let by_rows = a.column_stride == 1;
    let (rows_at_once, columns_at_once) = (if by_rows { m } else { packed_at_once(TILE.0) }, packed_at_once(TILE.1));
    let [mut packed_a, mut packed_b] = PACKED.take();
    for column in (0..n).step_by(columns_at_once) {
        let columns = columns_at_once.min(n - column);
        pack::<{ TILE.1 }>(b.t(), column..column + columns, k, &mut packed_b, threads);
        for row in (0..m).step_by(rows_at_once.max(1)) {
            let rows = rows_at_once.min(m - row);
            if !by_rows && (column == 0 || rows < m) {
                pack::<{ TILE.0 }>(a, row..row + rows, k, &mut packed_a, threads);
            }
            let (down, across) = (rows.div_ceil(TILE.0), columns.div_ceil(TILE.1));
            let blocks = down.div_ceil(TASK.0);
            let (product, packed_a, packed_b) = (&product, &packed_a, &packed_b);
            for_each(blocks * across.div_ceil(TASK.1), threads, |task| {
                let (block, strip) = (task % blocks * TASK.0, task / blocks * TASK.1);
                for j in strip..across.min(strip + TASK.1) {
                    let b = &packed_b[j * TILE.1 * pairs..][..TILE.1 * pairs];
                    for i in block..down.min(block + TASK.0) {
                        let place = Place {
                            row: row + i * TILE.0,
                            column: column + j * TILE.1,
                            rows: TILE.0.min(rows - i * TILE.0),
                        };
                        // SAFETY: the machine has the instructions; the matrices hold the rows and columns of the
                        // tile, and no other task has this tile of C.
                        unsafe {
                            if by_rows {
                                let first = a.data.as_ptr().add(place.row * a.row_stride);
                                product.tile::<1>(first, a.row_stride, b, place);
                            } else {
                                let first = packed_a[i * TILE.0 * pairs..].as_ptr().cast();
                                product.tile::<{ TILE.0 }>(first, 2, b, place);
                            }
                        }
                    }
                }
            });
        }
    }
    PACKED.set([packed_a, packed_b]);
}

thread_local! {
    /// Packed operands of the last product of this thread: memory that need not be asked for again. Taken while it is
    /// in use, for a thread that waits may begin another product.
    static PACKED: Cell<[Vec<u32>; 2]> = const { Cell::new([Vec::new(), Vec::new()]) };
}

fn for_each(tasks: usize, threads: Threads, task: impl Fn(usize) + Sync + Send) {
    if threads == Threads::All && tasks > 1 {
        (0..tasks).into_par_iter().for_each(task);
    } else {
        (0..tasks).for_each(task);
    }
}

/// The lowest `count` lanes of 16.
fn lanes(count: usize) -> __mmask16 {
    ((1u32 << count.min(16)) - 1) as __mmask16
}

/// A product that runs: where C is, and what is done to its tiles.
struct Product<'a, T> {
    c: *mut T,
    stride: usize,
    columns: usize,
    depth: usize,
    epilogue: Epilogue<&'a [bf16]>,
}

// SAFETY: tasks write disjoint tiles of C, which `product` borrows for all of them.
unsafe impl<T: Send> Sync for Product<'_, T> {}

/// A tile of C: its first element, and how many of its rows there are.
#[derive(Clone, Copy)]
struct Place {
    row: usize,
    column: usize,
    rows: usize,
}

impl<T: Output> Product<'_, T> {
    /// Pair p of row i of A is at `a + i·stride + 2·STEP·p`, rows behind the last are not read; B is a panel.
    ///
    /// # Safety
    /// A and B hold the tile, which no other thread writes; the machine has the instructions.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn tile<const STEP: usize>(&self, a: *const bf16, stride: usize, b: &[u32], place: Place) {
        let rows: [*const bf16; TILE.0] = std::array::from_fn(|i| a.wrapping_add(i.min(place.rows - 1) * stride));
        let mut sums = [[_mm512_setzero_ps(); 2]; TILE.0];
        // Of rows that are contiguous in k, the last of an odd depth has no partner.
        let whole = if STEP == 1 { self.depth / 2 } else { self.depth.div_ceil(2) };
        for p in 0..whole {
            // SAFETY: the panel has a pair of 32 columns for each p, A one of each row.
            unsafe {
                let columns = load_pairs(b.as_ptr().add(p * TILE.1));
                for (sums, row) in sums.iter_mut().zip(rows) {
                    let pair = row.add(2 * STEP * p).cast::<u32>().read_unaligned();
                    add_products(sums, pair, columns);
                }
            }
        }
        if 2 * whole < self.depth {
            // SAFETY: as above, and element depth − 1 is the last of a row.
            unsafe {
                let columns = load_pairs(b.as_ptr().add(whole * TILE.1));
                for (sums, row) in sums.iter_mut().zip(rows) {
                    add_products(sums, u32::from((*row.add(self.depth - 1)).to_bits()), columns);
                }
            }
        }
        for (i, sums) in sums.iter().enumerate().take(place.rows) {
            for (half, sum) in sums.iter().enumerate() {
                let column = place.column + 16 * half;
                if column < self.columns {
                    // SAFETY: row and column are inside of C, and the mask ends with the row.
                    unsafe { self.store(place.row + i, column, lanes(self.columns - column), *sum) };
                }
            }
        }
    }

    /// Applies the epilogue to 16 elements of a row of C.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn store(&self, row: usize, column: usize, mask: __mmask16, sum: __m512) {
        let Epilogue { alpha, bias, residual, accumulate } = self.epilogue;
        let index = row * self.stride + column;
        let mut value = if alpha == 1.0 { sum } else { _mm512_mul_ps(sum, _mm512_set1_ps(alpha)) };
        // SAFETY: masked lanes lie inside of the row, and so inside of bias and residual, whose lengths were checked.
        unsafe {
            if let Some(bias) = bias {
                value = _mm512_add_ps(value, bf16::load(bias.as_ptr().add(column), mask));
            }
            if let Some(residual) = residual {
                value = _mm512_add_ps(value, bf16::load(residual.as_ptr().add(index), mask));
            }
            let to = self.c.add(index);
            if accumulate {
                value = _mm512_add_ps(value, T::load(to, mask));
            }
            T::store(to, mask, value);
        }
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

/// An element of C.
pub(super) trait Output: Copy + Send {
    /// The lanes of `mask` as f32, 0 in the others.
    ///
    /// # Safety
    /// Memory holds the lanes of the mask; the machine has AVX-512 BW, VL and BF16.
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512;
    /// Stores the lanes of `mask`, to nearest even.
    ///
    /// # Safety
    /// As [`Output::load`].
    unsafe fn store(to: *mut Self, mask: __mmask16, value: __m512);
}

impl Output for f32 {
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's.
        unsafe { _mm512_maskz_loadu_ps(mask, from) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn store(to: *mut Self, mask: __mmask16, value: __m512) {
        // SAFETY: the caller's.
        unsafe { _mm512_mask_storeu_ps(to, mask, value) };
    }
}

impl Output for bf16 {
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl")]
    unsafe fn load(from: *const Self, mask: __mmask16) -> __m512 {
        // SAFETY: the caller's.
        let bits = unsafe { _mm256_maskz_loadu_epi16(mask, from.cast()) };
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
    }

    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn store(to: *mut Self, mask: __mmask16, value: __m512) {
        // SAFETY: the caller's; the types have the same bits.
        unsafe {
            _mm256_mask_storeu_epi16(
                to.cast(),
                mask,
                std::mem::transmute::<__m256bh, __m256i>(_mm512_cvtneps_pbh(value)),
            )
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::matrix::Matrix;

    fn numbers(seed: u32, len: usize) -> Vec<bf16> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| bf16::from_f32(next())).collect()
    }

    /// All layouts, tails and epilogues: one rounding of the f64 result, but for what sums in f32 are off by.
    #[test]
    fn every_layout_and_epilogue() {
        if !available() {
            return;
        }
        for size in [(1, 1, 1), (14, 32, 64), (15, 33, 31), (37, 45, 71), (3, 100, 130), (130, 70, 33), (300, 515, 2)] {
            let (m, n, k) = size;
            let (x, y) = (numbers(1, m * k), numbers(2, k * n));
            let (bias, residual, before) = (numbers(3, n), numbers(4, m * n), numbers(5, m * n));
            for a in [Matrix::rows(&x, k), Matrix::rows(&x, m).t()] {
                for b in [Matrix::rows(&y, n), Matrix::rows(&y, k).t()] {
                    for added in [false, true] {
                        let epilogue = Epilogue {
                            alpha: if added { -0.5 } else { 1.0 },
                            bias: added.then_some(&bias[..]),
                            residual: added.then_some(&residual[..]),
                            accumulate: added,
                        };
                        let mut narrow = before.clone();
                        let mut wide: Vec<f32> = before.iter().map(|x| x.to_f32()).collect();
                        product(matrix::Product { epilogue, ..matrix::Product::new(&mut narrow[..], n, a, b, size) });
                        product(matrix::Product { epilogue, ..matrix::Product::serial(&mut wide[..], n, a, b, size) });
                        for i in 0..m {
                            for (j, bias) in bias.iter().enumerate() {
                                let element = |x: Matrix<'_, bf16>, i: usize, j: usize| {
                                    x.data[i * x.row_stride + j * x.column_stride].to_f64()
                                };
                                let sum: f64 = (0..k).map(|l| element(a, i, l) * element(b, l, j)).sum();
                                let magnitude: f64 = (0..k).map(|l| (element(a, i, l) * element(b, l, j)).abs()).sum();
                                let at = i * n + j;
                                let exact = if added {
                                    before[at].to_f64() + residual[at].to_f64() + bias.to_f64() - 0.5 * sum
                                } else {
                                    sum
                                };
                                let off = (f64::from(wide[at]) - exact).abs();
                                assert!(off <= 1e-6 * (magnitude + 3.0), "{size:?} {at}: {} {exact}", wide[at]);
                                let rounded = (narrow[at].to_f64() - exact).abs();
                                assert!(rounded <= exact.abs() / 256.0 + 1e-6 * (magnitude + 3.0), "{size:?} {at}");
                            }
                        }
                    }
                }
            }
        }
    }
}
