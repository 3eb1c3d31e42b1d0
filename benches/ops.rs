//! Operations of the CPU backend at the shapes of SmolLM2-135M and Qwen2.5-0.5B.
//!
//! `cargo bench --bench ops -- linear` for some of them. Throughput is elements (FLOP for products, so Gelem/s reads as
//! GFLOP/s) or bytes read and written. Variant `gemm-crate` is the peer that products are held against.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use std::hint::black_box;
use swat::backend::cpu::Cpu;
use swat::backend::{
    AdamW, AdamWModule, Attention, Backend, Buffer, Direction, Documents, Epilogue, LinearShape, NoiseKey, Rounding,
    Sampling,
};

const B: Cpu = Cpu;

struct Model {
    name: &'static str,
    hidden: usize,
    ffn: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
}

const MODELS: [Model; 2] = [
    Model { name: "smollm2-135m", hidden: 576, ffn: 1536, heads: 9, kv_heads: 3, head_dim: 64, vocab: 49_152 },
    Model { name: "qwen2.5-0.5b", hidden: 896, ffn: 4864, heads: 14, kv_heads: 2, head_dim: 64, vocab: 151_936 },
];

/// Numbers of both signs that differ from one another.
fn float(len: usize) -> Buffer<Cpu, f32> {
    let values: Vec<f32> = (0..len).map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 300.0).collect();
    let mut buffer = B.zeros(len).unwrap();
    B.write(&values, buffer.view_mut()).unwrap();
    buffer
}

fn integers(values: impl Iterator<Item = u32>) -> Buffer<Cpu, u32> {
    let values: Vec<u32> = values.collect();
    let mut buffer = B.zeros(values.len()).unwrap();
    B.write(&values, buffer.view_mut()).unwrap();
    buffer
}

fn documents(count: usize, tokens: usize) -> Documents<Cpu> {
    let starts: Vec<u32> = (0..=count).map(|i| (i * tokens) as u32).collect();
    Documents { device: integers(starts.iter().copied()), starts }
}

/// The peer: C [m, n] = A·B with strides (row, column).
fn gemm_crate(
    c: &mut [f32],
    (a, sa): (&[f32], (usize, usize)),
    (b, sb): (&[f32], (usize, usize)),
    (m, n, k): (usize, usize, usize),
) {
    assert!(c.len() >= m * n && a.len() >= m * k && b.len() >= k * n);
    let [a_rows, a_columns, b_rows, b_columns] = [sa.0, sa.1, sb.0, sb.1].map(|s| s as isize);
    // SAFETY: dense matrices of the sizes asserted above.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            n as isize,
            false,
            a.as_ptr(),
            a_columns,
            a_rows,
            b.as_ptr(),
            b_columns,
            b_rows,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::Rayon(0),
        );
    }
}

fn linear(c: &mut Criterion) {
    for model in &MODELS {
        let Model { hidden, ffn, heads, kv_heads, head_dim, vocab, .. } = *model;
        let shapes = [
            (1024, hidden, heads * head_dim),
            (1024, hidden, kv_heads * head_dim),
            (1024, hidden, ffn),
            (1024, ffn, hidden),
            (256, hidden, vocab),
        ];
        for (tokens, inputs, outputs) in shapes {
            let shape = LinearShape { tokens, inputs, outputs };
            let id = format!("{}/{tokens}x{inputs}x{outputs}", model.name);
            let (x, w, dy) = (float(tokens * inputs), float(outputs * inputs), float(tokens * outputs));
            let (mut y, mut dx, mut dw) = (float(tokens * outputs), float(tokens * inputs), float(outputs * inputs));
            let host = vec![0.5f32; tokens * inputs.max(outputs)];
            let host_w = vec![0.25f32; outputs * inputs];
            let mut out = vec![0.0f32; (tokens * outputs).max(tokens * inputs).max(outputs * inputs)];
            let flops = Throughput::Elements(2 * (tokens * inputs * outputs) as u64);
            let mut group = c.benchmark_group("linear/forward");
            group.throughput(flops.clone()).sample_size(10);
            group.bench_function(BenchmarkId::new("swat", &id), |b| {
                b.iter(|| B.linear(x.view(), w.view(), y.view_mut(), shape, Epilogue::default()).unwrap());
            });
            group.bench_function(BenchmarkId::new("gemm-crate", &id), |b| {
                let size = (tokens, outputs, inputs);
                b.iter(|| gemm_crate(&mut out, (&host, (inputs, 1)), (&host_w, (1, inputs)), size));
            });
            group.finish();
            let mut group = c.benchmark_group("linear/backward-input");
            group.throughput(flops.clone()).sample_size(10);
            group.bench_function(BenchmarkId::new("swat", &id), |b| {
                b.iter(|| {
                    B.linear_backward_input(dy.view(), w.view(), dx.view_mut(), shape, 1.0, false).unwrap();
                });
            });
            group.bench_function(BenchmarkId::new("gemm-crate", &id), |b| {
                let size = (tokens, inputs, outputs);
                b.iter(|| gemm_crate(&mut out, (&host, (outputs, 1)), (&host_w, (inputs, 1)), size));
            });
            group.finish();
            let mut group = c.benchmark_group("linear/backward-weight");
            group.throughput(flops).sample_size(10);
            group.bench_function(BenchmarkId::new("swat", &id), |b| {
                b.iter(|| {
                    B.linear_backward_weight(dy.view(), x.view(), dw.view_mut(), shape, 1.0, false).unwrap();
                });
            });
            group.bench_function(BenchmarkId::new("gemm-crate", &id), |b| {
                let size = (outputs, inputs, tokens);
                b.iter(|| gemm_crate(&mut out, (&host, (1, outputs)), (&host, (inputs, 1)), size));
            });
            group.finish();
        }
    }
}

/// Few tokens: bound by reading the weight, so bytes count.
fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("linear/decode");
    group.sample_size(10);
    for model in &MODELS {
        for (inputs, outputs) in [(model.hidden, model.ffn), (model.hidden, model.vocab)] {
            // Rotated, so that no cache holds them all.
            let weights: Vec<_> = (0..(1 << 26) / (inputs * outputs) + 1).map(|_| float(inputs * outputs)).collect();
            group.throughput(Throughput::Bytes((inputs * outputs * 4) as u64));
            for tokens in [1, 4, 8, 16] {
                let (x, mut y) = (float(tokens * inputs), float(tokens * outputs));
                let mut next = weights.iter().cycle();
                group.bench_function(format!("{}/{tokens}x{inputs}x{outputs}", model.name), |b| {
                    b.iter(|| {
                        let w = next.next().unwrap().view();
                        let shape = LinearShape { tokens, inputs, outputs };
                        B.linear(x.view(), w, y.view_mut(), shape, Epilogue::default()).unwrap();
                    });
                });
            }
        }
    }
}

fn attention(c: &mut Criterion) {
    for model in &MODELS {
        let Model { heads, kv_heads, head_dim, .. } = *model;
        for (count, len) in [(4, 256), (64, 32), (1, 1024)] {
            let documents = documents(count, len);
            let shape = Attention { heads, kv_heads, head_dim, scale: 0.125, window: None, documents: &documents };
            let tokens = count * len;
            let (q, d_o) = (float(tokens * heads * head_dim), float(tokens * heads * head_dim));
            let (k, v) = (float(tokens * kv_heads * head_dim), float(tokens * kv_heads * head_dim));
            let (mut o, mut lse) = (float(q.len()), float(tokens * heads));
            let (mut dq, mut dk, mut dv) = (float(q.len()), float(k.len()), float(v.len()));
            // Causal: half of the square.
            let flops = 2 * (count * len * (len + 1) * heads * head_dim) as u64;
            let id = format!("{}/{count}x{len}", model.name);
            let mut group = c.benchmark_group("attention");
            group.sample_size(10).throughput(Throughput::Elements(flops));
            group.bench_function(BenchmarkId::new("forward", &id), |b| {
                b.iter(|| {
                    let lse = Some(lse.view_mut());
                    B.attention(q.view(), k.view(), v.view(), o.view_mut(), lse, &shape).unwrap();
                });
            });
            group.throughput(Throughput::Elements(flops * 5 / 2));
            group.bench_function(BenchmarkId::new("backward", &id), |b| {
                b.iter(|| {
                    B.attention_backward(
                        q.view(),
                        k.view(),
                        v.view(),
                        o.view(),
                        lse.view(),
                        d_o.view(),
                        dq.view_mut(),
                        dk.view_mut(),
                        dv.view_mut(),
                        &shape,
                    )
                    .unwrap();
                });
            });
            let mut spans = B.zeros::<u32>(2 * count).unwrap();
            let host: Vec<u32> = (0..count).flat_map(|i| [(i * len) as u32, len as u32]).collect();
            B.write(&host, spans.view_mut()).unwrap();
            let width = count * heads * head_dim;
            group.throughput(Throughput::Bytes((8 * k.len()) as u64));
            group.bench_function(BenchmarkId::new("last-rows", &id), |b| {
                b.iter(|| {
                    let to = o.range_mut(0..width);
                    let (q, spans) = (q.range(0..width), spans.view());
                    B.attention_decode(q, k.view(), v.view(), to, spans, len, &shape).unwrap();
                });
            });
            group.finish();
        }
    }
}

fn elementwise(c: &mut Criterion) {
    for model in &MODELS {
        let Model { hidden, ffn, heads, head_dim, vocab, .. } = *model;
        let tokens = 1024;
        let mut group = c.benchmark_group("elementwise");
        group.sample_size(20);
        let mut bench = |what: &str, bytes: usize, f: &mut dyn FnMut()| {
            group.throughput(Throughput::Bytes(bytes as u64));
            group.bench_function(BenchmarkId::new(what, model.name), |b| b.iter(&mut *f));
        };
        let n = tokens * hidden;
        let (x, dy, weight) = (float(n), float(n), float(hidden));
        let (mut y, mut rstd, mut dx, mut dw) = (float(n), float(tokens), float(n), float(hidden));
        bench("copy", 8 * n, &mut || B.copy(x.view(), y.view_mut()).unwrap());
        bench("rmsnorm-forward", 8 * n, &mut || {
            B.rmsnorm(x.view(), weight.view(), y.view_mut(), Some(rstd.view_mut()), hidden, 1e-5).unwrap();
        });
        bench("rmsnorm-backward", 16 * n, &mut || {
            let (dx, dw) = (Some(dx.view_mut()), Some(dw.view_mut()));
            B.rmsnorm_backward(dy.view(), x.view(), weight.view(), rstd.view(), dx, dw, hidden, true, true).unwrap();
        });
        let positions = integers((0..tokens as u32).map(|i| i % 256));
        let (mut q, mut table) = (float(tokens * heads * head_dim), float(256 * head_dim));
        let angle = |i: usize| (i / head_dim) as f32 * 0.7f32.powi((i % (head_dim / 2)) as i32);
        let turns = (0..table.len()).map(|i| if i % head_dim < head_dim / 2 { angle(i).cos() } else { angle(i).sin() });
        B.write(&turns.collect::<Vec<f32>>(), table.view_mut()).unwrap();
        let bytes = 8 * q.len();
        bench("rope", bytes, &mut || {
            B.rope(q.view_mut(), table.view(), positions.view(), heads, head_dim, false).unwrap();
        });
        let n = tokens * ffn;
        let (mut gate, mut up, mut y) = (float(n), float(n), float(n));
        bench("swiglu-forward", 12 * n, &mut || B.swiglu(gate.view(), up.view(), y.view_mut()).unwrap());
        let (gate_before, up_before) = (float(n), float(n));
        // In place: both are put back each time, and counted.
        bench("swiglu-backward-and-copies", 36 * n, &mut || {
            B.copy(gate_before.view(), gate.view_mut()).unwrap();
            B.copy(up_before.view(), up.view_mut()).unwrap();
            B.swiglu_backward(gate.view_mut(), up.view_mut(), y.view()).unwrap();
        });
        let rows = 64;
        let (mut logits, mut losses) = (float(rows * vocab), float(rows));
        let targets = integers((0..rows as u32).map(|i| i * 7));
        for (what, scale, factor) in [("cross-entropy", None, 4), ("cross-entropy-gradient", Some(1.0), 8)] {
            bench(what, factor * rows * vocab, &mut || {
                B.cross_entropy(logits.view_mut(), targets.view(), losses.view_mut(), vocab, scale).unwrap();
            });
        }
        let (uniforms, mut drawn) = (float(1), integers([0].into_iter()));
        for (what, temperature) in [("sample-greedy", 0.0), ("sample-nucleus", 0.7)] {
            let sampling = Sampling { temperature, top_p: 0.9 };
            bench(what, 4 * vocab, &mut || {
                B.sample(logits.range(0..vocab), uniforms.view(), drawn.view_mut(), vocab, sampling).unwrap();
            });
        }
        let rows = integers((0..tokens as u32).map(|i| i * 7919 % 5000));
        let (mut dtable, dy) = (float(5000 * hidden), float(tokens * hidden));
        bench("embedding-backward", 12 * tokens * hidden, &mut || {
            B.embedding_backward(dy.view(), rows.view(), dtable.view_mut(), hidden).unwrap();
        });
        group.finish();
    }
}

fn modules(c: &mut Criterion) {
    let mut group = c.benchmark_group("modules");
    group.sample_size(10);
    let n = 1 << 24;
    let (mut w, g, mut m, mut v, mut squares) = (float(n), float(n), float(n), float(n), float(1));
    B.clear(v.view_mut()).unwrap();
    group.throughput(Throughput::Bytes(4 * n as u64));
    group.bench_function("sum-squares", |b| b.iter(|| B.sum_squares(&[g.view()], squares.view_mut()).unwrap()));
    let hyper = AdamW {
        beta1: 0.9,
        beta2: 0.999,
        eps: 1e-8,
        step: 3,
        max_grad_norm: Some(1.0),
        seed: 1,
        rounding: Rounding::Nearest,
    };
    group.throughput(Throughput::Bytes(28 * n as u64));
    group.bench_function("adamw", |b| {
        b.iter(|| {
            let mut table = [AdamWModule {
                weight: w.view_mut(),
                grad: g.view(),
                m: m.view_mut(),
                v: v.view_mut(),
                lr: 1e-5,
                weight_decay: 0.1,
            }];
            B.adamw_masked(&mut table, squares.view(), hyper).unwrap();
        });
    });
    for model in &MODELS {
        let n = model.hidden * model.ffn;
        let (w, mut plus, mut minus) = (float(n), float(n), float(n));
        let key = NoiseKey { seed: 1, stream: 2 };
        group.throughput(Throughput::Elements(n as u64));
        for (what, direction) in [
            ("gaussian", Direction::Gaussian(key)),
            ("rademacher", Direction::Rademacher(key)),
            ("lowrank-4", Direction::LowRank { key, rank: 4, rows: model.ffn }),
            ("scale", Direction::Scale),
        ] {
            group.bench_function(BenchmarkId::new(format!("perturb-{what}"), model.name), |b| {
                b.iter(|| {
                    let minus = Some(minus.view_mut());
                    B.perturb(w.view(), black_box(&direction), 0.1, plus.view_mut(), minus).unwrap();
                });
            });
        }
    }
    group.finish();
}

criterion_group! {
    name = ops;
    config = Criterion::default()
        .warm_up_time(std::time::Duration::from_millis(200))
        .measurement_time(std::time::Duration::from_millis(600));
    targets = linear, decode, attention, elementwise, modules
}
criterion_main!(ops);
