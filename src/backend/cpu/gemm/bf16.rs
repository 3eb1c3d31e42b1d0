//! Products of bf16 matrices with f32 sums, by `vdpbf16ps` (AVX-512 BF16: Cooper Lake, Zen 4 and later) or on the matrix
//! unit (AMX: Sapphire Rapids and later).
//!
//! A tile of C is summed in registers over the whole depth and written once, so a result is rounded once. Both
//! instructions add pairs of products to each f32 sum: B is packed into panels [pairs, 32] of pairs (k, k + 1); A is
//! read from its rows where these are contiguous in k, else it is packed as well. The depth is not blocked: a panel of B
//! streams from L2. Subnormal operands and results count as 0; sums round to nearest even, in an order that depends on k
//! alone.
//!
//! Strips of B are packed and multiplied as [`strips`] says: no step of a product waits for all threads.

mod dots;
mod pack;
mod strips;
#[cfg(target_os = "linux")]
mod tiles;
mod vectors;

pub(super) use dots::dots;

use crate::backend::Epilogue;
use crate::backend::cpu::matrix::{self, Matrix, Threads};
use crate::backend::cpu::storage::Shared;
use half::bf16;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;
use strips::Strips;

/// Columns of a tile of C.
const COLUMNS: usize = 32;
/// Tiles of a task, down and across, up to the depth [`TASK_DEPTH`]: about 100 µs of work. Deeper ones have fewer.
const TASK: (usize, usize) = (8, 4);
const TASK_DEPTH: usize = 1024;
/// Most bytes of a strip of B, which is [`TASK`] panels across where these are not deeper.
const STRIP_BYTES: usize = 4 << 20;
/// Bytes of strips that are packed at the same time: of two strips at least.
const PACKED_BYTES: usize = 64 << 20;
/// Bytes of A packed at once: they stay in the last-level cache until they are read.
const PACKED_A_BYTES: usize = 4 << 20;
/// Rows, columns and depths from which the matrix unit pays.
#[cfg(target_os = "linux")]
const MATRIX_UNIT: usize = 16;

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
    #[cfg(target_os = "linux")]
    {
        let (m, n, k) = product.size;
        if m.min(n).min(k) >= MATRIX_UNIT && super::amx::available() {
            return run::<_, tiles::Tiles<tiles::Amx>>(product);
        }
    }
    run::<_, vectors::Vectors>(product);
}

/// How a tile of C is summed.
trait Kernel {
    /// Rows of a tile of C.
    const ROWS: usize;
    /// Pairs to a multiple of which operands are packed.
    const PAIRS: usize;

    /// Packs rows of an A that is not contiguous in k: [`Kernel::ROWS`] · `pairs` words a tile.
    fn pack_a(a: Matrix<'_, bf16>, range: Range<usize>, k: usize, packed: &mut Vec<u32>, threads: Threads);

    /// Prepares the calling thread for the tiles of a task.
    ///
    /// # Safety
    /// The machine has the instructions.
    unsafe fn begin() {}

    /// Sums a tile of C over the whole depth; `b` is a panel.
    ///
    /// # Safety
    /// A and C hold the tile, which no other thread writes; the machine has the instructions; the thread has begun.
    unsafe fn tile<T: Output>(product: &Product<'_, T>, a: Rows, b: &[u32], place: Place);

    /// Ends what [`Kernel::begin`] began.
    ///
    /// # Safety
    /// As [`Kernel::begin`].
    unsafe fn end() {}
}

/// Rows of A: the first element, and the elements from one row to the next if they lie in the matrix itself.
#[derive(Clone, Copy)]
struct Rows {
    first: *const bf16,
    stride: usize,
    layout: Layout,
}

/// Where the rows of A lie.
#[derive(Clone, Copy, PartialEq)]
enum Layout {
    /// In the matrix itself, contiguous in k.
    Matrix,
    /// Packed by [`Kernel::pack_a`].
    Packed,
}

fn run<T: Output, K: Kernel>(product: matrix::Product<'_, bf16, T>) {
    let matrix::Product { c, stride, a, b, size: (m, n, k), epilogue, threads } = product;
    let product = Product { c: c.as_mut_ptr(), stride, columns: n, depth: k, epilogue };
    let pairs = k.div_ceil(2).next_multiple_of(K::PAIRS);
    let panel = COLUMNS * pairs;
    let across = (STRIP_BYTES / 4 / panel.max(1)).clamp(1, TASK.1);
    let down = (TASK.0 * TASK_DEPTH / k.max(1)).clamp(1, TASK.0);
    let strips = n.div_ceil(across * COLUMNS);
    let most = (PACKED_BYTES / 4 / (across * panel).max(1)).max(2);
    let spaces = strips::workers(threads).min(strips).min(most);
    let [mut packed_a, mut packed_b] = PACKED.take();
    packed_b.resize(packed_b.len().max(spaces * across * panel), 0);
    let packed = Shared::new(&mut packed_b);
    let space = |i: usize| i * across * panel..(i + 1) * across * panel;

    let by_rows = a.column_stride == 1;
    let rows_at_once = if by_rows { m } else { (PACKED_A_BYTES / 4 / (K::ROWS * pairs.max(1))).max(1) * K::ROWS };
    for row in (0..m).step_by(rows_at_once) {
        let rows = rows_at_once.min(m - row);
        if !by_rows {
            K::pack_a(a, row..row + rows, k, &mut packed_a, threads);
        }
        let (tiles, packed_a) = (rows.div_ceil(K::ROWS), &packed_a);
        let columns = |strip: usize| strip * across * COLUMNS..n.min((strip + 1) * across * COLUMNS);
        Strips { strips, blocks: tiles.div_ceil(down), spaces }.run(
            threads,
            |i, strip| {
                // SAFETY: no thread reads a space while it is packed.
                pack::panels::<COLUMNS>(b.t(), columns(strip), k, pairs, unsafe { packed.range(space(i)) });
            },
            |i, strip, block| {
                // SAFETY: no thread writes to a space while it is read.
                let b = unsafe { std::slice::from_raw_parts(packed.pointer(space(i)), across * panel) };
                // SAFETY: the machine has the instructions.
                unsafe { K::begin() };
                for (column, b) in columns(strip).step_by(COLUMNS).zip(b.chunks_exact(panel)) {
                    for tile in (block * down..tiles).take(down) {
                        let place =
                            Place { row: row + tile * K::ROWS, column, rows: K::ROWS.min(rows - tile * K::ROWS) };
                        let (first, layout) = if by_rows {
                            (a.data[place.row * a.row_stride..].as_ptr(), Layout::Matrix)
                        } else {
                            (packed_a[tile * K::ROWS * pairs..].as_ptr().cast(), Layout::Packed)
                        };
                        // SAFETY: the machine has the instructions; the matrices hold the rows and columns of the
                        // tile, and no other task has this tile of C.
                        unsafe { K::tile(&product, Rows { first, stride: a.row_stride, layout }, b, place) };
                    }
                }
                // SAFETY: as above.
                unsafe { K::end() };
            },
        );
    }
    PACKED.set([packed_a, packed_b]);
}

thread_local! {
    /// Packed operands of the last product of this thread: memory that need not be asked for again. Taken while it is
    /// in use, for a thread that waits may begin another product.
    static PACKED: Cell<[Vec<u32>; 2]> = const { Cell::new([Vec::new(), Vec::new()]) };
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
    /// Stores 32 sums of a row of C, those that it has.
    ///
    /// # Safety
    /// That of [`Product::store`].
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn store_row(&self, row: usize, column: usize, sums: [__m512; 2]) {
        for (half, sum) in sums.into_iter().enumerate() {
            let column = column + 16 * half;
            if column < self.columns {
                // SAFETY: the mask ends with the row; the caller's.
                unsafe { self.store(row, column, lanes(self.columns - column), sum) };
            }
        }
    }

    /// Applies the epilogue to 16 elements of a row of C.
    ///
    /// # Safety
    /// C has the row and the lanes of the mask, which no other thread writes; the machine has the instructions.
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

    fn numbers(seed: u32, len: usize) -> Vec<bf16> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        };
        (0..len).map(|_| bf16::from_f32(next())).collect()
    }

    #[test]
    fn vectors_in_every_layout_and_epilogue() {
        if available() {
            every_layout_and_epilogue::<vectors::Vectors>();
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn tiles_in_every_layout_and_epilogue() {
        if available() {
            every_layout_and_epilogue::<tiles::Tiles<tiles::Emulated>>();
        }
        if available() && super::super::amx::available() {
            every_layout_and_epilogue::<tiles::Tiles<tiles::Amx>>();
        }
    }

    /// All layouts, tails and epilogues: one rounding of the f64 result, but for what sums in f32 are off by.
    fn every_layout_and_epilogue<K: Kernel>() {
        for size in [
            (1, 1, 1),
            (14, 32, 64),
            (15, 33, 31),
            (37, 45, 71),
            (3, 100, 130),
            (130, 70, 33),
            (300, 515, 2),
            (70, 64, 96),
        ] {
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
                        run::<_, K>(matrix::Product {
                            epilogue,
                            ..matrix::Product::new(&mut narrow[..], n, a, b, size)
                        });
                        run::<_, K>(matrix::Product {
                            epilogue,
                            ..matrix::Product::serial(&mut wide[..], n, a, b, size)
                        });
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
