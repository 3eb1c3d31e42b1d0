//! Seeded draws.

/// SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): the same seed gives the same draws on every machine.
#[derive(Clone, Debug)]
pub struct Draw {
    state: u64,
}

impl Draw {
    /// Draws of one of many streams of a seed, so that one stream's length does not move another.
    pub fn stream(seed: u64, stream: u64) -> Self {
        Self { state: scramble(seed ^ scramble(stream.wrapping_add(1))) }
    }

    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        scramble(self.state)
    }

    /// A whole number in 0..n; 0 where `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.bits()) * n as u128) >> 64) as usize
    }

    /// A number in [0, 1).
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A standard normal number (Box and Muller).
    pub fn normal(&mut self) -> f32 {
        let radius = (-2.0 * (1.0 - self.unit()).ln()).sqrt();
        (radius * (std::f64::consts::TAU * self.unit()).cos()) as f32
    }

    /// One of `choices`, each with the same probability.
    ///
    /// # Panics
    /// If there are no choices.
    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }

    /// A new order (Fisher and Yates).
    pub fn shuffle<T>(&mut self, values: &mut [T]) {
        for i in (1..values.len()).rev() {
            values.swap(i, self.below(i + 1));
        }
    }
}

fn scramble(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_outputs_are_those_of_the_published_generator() {
        let mut draw = Draw { state: 1234567 };
        let outputs: Vec<u64> = (0..3).map(|_| draw.bits()).collect();
        assert_eq!(outputs, [6457827717110365317, 3203168211198807973, 9817491932198370423]);
    }

    #[test]
    fn every_place_is_equally_likely_for_every_value() {
        let mut counts = [[0u32; 4]; 4];
        for stream in 0..24_000 {
            let mut values = [0, 1, 2, 3];
            Draw::stream(5, stream).shuffle(&mut values);
            for (place, value) in values.into_iter().enumerate() {
                counts[place][value] += 1;
            }
        }
        // 6,000 expected, standard deviation 67.
        assert!(counts.iter().flatten().all(|c| (5_650..6_350).contains(c)), "{counts:?}");
    }

    #[test]
    fn normals_have_mean_zero_and_variance_one() {
        let mut draw = Draw::stream(7, 3);
        let values: Vec<f64> = (0..20_000).map(|_| f64::from(draw.normal())).collect();
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        let variance = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / values.len() as f64;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.04, "mean {mean}, variance {variance}");
    }
}
