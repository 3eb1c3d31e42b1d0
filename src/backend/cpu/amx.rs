//! f32 products on the matrix unit (AMX) of Intel servers, which multiplies bf16 and adds in f32.
//!
//! Each f32 is cut into three bf16 parts, x = x₁ + x₂ + x₃ (8 bits each, so nothing is lost), and the six products of
//! parts that matter, x₁y₁ + x₁y₂ + x₂y₁ + x₂y₂ + x₁y₃ + x₃y₁, are added in f32; what is left out is below 2⁻²⁵ of
//! |x·y|. That is as exact as f32 multiply-add (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial
//! intelligence datatype for higher-precision computations", ARITH 2019) at 6/16 of its cost.
//!
//! Both operands are packed into tiles first: a panel is 32 rows of A or 32 columns of B; a step of a panel is 32 deep
//! and holds six tiles of 1 KiB, part by part, two tiles a part. A word of a tile pairs depths i and i + 16: a tile of A
//! is 16 rows of 16 pairs; a tile of B is 16 pairs of 16 columns.
//!
//! Not finite stays not finite, but an infinity may become NaN.

use super::gemm::Matrix;
use super::storage::Shared;
use rayon::prelude::*;
use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::Cell;
use std::ops::Range;
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

/// C [m, n], rows `stride` apart, = alpha·A [m, k]·B [k, n] (+ C). The caller has checked that [`available`] holds and
/// that all three fit their slices.
///
/// The operand with fewer panels is packed as a whole and streamed; of the other, each task packs a block of panels,
/// which stays in its core's cache. How the work is cut changes no result: an element of C is one sum over the depths
/// in their order.
#[allow(clippy::too_many_arguments)]
pub(super) fn product(
    c: &mut [f32],
    stride: usize,
    a: Matrix<'_>,
    b: Matrix<'_>,
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    accumulate: bool,
    parallel: bool,
) {
    let threads = if parallel && m * n * k >= SERIAL { rayon::current_num_threads() } else { 1 };
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
            let packed = whole.pack(&mut space, start..end, &depths, threads > 1);
            let task = |task: usize| {
                let rows = task * per_task * PANEL..other.rows.min((task + 1) * per_task * PANEL);
                if rows.is_empty() {
                    return;
                }
                let mut space = BLOCK_SPACE.take();
                let block = other.pack(&mut space, rows.clone(), &depths, false);
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

/// What a packed operand is for.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    A,
    B,
}

/// A, or Bᵀ: rows by depths.
#[derive(Clone, Copy)]
struct Operand<'a> {
    from: Matrix<'a>,
    rows: usize,
    factor: f32,
    side: Side,
}

impl Operand<'_> {
    fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// Packs some rows and depths, padded with zeros to whole panels.
    fn pack<'s>(
        &self,
        space: &'s mut Vec<Step>,
        rows: Range<usize>,
        depths: &Range<usize>,
        parallel: bool,
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
                let place = Place { row, rows, depth, depths: (depths.end - depth).min(STEP) };
                // SAFETY: `available` has seen AVX-512.
                unsafe { pack_tiles(self.from, place, self.factor, self.side, half, to) };
            }
        };
        let space = &mut space[..len];
        if parallel {
            space.par_iter_mut().with_min_len(16).enumerate().for_each(pack_step);
        } else {
            space.iter_mut().enumerate().for_each(pack_step);
        }
        space
    }
}

/// Up to 16 rows and 32 depths of an operand.
#[derive(Clone, Copy)]
struct Place {
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
fn pack_tiles(from: Matrix<'_>, place: Place, factor: f32, side: Side, half: usize, to: &mut Step) {
    let Place { row, rows, depth, depths } = place;
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
            return unsafe { multiply(a, b, c, self.stride, self.add, ahead) };
        }
        let mut edge = [[0.0f32; PANEL]; PANEL];
        // SAFETY: `edge` is 32 × 32; the tiles are configured.
        unsafe { multiply(a, b, edge.as_mut_ptr().cast(), PANEL, false, ahead) };
        for (r, edge) in edge.iter().enumerate().take(rows) {
            for (c, x) in place(r, columns).iter_mut().zip(edge) {
                *c = if self.add { *c + x } else { *x };
            }
        }
    }
}

/// All eight tiles 16 rows of 64 bytes.
///
/// # Safety
/// The unit is [`available`].
unsafe fn configure() {
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
/// The tiles are configured; `c` holds 32 rows of 32, `stride` elements apart.
unsafe fn multiply(a: &[Step], b: &[Step], c: *mut f32, stride: usize, add: bool, ahead: *const u8) {
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
