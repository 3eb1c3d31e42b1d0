//! Perturbed copies.

use super::*;
use swat::backend::{Direction, NoiseKey};

const KEY: NoiseKey = NoiseKey { seed: 77, stream: 5 };
const EPSILON: f32 = 0.5;

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// (w, plus − w, minus − w)
fn perturb<B: Backend>(
    b: &B,
    rows: usize,
    columns: usize,
    direction: &Direction<'_, B>,
    epsilon: f32,
) -> [Vec<f64>; 3] {
    let len = rows * columns;
    let w = put::<B, B::Float>(b, &normals(1, len));
    let [mut plus, mut minus, mut alone] = [(), (), ()].map(|_| put::<B, B::Float>(b, &vec![f64::NAN; len]));
    b.perturb(w.device.view(), direction, epsilon, plus.device.view_mut(), Some(minus.device.view_mut())).unwrap();
    b.perturb(w.device.view(), direction, epsilon, alone.device.view_mut(), None).unwrap();
    assert_eq!(get(b, &plus.device), get(b, &alone.device), "with and without the antithetic copy");
    assert_eq!(get(b, &w.device), w.host, "the weight itself");
    let less = |t: &Tensor<B, B::Float>| get(b, &t.device).iter().zip(&w.host).map(|(p, w)| p - w).collect();
    let (plus, minus) = (less(&plus), less(&minus));
    [w.host, plus, minus]
}

#[track_caller]
fn assert_pair(w: &[f64], plus: &[f64], minus: &[f64], epsilon: f64, tolerance: f64) {
    let ratio = norm(plus) / norm(w);
    assert!((ratio / epsilon - 1.0).abs() < tolerance, "‖δ‖/‖w‖ = {ratio}, wanted {epsilon}");
    assert!(plus.iter().zip(minus).all(|(p, m)| (p + m).abs() < 1e-6 * (1.0 + p.abs())), "antithetic");
}

const SIZES: [(usize, usize); 4] = [(1, 1), (7, 13), (64, 100), (300, 333)];

fn equal_relative_norm_and_antithetic<B: Backend>(b: &B) {
    for (rows, columns) in SIZES {
        let given = put::<B, B::Float>(b, &normals(3, rows * columns));
        for direction in [
            Direction::Gaussian(KEY),
            Direction::Rademacher(KEY),
            Direction::LowRank { key: KEY, rank: 1, rows },
            Direction::LowRank { key: KEY, rank: 5, rows },
            Direction::Scale,
            Direction::Given(given.device.view()),
        ] {
            let [w, plus, minus] = perturb(b, rows, columns, &direction, EPSILON);
            assert_pair(&w, &plus, &minus, EPSILON as f64, 1e-5);
        }
    }
}

/// Central moments and the correlation of neighbours.
fn gaussian_is_gaussian<B: Backend>(b: &B) {
    let [w, n, _] = perturb(b, 400, 500, &Direction::Gaussian(KEY), 1.0);
    let len = n.len() as f64;
    let deviation = norm(&w) / len.sqrt();
    let moment = |p: i32| n.iter().map(|x| (x / deviation).powi(p)).sum::<f64>() / len;
    assert!(moment(1).abs() < 0.01 && (moment(4) - 3.0).abs() < 0.06, "{} {}", moment(1), moment(4));
    for lag in 1..9 {
        let correlation = n.windows(lag + 1).map(|x| x[0] * x[lag]).sum::<f64>() / deviation.powi(2) / len;
        assert!(correlation.abs() < 0.01, "lag {lag}: {correlation}");
    }
}

fn rademacher_has_one_size<B: Backend>(b: &B) {
    let [w, n, _] = perturb(b, 123, 77, &Direction::Rademacher(KEY), 1.0);
    let size = norm(&w) / (w.len() as f64).sqrt();
    assert!(n.iter().all(|n| (n.abs() / size - 1.0).abs() < 1e-4));
    let positive = n.iter().filter(|n| **n > 0.0).count() as f64 / n.len() as f64;
    assert!((positive - 0.5).abs() < 0.03, "{positive}");
}

/// Every 2 × 2 minor of a matrix of rank 1 is zero; rank 2 is not rank 1.
fn low_rank_has_its_rank<B: Backend>(b: &B) {
    let (rows, columns) = (30, 40);
    let minor = |n: &[f64], i: usize, j: usize| n[i * columns + j] * n[0] - n[i * columns] * n[j];
    let worst = |rank: usize| {
        let [_, n, _] = perturb(b, rows, columns, &Direction::LowRank { key: KEY, rank, rows }, 1.0);
        some(rows * columns, 100).iter().map(|at| minor(&n, at / columns, at % columns).abs()).fold(0.0, f64::max)
    };
    assert!(worst(1) < 1e-4 && worst(2) > 0.1, "{} {}", worst(1), worst(2));
}

fn minus_one_zeroes<B: Backend>(b: &B) {
    let w = put::<B, B::Float>(b, &normals(1, 1000));
    let mut plus = put::<B, B::Float>(b, &vec![f64::NAN; 1000]);
    b.perturb(w.device.view(), &Direction::Scale, -1.0, plus.device.view_mut(), None).unwrap();
    assert!(get(b, &plus.device).iter().all(|x| *x == 0.0));
}

fn keys_select_the_draw<B: Backend>(b: &B) {
    let draw = |seed, stream| perturb(b, 10, 10, &Direction::Gaussian(NoiseKey { seed, stream }), 1.0)[1].clone();
    assert_eq!(draw(1, 1), draw(1, 1));
    assert_ne!(draw(1, 1), draw(1, 2));
    assert_ne!(draw(1, 1), draw(2, 1));
}

fn a_zero_direction_changes_nothing<B: Backend>(b: &B) {
    let zero = put::<B, B::Float>(b, &[0.0; 64]);
    let [_, plus, minus] = perturb(b, 8, 8, &Direction::Given(zero.device.view()), 1.0);
    assert!(plus.iter().chain(&minus).all(|x| *x == 0.0));
}

on_every_backend!(
    equal_relative_norm_and_antithetic,
    gaussian_is_gaussian,
    rademacher_has_one_size,
    low_rank_has_its_rank,
    minus_one_zeroes,
    keys_select_the_draw,
    a_zero_direction_changes_nothing
);
