//! Tiles of 32 × 32 in four registers of the matrix unit (AMX), which multiplies 16 × 32 by 32 × 16 elements of bf16.
//!
//! A tile register of A is 16 rows of 16 pairs, read from the rows of the matrix where these are contiguous in k; one of
//! B is 16 pairs of 16 columns, half of a panel's width.

use super::strips::for_each;
use super::{COLUMNS, Kernel, Layout, Output, Place, Product, Rows, pack};
use crate::backend::cpu::gemm::amx;
use crate::backend::cpu::matrix::{Matrix, Threads};
use crate::backend::cpu::storage::Shared;
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::Range;

const ROWS: usize = 32;
/// Pairs of a tile register.
const PAIRS: usize = 16;

/// Sums of a tile of C.
#[repr(C, align(64))]
pub(super) struct Sums([[f32; COLUMNS]; ROWS]);

/// 32 rows of A: where their upper and lower half begin, and the elements from row to row and from step to step.
#[derive(Clone, Copy)]
pub(super) struct Walk {
    halves: [*const bf16; 2],
    stride: usize,
    step: usize,
}

impl Walk {
    /// Rows that are contiguous in k.
    fn rows(first: *const bf16, stride: usize) -> Self {
        Self { halves: [first, first.wrapping_add(16 * stride)], stride, step: 2 * PAIRS }
    }

    /// Two tiles for each step, one behind the other.
    fn packed(first: *const bf16) -> Self {
        const TILE: usize = 16 * 2 * PAIRS;
        Self { halves: [first, first.wrapping_add(TILE)], stride: 2 * PAIRS, step: 2 * TILE }
    }
}

/// What multiplies tiles.
pub(super) trait Unit {
    /// Configures the tile registers of this thread.
    ///
    /// # Safety
    /// The machine has the unit.
    unsafe fn configure();
    /// C = A·B, `steps` · 32 deep; `b` is a panel.
    ///
    /// # Safety
    /// A and B hold that much; the registers are configured.
    unsafe fn multiply(a: Walk, b: *const u32, steps: usize, c: &mut Sums);
    /// Puts the tile registers of this thread back to their initial state.
    ///
    /// # Safety
    /// The machine has the unit.
    unsafe fn release();
}

/// The kernel of a unit.
pub(super) struct Tiles<U>(PhantomData<U>);

thread_local! {
    /// Rows of A at its edges, padded with zeros; taken while in use.
    static EDGE: Cell<Vec<bf16>> = const { Cell::new(Vec::new()) };
}

impl<U: Unit> Kernel for Tiles<U> {
    const ROWS: usize = ROWS;
    const PAIRS: usize = PAIRS;

    /// Tiles of 16 rows of 16 pairs.
    fn pack_a(a: Matrix<'_, bf16>, range: Range<usize>, k: usize, packed: &mut Vec<u32>, threads: Threads) {
        let pairs = k.div_ceil(2).next_multiple_of(PAIRS);
        let panels = range.len().div_ceil(ROWS);
        pack::pack::<ROWS>(a, range, k, pairs, packed, threads);
        let packed = Shared::new(&mut packed[..panels * ROWS * pairs]);
        for_each(panels, threads, |i| {
            // SAFETY: each panel is turned once; the machine has the instructions.
            unsafe { pack::turn(packed.range(i * ROWS * pairs..(i + 1) * ROWS * pairs)) };
        });
    }

    unsafe fn begin() {
        // SAFETY: the caller's.
        unsafe { U::configure() };
    }

    unsafe fn tile<T: Output>(product: &Product<'_, T>, a: Rows, b: &[u32], place: Place) {
        let steps = b.len() / COLUMNS / PAIRS;
        let mut sums = Sums([[0.0; COLUMNS]; ROWS]);
        // SAFETY: the caller's; what is read of A is whole tiles of it, or a copy of its edge.
        unsafe {
            if a.layout == Layout::Packed {
                U::multiply(Walk::packed(a.first), b.as_ptr(), steps, &mut sums);
            } else if place.rows == ROWS && product.depth == 2 * PAIRS * steps {
                U::multiply(Walk::rows(a.first, a.stride), b.as_ptr(), steps, &mut sums);
            } else {
                let mut edge = EDGE.take();
                let stride = 2 * PAIRS * steps;
                edge.clear();
                edge.resize(ROWS * stride, bf16::ZERO);
                for (i, row) in edge.chunks_exact_mut(stride).enumerate().take(place.rows) {
                    let from = std::slice::from_raw_parts(a.first.add(i * a.stride), product.depth);
                    row[..product.depth].copy_from_slice(from);
                }
                U::multiply(Walk::rows(edge.as_ptr(), stride), b.as_ptr(), steps, &mut sums);
                EDGE.set(edge);
            }
            for (i, sums) in sums.0.iter().enumerate().take(place.rows) {
                store(product, place.row + i, place.column, sums);
            }
        }
    }

    unsafe fn end() {
        // SAFETY: the caller's.
        unsafe { U::release() };
    }
}

/// # Safety
/// That of [`Product::store_row`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
unsafe fn store<T: Output>(product: &Product<'_, T>, row: usize, column: usize, sums: &[f32; COLUMNS]) {
    // SAFETY: two vectors of a row; the caller's.
    unsafe {
        let sums = [_mm512_loadu_ps(sums.as_ptr()), _mm512_loadu_ps(sums.as_ptr().add(16))];
        product.store_row(row, column, sums);
    }
}

/// The matrix unit of this machine.
pub(super) struct Amx;

impl Unit for Amx {
    unsafe fn configure() {
        // SAFETY: the caller's.
        unsafe { amx::configure() };
    }

    /// Tiles 0–3 are C, 4 and 5 the rows of A, 6 and 7 the columns of B.
    unsafe fn multiply(a: Walk, b: *const u32, steps: usize, c: &mut Sums) {
        // SAFETY: reads A and B in whole steps, writes the 32 rows of C.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "test {steps}, {steps}",
                "jz 3f",
                "2:",
                "tileloadd tmm4, [{a} + {s}]", "tileloadd tmm6, [{b} + {t}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b} + {t} + 64]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{lower} + {s}]",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a}, {step}", "add {lower}, {step}", "add {b}, 2048",
                "dec {steps}",
                "jnz 2b",
                "3:",
                "tilestored [{c} + {t}], tmm0", "tilestored [{c} + {t} + 64], tmm1",
                "tilestored [{d} + {t}], tmm2", "tilestored [{d} + {t} + 64], tmm3",
                a = inout(reg) a.halves[0] => _, lower = inout(reg) a.halves[1] => _,
                s = in(reg) 2 * a.stride, step = in(reg) 2 * a.step,
                b = inout(reg) b => _, t = in(reg) 4 * COLUMNS, steps = inout(reg) steps => _,
                c = in(reg) &raw mut c.0[0], d = in(reg) &raw mut c.0[16],
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _, options(nostack),
            );
        }
    }

    unsafe fn release() {
        // SAFETY: puts the registers back to their initial state.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// The unit in plain code, so that packing and edges are tested on any machine.
#[cfg(test)]
pub(super) struct Emulated;

#[cfg(test)]
impl Unit for Emulated {
    unsafe fn configure() {}

    unsafe fn multiply(a: Walk, b: *const u32, steps: usize, c: &mut Sums) {
        for (i, sums) in c.0.iter_mut().enumerate() {
            sums.fill(0.0);
            for p in 0..steps * PAIRS {
                let at = i % 16 * a.stride + p / PAIRS * a.step + 2 * (p % PAIRS);
                // SAFETY: the caller's.
                let [even, odd] = [0, 1].map(|l| unsafe { *a.halves[i / 16].add(at + l) }.to_f32());
                for (j, sum) in sums.iter_mut().enumerate() {
                    // SAFETY: the caller's.
                    let pair = unsafe { *b.add(p * COLUMNS + j) };
                    *sum += even * f32::from_bits(pair << 16) + odd * f32::from_bits(pair & 0xffff_0000);
                }
            }
        }
    }

    unsafe fn release() {}
}
