//! Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the one
//! source of randomness. A draw is a function of (seed, stream, position) alone, so it depends neither on the order of
//! work nor on the number of threads.
//!
//! # From a counter to an element
//!
//! Key = (seed low, seed high); counter = (block low, block high, stream low, stream high), all 32-bit words; one
//! application gives words w₀…w₃. Element i of a noise tensor belongs to block i / 4:
//! - **uniform** in (0, 1]: u(w) = w·2⁻³² + 2⁻³³ in f32, w rounded to the nearest f32 first;
//! - **normal** (Box and Muller): elements 4b, 4b+1 = √(−2 ln u(w₀))·(cos, sin)(2π·w₁·2⁻³²), elements 4b+2, 4b+3 the
//!   same of w₂, w₃. |normal| ≤ 6.77;
//! - **sign**: element 4b+j is −1 where bit 31 of wⱼ is set, else +1.
//!
//! The words are exact on every backend; normals agree up to the rounding of ln, cos and sin.

/// Multipliers of a round.
pub(crate) const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// What the key grows by from round to round.
pub(crate) const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// The ten rounds: four words from a counter and a key.
#[inline(always)]
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut c0, mut c1, mut c2, mut c3], [mut k0, mut k1]) = (counter, key);
    for _ in 0..10 {
        let p0 = MULTIPLIERS[0] as u64 * c0 as u64;
        let p1 = MULTIPLIERS[1] as u64 * c2 as u64;
        (c0, c1, c2, c3) = ((p1 >> 32) as u32 ^ c1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ c3 ^ k1, p0 as u32);
        k0 = k0.wrapping_add(WEYL[0]);
        k1 = k1.wrapping_add(WEYL[1]);
    }
    [c0, c1, c2, c3]
}

/// The four words of a block of a stream.
#[inline(always)]
pub fn words(seed: u64, stream: u64, block: u64) -> [u32; 4] {
    let ([b0, b1], [s0, s1]) = (halves(block), halves(stream));
    philox4x32([b0, b1, s0, s1], halves(seed))
}

/// Low and high word.
#[inline(always)]
fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// A uniform in (0, 1].
#[inline(always)]
pub fn uniform(word: u32) -> f32 {
    word as f32 * (1.0 / 4_294_967_296.0) + (0.5 / 4_294_967_296.0)
}

/// A stream of random numbers on the host: shuffles, splits, sampling, initial weights.
#[derive(Clone, Debug)]
pub struct Philox {
    seed: u64,
    stream: u64,
    block: u64,
    words: [u32; 4],
    used: usize,
}

impl Philox {
    /// The stream `stream` of `seed`, at its start.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self { seed, stream, block: 0, words: [0; 4], used: 4 }
    }

    /// The next word: w₀…w₃ of block 0, then of block 1, …
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.words = words(self.seed, self.stream, self.block);
            self.block = self.block.wrapping_add(1);
            self.used = 0;
        }
        let word = self.words[self.used];
        self.used += 1;
        word
    }

    /// Two words, the first the low half.
    pub fn next_u64(&mut self) -> u64 {
        self.next_u32() as u64 | (self.next_u32() as u64) << 32
    }

    /// Uniform in [0, 1), 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal (Box and Muller, the cosine of the pair).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (2.0 * std::f64::consts::PI * self.uniform()).cos()
    }

    /// Uniform in 0..n without bias (Lemire, arXiv 1805.10941); 0 for n = 0.
    pub fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        if n == 0 {
            return 0;
        }
        let reject = n.wrapping_neg() % n;
        loop {
            let wide = self.next_u64() as u128 * n as u128;
            if wide as u64 >= reject {
                return (wide >> 64) as usize;
            }
        }
    }

    /// Puts `items` in an order drawn uniformly (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `kat_vectors` of Random123, philox4x32 10.
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox4x32([!0; 4], [!0; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
        assert_eq!(
            philox4x32([0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344], [0xa4093822, 0x299f31d0]),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
        let seed = 0x299f31d0_a4093822;
        assert_eq!(
            words(seed, 0x03707344_13198a2e, 0x85a308d3_243f6a88),
            [0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1]
        );
    }

    #[test]
    fn uniforms_stay_in_their_interval() {
        assert!(uniform(0) > 0.0);
        assert_eq!(uniform(u32::MAX), 1.0);
        let mut rng = Philox::new(7, 1);
        let mean = (0..100_000).map(|_| rng.uniform()).inspect(|u| assert!((0.0..1.0).contains(u))).sum::<f64>() / 1e5;
        assert!((mean - 0.5).abs() < 0.005, "{mean}");
    }

    #[test]
    fn normals_have_unit_moments() {
        let mut rng = Philox::new(7, 2);
        let draws: Vec<f64> = (0..200_000).map(|_| rng.normal()).collect();
        let mean = draws.iter().sum::<f64>() / draws.len() as f64;
        let variance = draws.iter().map(|x| x * x).sum::<f64>() / draws.len() as f64;
        assert!(mean.abs() < 0.01 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
    }

    #[test]
    fn below_is_even_and_shuffle_permutes() {
        let mut rng = Philox::new(3, 0);
        let mut counts = [0usize; 7];
        for _ in 0..70_000 {
            counts[rng.below(7)] += 1;
        }
        assert!(counts.iter().all(|c| c.abs_diff(10_000) < 500), "{counts:?}");
        assert_eq!((rng.below(0), rng.below(1)), (0, 0));
        let mut items: Vec<usize> = (0..100).collect();
        rng.shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn streams_repeat_and_differ() {
        let draw = |seed, stream| {
            let mut rng = Philox::new(seed, stream);
            [rng.next_u32(), rng.next_u32(), rng.next_u32(), rng.next_u32(), rng.next_u32()]
        };
        assert_eq!(draw(1, 2), draw(1, 2));
        assert_ne!(draw(1, 2), draw(1, 3));
        assert_ne!(draw(1, 2), draw(2, 2));
        assert_eq!(draw(1, 2)[4], words(1, 2, 1)[0]);
    }
}
