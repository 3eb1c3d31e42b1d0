//! bf16 products on CPUs without bf16 instructions: blocks of the operands are widened to f32, and each element of C is
//! rounded once.

use crate::backend::cpu::matrix::{Matrix, Product, Threads};
use crate::backend::cpu::wide::convert;
use crate::backend::{Epilogue, FloatElement};
use rayon::prelude::*;
use std::ops::Range;

/// Largest block of C, in rows and columns.
const PART: usize = 1024;

pub(super) fn product<T: FloatElement, C: FloatElement>(product: Product<'_, T, C>) {
    let Product { c, stride, a, b, size: (m, n, k), epilogue, threads } = product;
    let Epilogue { alpha, bias, residual, accumulate } = epilogue;
    let (mut wide_a, mut wide_b, mut sums) = (Vec::new(), Vec::new(), vec![0.0; m.min(PART) * n.min(PART)]);
    for column in (0..n).step_by(PART) {
        let columns = column..n.min(column + PART);
        let b = widened(b.t(), columns.clone(), k, &mut wide_b, threads).t();
        for row in (0..m).step_by(PART) {
            let rows = row..m.min(row + PART);
            let a = widened(a, rows.clone(), k, &mut wide_a, threads);
            let sums = &mut sums[..rows.len() * columns.len()];
            let part = Product::new(sums, columns.len(), a, b, (rows.len(), columns.len(), k));
            Product { threads, ..part }.run();
            for (row, sums) in rows.zip(sums.chunks_exact(columns.len())) {
                let at = row * stride + column;
                for (i, (c, sum)) in c[at..].iter_mut().zip(sums).enumerate() {
                    let mut value = alpha * sum;
                    value += bias.map_or(0.0, |bias| bias[column + i].to_f32());
                    value += residual.map_or(0.0, |residual| residual[at + i].to_f32());
                    *c = C::from_f32(if accumulate { c.to_f32() + value } else { value });
                }
            }
        }
    }
}

/// Some rows of a matrix of depth `k`, in the order in which they lie in memory.
fn widened<'s, T: FloatElement>(
    matrix: Matrix<'_, T>,
    rows: Range<usize>,
    k: usize,
    space: &'s mut Vec<f32>,
    threads: Threads,
) -> Matrix<'s> {
    space.resize(rows.len() * k, 0.0);
    let Matrix { data, row_stride, column_stride } = matrix;
    let by_rows = column_stride == 1;
    assert!(by_rows || row_stride == 1, "neighbours are neighbours in memory");
    let first = rows.start * row_stride;
    let (line, step) = if by_rows { (k, row_stride) } else { (rows.len(), column_stride) };
    let fill = |(i, to): (usize, &mut [f32])| convert(&data[first + i * step..][..line], to);
    if threads == Threads::All {
        space.par_chunks_mut(line.max(1)).enumerate().for_each(fill);
    } else {
        space.chunks_mut(line.max(1)).enumerate().for_each(fill);
    }
    if by_rows { Matrix::rows(space, k) } else { Matrix::rows(space, rows.len()).t() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Philox;
    use half::bf16;

    /// All layouts and addends, in several parts.
    #[test]
    fn as_the_products_of_f32() {
        let numbers = |stream: u64, len: usize| -> Vec<bf16> {
            let mut rng = Philox::new(6, stream);
            (0..len).map(|_| bf16::from_f64(rng.normal())).collect()
        };
        for size in [(3, 5, 7), (1030, 17, 40), (20, 1025, 33)] {
            let (m, n, k) = size;
            let (x, y, bias, residual, before) =
                (numbers(1, m * k), numbers(2, k * n), numbers(3, n), numbers(4, m * n), numbers(5, m * n));
            let wide = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
            let [wide_x, wide_y, wide_bias, wide_residual] = [&x, &y, &bias, &residual].map(|x| wide(x));
            let swap = |t: bool, rows: usize, columns: usize| if t { rows } else { columns };
            for (ta, tb) in [(false, false), (false, true), (true, false), (true, true)] {
                let (mut got, mut expected) = (before.clone(), wide(&before));
                let epilogue =
                    Epilogue { alpha: -0.5, bias: Some(&bias[..]), residual: Some(&residual[..]), accumulate: true };
                let (a, b) = (Matrix::rows(&x, swap(ta, m, k)), Matrix::rows(&y, swap(tb, k, n)));
                let (a, b) = (if ta { a.t() } else { a }, if tb { b.t() } else { b });
                product(Product { epilogue, ..Product::new(&mut got[..], n, a, b, size) });
                let (a, b) = (Matrix::rows(&wide_x, swap(ta, m, k)), Matrix::rows(&wide_y, swap(tb, k, n)));
                let (a, b) = (if ta { a.t() } else { a }, if tb { b.t() } else { b });
                let epilogue = Epilogue {
                    alpha: -0.5,
                    bias: Some(&wide_bias[..]),
                    residual: Some(&wide_residual[..]),
                    accumulate: true,
                };
                Product { epilogue, ..Product::new(&mut expected[..], n, a, b, size) }.run();
                for (got, expected) in got.iter().zip(&expected) {
                    assert!((got.to_f32() - expected).abs() <= expected.abs() / 200.0 + 1e-4, "{got} {expected}");
                }
            }
        }
    }
}
