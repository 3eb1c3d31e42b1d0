//! Linear layers: products on the matrix unit where the machine has one, else with the crate `gemm`, and a streaming
//! product for the few rows of decoding.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx;
use super::simd::{prefetch, simd_kernel};
use super::storage::Shared;
use crate::backend::LinearShape;
use gemm::Parallelism;
use rayon::prelude::*;

/// Up to this many rows of X the weight is streamed once, instead of being packed: by products alone, and where there is
/// a matrix unit.
const STREAM_TOKENS: usize = 32;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
const STREAM_TOKENS_BESIDE_UNIT: usize = 16;
/// Rows, columns and depths from which the matrix unit pays.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
const MATRIX_UNIT: usize = 8;
/// Weight elements of one task of the streaming product (128 KiB).
const STREAM_BLOCK: usize = 1 << 15;
/// How far in front of its reads the streaming product of one row of X fetches (2 KiB: 15 % more than the hardware's own
/// fetching).
const AHEAD: usize = 512;
/// Rows of W and rows of X whose products are summed side by side: two sums for each pair fill 32 vector registers.
const TILE: (usize, usize) = (2, 6);
/// Rows of dY that one partial sum of a bias gradient covers.
const BIAS_ROWS: usize = 128;

/// The addends of `y = alpha·x·wᵀ + bias + residual (+ y)`.
#[derive(Clone, Copy)]
pub(super) struct Addends<'a> {
    pub alpha: f32,
    pub bias: Option<&'a [f32]>,
    pub residual: Option<&'a [f32]>,
    pub accumulate: bool,
}

/// A matrix in a slice: element (i, j) is at `i·rows + j·columns`.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Row-major with rows `stride` apart.
    pub(super) fn rows(data: &'a [f32], stride: usize) -> Self {
        Self { data, row_stride: stride, column_stride: 1 }
    }

    /// The transpose.
    pub(super) fn t(self) -> Self {
        Self { data: self.data, row_stride: self.column_stride, column_stride: self.row_stride }
    }

    /// Whether neighbours in a row or in a column are neighbours in memory.
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    fn has_vectors(&self) -> bool {
        self.row_stride == 1 || self.column_stride == 1
    }

    fn check(&self, rows: usize, columns: usize) {
        if rows > 0 && columns > 0 {
            let last = (rows - 1) * self.row_stride + (columns - 1) * self.column_stride;
            assert!(last < self.data.len(), "{rows} × {columns} of {} elements", self.data.len());
        }
    }
}

/// C [m, n], rows `stride` apart, = alpha·A [m, k]·B [k, n] (+ C).
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
    if m == 0 || n == 0 {
        return;
    }
    a.check(m, k);
    b.check(k, n);
    assert!(n <= stride && (m - 1) * stride + n <= c.len(), "{m} × {n} of {} elements", c.len());
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if m.min(n).min(k) >= MATRIX_UNIT && a.has_vectors() && b.has_vectors() && amx::available() {
        return amx::product(c, stride, a, b, (m, n, k), alpha, accumulate, parallel);
    }
    product_by_crate(c, stride, a, b, (m, n, k), alpha, accumulate, parallel);
}

/// Whether so few rows of X are multiplied by streaming the weight.
fn streams(tokens: usize) -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if amx::available() {
        return tokens <= STREAM_TOKENS_BESIDE_UNIT;
    }
    tokens <= STREAM_TOKENS
}

/// [`product`] without the matrix unit.
#[allow(clippy::too_many_arguments)]
fn product_by_crate(
    c: &mut [f32],
    stride: usize,
    a: Matrix<'_>,
    b: Matrix<'_>,
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    accumulate: bool,
    parallel: bool,
) {
    a.check(m, k);
    b.check(k, n);
    assert!(n <= stride && (m - 1) * stride + n <= c.len(), "{m} × {n} of {} elements", c.len());
    // SAFETY: the largest index into each slice was checked above, and C is borrowed for this call alone.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            alpha,
            false,
            false,
            false,
            if parallel { Parallelism::Rayon(0) } else { Parallelism::None },
        );
    }
}

pub(super) fn linear(x: &[f32], w: &[f32], y: &mut [f32], shape: LinearShape, addends: Addends<'_>) {
    let LinearShape { tokens, inputs, outputs } = shape;
    if streams(tokens) {
        return stream(x, w, y, shape, addends);
    }
    prepare(y, outputs, addends);
    let accumulate = addends.accumulate || addends.bias.is_some() || addends.residual.is_some();
    product(
        y,
        outputs,
        Matrix::rows(x, inputs),
        Matrix::rows(w, inputs).t(),
        (tokens, outputs, inputs),
        addends.alpha,
        accumulate,
        true,
    );
}

/// One of several layers of the same X: W, bias and Y.
pub(super) struct Layer<'a> {
    pub w: &'a [f32],
    pub bias: Option<&'a [f32]>,
    pub y: &'a mut [f32],
}

/// [`linear`] for each layer; few tokens go through all of them in one parallel pass.
pub(super) fn linear_each(x: &[f32], layers: Vec<Layer<'_>>, tokens: usize, inputs: usize) {
    let layers = layers.into_iter().map(|Layer { w, bias, y }| {
        let shape = LinearShape { tokens, inputs, outputs: w.len() / inputs };
        (w, y, shape, Addends { alpha: 1.0, bias, residual: None, accumulate: false })
    });
    if !streams(tokens) {
        return layers.for_each(|(w, y, shape, addends)| linear(x, w, y, shape, addends));
    }
    let streams: Vec<Stream<'_>> = layers.map(|(w, y, shape, addends)| Stream::new(x, w, y, shape, addends)).collect();
    let tasks: Vec<(&Stream<'_>, usize)> = streams.iter().flat_map(|s| (0..s.blocks()).map(move |b| (s, b))).collect();
    tasks.into_par_iter().for_each(|(stream, block)| stream.run(block));
}

/// Puts what is added to the product into `y`.
fn prepare(y: &mut [f32], outputs: usize, addends: Addends<'_>) {
    let row = |y: &mut [f32], residual: Option<&[f32]>| {
        match residual {
            Some(r) if addends.accumulate => y.iter_mut().zip(r).for_each(|(y, r)| *y += r),
            Some(r) => y.copy_from_slice(r),
            None if addends.bias.is_some() && !addends.accumulate => y.fill(0.0),
            None => {}
        }
        if let Some(bias) = addends.bias {
            y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    };
    match addends.residual {
        Some(r) => y.par_chunks_mut(outputs).zip(r.par_chunks(outputs)).for_each(|(y, r)| row(y, Some(r))),
        None if addends.bias.is_some() => y.par_chunks_mut(outputs).for_each(|y| row(y, None)),
        None => {}
    }
}

/// dX [tokens, inputs] = alpha·dY·W (+ dX).
pub(super) fn linear_backward_input(
    dy: &[f32],
    w: &[f32],
    dx: &mut [f32],
    shape: LinearShape,
    alpha: f32,
    accumulate: bool,
) {
    let LinearShape { tokens, inputs, outputs } = shape;
    product(
        dx,
        inputs,
        Matrix::rows(dy, outputs),
        Matrix::rows(w, inputs),
        (tokens, inputs, outputs),
        alpha,
        accumulate,
        true,
    );
}

/// dW [outputs, inputs] = alpha·dYᵀ·X (+ dW).
pub(super) fn linear_backward_weight(
    dy: &[f32],
    x: &[f32],
    dw: &mut [f32],
    shape: LinearShape,
    alpha: f32,
    accumulate: bool,
) {
    let LinearShape { tokens, inputs, outputs } = shape;
    product(
        dw,
        inputs,
        Matrix::rows(dy, outputs).t(),
        Matrix::rows(x, inputs),
        (outputs, inputs, tokens),
        alpha,
        accumulate,
        true,
    );
}

/// dbias = column sums of dY (+ dbias): partial sums over fixed blocks of rows, added in their order.
pub(super) fn linear_backward_bias(dy: &[f32], dbias: &mut [f32], outputs: usize, accumulate: bool) {
    let partials: Vec<Vec<f32>> = dy
        .par_chunks(BIAS_ROWS * outputs)
        .map(|rows| {
            let mut sums = vec![0.0; outputs];
            for row in rows.chunks_exact(outputs) {
                sums.iter_mut().zip(row).for_each(|(s, x)| *s += x);
            }
            sums
        })
        .collect();
    if !accumulate {
        dbias.fill(0.0);
    }
    for sums in &partials {
        dbias.iter_mut().zip(sums).for_each(|(d, s)| *d += s);
    }
}

/// [`linear`] for few tokens, bound by reading W: each row of W is read once, for all rows of X.
fn stream(x: &[f32], w: &[f32], y: &mut [f32], shape: LinearShape, addends: Addends<'_>) {
    if shape.tokens > 0 {
        let stream = Stream::new(x, w, y, shape, addends);
        (0..stream.blocks()).into_par_iter().for_each(|block| stream.run(block));
    }
}

/// A streaming product, cut into blocks of rows of W.
struct Stream<'a> {
    x: &'a [f32],
    w: &'a [f32],
    y: Shared<'a, f32>,
    tokens: usize,
    inputs: usize,
    outputs: usize,
    addends: Addends<'a>,
}

impl<'a> Stream<'a> {
    fn new(x: &'a [f32], w: &'a [f32], y: &'a mut [f32], shape: LinearShape, addends: Addends<'a>) -> Self {
        let LinearShape { tokens, inputs, outputs } = shape;
        Self { x, w, y: Shared::new(y), tokens, inputs, outputs, addends }
    }

    fn rows_a_block(&self) -> usize {
        (STREAM_BLOCK / self.inputs.max(1)).max(1)
    }

    fn blocks(&self) -> usize {
        self.outputs.div_ceil(self.rows_a_block())
    }

    fn run(&self, block: usize) {
        let Self { x, w, inputs, outputs, tokens, addends, .. } = *self;
        let rows = self.rows_a_block();
        let range = block * rows..outputs.min((block + 1) * rows);
        let w = &w[range.start * inputs..range.end * inputs];
        stream_rows(x, w, inputs, tokens, &mut |row, token, sums| {
            for (row, sums) in (range.start + row..).zip(sums) {
                for (token, sum) in (token..).zip(sums.iter()) {
                    let at = token * outputs + row;
                    // SAFETY: each block writes the columns of its own outputs, and runs once.
                    let y = unsafe { &mut self.y.range(at..at + 1)[0] };
                    let mut value = addends.alpha * sum;
                    if let Some(bias) = addends.bias {
                        value += bias[row];
                    }
                    if let Some(residual) = addends.residual {
                        value += residual[at];
                    }
                    *y = if addends.accumulate { *y + value } else { value };
                }
            }
        });
    }
}

/// Takes the first row of W, the first row of X and the products of the rows of W from there, a slice each, with the rows
/// of X from there.
type Put<'a> = dyn FnMut(usize, usize, &[&[f32]]) + 'a;

simd_kernel! {
    /// All products of a row of W and a row of X, a few rows of both at a time.
    fn stream_rows(simd, x: &'a [f32], w: &'a [f32], inputs: usize, tokens: usize, put: &'a mut Put<'a>) {
        // Of 16 registers, half as many sums.
        let most = if S::REGISTER_COUNT >= 32 { TILE.1 } else { TILE.1 / 2 };
        let rows_a_tile = if tokens == 1 { 1 } else { TILE.0 };
        for (first, w) in (0..).step_by(rows_a_tile).zip(w.chunks(rows_a_tile * inputs)) {
            for (token, x) in (0..).step_by(most).zip(x[..tokens * inputs].chunks(most * inputs)) {
                let mut sums = [[0.0; TILE.1]; TILE.0];
                let count = x.len() / inputs;
                if w.len() == inputs {
                    match count {
                        1 => dots::<S, 1, 1>(simd, x, w, AHEAD, &mut sums),
                        2 => dots::<S, 1, 2>(simd, x, w, AHEAD, &mut sums),
                        3 => dots::<S, 1, 3>(simd, x, w, AHEAD, &mut sums),
                        4 => dots::<S, 1, 4>(simd, x, w, AHEAD, &mut sums),
                        5 => dots::<S, 1, 5>(simd, x, w, AHEAD, &mut sums),
                        _ => dots::<S, 1, 6>(simd, x, w, AHEAD, &mut sums),
                    }
                    put(first, token, &[&sums[0][..count]]);
                } else {
                    // The same place of the next rows.
                    let ahead = TILE.0 * inputs;
                    match count {
                        1 => dots::<S, 2, 1>(simd, x, w, ahead, &mut sums),
                        2 => dots::<S, 2, 2>(simd, x, w, ahead, &mut sums),
                        3 => dots::<S, 2, 3>(simd, x, w, ahead, &mut sums),
                        4 => dots::<S, 2, 4>(simd, x, w, ahead, &mut sums),
                        5 => dots::<S, 2, 5>(simd, x, w, ahead, &mut sums),
                        _ => dots::<S, 2, 6>(simd, x, w, ahead, &mut sums),
                    }
                    put(first, token, &[&sums[0][..count], &sums[1][..count]]);
                }
            }
        }
    }
}

/// Products of `ROWS` rows of W with `TOKENS` rows of X. The order of each sum depends on neither: a token's result is the
/// same in any batch.
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
    for r in 0..ROWS {
        let w_tail = simd.partial_load_f32s(ws[r].1);
        for t in 0..TOKENS {
            let [even, odd] = &mut partial[r][t];
            if !last.is_empty() {
                *even = simd.mul_add_f32s(ws[r].0[2 * pairs.len()], xs[t].0[2 * pairs.len()], *even);
            }
            *odd = simd.mul_add_f32s(w_tail, simd.partial_load_f32s(xs[t].1), *odd);
            sums[r][t] = simd.reduce_sum_f32s(simd.add_f32s(*even, *odd));
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

    /// Root mean square of what a product is off by, against f64.
    fn error(c: &[f32], before: &[f32], a: Matrix<'_>, b: Matrix<'_>, (m, n, k): (usize, usize, usize)) -> f64 {
        let at = |x: Matrix<'_>, i: usize, j: usize| x.data[i * x.row_stride + j * x.column_stride] as f64;
        let mut squares = 0.0;
        for i in 0..m {
            for j in 0..n {
                let exact = before[i * n + j] as f64 - 0.5 * (0..k).map(|l| at(a, i, l) * at(b, l, j)).sum::<f64>();
                squares += (c[i * n + j] as f64 - exact).powi(2);
            }
        }
        (squares / (m * n) as f64).sqrt()
    }

    /// Both ways of computing, whichever the machine prefers, in all layouts; the unit is as exact as f32.
    #[test]
    fn either_way_is_exact() {
        for size in [(8, 8, 8), (33, 65, 31), (100, 40, 900), (17, 300, 64), (129, 96, 1600)] {
            let (m, n, k) = size;
            let (x, y, before) = (normals(1, m * k), normals(2, k * n), normals(3, m * n));
            for a in [Matrix::rows(&x, k), Matrix::rows(&x, m).t()] {
                for b in [Matrix::rows(&y, n), Matrix::rows(&y, k).t()] {
                    let (mut preferred, mut by_crate) = (before.clone(), before.clone());
                    product(&mut preferred, n, a, b, size, -0.5, true, true);
                    product_by_crate(&mut by_crate, n, a, b, size, -0.5, true, true);
                    let [preferred, by_crate] = [preferred, by_crate].map(|c| error(&c, &before, a, b, size));
                    assert!(by_crate < 1e-6 * (k as f64).sqrt(), "{size:?}: {by_crate}");
                    assert!(preferred < 2.0 * by_crate + 1e-7, "{size:?}: {preferred}, {by_crate}");
                }
            }
        }
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for broken in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let (mut x, w) = (normals(1, 40 * 64), normals(2, 48 * 64));
            x[7 * 64 + 3] = broken;
            let mut y = vec![0.0; 40 * 48];
            let (a, b) = (Matrix::rows(&x, 64), Matrix::rows(&w, 64).t());
            product(&mut y, 48, a, b, (40, 48, 64), 1.0, false, true);
            for (i, y) in y.chunks(48).enumerate() {
                assert!(y.iter().all(|y| y.is_finite() == (i != 7)), "row {i}");
            }
        }
    }
    /// Streamed products: exact, and the same bits for a token in any batch.
    #[test]
    fn a_token_is_the_same_in_any_batch() {
        for (inputs, outputs) in [(31, 7), (64, 33), (100, 20), (576, 41)] {
            let (x, w) = (normals(1, STREAM_TOKENS * inputs), normals(2, outputs * inputs));
            let run = |x: &[f32]| {
                let shape = LinearShape { tokens: x.len() / inputs, inputs, outputs };
                let mut y = vec![0.0; shape.tokens * outputs];
                stream(x, &w, &mut y, shape, Addends { alpha: 1.0, bias: None, residual: None, accumulate: false });
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
