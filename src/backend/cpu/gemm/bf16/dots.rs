//! Products of rows with rows, for the few rows of decoding.

use half::bf16;
use std::arch::x86_64::*;

/// Products of some rows of W and rows of X, `inputs` elements each: sums\[r\]\[t\]. The order of each sum depends on
/// neither number.
///
/// # Safety
/// `x` holds `TOKENS` rows and `w` holds `ROWS`; the machine has the instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
#[allow(clippy::needless_range_loop)] // Plain loops are unrolled, and their sums stay in registers.
pub(in crate::backend::cpu::gemm) unsafe fn dots<
    const ROWS: usize,
    const TOKENS: usize,
    const R: usize,
    const T: usize,
>(
    x: *const bf16,
    w: *const bf16,
    inputs: usize,
    ahead: usize,
    sums: &mut [[f32; T]; R],
) {
    let mut partial = [[[_mm512_setzero_ps(); 2]; TOKENS]; ROWS];
    for at in (0..inputs / 64 * 64).step_by(64) {
        for half in 0..2 {
            let at = at + 32 * half;
            // SAFETY: 32 elements of each row; a prefetch reads nothing.
            unsafe {
                let mut columns = [_mm512_setzero_ps(); ROWS].map(|x| std::mem::transmute::<__m512, __m512bh>(x));
                for (r, column) in columns.iter_mut().enumerate() {
                    let from = w.add(r * inputs + at);
                    *column = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_epi16(from.cast()));
                    _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(ahead).cast());
                }
                for t in 0..TOKENS {
                    let x = std::mem::transmute::<__m512i, __m512bh>(_mm512_loadu_epi16(x.add(t * inputs + at).cast()));
                    for r in 0..ROWS {
                        partial[r][t][half] = _mm512_dpbf16_ps(partial[r][t][half], columns[r], x);
                    }
                }
            }
        }
    }
    // Loops whose bodies are small enough to be unrolled: with an index that is not a constant, the sums above would be
    // kept in memory, and stored at every step.
    for half in 0..2 {
        let at = inputs / 64 * 64 + 32 * half;
        let mask = ((1u64 << inputs.saturating_sub(at).min(32)) - 1) as __mmask32;
        if mask == 0 {
            break;
        }
        // SAFETY: the mask ends with the row.
        unsafe {
            let mut columns = [_mm512_setzero_ps(); ROWS].map(|x| std::mem::transmute::<__m512, __m512bh>(x));
            for (r, column) in columns.iter_mut().enumerate() {
                let from = w.wrapping_add(r * inputs + at);
                *column = std::mem::transmute::<__m512i, __m512bh>(_mm512_maskz_loadu_epi16(mask, from.cast()));
            }
            for t in 0..TOKENS {
                let x = _mm512_maskz_loadu_epi16(mask, x.wrapping_add(t * inputs + at).cast());
                let x = std::mem::transmute::<__m512i, __m512bh>(x);
                for r in 0..ROWS {
                    partial[r][t][half] = _mm512_dpbf16_ps(partial[r][t][half], columns[r], x);
                }
            }
        }
    }
    let mut totals = [[_mm512_setzero_ps(); TOKENS]; ROWS];
    for t in 0..TOKENS {
        for r in 0..ROWS {
            totals[r][t] = _mm512_add_ps(partial[r][t][0], partial[r][t][1]);
        }
    }
    for (sums, totals) in sums.iter_mut().zip(totals) {
        for (sum, total) in sums.iter_mut().zip(totals) {
            *sum = _mm512_reduce_add_ps(total);
        }
    }
}
