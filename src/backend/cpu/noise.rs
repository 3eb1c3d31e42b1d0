//! Random numbers of [`crate::rng`], a block at a time with the vectors of this machine.

use super::simd::simd_kernel;
use crate::backend::NoiseKey;
use crate::rng::{MULTIPLIERS, WEYL, uniform};

/// Elements of a block.
pub(super) const BLOCK: usize = 1024;

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
pub(super) struct NoiseBlock {
    words: Quads<u32>,
    values: Quads<f32>,
}

impl NoiseBlock {
    pub(super) fn new() -> Self {
        Self { words: [[0; BLOCK / 4]; 4], values: [[0.0; BLOCK / 4]; 4] }
    }

    /// Normals of elements from `first`, a multiple of 4; at most [`BLOCK`] of them.
    pub(super) fn normals(&mut self, key: NoiseKey, first: usize, to: &mut [f32]) {
        fill_words(&mut self.words, key.seed, key.stream, first as u64 / 4);
        let [n0, n1, n2, n3] = &mut self.values;
        pair(&self.words[0], &self.words[1], n0, n1);
        pair(&self.words[2], &self.words[3], n2, n3);
        interleave(&self.values, to);
    }

    /// Signs of elements from `first`, a multiple of 4; at most [`BLOCK`] of them.
    pub(super) fn signs(&mut self, key: NoiseKey, first: usize, to: &mut [f32]) {
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
    fn pair(
        _simd,
        radii: &'a [u32; BLOCK / 4],
        angles: &'a [u32; BLOCK / 4],
        cosines: &'a mut [f32; BLOCK / 4],
        sines: &'a mut [f32; BLOCK / 4],
    ) {
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
        NoiseBlock::new().normals(KEY, 4096, &mut n);
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
        NoiseBlock::new().signs(KEY, 1024, &mut n);
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
