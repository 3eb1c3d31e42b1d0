//! What users wait for, on the shape of SmolLM2-135M with random weights: a training step (full, and with only some
//! modules trained), a decoded token, and a cell of the perturbed sweep.

use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use std::time::Duration;
use swat::backend::cpu::Cpu;
use swat::engine::{Batch, Decoder, GenerateOptions, Gradients, Member, NoiseKind, SweepOptions};
use swat::model::{ModelConfig, Rope, RopeScaling};
use swat::modules::{Cell, ModuleKind, ModuleSet, ParamId};

fn smollm2_135m() -> Decoder<Cpu> {
    let config = ModelConfig {
        family: "llama".into(),
        vocab: 49152,
        hidden: 576,
        ffn: 1536,
        layers: 30,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        rms_norm_eps: 1e-5,
        rope: Rope { theta: 100_000.0, scaling: RopeScaling::None },
        max_positions: 8192,
        tied: true,
        biases: vec![],
        qk_norm: false,
        windows: vec![None; 30],
        bos: None,
        eos: vec![],
    };
    let mut state = 1u32;
    Decoder::new(Cpu::new(), config, |_, shape| {
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        let norm = shape.len() == 1;
        Ok((0..shape.iter().product::<usize>()).map(|_| if norm { 1.0 } else { 0.1 * next() }).collect())
    })
    .expect("memory for 135M parameters")
}

fn documents(count: usize, tokens: usize) -> Vec<Vec<u32>> {
    (0..count).map(|d| (0..tokens).map(|i| ((d * 7919 + i * 104_729) % 49152) as u32).collect()).collect()
}

fn train_step(c: &mut Criterion, model: &Decoder<Cpu>) {
    let documents = documents(4, 256);
    let mut batch = Batch::from_prompts(documents.iter().map(Vec::as_slice));
    batch.targets = batch.tokens[1..].iter().copied().chain([0]).collect();
    let mut group = c.benchmark_group("train_step/smollm2-135m/4x256");
    group.sampling_mode(SamplingMode::Flat).sample_size(10).measurement_time(Duration::from_secs(30));
    group.throughput(Throughput::Elements(1024));
    let attention = |id: ParamId| matches!(id.cell(), Cell::Module(m) if m.kind.in_attention());
    let top_half = |id: ParamId| matches!(id.cell(), Cell::Module(m) if m.layer >= 15);
    let top_down = |id: ParamId| matches!(id.cell(), Cell::Module(m) if m.layer >= 23 && m.kind == ModuleKind::Down);
    let all = |_: ParamId| true;
    let sets: [(&str, &dyn Fn(ParamId) -> bool); 4] =
        [("all", &all), ("qkvo", &attention), ("top-half", &top_half), ("top-quarter-down", &top_down)];
    for (name, trains) in sets {
        let mut gradients = Gradients::new(model, trains).expect("memory");
        group.bench_function(name, |b| {
            b.iter(|| model.loss_and_gradients(&batch, &mut gradients, 1e-3, false, false).expect("a valid batch"))
        });
    }
    group.finish();
}

fn decode(c: &mut Criterion, model: &Decoder<Cpu>) {
    let mut group = c.benchmark_group("generate/smollm2-135m");
    group.sampling_mode(SamplingMode::Flat).sample_size(10).measurement_time(Duration::from_secs(10));
    for count in [1, 16] {
        let prompts = documents(count, 32);
        let options = GenerateOptions { max_new_tokens: 32, ..GenerateOptions::default() };
        group.throughput(Throughput::Elements(32 * count as u64));
        group.bench_function(format!("{count}x32"), |b| {
            b.iter(|| model.generate(&prompts, &options, &mut |_, _| {}).expect("valid prompts"))
        });
    }
    group.finish();
}

fn sweep(c: &mut Criterion, model: &Decoder<Cpu>) {
    let documents = documents(64, 32);
    let prompts = Batch::from_prompts(documents.iter().map(Vec::as_slice));
    let options = SweepOptions {
        kind: NoiseKind::Gaussian,
        epsilon: 1.0,
        layers: vec![30],
        head_rows: vec![1, 2, 3],
        budget_bytes: 1 << 30,
    };
    let mut group = c.benchmark_group("sweep/smollm2-135m/64x32");
    group.sampling_mode(SamplingMode::Flat).sample_size(10).measurement_time(Duration::from_secs(20));
    // A third of the way from both ends, and the middle: together about the mean cost of a cell.
    for layer in [5, 15, 25] {
        let members: Vec<Member> = ModuleKind::ALL
            .into_iter()
            .map(|kind| [Cell::module(layer, kind)].into_iter().collect::<ModuleSet>())
            .flat_map(|cells| [false, true].map(|negative| Member { cells: cells.clone(), seed: 1, negative }))
            .collect();
        group.throughput(Throughput::Elements(members.len() as u64));
        group.bench_function(format!("layer{layer}"), |b| {
            b.iter(|| model.sweep(&prompts, &members, &options, &mut |_, _| Ok(())).expect("valid prompts"))
        });
    }
    group.finish();
}

fn engine(c: &mut Criterion) {
    let model = smollm2_135m();
    train_step(c, &model);
    decode(c, &model);
    sweep(c, &model);
}

criterion_group!(benches, engine);
criterion_main!(benches);
