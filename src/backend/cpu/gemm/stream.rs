//! Products with few rows of X, bound by reading W: each row of W is read once, for all rows of X.

use super::matrix_unit;
use crate::backend::cpu::simd::{prefetch, simd_kernel};
use crate::backend::cpu::storage::Shared;
use crate::backend::cpu::wide::{as_type, widen};
use crate::backend::{Epilogue, FloatElement, LinearShape};
use rayon::prelude::*;

/// Up to this many rows of X the weight is streamed once instead of packed: without a matrix unit, and with one.
const STREAM_TOKENS: usize = 32;
const STREAM_TOKENS_BESIDE_UNIT: usize = 16;
/// Weight elements of one task of the streaming product (128 KiB).
const STREAM_BLOCK: usize = 1 << 15;
/// How far in front of its reads the streaming product fetches into the second-level cache, in elements of f32 (4 KiB).
/// Nearer, or into the first level, a decoding step of one sequence is a fifth slower on Zen 4.
const AHEAD: usize = 1024;
/// Rows of W and rows of X whose products are summed side by side: two sums for each pair fill 32 vector registers.
const TILE: (usize, usize) = (2, 6);

/// Whether so few rows of X are multiplied by streaming the weight.
pub(super) fn streams(tokens: usize) -> bool {
    tokens <= if matrix_unit() { STREAM_TOKENS_BESIDE_UNIT } else { STREAM_TOKENS }
}

/// Y = X·Wᵀ with its addends.
pub(super) fn stream<T: FloatElement>(x: &[T], w: &[T], y: &mut [T], shape: LinearShape, addends: Epilogue<&[T]>) {
    if shape.tokens > 0 {
        let stream = Stream::new(x, w, y, shape, addends);
        (0..stream.blocks()).into_par_iter().for_each(|block| stream.run(block));
    }
}

/// A streaming product, cut into blocks of rows of W.
pub(super) struct Stream<'a, T> {
    x: &'a [T],
    w: &'a [T],
    y: Shared<'a, T>,
    shape: LinearShape,
    addends: Epilogue<&'a [T]>,
}

impl<'a, T: FloatElement> Stream<'a, T> {
    pub(super) fn new(x: &'a [T], w: &'a [T], y: &'a mut [T], shape: LinearShape, addends: Epilogue<&'a [T]>) -> Self {
        Self { x, w, y: Shared::new(y), shape, addends }
    }

    fn rows_a_block(&self) -> usize {
        (STREAM_BLOCK / self.shape.inputs.max(1)).max(1)
    }

    pub(super) fn blocks(&self) -> usize {
        self.shape.outputs.div_ceil(self.rows_a_block())
    }

    pub(super) fn run(&self, block: usize) {
        let Self { x, w, shape: LinearShape { tokens, inputs, outputs }, addends, .. } = *self;
        let rows = self.rows_a_block();
        let range = block * rows..outputs.min((block + 1) * rows);
        let w = &w[range.start * inputs..range.end * inputs];
        let mut put = |row: usize, token: usize, count: usize, sums: &[[f32; TILE.1]]| {
            for (row, sums) in (range.start + row..).zip(sums) {
                for (token, sum) in (token..).zip(&sums[..count]) {
                    let at = token * outputs + row;
                    // SAFETY: each block writes the columns of its own outputs, and runs once.
                    let y = unsafe { &mut self.y.range(at..at + 1)[0] };
                    let mut value = addends.alpha * sum;
                    if let Some(bias) = addends.bias {
                        value += bias[row].to_f32();
                    }
                    if let Some(residual) = addends.residual {
                        value += residual[at].to_f32();
                    }
                    *y = T::from_f32(if addends.accumulate { y.to_f32() + value } else { value });
                }
            }
        };
        #[cfg(target_arch = "x86_64")]
        if let (Some(x), Some(w), true) = (as_type(x), as_type(w), super::bf16_products()) {
            return bf16_rows(x, w, inputs, tokens, &mut put);
        }
        let mut space = Vec::new();
        stream_rows(widen(x, &mut space), w, inputs, tokens, &mut put);
    }
}

/// Takes the first row of W, the first row and the number of rows of X, and the sums of each row of W from there.
type Put<'a> = dyn FnMut(usize, usize, usize, &[[f32; TILE.1]]) + 'a;

/// Rows of W whose sums are taken side by side.
fn rows_a_tile(tokens: usize) -> usize {
    if tokens == 1 { 1 } else { TILE.0 }
}

simd_kernel! {
    /// All products of a row of W and a row of X, a few rows of both at a time. Loops, not iterators with closures: a
    /// closure is not compiled with the vectors of its kernel.
    fn stream_rows<T: FloatElement>(simd, x: &'a [f32], w: &'a [T], inputs: usize, tokens: usize, put: &'a mut Put<'a>) {
        // Of 16 registers, half as many sums.
        let most = if S::REGISTER_COUNT >= 32 { TILE.1 } else { TILE.1 / 2 };
        let rows_a_tile = rows_a_tile(tokens);
        let mut space = Vec::new();
        for (first, w) in (0..).step_by(rows_a_tile).zip(w.chunks(rows_a_tile * inputs.max(1))) {
            let rows = w.len() / inputs.max(1);
            let w = widen(w, &mut space);
            // At least as far as the same place of the next rows.
            let ahead = AHEAD.max(TILE.0 * inputs);
            for (token, x) in (0..).step_by(most).zip(x[..tokens * inputs].chunks(most * inputs.max(1))) {
                let count = x.len() / inputs.max(1);
                let mut sums = [[0.0; TILE.1]; TILE.0];
                match (rows, count) {
                    (1, 1) => dots::<S, 1, 1>(simd, x, w, ahead, &mut sums),
                    (1, 2) => dots::<S, 1, 2>(simd, x, w, ahead, &mut sums),
                    (1, 3) => dots::<S, 1, 3>(simd, x, w, ahead, &mut sums),
                    (1, 4) => dots::<S, 1, 4>(simd, x, w, ahead, &mut sums),
                    (1, 5) => dots::<S, 1, 5>(simd, x, w, ahead, &mut sums),
                    (1, _) => dots::<S, 1, 6>(simd, x, w, ahead, &mut sums),
                    (_, 1) => dots::<S, 2, 1>(simd, x, w, ahead, &mut sums),
                    (_, 2) => dots::<S, 2, 2>(simd, x, w, ahead, &mut sums),
                    (_, 3) => dots::<S, 2, 3>(simd, x, w, ahead, &mut sums),
                    (_, 4) => dots::<S, 2, 4>(simd, x, w, ahead, &mut sums),
                    (_, 5) => dots::<S, 2, 5>(simd, x, w, ahead, &mut sums),
                    _ => dots::<S, 2, 6>(simd, x, w, ahead, &mut sums),
                }
                put(first, token, count, &sums[..rows]);
            }
        }
    }
}

/// [`stream_rows`] by products of bf16, which the machine has.
#[cfg(target_arch = "x86_64")]
fn bf16_rows(x: &[half::bf16], w: &[half::bf16], inputs: usize, tokens: usize, put: &mut Put<'_>) {
    use super::bf16::dots;
    let rows_a_tile = rows_a_tile(tokens);
    for (first, w) in (0..).step_by(rows_a_tile).zip(w.chunks(rows_a_tile * inputs.max(1))) {
        let rows = w.len() / inputs.max(1);
        let ahead = (2 * AHEAD).max(TILE.0 * inputs);
        for (token, x) in (0..).step_by(TILE.1).zip(x[..tokens * inputs].chunks(TILE.1 * inputs.max(1))) {
            let count = x.len() / inputs.max(1);
            let (x, w) = (x.as_ptr(), w.as_ptr());
            let mut sums = [[0.0; TILE.1]; TILE.0];
            // SAFETY: the slices just cut; the caller knows of the instructions.
            unsafe {
                match (rows, count) {
                    (1, 1) => dots::<1, 1, _, _>(x, w, inputs, ahead, &mut sums),
                    (1, 2) => dots::<1, 2, _, _>(x, w, inputs, ahead, &mut sums),
                    (1, 3) => dots::<1, 3, _, _>(x, w, inputs, ahead, &mut sums),
                    (1, 4) => dots::<1, 4, _, _>(x, w, inputs, ahead, &mut sums),
                    (1, 5) => dots::<1, 5, _, _>(x, w, inputs, ahead, &mut sums),
                    (1, _) => dots::<1, 6, _, _>(x, w, inputs, ahead, &mut sums),
                    (_, 1) => dots::<2, 1, _, _>(x, w, inputs, ahead, &mut sums),
                    (_, 2) => dots::<2, 2, _, _>(x, w, inputs, ahead, &mut sums),
                    (_, 3) => dots::<2, 3, _, _>(x, w, inputs, ahead, &mut sums),
                    (_, 4) => dots::<2, 4, _, _>(x, w, inputs, ahead, &mut sums),
                    (_, 5) => dots::<2, 5, _, _>(x, w, inputs, ahead, &mut sums),
                    _ => dots::<2, 6, _, _>(x, w, inputs, ahead, &mut sums),
                }
            }
            put(first, token, count, &sums[..rows]);
        }
    }
}

/// Products of `ROWS` rows of W with `TOKENS` rows of X. The order of each sum depends on neither: a token's result is
/// the same in any batch.
#[inline(always)]
fn dots<S: pulp::Simd, const ROWS: usize, const TOKENS: usize>(
    simd: S,
    x: &[f32],
    w: &[f32],
    ahead: usize,
    sums: &mut [[f32; TILE.1]; TILE.0],
) {
    let inputs = w.len() / ROWS;
    let ws: [(&[S::f32s], &[f32]); ROWS] = std::array::from_fn(|r| S::as_simd_f32s(&w[r * inputs..][..inputs]));
    let xs: [(&[S::f32s], &[f32]); TOKENS] = std::array::from_fn(|t| S::as_simd_f32s(&x[t * inputs..][..inputs]));
    let (pairs, last) = ws[0].0.as_chunks::<2>();
    let w_pairs: [&[[S::f32s; 2]]; ROWS] = std::array::from_fn(|r| &ws[r].0.as_chunks::<2>().0[..pairs.len()]);
    let x_pairs: [&[[S::f32s; 2]]; TOKENS] = std::array::from_fn(|t| &xs[t].0.as_chunks::<2>().0[..pairs.len()]);
    let mut partial = [[[simd.splat_f32s(0.0); 2]; TOKENS]; ROWS];
    for i in 0..pairs.len() {
        for w in &w_pairs {
            let next = w[i].as_ptr().cast::<f32>().wrapping_add(ahead);
            prefetch(next);
            prefetch(next.wrapping_add(S::F32_LANES));
        }
        for half in 0..2 {
            let w: [S::f32s; ROWS] = std::array::from_fn(|r| w_pairs[r][i][half]);
            for t in 0..TOKENS {
                let x = x_pairs[t][i][half];
                for r in 0..ROWS {
                    partial[r][t][half] = simd.mul_add_f32s(w[r], x, partial[r][t][half]);
                }
            }
        }
    }
    // Loops whose bodies are small enough to be unrolled: with an index that is not a constant, the sums above would be
    // kept in memory, and stored at every step.
    if !last.is_empty() {
        for t in 0..TOKENS {
            for r in 0..ROWS {
                let (w, x) = (ws[r].0[2 * pairs.len()], xs[t].0[2 * pairs.len()]);
                partial[r][t][0] = simd.mul_add_f32s(w, x, partial[r][t][0]);
            }
        }
    }
    let w_tails: [S::f32s; ROWS] = std::array::from_fn(|r| simd.partial_load_f32s(ws[r].1));
    for t in 0..TOKENS {
        let x = simd.partial_load_f32s(xs[t].1);
        for r in 0..ROWS {
            partial[r][t][1] = simd.mul_add_f32s(w_tails[r], x, partial[r][t][1]);
        }
    }
    let mut totals = [[simd.splat_f32s(0.0); TOKENS]; ROWS];
    for t in 0..TOKENS {
        for r in 0..ROWS {
            totals[r][t] = simd.add_f32s(partial[r][t][0], partial[r][t][1]);
        }
    }
    for (sums, totals) in sums.iter_mut().zip(totals) {
        for (sum, total) in sums.iter_mut().zip(totals) {
            *sum = simd.reduce_sum_f32s(total);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Philox;

    fn normals(stream: u64, len: usize) -> Vec<f32> {
        let mut rng = Philox::new(5, stream);
        (0..len).map(|_| rng.normal() as f32).collect()
    }

    /// Streamed products: exact, and the same bits for a token in any batch.
    #[test]
    fn a_token_is_the_same_in_any_batch() {
        for (inputs, outputs) in [(31, 7), (64, 33), (100, 20), (576, 41)] {
            let (x, w) = (normals(1, STREAM_TOKENS * inputs), normals(2, outputs * inputs));
            let run = |x: &[f32]| {
                let shape = LinearShape { tokens: x.len() / inputs, inputs, outputs };
                let mut y = vec![0.0; shape.tokens * outputs];
                stream(x, &w, &mut y, shape, Epilogue::default());
                y
            };
            let alone: Vec<f32> = x.chunks(inputs).flat_map(run).collect();
            for tokens in [2, 3, 6, 7, 11, STREAM_TOKENS] {
                assert_eq!(run(&x[..tokens * inputs]), alone[..tokens * outputs], "{tokens} tokens of {inputs}");
            }
            for (y, x) in alone.chunks(outputs).zip(x.chunks(inputs)) {
                for (y, w) in y.iter().zip(w.chunks(inputs)) {
                    let exact: f64 = x.iter().zip(w).map(|(x, w)| *x as f64 * *w as f64).sum();
                    assert!((*y as f64 - exact).abs() < 1e-6 * inputs as f64, "{y}, {exact}");
                }
            }
        }
    }
}
