//! Linear layers: products with `gemm`, and a streaming product for the few rows of decoding.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
use super::amx;
use super::simd::simd_kernel;
use super::storage::Shared;
use crate::backend::LinearShape;
use gemm::Parallelism;
use rayon::prelude::*;
use std::ops::Range;

/// Up to this many rows of X the weight is streamed once, row by row, instead of being packed.
const STREAM_TOKENS: usize = 8;
/// Sizes from which the matrix unit pays.
const MATRIX_UNIT: usize = 16;
/// Weight elements of one task of the streaming product (128 KiB).
const STREAM_BLOCK: usize = 1 << 15;
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
    if tokens <= STREAM_TOKENS {
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
    let LinearShape { tokens, inputs, outputs } = shape;
    if tokens == 0 || outputs == 0 {
        return;
    }
    let rows = (STREAM_BLOCK / inputs.max(1)).next_multiple_of(4).max(4);
    let y = Shared::new(y);
    (0..outputs.div_ceil(rows)).into_par_iter().for_each(|block| {
        let range = block * rows..outputs.min((block + 1) * rows);
        stream_rows(x, &w[range.start * inputs..range.end * inputs], inputs, tokens, &mut |row, token, sum| {
            let output = range.start + row;
            let at = token * outputs + output;
            // SAFETY: each task writes the columns of its own block of outputs.
            let y = unsafe { &mut y.range(at..at + 1)[0] };
            let mut value = addends.alpha * sum;
            if let Some(bias) = addends.bias {
                value += bias[output];
            }
            if let Some(residual) = addends.residual {
                value += residual[at];
            }
            *y = if addends.accumulate { *y + value } else { value };
        });
    });
}

simd_kernel! {
    /// Calls `put(row of W, row of X, their product)` for all pairs: four rows of W against up to four rows of X at once.
    fn stream_rows(simd, x: &'a [f32], w: &'a [f32], inputs: usize, tokens: usize, put: &'a mut dyn FnMut(usize, usize, f32)) {
        let mut row = 0;
        for w in w.chunks(4 * inputs) {
            let mut token = 0;
            while token < tokens {
                let x = &x[token * inputs..];
                let group = match (w.len() == 4 * inputs, tokens - token) {
                    (true, 1) => { tile::<S, 4, 1>(simd, x, w, inputs, (row, token), put); 1 }
                    (true, 2) => { tile::<S, 4, 2>(simd, x, w, inputs, (row, token), put); 2 }
                    (true, 3) => { tile::<S, 4, 3>(simd, x, w, inputs, (row, token), put); 3 }
                    (true, _) => { tile::<S, 4, 4>(simd, x, w, inputs, (row, token), put); 4 }
                    (false, _) => {
                        for (i, w) in w.chunks_exact(inputs).enumerate() {
                            tile::<S, 1, 1>(simd, x, w, inputs, (row + i, token), put);
                        }
                        1
                    }
                };
                token += group;
            }
            row += 4;
        }
    }
}

#[inline(always)]
fn tile<S: pulp::Simd, const ROWS: usize, const TOKENS: usize>(
    simd: S,
    x: &[f32],
    w: &[f32],
    inputs: usize,
    (row, token): (usize, usize),
    put: &mut dyn FnMut(usize, usize, f32),
) {
    let split = |m: &'_ [f32], i: usize| -> Range<usize> {
        debug_assert!((i + 1) * inputs <= m.len());
        i * inputs..(i + 1) * inputs
    };
    let xs: [_; TOKENS] = std::array::from_fn(|t| S::as_simd_f32s(&x[split(x, t)]));
    let ws: [_; ROWS] = std::array::from_fn(|r| S::as_simd_f32s(&w[split(w, r)]));
    let mut sums = [[simd.splat_f32s(0.0); TOKENS]; ROWS];
    let vectors = ws[0].0.len();
    let xv: [&[S::f32s]; TOKENS] = std::array::from_fn(|t| &xs[t].0[..vectors]);
    let wv: [&[S::f32s]; ROWS] = std::array::from_fn(|r| &ws[r].0[..vectors]);
    for i in 0..vectors {
        for r in 0..ROWS {
            for t in 0..TOKENS {
                sums[r][t] = simd.mul_add_f32s(wv[r][i], xv[t][i], sums[r][t]);
            }
        }
    }
    for r in 0..ROWS {
        for t in 0..TOKENS {
            let tail = simd.mul_add_f32s(simd.partial_load_f32s(ws[r].1), simd.partial_load_f32s(xs[t].1), sums[r][t]);
            put(row + r, token + t, simd.reduce_sum_f32s(tail));
        }
    }
}
