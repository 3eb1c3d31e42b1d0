//! Ridge logistic regression, mean cross-entropy + λ‖w‖² with an unpenalised bias, by Newton's method with conjugate
//! gradients and a backtracking line search, in f64. The objective is strictly convex in w.
//!
//! With more features than prompts, w lies in the span of the prompts' feature rows (representer theorem): with
//! X·Xᵀ = L·Lᵀ, the rows of L have the same inner products, and w = Xᵀ·L⁻ᵀ·v. A step then costs prompts² instead of
//! prompts·features, and the reduction is shared by all λ and all heads of a layer.

use super::linalg::{Matrix, add_scaled, dot};
use crate::secure::eval::metrics::{binary_cross_entropy, sigmoid};

/// Most Newton steps; 5 to 15 are usual.
const MAX_STEPS: usize = 100;
/// Gradient norm relative to w = 0 at which the fit has converged.
const TOLERANCE: f64 = 1e-8;
/// Relative jitter of the Gram matrix, which is singular for centred features.
const JITTER: f64 = 1e-10;

/// Feature rows of a fit, reduced to at most as many columns as rows.
pub(crate) struct Design {
    pub(crate) x: Matrix,
    reduced: Option<Matrix>,
}

/// A fitted linear head.
#[derive(Clone, Debug)]
pub(crate) struct Fit {
    pub(crate) w: Vec<f64>,
    pub(crate) b: f64,
    /// Gradient norm relative to w = 0.
    pub(crate) gradient: f64,
}

impl Design {
    /// `x`: [prompts, features].
    pub(crate) fn new(x: Matrix) -> Self {
        let reduced = (x.columns > x.rows).then(|| x.gram(JITTER).cholesky());
        Self { x, reduced }
    }

    /// Fits labels `y` [prompts].
    pub(crate) fn fit(&self, y: &[bool], lambda: f64) -> Fit {
        match &self.reduced {
            None => newton(&self.x, y, lambda),
            Some(l) => {
                let fit = newton(l, y, lambda);
                Fit { w: self.x.transposed_times(&l.solve_transposed(&fit.w)), ..fit }
            }
        }
    }
}

fn logits(x: &Matrix, w: &[f64], b: f64) -> Vec<f64> {
    let mut z = x.times(w);
    z.iter_mut().for_each(|z| *z += b);
    z
}

/// Gradient of the objective: (∂w, ∂b).
fn gradient(x: &Matrix, z: &[f64], y: &[bool], w: &[f64], lambda: f64) -> (Vec<f64>, f64) {
    let n = y.len() as f64;
    let residual: Vec<f64> = z.iter().zip(y).map(|(z, y)| (sigmoid(*z) - f64::from(u8::from(*y))) / n).collect();
    let mut dw = x.transposed_times(&residual);
    add_scaled(&mut dw, 2.0 * lambda, w);
    (dw, residual.iter().sum())
}

fn newton(x: &Matrix, y: &[bool], lambda: f64) -> Fit {
    let n = y.len() as f64;
    let mut w = vec![0.0; x.columns];
    let positives = y.iter().filter(|y| **y).count() as f64;
    let mut b = ((positives + 0.5) / (n - positives + 0.5)).ln();
    let mut z = logits(x, &w, b);
    let mut first = 0.0;
    let mut relative = f64::INFINITY;
    for step in 0..MAX_STEPS {
        let (dw, db) = gradient(x, &z, y, &w, lambda);
        let norm = (dot(&dw, &dw) + db * db).sqrt();
        if step == 0 {
            first = norm.max(f64::MIN_POSITIVE);
        }
        relative = norm / first;
        if relative <= TOLERANCE {
            break;
        }
        let curvature: Vec<f64> = z.iter().map(|z| sigmoid(*z) * sigmoid(-z) / n).collect();
        let (sw, sb) = newton_direction(x, &curvature, lambda, &dw, db, relative.sqrt().min(0.1) * norm);
        let slope = dot(&sw, &dw) + sb * db;
        let along = logits(x, &sw, sb);
        let objective = |z: &[f64], w: &[f64]| binary_cross_entropy(z, y) + lambda * dot(w, w);
        let here = objective(&z, &w);
        let mut t = 1.0;
        let accepted = (0..40).find_map(|_| {
            let (mut nz, mut nw) = (z.clone(), w.clone());
            add_scaled(&mut nz, t, &along);
            add_scaled(&mut nw, t, &sw);
            let accept = objective(&nz, &nw) <= here + 1e-4 * t * slope;
            let result = accept.then_some((nz, nw, b + t * sb));
            t *= 0.5;
            result
        });
        // No decrease that f64 can resolve: the minimum up to rounding.
        let Some((nz, nw, nb)) = accepted else { break };
        (z, w, b) = (nz, nw, nb);
    }
    Fit { w, b, gradient: relative }
}

/// Solves H·s = −g to a residual of `tolerance` by conjugate gradients with the diagonal as preconditioner;
/// H = Xᵀ·diag(curvature)·X + 2λI, with a row and column for the bias.
fn newton_direction(
    x: &Matrix,
    curvature: &[f64],
    lambda: f64,
    dw: &[f64],
    db: f64,
    tolerance: f64,
) -> (Vec<f64>, f64) {
    let m = x.columns;
    let total: f64 = curvature.iter().sum::<f64>() + 1e-12;
    let mut diagonal = vec![2.0 * lambda; m];
    for (row, c) in x.values.chunks_exact(m).zip(curvature) {
        for (d, v) in diagonal.iter_mut().zip(row) {
            *d += c * v * v;
        }
    }
    diagonal.push(total);
    let times = |v: &[f64]| -> Vec<f64> {
        let mut z = logits(x, &v[..m], v[m]);
        z.iter_mut().zip(curvature).for_each(|(z, c)| *z *= c);
        let mut out = x.transposed_times(&z);
        add_scaled(&mut out, 2.0 * lambda, &v[..m]);
        out.push(z.iter().sum::<f64>() + 1e-12 * v[m]);
        out
    };
    let mut s = vec![0.0; m + 1];
    let mut r: Vec<f64> = dw.iter().chain([&db]).map(|g| -g).collect();
    let preconditioned = |r: &[f64]| -> Vec<f64> { r.iter().zip(&diagonal).map(|(r, d)| r / d).collect() };
    let mut p = preconditioned(&r);
    let mut rz = dot(&r, &p);
    for _ in 0..2 * (m + 1) {
        if dot(&r, &r).sqrt() <= tolerance {
            break;
        }
        let hp = times(&p);
        let bend = dot(&p, &hp);
        if bend <= 0.0 {
            break;
        }
        let alpha = rz / bend;
        add_scaled(&mut s, alpha, &p);
        add_scaled(&mut r, -alpha, &hp);
        let next = preconditioned(&r);
        let next_rz = dot(&r, &next);
        let beta = next_rz / rz;
        p.iter_mut().zip(next).for_each(|(p, z)| *p = z + beta * *p);
        rz = next_rz;
    }
    let sb = s.pop().unwrap_or_default();
    (s, sb)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::Philox;
    use crate::secure::eval::metrics::softplus;

    fn data(n: usize, m: usize, noise: f64, seed: u64) -> (Matrix, Vec<bool>) {
        let mut draw = Philox::new(seed, 0);
        let direction: Vec<f64> = (0..m).map(|_| draw.normal()).collect();
        let values: Vec<f64> = (0..n * m).map(|_| draw.normal()).collect();
        let x = Matrix { rows: n, columns: m, values };
        let y = x.times(&direction).iter().map(|z| z + noise * draw.normal() > 0.3).collect();
        (x, y)
    }

    #[test]
    fn gradient_agrees_with_finite_differences() {
        let (x, y) = data(30, 7, 1.0, 1);
        let mut draw = Philox::new(2, 0);
        let w: Vec<f64> = (0..7).map(|_| draw.normal()).collect();
        let (b, lambda, h) = (0.2, 0.05, 1e-6);
        let objective = |w: &[f64], b: f64| binary_cross_entropy(&logits(&x, w, b), &y) + lambda * dot(w, w);
        let (dw, db) = gradient(&x, &logits(&x, &w, b), &y, &w, lambda);
        for i in 0..7 {
            let (mut up, mut down) = (w.clone(), w.clone());
            up[i] += h;
            down[i] -= h;
            let difference = (objective(&up, b) - objective(&down, b)) / (2.0 * h);
            assert!((dw[i] - difference).abs() < 1e-8, "{i}: {} {difference}", dw[i]);
        }
        let difference = (objective(&w, b + h) - objective(&w, b - h)) / (2.0 * h);
        assert!((db - difference).abs() < 1e-8);
    }

    #[test]
    fn finds_the_minimum_at_every_lambda() {
        for (n, m, noise) in [(200, 12, 1.0), (200, 12, 0.0), (40, 90, 0.5)] {
            let (x, y) = data(n, m, noise, 3);
            let design = Design::new(x);
            for lambda in [1e-6, 1e-3, 1e-1, 10.0] {
                let fit = design.fit(&y, lambda);
                let z = logits(&design.x, &fit.w, fit.b);
                let (dw, db) = gradient(&design.x, &z, &y, &fit.w, lambda);
                let (at_zero, _) = gradient(&design.x, &vec![0.0; n], &y, &vec![0.0; m], lambda);
                let norm = (dot(&dw, &dw) + db * db).sqrt() / dot(&at_zero, &at_zero).sqrt();
                assert!(norm < 1e-6, "{n}×{m}, λ {lambda}: {norm}");
            }
        }
    }

    #[test]
    fn reduced_and_direct_problems_have_the_same_minimum() {
        let (x, y) = data(25, 60, 0.5, 5);
        let reduced = Design::new(x.clone()).fit(&y, 0.01);
        let direct = newton(&x, &y, 0.01);
        assert!((reduced.b - direct.b).abs() < 1e-6);
        for (a, b) in reduced.w.iter().zip(&direct.w) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }

    #[test]
    fn one_class_and_saturation_stay_finite() {
        let x = Matrix { rows: 4, columns: 1, values: vec![1e6, 2e6, -1e6, -2e6] };
        let fit = newton(&x, &[true, true, false, false], 1e-9);
        assert!(fit.w[0].is_finite() && fit.w[0] > 0.0 && fit.b.is_finite());
        assert_eq!((sigmoid(-1e4), sigmoid(1e4)), (0.0, 1.0));
        assert!((softplus(1e4) - 1e4).abs() < 1e-9 && softplus(-1e4) == 0.0);
    }
}
