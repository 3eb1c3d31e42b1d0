//! Linear layers: products of f32 on the matrix unit where the machine has one, else with the crate `gemm`; products of
//! bf16 by AVX-512 BF16, else widened; and a streaming product for the few rows of decoding.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod stream;
mod widened;

use super::matrix::{Matrix, Product, Store, Threads};
use super::storage::{slice, slice_mut};
use super::wide::{as_type_mut, convert_all};
use super::{Cpu, Elements};
use crate::backend::{
    Epilogue, FloatElement, InputGradient, Linear, LinearBackwardBias, LinearBackwardInput, LinearBackwardInputEach,
    LinearBackwardWeight, LinearEach, LinearShape, Projection,
};
use gemm::Parallelism;
use rayon::prelude::*;
use std::cell::Cell;
use stream::{Stream, stream, streams};

/// Rows, columns and depths from which the matrix unit pays.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
const MATRIX_UNIT: usize = 8;
/// Rows of dY that one partial sum of a bias gradient covers.
const BIAS_ROWS: usize = 128;

/// Whether this machine has a matrix unit.
pub(super) fn matrix_unit() -> bool {
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    return amx::available();
    #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
    return false;
}

/// Whether this machine has instructions for products of bf16.
pub(super) fn bf16_products() -> bool {
    #[cfg(target_arch = "x86_64")]
    return bf16::available();
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

impl<T: FloatElement, C: FloatElement> Product<'_, T, C> {
    /// Computes it, by the fastest instructions that the machine has for it.
    pub(super) fn run(self) {
        let (m, n, _) = self.size;
        if m == 0 || n == 0 {
            return;
        }
        self.check();
        if Self::has_types::<f32, f32>() {
            return self.with_types().run_f32();
        }
        #[cfg(target_arch = "x86_64")]
        if bf16_products() {
            if Self::has_types::<half::bf16, half::bf16>() {
                return bf16::product(self.with_types::<half::bf16, half::bf16>());
            }
            if Self::has_types::<half::bf16, f32>() {
                return bf16::product(self.with_types::<half::bf16, f32>());
            }
        }
        widened::product(self);
    }
}

impl Product<'_> {
    /// On the matrix unit where that pays.
    fn run_f32(mut self) {
        self.prepare();
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        {
            let (m, n, k) = self.size;
            if m.min(n).min(k) >= MATRIX_UNIT && self.a.has_vectors() && self.b.has_vectors() && amx::available() {
                return amx::product(self);
            }
        }
        self.run_by_crate();
    }

    /// Writes the addends into C.
    fn prepare(&mut self) {
        let Epilogue { bias, residual, accumulate, .. } = self.epilogue;
        let row = |y: &mut [f32], residual: Option<&[f32]>| {
            match residual {
                Some(r) if accumulate => y.iter_mut().zip(r).for_each(|(y, r)| *y += r),
                Some(r) => y.copy_from_slice(r),
                None if bias.is_some() && !accumulate => y.fill(0.0),
                None => {}
            }
            if let Some(bias) = bias {
                y.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
            }
        };
        let rows = self.c.par_chunks_mut(self.stride);
        match residual {
            Some(r) => rows.zip(r.par_chunks(self.stride)).for_each(|(y, r)| row(y, Some(r))),
            None if bias.is_some() => rows.for_each(|y| row(y, None)),
            None => return,
        }
        self.epilogue = Epilogue { alpha: self.epilogue.alpha, accumulate: true, ..Epilogue::default() };
    }

    /// Without the matrix unit. Bias and residual are in C.
    fn run_by_crate(self) {
        let Self { c, stride, a, b, size: (m, n, k), epilogue, threads } = self;
        // SAFETY: the largest index into each slice was checked, and C is borrowed for this call alone.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                c.as_mut_ptr(),
                1,
                stride as isize,
                epilogue.accumulate,
                a.data.as_ptr(),
                a.column_stride as isize,
                a.row_stride as isize,
                b.data.as_ptr(),
                b.column_stride as isize,
                b.row_stride as isize,
                1.0,
                epilogue.alpha,
                false,
                false,
                false,
                match threads {
                    Threads::All => Parallelism::Rayon(0),
                    Threads::One => Parallelism::None,
                },
            );
        }
    }
}

pub(super) fn linear<E: Elements>(op: Linear<'_, Cpu<E>>) {
    let addends = op.epilogue.map(slice);
    layer(slice(&op.x), slice(&op.w), slice_mut(op.y), op.shape, addends);
}

fn layer<T: FloatElement>(x: &[T], w: &[T], y: &mut [T], shape: LinearShape, epilogue: Epilogue<&[T]>) {
    let LinearShape { tokens, inputs, outputs } = shape;
    if streams(tokens) {
        return stream(x, w, y, shape, epilogue);
    }
    let (x, w) = (Matrix::rows(x, inputs), Matrix::rows(w, inputs).t());
    Product { epilogue, ..Product::new(y, outputs, x, w, (tokens, outputs, inputs)) }.run();
}

/// [`linear`] for each layer; few tokens go through all of them in one parallel pass.
pub(super) fn linear_each<E: Elements>(op: LinearEach<'_, Cpu<E>>) {
    let (x, LinearShape { tokens, inputs, .. }) = (slice(&op.x), op.shape());
    let layers = op.layers.iter_mut().map(|Projection { w, bias, y }| {
        let shape = LinearShape { tokens, inputs, outputs: w.len() / inputs };
        (slice(w), slice_mut(y.reborrow()), shape, Epilogue { bias: bias.as_ref().map(slice), ..Epilogue::default() })
    });
    if !streams(tokens) {
        return layers.for_each(|(w, y, shape, addends)| layer(x, w, y, shape, addends));
    }
    let streams: Vec<Stream<'_, E::Float>> =
        layers.map(|(w, y, shape, addends)| Stream::new(x, w, y, shape, addends)).collect();
    let tasks: Vec<(&Stream<'_, E::Float>, usize)> =
        streams.iter().flat_map(|s| (0..s.blocks()).map(move |b| (s, b))).collect();
    tasks.into_par_iter().for_each(|(stream, block)| stream.run(block));
}

pub(super) fn linear_backward_input<E: Elements>(op: LinearBackwardInput<'_, Cpu<E>>) {
    let LinearShape { tokens, inputs, outputs } = op.shape;
    let (dy, w) = (Matrix::rows(slice(&op.dy), outputs), Matrix::rows(slice(&op.w), inputs));
    let product = Product::new(slice_mut(op.dx), inputs, dy, w, (tokens, inputs, outputs));
    product.with(op.alpha, Store::of(op.accumulate)).run();
}

/// The terms are added in f32, and rounded once.
pub(super) fn linear_backward_input_each<E: Elements>(op: LinearBackwardInputEach<'_, Cpu<E>>) {
    thread_local! {
        /// The sums of bf16 gradients; taken while in use.
        static SUMS: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
    }
    let (tokens, layers, accumulate, dx) = (op.tokens, op.layers, op.accumulate, slice_mut(op.dx));
    let inputs = dx.len() / tokens;
    let sum = |dx: &mut [f32]| {
        for (i, InputGradient { dy, w }) in layers.iter().enumerate() {
            let outputs = w.len() / inputs;
            let (dy, w) = (Matrix::rows(slice(dy), outputs), Matrix::rows(slice(w), inputs));
            let product = Product::new(&mut *dx, inputs, dy, w, (tokens, inputs, outputs));
            product.with(1.0, Store::of(accumulate || i > 0)).run();
        }
    };
    if let Some(dx) = as_type_mut(dx) {
        return sum(dx);
    }
    let mut space = SUMS.take();
    space.resize(space.len().max(dx.len()), 0.0);
    let sums = &mut space[..dx.len()];
    if accumulate {
        convert_all(dx, sums);
    }
    sum(sums);
    convert_all(sums, dx);
    SUMS.set(space);
}

pub(super) fn linear_backward_weight<E: Elements>(op: LinearBackwardWeight<'_, Cpu<E>>) {
    let LinearShape { tokens, inputs, outputs } = op.shape;
    let (dy, x) = (Matrix::rows(slice(&op.dy), outputs).t(), Matrix::rows(slice(&op.x), inputs));
    let product = Product::new(slice_mut(op.dw), inputs, dy, x, (outputs, inputs, tokens));
    product.with(op.alpha, Store::of(op.accumulate)).run();
}

/// Partial sums over fixed blocks of rows, added in their order.
pub(super) fn linear_backward_bias<E: Elements>(op: LinearBackwardBias<'_, Cpu<E>>) {
    let (dy, dbias) = (slice(&op.dy), slice_mut(op.dbias));
    let outputs = dbias.len();
    let partials: Vec<Vec<f32>> = dy
        .par_chunks(BIAS_ROWS * outputs)
        .map(|rows| {
            let mut sums = vec![0.0; outputs];
            for row in rows.chunks_exact(outputs) {
                sums.iter_mut().zip(row).for_each(|(s, x)| *s += x.to_f32());
            }
            sums
        })
        .collect();
    for (i, dbias) in dbias.iter_mut().enumerate() {
        let before = if op.accumulate { dbias.to_f32() } else { 0.0 };
        *dbias = E::Grad::from_f32(partials.iter().fold(before, |sum, partial| sum + partial[i]));
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

    /// Root mean square error of a product against f64.
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

    /// The preferred path of this machine and the crate's, in all layouts; the matrix unit is as exact as f32.
    #[test]
    fn either_way_is_exact() {
        for size in [(8, 8, 8), (33, 65, 31), (100, 40, 900), (17, 300, 64), (129, 96, 1600)] {
            let (m, n, k) = size;
            let (x, y, before) = (normals(1, m * k), normals(2, k * n), normals(3, m * n));
            for a in [Matrix::rows(&x, k), Matrix::rows(&x, m).t()] {
                for b in [Matrix::rows(&y, n), Matrix::rows(&y, k).t()] {
                    let (mut preferred, mut by_crate) = (before.clone(), before.clone());
                    let accumulated = |c| Product::new(c, n, a, b, size).with(-0.5, Store::Add);
                    accumulated(&mut preferred).run();
                    accumulated(&mut by_crate).run_by_crate();
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
            Product::new(&mut y, 48, a, b, (40, 48, 64)).run();
            for (i, y) in y.chunks(48).enumerate() {
                assert!(y.iter().all(|y| y.is_finite() == (i != 7)), "row {i}");
            }
        }
    }
}
