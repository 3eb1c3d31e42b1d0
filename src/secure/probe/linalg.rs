//! Small dense linear algebra in f64, row-major.

use rayon::prelude::*;

/// Σ aᵢ·bᵢ in eight interleaved sums, which vectorises.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a8.remainder().iter().zip(b8.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a8.zip(b8) {
        for j in 0..8 {
            sums[j] += x[j] * y[j];
        }
    }
    sums.iter().sum::<f64>() + rest
}

/// y += factor·x.
pub(crate) fn add_scaled(y: &mut [f64], factor: f64, x: &[f64]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += factor * x;
    }
}

/// A matrix [rows, columns].
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Matrix {
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) values: Vec<f64>,
}

impl Matrix {
    pub(crate) fn row(&self, i: usize) -> &[f64] {
        &self.values[i * self.columns..(i + 1) * self.columns]
    }

    /// A·x.
    pub(crate) fn times(&self, x: &[f64]) -> Vec<f64> {
        self.values.chunks_exact(self.columns).map(|row| dot(row, x)).collect()
    }

    /// Aᵀ·y.
    pub(crate) fn transposed_times(&self, y: &[f64]) -> Vec<f64> {
        let mut x = vec![0.0; self.columns];
        for (row, y) in self.values.chunks_exact(self.columns).zip(y) {
            add_scaled(&mut x, *y, row);
        }
        x
    }

    /// A·Aᵀ + jitter·(mean of its diagonal)·I.
    pub(crate) fn gram(&self, jitter: f64) -> Matrix {
        let n = self.rows;
        let mut values = vec![0.0; n * n];
        values.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, row)| {
            for (j, value) in row.iter_mut().enumerate().take(i + 1) {
                *value = dot(self.row(i), self.row(j));
            }
        });
        let mean = (0..n).map(|i| values[i * n + i]).sum::<f64>() / n.max(1) as f64;
        for i in 0..n {
            values[i * n + i] += jitter * mean.max(f64::MIN_POSITIVE);
            for j in i + 1..n {
                values[i * n + j] = values[j * n + i];
            }
        }
        Matrix { rows: n, columns: n, values }
    }

    /// Lower L with L·Lᵀ = A, for a symmetric positive definite A.
    pub(crate) fn cholesky(&self) -> Matrix {
        let n = self.rows;
        let mut l = Matrix { rows: n, columns: n, values: vec![0.0; n * n] };
        for i in 0..n {
            for j in 0..=i {
                let sum = self.values[i * n + j] - dot(&l.row(i)[..j], &l.row(j)[..j]);
                // Rounding may take a pivot of a nearly singular matrix to zero or below.
                l.values[i * n + j] = if i == j { sum.max(f64::EPSILON).sqrt() } else { sum / l.values[j * n + j] };
            }
        }
        l
    }

    /// x with Lᵀ·x = y, for a lower triangular L.
    pub(crate) fn solve_transposed(&self, y: &[f64]) -> Vec<f64> {
        let mut x = y.to_vec();
        for i in (0..self.rows).rev() {
            x[i] /= self.values[i * self.columns + i];
            let (head, tail) = x.split_at_mut(i);
            add_scaled(head, -tail[0], &self.row(i)[..i]);
        }
        x
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cholesky_solves() {
        let a = Matrix { rows: 5, columns: 9, values: (0..45).map(|i| ((i * 37) % 23) as f64 / 11.0 - 1.0).collect() };
        let gram = a.gram(0.0);
        let l = gram.cholesky();
        for i in 0..5 {
            for j in 0..5 {
                assert!((dot(l.row(i), l.row(j)) - gram.row(i)[j]).abs() < 1e-12);
            }
        }
        let y = [1.0, -2.0, 0.5, 3.0, 0.25];
        let x = l.solve_transposed(&y);
        for (found, expected) in l.transposed_times(&x).iter().zip(y) {
            assert!((found - expected).abs() < 1e-9);
        }
    }
}
