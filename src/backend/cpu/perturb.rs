//! Perturbed copies of a weight at equal relative norm. The generator runs twice, once for ‖n‖ and once for the copies:
//! noise is stored only a block at a time.

use super::adamw::{squared_norm, squared_norm_block};
use super::matrix::{Matrix, Product};
use super::simd::simd_kernel;
use super::storage::{slice, slice_mut};
use super::wide::{convert, same_mut};
use super::{Cpu, Elements};
use crate::backend::{Direction, FloatElement, NoiseKey, Perturb};
use crate::rng::{MULTIPLIERS, WEYL, uniform};
use rayon::prelude::*;

/// Elements of one task.
const TASK: usize = 1 << 15;
/// Elements of noise that a task holds at once.
pub(super) const BLOCK: usize = 1024;

pub(super) fn perturb<E: Elements>(op: Perturb<'_, Cpu<E>>) {
    let Perturb { w, squares: known, direction, epsilon, plus, minus } = op;
    let (w, plus, minus) = (slice(&w), slice_mut(plus), minus.map(slice_mut));
    let factor = |squares_n: f64| {
        let squares_w = known.as_ref().map_or_else(|| squared_norm(w), |known| slice(known)[0]);
        let ratio = epsilon as f64 * (squares_w / squares_n).sqrt();
        if squares_n > 0.0 { ratio as f32 } else { 0.0 }
    };
    match direction {
        Direction::Scale => combine(w, plus, minus, |_, _, w, n| convert(w, n), epsilon),
        Direction::Given(n) => {
            let n = slice(&n);
            combine(w, plus, minus, |_, at, w, to| convert(&n[at..at + w.len()], to), factor(squared_norm(n)));
        }
        Direction::Rademacher(key) => {
            combine(w, plus, minus, |draw, at, _, n| draw.signs(key, at, n), factor(w.len() as f64))
        }
        Direction::Gaussian(key) => {
            let squares: Vec<f64> =
                (0..w.len().div_ceil(TASK)).into_par_iter().map(|t| squares(key, t, w.len())).collect();
            combine(w, plus, minus, |draw, at, _, n| draw.normals(key, at, n), factor(squares.iter().sum()));
        }
        Direction::LowRank { key, rank, rows } => {
            let columns = w.len() / rows;
            let (a, b) = low_rank_factors(key, rank, rows, columns);
            let factor = factor(low_rank_squares(&a, &b, rank));
            let (a, b) = (Matrix::rows(&a, rank), Matrix::rows(&b, rank).t());
            // f32 has room for n where the copy goes.
            let mut apart = Vec::new();
            let n = match same_mut(plus) {
                Some(n) => n,
                None => {
                    apart.resize(w.len(), 0.0);
                    &mut apart[..]
                }
            };
            Product::new(n, columns, a, b, (rows, columns, rank)).run();
            if apart.is_empty() {
                combine_in_place(w, plus, minus, factor);
            } else {
                let fill = |_: &mut Draw, at: usize, w: &[E::Float], to: &mut [f32]| {
                    to.copy_from_slice(&apart[at..at + w.len()])
                };
                combine(w, plus, minus, fill, factor);
            }
        }
    }
}

/// Both copies; `fill(buffers, first element, w, n)` fills a block of n.
fn combine<T: FloatElement>(
    w: &[T],
    plus: &mut [T],
    minus: Option<&mut [T]>,
    fill: impl Fn(&mut Draw, usize, &[T], &mut [f32]) + Sync,
    factor: f32,
) {
    let block = |draw: &mut Draw, at: usize, w: &[T], plus: &mut [T], minus: Option<&mut [T]>| {
        let mut n = [0.0; BLOCK];
        let n = &mut n[..w.len()];
        fill(draw, at, w, n);
        match minus {
            Some(minus) => add_and_subtract(w, n, plus, minus, factor),
            None => add(w, n, plus, factor),
        }
    };
    let tasks = w.par_chunks(TASK).zip(plus.par_chunks_mut(TASK)).enumerate();
    match minus {
        Some(minus) => tasks.zip(minus.par_chunks_mut(TASK)).for_each(|((t, (w, plus)), minus)| {
            let mut draw = Draw::new();
            let blocks = w.chunks(BLOCK).zip(plus.chunks_mut(BLOCK)).zip(minus.chunks_mut(BLOCK));
            blocks
                .enumerate()
                .for_each(|(i, ((w, plus), minus))| block(&mut draw, t * TASK + i * BLOCK, w, plus, Some(minus)));
        }),
        None => tasks.for_each(|(t, (w, plus))| {
            let mut draw = Draw::new();
            let blocks = w.chunks(BLOCK).zip(plus.chunks_mut(BLOCK));
            blocks.enumerate().for_each(|(i, (w, plus))| block(&mut draw, t * TASK + i * BLOCK, w, plus, None));
        }),
    }
}

/// Both copies where `plus` holds n.
fn combine_in_place<T: FloatElement>(w: &[T], plus: &mut [T], minus: Option<&mut [T]>, factor: f32) {
    if let Some(minus) = minus {
        let tasks = w.par_chunks(TASK).zip(plus.par_chunks(TASK)).zip(minus.par_chunks_mut(TASK));
        tasks.for_each(|((w, n), minus)| {
            add(w, n, minus, -factor);
        });
    }
    w.par_chunks(TASK).zip(plus.par_chunks_mut(TASK)).for_each(|(w, n)| {
        add_to_noise(w, n, factor);
    });
}

simd_kernel! {
    fn add<T: FloatElement, N: FloatElement>(_simd, w: &'a [T], n: &'a [N], to: &'a mut [T], factor: f32) {
        for ((to, w), n) in to.iter_mut().zip(w).zip(n) {
            *to = T::from_f32(n.to_f32().mul_add(factor, w.to_f32()));
        }
    }
}

simd_kernel! {
    fn add_to_noise<T: FloatElement>(_simd, w: &'a [T], n: &'a mut [T], factor: f32) {
        for (n, w) in n.iter_mut().zip(w) {
            *n = T::from_f32(n.to_f32().mul_add(factor, w.to_f32()));
        }
    }
}

simd_kernel! {
    fn add_and_subtract<T: FloatElement>(
        _simd,
        w: &'a [T],
        n: &'a [f32],
        plus: &'a mut [T],
        minus: &'a mut [T],
        factor: f32,
    ) {
        for (((plus, minus), w), n) in plus.iter_mut().zip(minus).zip(w).zip(n) {
            *plus = T::from_f32(n.mul_add(factor, w.to_f32()));
            *minus = T::from_f32(n.mul_add(-factor, w.to_f32()));
        }
    }
}

/// Σ n² over one task.
fn squares(key: NoiseKey, task: usize, len: usize) -> f64 {
    let mut draw = Draw::new();
    let mut n = [0.0; BLOCK];
    let end = len.min((task + 1) * TASK);
    (task * TASK..end)
        .step_by(BLOCK)
        .map(|at| {
            let n = &mut n[..BLOCK.min(end - at)];
            draw.normals(key, at, n);
            squared_norm_block(n)
        })
        .sum()
}

/// A [rows, rank] = elements 0.. of the stream; B [columns, rank] = elements from the next multiple of 4.
fn low_rank_factors(key: NoiseKey, rank: usize, rows: usize, columns: usize) -> (Vec<f32>, Vec<f32>) {
    let draw = |first: usize, len: usize| {
        let mut values = vec![0.0; len];
        values.par_chunks_mut(BLOCK).enumerate().for_each(|(i, to)| Draw::new().normals(key, first + i * BLOCK, to));
        values
    };
    let a = draw(0, rows * rank);
    let b = draw((rows * rank).next_multiple_of(4), columns * rank);
    (a, b)
}

/// ‖A·Bᵀ‖² = Σ (AᵀA)∘(BᵀB).
fn low_rank_squares(a: &[f32], b: &[f32], rank: usize) -> f64 {
    let gram = |m: &[f32]| {
        let mut gram = vec![0.0f64; rank * rank];
        for row in m.chunks_exact(rank) {
            for (gram, x) in gram.chunks_exact_mut(rank).zip(row) {
                gram.iter_mut().zip(row).for_each(|(g, y)| *g += *x as f64 * *y as f64);
            }
        }
        gram
    };
    gram(a).iter().zip(gram(b)).map(|(a, b)| a * b).sum()
}

/// Words of a block of counters, or values of their elements, by the place of the word.
pub(super) type Quads<T> = [[T; BLOCK / 4]; 4];

simd_kernel! {
    /// Words of blocks from `start`: the rounds of [`crate::rng`] on 64-bit lanes, whose upper
    /// halves are left to hold anything, because a round needs no other shuffle then.
    pub(super) fn fill_words(_simd, words: &'a mut Quads<u32>, seed: u64, stream: u64, start: u64) {
        let [w0, w1, w2, w3] = words;
        const LOW: u64 = 0xffff_ffff;
        // Zipped iterators are not vectorised here.
        #[allow(clippy::needless_range_loop)]
        for i in 0..BLOCK / 4 {
            let block = start + i as u64;
            let (mut c0, mut c1, mut c2, mut c3) = (block, block >> 32, stream, stream >> 32);
            let (mut k0, mut k1) = (seed & LOW, seed >> 32);
            for _ in 0..10 {
                let (p0, p1) = ((c0 & LOW) * MULTIPLIERS[0] as u64, (c2 & LOW) * MULTIPLIERS[1] as u64);
                (c0, c1, c2, c3) = (p1 >> 32 ^ c1 ^ k0, p1, p0 >> 32 ^ c3 ^ k1, p0);
                k0 = (k0 + WEYL[0] as u64) & LOW;
                k1 = (k1 + WEYL[1] as u64) & LOW;
            }
            (w0[i], w1[i], w2[i], w3[i]) = (c0 as u32, c1 as u32, c2 as u32, c3 as u32);
        }
    }
}

/// Buffers for the words of [`BLOCK`] elements and for the values made of them.
struct Draw {
    words: Quads<u32>,
    values: Quads<f32>,
}

impl Draw {
    fn new() -> Self {
        Self { words: [[0; BLOCK / 4]; 4], values: [[0.0; BLOCK / 4]; 4] }
    }

    /// Normals of elements from `first`, a multiple of 4; at most [`BLOCK`] of them.
    fn normals(&mut self, key: NoiseKey, first: usize, to: &mut [f32]) {
        fill_words(&mut self.words, key.seed, key.stream, first as u64 / 4);
        let [n0, n1, n2, n3] = &mut self.values;
        pair(&self.words[0], &self.words[1], n0, n1);
        pair(&self.words[2], &self.words[3], n2, n3);
        interleave(&self.values, to);
    }

    /// Signs of elements from `first`, a multiple of 4; at most [`BLOCK`] of them.
    fn signs(&mut self, key: NoiseKey, first: usize, to: &mut [f32]) {
        fill_words(&mut self.words, key.seed, key.stream, first as u64 / 4);
        for (values, words) in self.values.iter_mut().zip(&self.words) {
            signs_of(words, values);
        }
        interleave(&self.values, to);
    }
}

simd_kernel! {
    fn signs_of(_simd, words: &'a [u32; BLOCK / 4], values: &'a mut [f32; BLOCK / 4]) {
        for (value, word) in values.iter_mut().zip(words) {
            *value = f32::from_bits(1.0f32.to_bits() | (word & 0x8000_0000));
        }
    }
}

simd_kernel! {
    fn interleave(_simd, values: &'a Quads<f32>, to: &'a mut [f32]) {
        let (fours, tail) = to.as_chunks_mut::<4>();
        let whole = fours.len();
        for (i, four) in fours.iter_mut().enumerate() {
            *four = [values[0][i], values[1][i], values[2][i], values[3][i]];
        }
        for (j, x) in tail.iter_mut().enumerate() {
            *x = values[j][whole];
        }
    }
}

simd_kernel! {
    /// Box–Muller on words: see [`crate::rng`].
    fn pair(_simd, radii: &'a [u32; BLOCK / 4],
    angles: &'a [u32; BLOCK / 4],
    cosines: &'a mut [f32; BLOCK / 4],
    sines: &'a mut [f32; BLOCK / 4]) {
        for (((radius, angle), c), s) in radii.iter().zip(angles).zip(cosines).zip(sines) {
            let r = (-2.0 * ln(uniform(*radius))).max(0.0).sqrt();
            let (cos, sin) = cos_sin_turns(*angle);
            (*c, *s) = (r * cos, r * sin);
        }
    }
}

/// Natural logarithm of a normal positive number, by the polynomial of Cephes' `logf`.
#[inline(always)]
fn ln(x: f32) -> f32 {
    let bits = x.to_bits();
    let exponent = bits.wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits()) as i32 >> 23;
    let f = f32::from_bits(bits.wrapping_sub((exponent << 23) as u32)) - 1.0;
    let e = exponent as f32;
    let z = f * f;
    let p = 7.037_683_6e-2_f32
        .mul_add(f, -1.151_461e-1)
        .mul_add(f, 1.167_699_9e-1)
        .mul_add(f, -1.242_014_1e-1)
        .mul_add(f, 1.424_932_3e-1)
        .mul_add(f, -1.666_805_8e-1)
        .mul_add(f, 2.000_071_5e-1)
        .mul_add(f, -2.499_999_4e-1)
        .mul_add(f, 3.333_333e-1);
    let y = e.mul_add(-2.121_944_4e-4, p * f * z) - 0.5 * z;
    e.mul_add(0.693_359_4, f + y)
}

/// (cos, sin) of 2π·word·2⁻³²: the quarter turn is taken off exactly, in integers, then Cephes' `sinf` and `cosf`.
#[inline(always)]
fn cos_sin_turns(word: u32) -> (f32, f32) {
    let quarter = word.wrapping_add(1 << 29) >> 30;
    let rest = word.wrapping_sub(quarter << 30) as i32;
    let x = rest as f32 * (std::f32::consts::TAU / 4_294_967_296.0);
    let z = x * x;
    let sin = (-1.951_529_6e-4_f32).mul_add(z, 8.332_161e-3).mul_add(z, -1.666_665_5e-1).mul_add(z * x, x);
    let cos = 2.443_315_7e-5_f32.mul_add(z, -1.388_731_6e-3).mul_add(z, 4.166_664_6e-2).mul_add(z * z, 1.0 - 0.5 * z);
    let swap = quarter & 1 == 1;
    let (c, s) = (if swap { sin } else { cos }, if swap { cos } else { sin });
    let negate = |x: f32, bit: u32| f32::from_bits(x.to_bits() ^ (bit << 31));
    (negate(c, (quarter + 1) >> 1 & 1), negate(s, quarter >> 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng::words;

    const KEY: NoiseKey = NoiseKey { seed: 0x1234_5678_9abc_def0, stream: 42 };

    #[test]
    fn normals_follow_the_documented_mapping() {
        let mut n = vec![0.0; 1000];
        Draw::new().normals(KEY, 4096, &mut n);
        for (i, n) in n.iter().enumerate() {
            let w = words(KEY.seed, KEY.stream, (4096 + i as u64) / 4);
            let (radius, angle) = if i % 4 < 2 { (w[0], w[1]) } else { (w[2], w[3]) };
            let r = (-2.0 * (uniform(radius) as f64).ln()).sqrt();
            let turn = std::f64::consts::TAU * angle as f64 / 2f64.powi(32);
            let exact = r * if i % 2 == 0 { turn.cos() } else { turn.sin() };
            assert!((*n as f64 - exact).abs() <= 4e-7 * r.max(1.0), "{i}: {n}, exact {exact}");
        }
    }

    #[test]
    fn signs_follow_the_documented_mapping() {
        let mut n = vec![0.0; 1023];
        Draw::new().signs(KEY, 1024, &mut n);
        for (i, n) in n.iter().enumerate() {
            let w = words(KEY.seed, KEY.stream, (1024 + i as u64) / 4)[i % 4];
            assert_eq!(*n, if w >> 31 == 1 { -1.0 } else { 1.0 }, "{i}");
        }
    }

    #[test]
    fn logarithm_and_turns_at_their_ends() {
        assert_eq!(ln(1.0), 0.0);
        for word in [0u32, 1, 77, 1 << 20, 1 << 31, u32::MAX - 1000, u32::MAX] {
            let u = uniform(word);
            assert!((ln(u) as f64 - (u as f64).ln()).abs() <= 2e-7 * (u as f64).ln().abs().max(1e-3), "ln {u}");
        }
        for eighth in 0..8u32 {
            for word in [(eighth << 29).wrapping_sub(1), eighth << 29, (eighth << 29) + 1] {
                let turn = std::f64::consts::TAU * word as f64 / 2f64.powi(32);
                let (c, s) = cos_sin_turns(word);
                assert!((c as f64 - turn.cos()).abs() < 1.2e-7 && (s as f64 - turn.sin()).abs() < 1.2e-7, "{word}");
            }
        }
    }
}
