//! Perturbed copies.

use super::part::{Part, assert_no_worse};
use super::*;
use swat::backend::cuda::{Cuda, F32State, testing, with_version};
use swat::rng::{uniform, words};

const KEY: NoiseKey = NoiseKey { seed: 77, stream: 5 };
const EPSILON: f32 = 0.5;

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

/// Normals of a stream, in f64 but for the uniforms.
fn exact_normals(key: NoiseKey, first: usize, len: usize) -> Vec<f64> {
    let normal = |i: usize| {
        let w = words(key.seed, key.stream, i as u64 / 4);
        let (radius, angle) = if i % 4 < 2 { (w[0], w[1]) } else { (w[2], w[3]) };
        let turn = std::f64::consts::TAU * angle as f64 / 2f64.powi(32);
        (-2.0 * (uniform(radius) as f64).ln()).sqrt() * if i.is_multiple_of(2) { turn.cos() } else { turn.sin() }
    };
    (first..first + len).map(normal).collect()
}

/// What a direction is before it is scaled.
fn exact_direction(which: &Which, w: &[f64], given: &[f64], rows: usize) -> Vec<f64> {
    match *which {
        Which::Gaussian => exact_normals(KEY, 0, w.len()),
        Which::Rademacher => {
            let sign = |i: usize| words(KEY.seed, KEY.stream, i as u64 / 4)[i % 4] >> 31;
            (0..w.len()).map(|i| if sign(i) == 1 { -1.0 } else { 1.0 }).collect()
        }
        Which::LowRank(rank) => {
            let columns = w.len() / rows;
            let a = exact_normals(KEY, 0, rows * rank);
            let b = exact_normals(KEY, (rows * rank).next_multiple_of(4), columns * rank);
            let entry = |r: usize, c: usize| (0..rank).map(|k| a[r * rank + k] * b[c * rank + k]).sum();
            (0..w.len()).map(|i| entry(i / columns, i % columns)).collect()
        }
        Which::Scale => w.to_vec(),
        Which::Given => given.to_vec(),
    }
}

#[derive(Clone, Copy, Debug)]
enum Which {
    Gaussian,
    Rademacher,
    LowRank(usize),
    Scale,
    Given,
}

const ALL: [Which; 7] = [
    Which::Gaussian,
    Which::Rademacher,
    Which::LowRank(1),
    Which::LowRank(5),
    Which::LowRank(16),
    Which::Scale,
    Which::Given,
];

/// The direction for a backend.
fn direction<'a, B: Backend>(which: Which, given: &'a Part<B, B::Float>, rows: usize) -> Direction<In<'a, B>> {
    match which {
        Which::Gaussian => Direction::Gaussian(KEY),
        Which::Rademacher => Direction::Rademacher(KEY),
        Which::LowRank(rank) => Direction::LowRank { key: KEY, rank, rows },
        Which::Scale => Direction::Scale,
        Which::Given => Direction::Given(given.view()),
    }
}

/// w, plus and minus of one call; with plus alone, and with ‖w‖ made before, it must be the same.
struct Pair {
    w: Vec<f64>,
    plus: Vec<f64>,
    minus: Vec<f64>,
}

impl Pair {
    /// plus − w
    fn noise(&self) -> Vec<f64> {
        self.plus.iter().zip(&self.w).map(|(p, w)| p - w).collect()
    }
}

/// The offsets are those of w, plus and minus.
fn perturb<B: Backend>(b: &B, len: usize, direction: &Direction<In<'_, B>>, epsilon: f32, offsets: [usize; 3]) -> Pair {
    let w = Part::<B, B::Float>::new(b, &normals(1, len), offsets[0]);
    let [mut plus, mut minus, mut alone] =
        [1, 2, 1].map(|i| Part::<B, B::Float>::new(b, &vec![f64::NAN; len], offsets[i]));
    Perturb {
        w: w.view(),
        squares: None,
        direction: direction.clone(),
        epsilon,
        plus: plus.view_mut(),
        minus: Some(minus.view_mut()),
    }
    .run(b)
    .unwrap();
    let squares = SquaredNorm { w: w.view() }.run(b).unwrap();
    Perturb {
        w: w.view(),
        squares: Some(squares.view()),
        direction: direction.clone(),
        epsilon,
        plus: alone.view_mut(),
        minus: None,
    }
    .run(b)
    .unwrap();
    assert_eq!(plus.get(b), alone.get(b), "with and without the antithetic copy, and the norm at hand");
    let sum: f64 = read(b, &squares).iter().sum();
    let exact: f64 = w.host().iter().map(|w| w * w).sum();
    // A device adds eight at a time in f32.
    assert!((sum - exact).abs() <= 1e-6 * exact, "{sum}, exact {exact}");
    assert_eq!(w.get(b), w.host(), "the weight itself");
    Pair { plus: plus.get(b), minus: minus.get(b), w: w.host().to_vec() }
}

const SIZES: [(usize, usize); 9] =
    [(1, 1), (7, 1), (2, 4), (1, 9), (7, 13), (64, 100), (241, 17), (3, 1364), (100, 303)];

/// Against f64: the copies, how far they are from w, and that they are opposite.
fn copies_as_written<B: Backend>(b: &B) {
    for (case, (rows, columns)) in SIZES.into_iter().enumerate() {
        let len = rows * columns;
        let offsets = [[0, 0, 0], [1, 0, 0], [0, 3, 0], [0, 0, 5], [8, 8, 8]][case % 5];
        let given = Part::<B, B::Float>::new(b, &normals(3, len), [0, 8, 3][case % 3]);
        for which in ALL {
            let Pair { w, plus, minus } = perturb(b, len, &direction(which, &given, rows), EPSILON, offsets);
            let n = exact_direction(&which, &w, given.host(), rows);
            let factor = f64::from(EPSILON) * norm(&w) / norm(&n);
            let what = format!("{which:?} on {rows} × {columns}");
            // Radii next to 0 are approximate on a device: 6e-4 of a normal at worst.
            let tiny = if B::Float::NAME == "f32" { 2e-6 } else { 1e-4 };
            for (sign, got) in [(1.0, &plus), (-1.0, &minus)] {
                let exact: Vec<f64> = w.iter().zip(&n).map(|(w, n)| w + sign * factor * n).collect();
                let emulated: Vec<f64> = exact.iter().map(|x| B::Float::from_f32(*x as f32).to_f32() as f64).collect();
                assert_no_worse(got, &emulated, &exact, tiny, &what);
            }
            let half_unit = if B::Float::NAME == "f32" { 2f64.powi(-23) } else { 2f64.powi(-8) };
            for ((p, m), w) in plus.iter().zip(&minus).zip(&w) {
                let rounding = half_unit * (p.abs() + m.abs());
                assert!((p + m - 2.0 * w).abs() <= rounding, "{what}: {p} + {m} is not 2·{w}");
            }
            let difference: Vec<f64> = plus.iter().zip(&minus).map(|(p, m)| (p - m) / 2.0).collect();
            let ratio = norm(&difference) / norm(&w) / f64::from(EPSILON);
            // Where n lies on a lattice as w does, roundings are alike; else they cancel.
            let lattice = matches!(which, Which::Rademacher | Which::Scale | Which::Given);
            let cancelled = if lattice { 1.0 } else { 2.0 / (len as f64).sqrt() + half_unit };
            let allowed = 1e-5 + 2.0 * half_unit * cancelled;
            assert!((ratio - 1.0).abs() <= allowed, "{what}: ‖δ‖/(epsilon·‖w‖) = {ratio}");
        }
    }
}

/// Against f64, without the antithetic copy's checks.
#[track_caller]
fn assert_plus<B: Backend>(b: &B, which: Which, rows: usize, columns: usize) {
    let none = Part::<B, B::Float>::new(b, &[], 0);
    let Pair { w, plus, .. } = perturb(b, rows * columns, &direction(which, &none, rows), EPSILON, [0; 3]);
    let n = exact_direction(&which, &w, &[], rows);
    let factor = f64::from(EPSILON) * norm(&w) / norm(&n);
    let exact: Vec<f64> = w.iter().zip(&n).map(|(w, n)| w + factor * n).collect();
    let emulated: Vec<f64> = exact.iter().map(|x| B::Float::from_f32(*x as f32).to_f32() as f64).collect();
    assert_no_worse(&plus, &emulated, &exact, 1e-4, &format!("{which:?} on {rows} × {columns}"));
}

/// More rows than a grid has.
fn tall_matrix<B: Backend>(b: &B) {
    assert_plus(b, Which::LowRank(2), 13_000, 8);
}

/// Central moments and the correlation of neighbours.
fn gaussian_is_gaussian<B: Backend>(b: &B) {
    let pair = perturb(b, 200_000, &Direction::Gaussian(KEY), 1.0, [0; 3]);
    let n = pair.noise();
    let len = n.len() as f64;
    let deviation = norm(&pair.w) / len.sqrt();
    let moment = |p: i32| n.iter().map(|x| (x / deviation).powi(p)).sum::<f64>() / len;
    assert!(moment(1).abs() < 0.01 && (moment(4) - 3.0).abs() < 0.06, "{} {}", moment(1), moment(4));
    for lag in 1..9 {
        let correlation = n.windows(lag + 1).map(|x| x[0] * x[lag]).sum::<f64>() / deviation.powi(2) / len;
        assert!(correlation.abs() < 0.01, "lag {lag}: {correlation}");
    }
}

fn rademacher_has_one_size<B: Backend>(b: &B) {
    let pair = perturb(b, 123 * 77, &Direction::Rademacher(KEY), 1.0, [0; 3]);
    let size = norm(&pair.w) / (pair.w.len() as f64).sqrt();
    let tolerance = if B::Float::NAME == "f32" { 1e-4 } else { 2f64.powi(-8) };
    for ((p, m), w) in pair.plus.iter().zip(&pair.minus).zip(&pair.w) {
        let n = (p - m) / 2.0;
        assert!((n.abs() / size - 1.0).abs() < tolerance * (1.0 + w.abs() / size), "{n}, all are ±{size}");
    }
    let positive = pair.noise().iter().filter(|n| **n > 0.0).count() as f64 / pair.w.len() as f64;
    assert!((positive - 0.5).abs() < 0.03, "{positive}");
}

fn minus_one_zeroes<B: Backend>(b: &B) {
    let pair = perturb(b, 1000, &Direction::Scale, -1.0, [0; 3]);
    assert!(pair.plus.iter().all(|x| *x == 0.0));
    assert!(pair.minus.iter().zip(&pair.w).all(|(m, w)| *m == 2.0 * w));
}

fn keys_select_the_draw<B: Backend>(b: &B) {
    let draw = |seed, stream| perturb(b, 100, &Direction::Gaussian(NoiseKey { seed, stream }), 1.0, [0; 3]).plus;
    assert_eq!(draw(1, 1), draw(1, 1));
    for (seed, stream) in [(1, 2), (2, 1), (1, 1 + (1 << 32)), (1 + (1 << 32), 1)] {
        assert_ne!(draw(1, 1), draw(seed, stream));
    }
}

/// Where n or w is zero, and where there is nothing.
fn zeros_change_nothing<B: Backend>(b: &B) {
    let zero = put::<B, B::Float>(b, &[0.0; 64]);
    let pair = perturb(b, 64, &Direction::Given(zero.device.view()), 1.0, [0; 3]);
    assert!(pair.plus == pair.w && pair.minus == pair.w);
    let mut copy = put::<B, B::Float>(b, &[f64::NAN; 64]);
    Perturb {
        w: zero.device.view(),
        squares: None,
        direction: Direction::Gaussian(KEY),
        epsilon: 1.0,
        plus: copy.device.view_mut(),
        minus: None,
    }
    .run(b)
    .unwrap();
    assert!(get(b, &copy.device).iter().all(|x| *x == 0.0));
    let (empty, mut none) = (put::<B, B::Float>(b, &[]), put::<B, B::Float>(b, &[]));
    for direction in [Direction::Gaussian(KEY), Direction::Scale, Direction::LowRank { key: KEY, rank: 2, rows: 3 }] {
        Perturb {
            w: empty.device.view(),
            squares: None,
            direction: direction.clone(),
            epsilon: 1.0,
            plus: none.device.view_mut(),
            minus: None,
        }
        .run(b)
        .unwrap();
        let squares = SquaredNorm { w: empty.device.view() }.run(b).unwrap();
        let (from, to) = (empty.device.view(), none.device.view_mut());
        Perturb { w: from, squares: Some(squares.view()), direction, epsilon: 1.0, plus: to, minus: None }
            .run(b)
            .unwrap();
    }
}

/// The words of a stream from a block on.
fn device_words(b: &Cuda, key: NoiseKey, first: u64, blocks: usize) -> Vec<u32> {
    let mut to = put_u32(b, &vec![0; 4 * blocks]);
    testing::philox_words(b, key, first, to.view_mut()).unwrap();
    read(b, &to)
}

/// `kat_vectors` of Random123, philox4x32 10; then streams of the host.
#[test]
fn integers_are_exact() {
    for ordinal in 0..4 {
        let Some(b) = standin::open(ordinal) else { return };
        let block = |seed, stream, block| device_words(&b, NoiseKey { seed, stream }, block, 1);
        assert_eq!(block(0, 0, 0), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(block(!0, !0, !0), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            block(0x299f31d0_a4093822, 0x03707344_13198a2e, 0x85a308d3_243f6a88),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
        for (key, first) in [(KEY, 0), (NoiseKey { seed: 1 << 63, stream: 1 << 32 }, (1 << 32) - 200)] {
            let expected: Vec<u32> = (first..first + 1000).flat_map(|i| words(key.seed, key.stream, i)).collect();
            assert_eq!(device_words(&b, key, first, 1000), expected);
        }
    }
}

/// Approximate logarithms are off by 2⁻²² next to 1, where a radius is small.
#[test]
fn normals_agree() {
    for ordinal in 0..4 {
        let Some(b) = standin::open::<F32State>(ordinal) else { return };
        let mut to = put::<_, f32>(&b, &vec![f64::NAN; 100_003]);
        testing::philox_normals(&b, KEY, to.device.view_mut()).unwrap();
        let exact = exact_normals(KEY, 0, to.host.len());
        for (i, (got, exact)) in get(&b, &to.device).iter().zip(&exact).enumerate() {
            let [radius, angle] = [i / 2 * 2, i / 2 * 2 + 1].map(|i| exact_normals(KEY, i, 1)[0]);
            let r = radius.hypot(angle);
            let allowed = 2e-6 * r.max(1.0) + (4e-7 / r).min(6e-4);
            assert!((got - exact).abs() <= allowed, "element {i} is {got}, exact {exact}");
        }
    }
}

/// More partial sums than a block has threads.
#[test]
fn many_partial_sums() {
    let Some(b) = standin::open::<F32State>(0) else { return };
    assert_plus(&b, Which::Gaussian, 1, 530_001);
}

/// The versions differ in nothing that they write; the last length is beyond one round of a grid.
#[test]
fn baseline_writes_the_same() {
    let Some(b) = standin::open::<F32State>(0) else { return };
    for (len, offset) in [(1, 0), (1000, 1), (5001, 0), (1_700_001, 0)] {
        let values: Vec<half::bf16> =
            (0..len + offset).map(|i| half::bf16::from_bits((i as u16).wrapping_add(0x3f80) & 0xbfff)).collect();
        let mut w = b.zeros(len + offset).unwrap();
        b.write(&values, w.view_mut()).unwrap();
        let range = offset..len + offset;
        let copies = || [(), ()].map(|()| b.zeros::<half::bf16>(len + offset).unwrap());
        let [[mut plus, mut minus], [mut expected_plus, mut expected_minus]] = [copies(), copies()];
        let run = |plus: &mut Buffer<_, _>, minus: &mut Buffer<_, _>| {
            Perturb {
                w: w.range(range.clone()),
                squares: None,
                direction: Direction::Gaussian(KEY),
                epsilon: EPSILON,
                plus: plus.range_mut(range.clone()),
                minus: Some(minus.range_mut(range.clone())),
            }
            .run(&b)
            .unwrap();
        };
        with_version("baseline", || run(&mut plus, &mut minus));
        run(&mut expected_plus, &mut expected_minus);
        assert!(read(&b, &plus) == read(&b, &expected_plus), "{len}");
        assert!(read(&b, &minus) == read(&b, &expected_minus), "{len}");
        assert!(read(&b, &plus) != read(&b, &minus), "{len}");
    }
}

/// A step of length 10 along a direction of which (3, 4) is a part; and none along a direction of 0.
fn a_step_along_a_direction<B: Backend>(b: &B) {
    let (direction, squares) = (put::<B, B::Float>(b, &[3.0, 4.0]), put::<B, f32>(b, &[100.0]));
    let mut x = put::<B, B::Float>(b, &[1.0, -2.0]);
    let (direction, squares) = (direction.device.view(), squares.device.view());
    MoveAlong { x: x.device.view_mut(), direction: direction.clone(), squares, rho: 10.0 }.run(b).unwrap();
    assert_eq!(get(b, &x.device), [4.0, 2.0]);
    let none = put::<B, f32>(b, &[0.0]);
    MoveAlong { x: x.device.view_mut(), direction, squares: none.device.view(), rho: 10.0 }.run(b).unwrap();
    assert_eq!(get(b, &x.device), [4.0, 2.0]);
    for (len, offset) in [(1, 1), (2047, 0), (2049, 8), (70_000, 3)] {
        let mut x = Part::<B, B::Float>::new(b, &normals(1, len), offset);
        let direction = Part::<B, B::Float>::new(b, &normals(2, len), offset);
        let total: f64 = direction.host().iter().map(|n| n * n).sum();
        let squares = put::<B, f32>(b, &[total]);
        let (along, squares) = (direction.view(), squares.device.view());
        MoveAlong { x: x.view_mut(), direction: along, squares, rho: 0.5 * (total as f32).sqrt() }.run(b).unwrap();
        let exact: Vec<f64> = x.host().iter().zip(direction.host()).map(|(x, n)| x + 0.5 * n).collect();
        let stored: Vec<f64> = exact.iter().map(|x| B::Float::from_f32(*x as f32).to_f32() as f64).collect();
        assert_no_worse(&x.get(b), &stored, &exact, 4e-7, &format!("{len} elements {offset} in"));
    }
}

on_every_backend!(
    a_step_along_a_direction,
    copies_as_written,
    tall_matrix,
    gaussian_is_gaussian,
    rademacher_has_one_size,
    minus_one_zeroes,
    keys_select_the_draw,
    zeros_change_nothing
);
