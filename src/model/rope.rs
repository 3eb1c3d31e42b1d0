//! Table of cosines and sines for rotary position embedding (RoFormer, arXiv 2104.09864).

use super::{ModelConfig, RopeScaling};
use rayon::prelude::*;
use std::f64::consts::PI;

/// Table of [positions, head_dim]: per position the cosines of head_dim / 2 frequencies, then their sines, both times
/// the attention factor.
///
/// Formulas and roundings follow `transformers.modeling_rope_utils`: frequencies and angles are f32; powers, cosines
/// and sines are computed in f64 and rounded. With [`RopeScaling::Dynamic`] the frequencies depend on `positions`;
/// otherwise a shorter table is a prefix of a longer one.
pub fn rope_table(config: &ModelConfig, positions: usize) -> Vec<f32> {
    let frequencies = frequencies(config, positions);
    let attention_factor = match config.rope.scaling {
        RopeScaling::Yarn { attention_factor, .. } => attention_factor as f32,
        _ => 1.0,
    };
    let mut table = vec![0.0; positions * config.head_dim];
    table.par_chunks_exact_mut(config.head_dim).enumerate().for_each(|(position, row)| {
        let (cosines, sines) = row.split_at_mut(config.head_dim / 2);
        for ((frequency, cosine), sine) in frequencies.iter().zip(cosines).zip(sines) {
            let angle = f64::from(position as f32 * frequency);
            *cosine = angle.cos() as f32 * attention_factor;
            *sine = angle.sin() as f32 * attention_factor;
        }
    });
    table
}

/// Radians per position of each pair, [head_dim / 2].
fn frequencies(config: &ModelConfig, positions: usize) -> Vec<f32> {
    let theta = config.rope.theta;
    match config.rope.scaling {
        RopeScaling::None => inverse_powers(config, theta),
        RopeScaling::Linear { factor } => scaled(inverse_powers(config, theta), factor as f32),
        RopeScaling::Dynamic { factor } => inverse_powers(config, dynamic_theta(config, factor, positions)),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions } => {
            let context = original_max_positions as f64;
            let (low, high) = (low_freq_factor as f32, high_freq_factor as f32);
            let longest = (context / low_freq_factor) as f32;
            let shortest = (context / high_freq_factor) as f32;
            let stretch = |frequency: f32| {
                let wavelength = (2.0 * PI) as f32 / frequency;
                if wavelength < shortest {
                    frequency
                } else if wavelength > longest {
                    frequency / factor as f32
                } else {
                    let smooth = (context as f32 / wavelength - low) / (high - low);
                    (1.0 - smooth) * frequency / factor as f32 + smooth * frequency
                }
            };
            inverse_powers(config, theta).into_iter().map(stretch).collect()
        }
        RopeScaling::Yarn { factor, beta_fast, beta_slow, original_max_positions, truncate, .. } => {
            let [mut low, mut high] =
                [beta_fast, beta_slow].map(|turns| yarn_pair(config, turns, original_max_positions));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let ramp = yarn_ramp(config, low, high);
            let blend = |(power, ramp): (f32, f32)| {
                let kept = 1.0 - ramp;
                1.0 / (factor as f32 * power) * (1.0 - kept) + 1.0 / power * kept
            };
            powers(config, theta).into_iter().zip(ramp).map(blend).collect()
        }
    }
}

/// theta^(2i / head_dim)
fn powers(config: &ModelConfig, theta: f64) -> Vec<f32> {
    let theta = f64::from(theta as f32);
    let exponent = |i: usize| (2 * i) as f32 / config.head_dim as f32;
    (0..config.head_dim / 2).map(|i| theta.powf(f64::from(exponent(i))) as f32).collect()
}

fn inverse_powers(config: &ModelConfig, theta: f64) -> Vec<f32> {
    powers(config, theta).into_iter().map(|power| 1.0 / power).collect()
}

fn scaled(frequencies: Vec<f32>, factor: f32) -> Vec<f32> {
    frequencies.into_iter().map(|frequency| frequency / factor).collect()
}

/// Base of the frequencies under NTK-aware scaling at this length.
fn dynamic_theta(config: &ModelConfig, factor: f64, positions: usize) -> f64 {
    let exponent = config.head_dim as f64 / (config.head_dim as f64 - 2.0);
    let trained = config.max_positions;
    let stretch = factor * positions.max(trained) as f64 / trained as f64 - (factor - 1.0);
    config.rope.theta * stretch.powf(exponent)
}

/// The (fractional) pair of a head whose rotation makes this many turns over the original context.
fn yarn_pair(config: &ModelConfig, turns: f64, context: usize) -> f64 {
    let width = config.head_dim as f64;
    width * (context as f64 / (turns * 2.0 * PI)).ln() / (2.0 * config.rope.theta.ln())
}

/// YaRN's ramp between two pairs, [head_dim / 2]: 0 keeps a frequency, 1 divides it.
fn yarn_ramp(config: &ModelConfig, low: f64, high: f64) -> Vec<f32> {
    let (low, mut high) = (low.max(0.0), high.min(config.head_dim as f64 - 1.0));
    if low == high {
        high += 0.001;
    }
    (0..config.head_dim / 2).map(|i| ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0)).collect()
}
