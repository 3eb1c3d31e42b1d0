//! Shared by test executables: small random models, emulated attention, the stand-in GPU, a judge, trace rules.
#![allow(dead_code)]

pub mod attention;
pub mod hub_server;
pub mod judge_server;
pub mod standin;
pub mod trace;

use swat::backend::Backend;
use swat::backend::cpu::Cpu;
use swat::engine::{Batch, Decoder};
use swat::model::{ModelConfig, Rope, RopeScaling};
use swat::modules::ModuleKind;

/// A shape with odd sizes: GQA, head_dim unlike hidden / heads, biases and q/k norms on request.
pub fn config(layers: usize, tied: bool, biases: bool, qk_norm: bool) -> ModelConfig {
    ModelConfig {
        family: "qwen3".into(),
        vocab: 61,
        hidden: 24,
        ffn: 40,
        layers,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: RopeScaling::None },
        max_positions: 64,
        tied,
        biases: if biases { vec![ModuleKind::Q, ModuleKind::K, ModuleKind::V] } else { vec![] },
        qk_norm,
        windows: vec![None; layers],
        bos: None,
        eos: vec![0],
    }
}

/// Sizes that every fast kernel supports; two query heads for each key head.
pub fn wide(layers: usize, head_dim: usize) -> ModelConfig {
    ModelConfig {
        vocab: 320,
        hidden: 128,
        ffn: 192,
        heads: 4,
        kv_heads: 2,
        head_dim,
        max_positions: 256,
        ..config(layers, true, false, false)
    }
}

/// A deterministic stream of numbers in [-1, 1).
pub fn numbers(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// Random weights; norm weights around 1.
pub fn decoder(config: ModelConfig, seed: u64) -> Decoder<Cpu> {
    let mut next = numbers(seed);
    Decoder::new(Cpu::new(), config, |_, shape| {
        let centre = if shape.len() == 1 { 1.0 } else { 0.0 };
        Ok((0..shape.iter().product::<usize>()).map(|_| centre + 0.35 * next()).collect())
    })
    .expect("a valid model")
}

/// Random weights that bf16 represents exactly, so that all backends have the same.
pub fn decoder_on<B: Backend>(backend: &B, config: &ModelConfig, seed: u64) -> Decoder<B> {
    let mut next = numbers(seed);
    Decoder::new(backend.clone(), config.clone(), |_, shape| {
        let (centre, spread) = match shape {
            [_] => (1.0, 0.3),
            [_, inputs, ..] => (0.0, 1.7 / (*inputs as f32).sqrt()),
            [] => unreachable!("a tensor without dimensions"),
        };
        let round = |x: f32| half::bf16::from_f32(x).to_f32();
        Ok((0..shape.iter().product::<usize>()).map(|_| round(centre + spread * next())).collect())
    })
    .expect("a valid model")
}

/// Documents of the given lengths with random tokens; every third target is ignored.
pub fn batch(config: &ModelConfig, lengths: &[usize], seed: u64) -> Batch {
    let mut next = numbers(seed);
    let documents: Vec<Vec<u32>> = lengths
        .iter()
        .map(|n| (0..*n).map(|_| ((next() + 1.0) * 0.5 * (config.vocab - 1) as f32) as u32).collect())
        .collect();
    let mut batch = Batch::from_prompts(documents.iter().map(Vec::as_slice));
    for document in &documents {
        for i in 0..document.len() {
            let trained = i + 1 < document.len() && i % 3 != 1;
            batch.targets.push(if trained { document[i + 1] } else { swat::backend::IGNORE });
        }
    }
    batch
}

/// Largest difference, relative to the largest element of `expected`.
pub fn relative(actual: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(actual.len(), expected.len());
    let scale = expected.iter().fold(0f32, |m, x| m.max(x.abs())).max(1e-12);
    actual.iter().zip(expected).fold(0f32, |m, (a, b)| m.max((a - b).abs())) / scale
}
