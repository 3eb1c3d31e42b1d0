//! f32 products on the matrix unit (AMX) of Intel servers, which multiplies bf16 and adds in f32.
//!
//! Each f32 is cut into three bf16 parts, x = x₁ + x₂ + x₃ (8 bits each, so nothing is lost), and the six products of
//! parts that matter, x₁y₁ + x₁y₂ + x₂y₁ + x₂y₂ + x₁y₃ + x₃y₁, are added in f32; what is left out is below 2⁻²⁵ of
//! |x·y|. That is as exact as f32 multiply-add (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial
//! intelligence datatype for higher-precision computations", ARITH 2019) at 6/16 of its cost.
//!
//! Both operands are packed into tiles first: a panel is 32 rows of A or 32 columns of B; a step of a panel is 32 deep
//! and holds six tiles of 1 KiB, part by part, two tiles a part. A word of a tile pairs depths i and i + 16: a tile of
//! A is 16 rows of 16 pairs; a tile of B is 16 pairs of 16 columns.
//!
//! Not finite stays not finite, but an infinity may become NaN. The unit takes parts below 2⁻¹²⁶ for zero.

mod pack;

use crate::backend::Epilogue;
use crate::backend::cpu::matrix::{Product, Threads};
use crate::backend::cpu::storage::Shared;
use pack::{Operand, Side};
use rayon::prelude::*;
use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::cell::Cell;
use std::sync::OnceLock;

/// Rows of A, columns of B in a panel.
const PANEL: usize = 32;
/// Depths of a step.
const STEP: usize = 32;
/// Deepest panel; beyond it C is written and read back.
const DEPTH: usize = 768;
/// Most rows of an operand that are packed as a whole (18 MiB).
const WHOLE: usize = 4096;
/// Steps of the block that a task packs for itself (864 KiB): with a streamed panel it stays in the second-level cache.
const BLOCK_STEPS: usize = 144;
/// Bytes of the next streamed panel that a step fetches.
const AHEAD: usize = 1024;
/// Multiply-adds below which one thread does everything.
const SERIAL: usize = 1 << 21;

/// One 16 × 64-byte tile.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Tile([[u32; 16]; 16]);

/// A step of a panel: tiles [part][half].
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Step([[Tile; 2]; 3]);

const EMPTY: Step = Step([[Tile([[0; 16]; 16]); 2]; 3]);

/// Whether this machine has the unit and the system lets this process use it.
pub(super) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        if !(is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")) {
            return false;
        }
        const AMX_BF16: u32 = 1 << 22;
        const AMX_TILE: u32 = 1 << 24;
        let wanted = AMX_BF16 | AMX_TILE;
        if __cpuid(0).eax < 7 || __cpuid_count(7, 0).edx & wanted != wanted {
            return false;
        }
        // Linux grants the tile registers on request: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
        let mut answer: i64 = 158;
        // SAFETY: a system call that reads and writes no memory of this process.
        unsafe {
            asm!("syscall", inlateout("rax") answer, in("rdi") 0x1023, in("rsi") 18, out("rcx") _, out("r11") _, options(nostack));
        }
        answer == 0
    })
}

thread_local! {
    /// Packed operands of this thread's last product, for the next; taken while in use.
    static WHOLE_SPACE: Cell<Vec<Step>> = const { Cell::new(Vec::new()) };
    static BLOCK_SPACE: Cell<Vec<Step>> = const { Cell::new(Vec::new()) };
}

/// Computes a product of at least one row and column, without bias and residual. The caller has checked that
/// [`available`] holds and that the matrices fit their slices.
///
/// The operand with fewer panels is packed as a whole and streamed; of the other, each task packs a block of panels,
/// which stays in its core's cache. How the work is cut changes no result: an element of C is one sum over the depths
/// in their order.
pub(super) fn product(product: Product<'_>) {
    let Product { c, stride, a, b, size: (m, n, k), epilogue, threads } = product;
    let Epilogue { alpha, accumulate, .. } = epilogue;
    let threads = if threads == Threads::All && m * n * k >= SERIAL { rayon::current_num_threads() } else { 1 };
    let a = Operand { from: a, rows: m, factor: alpha, side: Side::A };
    let b = Operand { from: b.t(), rows: n, factor: 1.0, side: Side::B };
    let (whole, other) = if m < n { (a, b) } else { (b, a) };
    let c = Shared::new(c);
    let mut space = WHOLE_SPACE.take();
    let depth = k.div_ceil(k.div_ceil(DEPTH)).next_multiple_of(STEP);
    for from in (0..k).step_by(depth) {
        let depths = from..k.min(from + depth);
        let steps = depths.len().div_ceil(STEP);
        let most = (BLOCK_STEPS / steps).max(1);
        let panels = other.panels();
        let tasks = panels.div_ceil(most).next_multiple_of(threads).min(panels);
        let per_task = panels.div_ceil(tasks);
        for start in (0..whole.rows).step_by(WHOLE) {
            let end = whole.rows.min(start + WHOLE);
            let packed = whole.pack(&mut space, start..end, &depths, threads);
            let task = |task: usize| {
                let rows = task * per_task * PANEL..other.rows.min((task + 1) * per_task * PANEL);
                if rows.is_empty() {
                    return;
                }
                let mut space = BLOCK_SPACE.take();
                let block = other.pack(&mut space, rows.clone(), &depths, 1);
                let (packed, block) = (Panels { packed, first: start }, Panels { packed: block, first: rows.start });
                let target = Target { c: &c, stride, size: (m, n), add: accumulate || from > 0 };
                target.compute(packed, block, steps, whole.side);
                BLOCK_SPACE.set(space);
            };
            if threads > 1 {
                (0..tasks).into_par_iter().with_max_len(1).for_each(task);
            } else {
                (0..tasks).for_each(task);
            }
        }
    }
    WHOLE_SPACE.set(space);
}

/// Packed panels, the first of which begins at row `first` of its operand.
#[derive(Clone, Copy)]
struct Panels<'a> {
    packed: &'a [Step],
    first: usize,
}

/// Where products go.
struct Target<'a> {
    c: &'a Shared<'a, f32>,
    stride: usize,
    size: (usize, usize),
    add: bool,
}

impl Target<'_> {
    /// All products of a streamed panel and a panel of the block; the next streamed one is fetched meanwhile.
    fn compute(&self, streamed: Panels<'_>, block: Panels<'_>, steps: usize, streamed_side: Side) {
        // SAFETY: `available` has seen the unit; the configuration is this thread's, and released below.
        unsafe { configure() };
        if streamed_side == Side::B && streamed.packed.len() <= BLOCK_STEPS {
            // Both fit the cache: write C row by row.
            for (i, a) in block.packed.chunks_exact(steps).enumerate() {
                for (j, b) in streamed.packed.chunks_exact(steps).enumerate() {
                    let next = b.as_ptr_range().end.cast();
                    self.panel(a, b, (block.first + i * PANEL, streamed.first + j * PANEL), next);
                }
            }
        } else {
            for (i, panel) in streamed.packed.chunks_exact(steps).enumerate() {
                let mut ahead = panel.as_ptr_range().end.cast::<u8>();
                for (j, other) in block.packed.chunks_exact(steps).enumerate() {
                    let (i, j) = (streamed.first + i * PANEL, block.first + j * PANEL);
                    match streamed_side {
                        Side::A => self.panel(panel, other, (i, j), ahead),
                        Side::B => self.panel(other, panel, (j, i), ahead),
                    }
                    ahead = ahead.wrapping_add(steps * AHEAD);
                }
            }
        }
        // SAFETY: puts the tile registers back to their initial state.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    /// The 32 × 32 elements of C from (row, column) on.
    fn panel(&self, a: &[Step], b: &[Step], (row, column): (usize, usize), ahead: *const u8) {
        let (rows, columns) = ((self.size.0 - row).min(PANEL), (self.size.1 - column).min(PANEL));
        let place = |r: usize, columns: usize| {
            let at = (row + r) * self.stride + column;
            // SAFETY: each task writes its own block of C.
            unsafe { self.c.range(at..at + columns) }
        };
        if rows == PANEL && columns == PANEL {
            let at = row * self.stride + column;
            let c = self.c.pointer(at..at + (PANEL - 1) * self.stride + PANEL);
            // SAFETY: the 32 × 32 block is inside C and this task's alone; the tiles are configured.
            return unsafe { multiply(a, b, Block { c, stride: self.stride, add: self.add }, ahead) };
        }
        let mut edge = [[0.0f32; PANEL]; PANEL];
        // SAFETY: `edge` is 32 × 32; the tiles are configured.
        unsafe { multiply(a, b, Block { c: edge.as_mut_ptr().cast(), stride: PANEL, add: false }, ahead) };
        for (r, edge) in edge.iter().enumerate().take(rows) {
            for (c, x) in place(r, columns).iter_mut().zip(edge) {
                *c = if self.add { *c + x } else { *x };
            }
        }
    }
}

/// 32 × 32 elements of C, whose rows are `stride` apart, overwritten or added to.
struct Block {
    c: *mut f32,
    stride: usize,
    add: bool,
}

/// Configures all eight tiles as 16 rows of 64 bytes.
///
/// # Safety
/// The unit is [`available`].
pub(super) unsafe fn configure() {
    #[repr(C, align(64))]
    struct Configuration {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }
    let first_eight = |i: usize| i < 8;
    let configuration = Configuration {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: std::array::from_fn(|i| if first_eight(i) { 64 } else { 0 }),
        rows: std::array::from_fn(|i| if first_eight(i) { 16 } else { 0 }),
    };
    // SAFETY: reads the 64 bytes of a valid configuration.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &configuration, options(nostack, readonly)) };
}

/// C [32, 32] = A·B (+ C). Tiles 0–3 are C, 4 and 5 a part of A, 6 and 7 a part of B; parts follow one another so that
/// each change loads one side only. Fetches [`AHEAD`] bytes from `ahead` on into the second-level cache a step.
///
/// # Safety
/// The tiles are configured; the block is live memory that nothing else uses.
unsafe fn multiply(a: &[Step], b: &[Step], Block { c, stride, add }: Block, ahead: *const u8) {
    assert_eq!(a.len(), b.len());
    let bytes = stride * size_of::<f32>();
    // SAFETY: reads `a` and `b` in whole steps and the 32 rows of C, writes the latter.
    unsafe {
        asm!(
            "test {add:e}, {add:e}",
            "jz 3f",
            "tileloadd tmm0, [{c} + {s}]", "tileloadd tmm1, [{c} + {s} + 64]",
            "tileloadd tmm2, [{d} + {s}]", "tileloadd tmm3, [{d} + {s} + 64]",
            "jmp 2f",
            "3:",
            "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{a} + {t}]", "tileloadd tmm6, [{b} + {t}]", // parts 1, 1
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b} + {t} + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a} + {t} + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm6, [{b} + {t} + 4096]", "tileloadd tmm7, [{b} + {t} + 5120]", // 1, 3
            "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm6, [{b} + {t} + 2048]", "tileloadd tmm7, [{b} + {t} + 3072]", // 1, 2
            "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm4, [{a} + {t} + 2048]", "tileloadd tmm5, [{a} + {t} + 3072]", // 2, 2
            "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm6, [{b} + {t}]", "tileloadd tmm7, [{b} + {t} + 1024]", // 2, 1
            "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm4, [{a} + {t} + 4096]", "tileloadd tmm5, [{a} + {t} + 5120]", // 3, 1
            "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
            "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
            "prefetcht1 [{n}]", "prefetcht1 [{n} + 64]", "prefetcht1 [{n} + 128]", "prefetcht1 [{n} + 192]",
            "prefetcht1 [{n} + 256]", "prefetcht1 [{n} + 320]", "prefetcht1 [{n} + 384]", "prefetcht1 [{n} + 448]",
            "prefetcht1 [{n} + 512]", "prefetcht1 [{n} + 576]", "prefetcht1 [{n} + 640]", "prefetcht1 [{n} + 704]",
            "prefetcht1 [{n} + 768]", "prefetcht1 [{n} + 832]", "prefetcht1 [{n} + 896]", "prefetcht1 [{n} + 960]",
            "add {a}, 6144", "add {b}, 6144", "add {n}, 1024",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{c} + {s}], tmm0", "tilestored [{c} + {s} + 64], tmm1",
            "tilestored [{d} + {s}], tmm2", "tilestored [{d} + {s} + 64], tmm3",
            add = in(reg) add as u32, n = inout(reg) ahead => _,
            a = inout(reg) a.as_ptr() => _, b = inout(reg) b.as_ptr() => _, steps = inout(reg) a.len() => _,
            c = in(reg) c, d = in(reg) c.add(16 * stride), s = in(reg) bytes, t = in(reg) 64usize,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _, options(nostack),
        );
    }
}
