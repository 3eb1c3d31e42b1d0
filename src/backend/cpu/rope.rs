//! Rotary position embedding (Su et al., arXiv 2104.09864), halves rotated as in `transformers`.

use super::simd::simd_kernel;
use rayon::prelude::*;

/// Elements of one task.
const BLOCK: usize = 1 << 15;

/// x [tokens, heads·head_dim] in place; `table` [positions, head_dim]: cosines, then sines.
pub(super) fn rope(x: &mut [f32], table: &[f32], positions: &[u32], heads: usize, head_dim: usize, inverse: bool) {
    let width = heads * head_dim;
    let rows = (BLOCK / width).max(1);
    let sign = if inverse { -1.0 } else { 1.0 };
    x.par_chunks_mut(rows * width).zip(positions.par_chunks(rows)).for_each(|(x, positions)| {
        rotate_rows(x, table, positions, head_dim, sign);
    });
}

simd_kernel! {
    fn rotate_rows(_simd, x: &'a mut [f32], table: &'a [f32], positions: &'a [u32], head_dim: usize, sign: f32) {
        let width = x.len() / positions.len();
        for (x, &position) in x.chunks_exact_mut(width).zip(positions) {
            let row = &table[position as usize * head_dim..][..head_dim];
            let (cosines, sines) = row.split_at(head_dim / 2);
            for x in x.chunks_exact_mut(head_dim) {
                let (low, high) = x.split_at_mut(head_dim / 2);
                rotate(low, high, cosines, sines, sign);
            }
        }
    }
}

#[inline(always)]
fn rotate(low: &mut [f32], high: &mut [f32], cosines: &[f32], sines: &[f32], sign: f32) {
    for (((a, b), c), s) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
        let s = s * sign;
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}
