//! Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011). A draw is a
//! function of (seed, stream, position), so it depends neither on the order of work nor on the number of threads.
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
//! Words are exact on every backend; normals agree up to the rounding of ln, cos and sin.

/// Multipliers of each round.
pub(crate) const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
/// Increments of the key between rounds.
pub(crate) const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Philox4x32 with ten rounds.
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

/// The four words of block `block` of a stream.
#[inline(always)]
pub fn words(seed: u64, stream: u64, block: u64) -> [u32; 4] {
    let ([b0, b1], [s0, s1]) = (halves(block), halves(stream));
    philox4x32([b0, b1, s0, s1], halves(seed))
}

#[inline(always)]
fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

/// Maps a word to a uniform number in (0, 1].
#[inline(always)]
pub fn uniform(word: u32) -> f32 {
    word as f32 * (1.0 / 4_294_967_296.0) + (0.5 / 4_294_967_296.0)
}

/// A stream of random numbers on the host, for shuffles, splits, sampling and initial weights.
#[derive(Clone, Debug)]
pub struct Philox {
    seed: u64,
    stream: u64,
    block: u64,
    words: [u32; 4],
    used: usize,
}

impl Philox {
    /// The start of stream `stream` of `seed`.
    pub fn new(seed: u64, stream: u64) -> Self {
        Self { seed, stream, block: 0, words: [0; 4], used: 4 }
    }

    /// The next word: w₀…w₃ of block 0, then those of block 1, and so on.
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

    /// The next two words, the low half first.
    pub fn next_u64(&mut self) -> u64 {
        self.next_u32() as u64 | (self.next_u32() as u64) << 32
    }

    /// A uniform number in [0, 1) with 53 random bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A standard normal number (Box and Muller, cosine branch).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (2.0 * std::f64::consts::PI * self.uniform()).cos()
    }

    /// An unbiased uniform number in 0..n (Lemire, arXiv 1805.10941); 0 for n = 0.
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

    /// One of `choices`, each with the same probability.
    ///
    /// # Panics
    /// If there are no choices.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }

    /// Shuffles `items` uniformly (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}
