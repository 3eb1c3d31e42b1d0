//! Sizes at which a kernel's shared memory is close to a limit of the driver: heads of 64 and a vocabulary of 32,000,
//! where a block needs 48 KiB or slightly less. Every version of a kernel is launched on both compute capabilities.

use crate::common::{batch, decoder_on, standin, wide};
use crate::devices;
use swat::backend::cuda::{
    Bf16State, Cuda, F32State, GemmLayout, GemmPlan, GemmShape, GemmSupport, GemmVersion, Precision, with_plan,
    with_version,
};
use swat::backend::*;
use swat::engine::{GradientOptions, Gradients};
use swat::model::ModelConfig;

fn put<B: Backend, T: Element>(b: &B, values: &[T]) -> Buffer<B, T> {
    let mut buffer = b.zeros(values.len()).unwrap();
    b.write(values, buffer.view_mut()).unwrap();
    buffer
}

fn ones<B: Backend>(b: &B, len: usize) -> Buffer<B, B::Float> {
    put(b, &vec![B::Float::from_f32(1.0); len])
}

fn read<B: Backend, T: FloatElement>(b: &B, buffer: &Buffer<B, T>) -> Vec<f32> {
    let mut host = vec![T::from_f32(0.0); buffer.len()];
    b.read(buffer.view(), &mut host).unwrap();
    host.iter().map(|x| x.to_f32()).collect()
}

/// With a constant V every output is that constant.
fn attention<B: Backend>(b: &B, head_dim: usize) {
    let (tokens, heads, kv_heads) = (130, 2, 1);
    let starts = vec![0, 3, tokens as u32];
    let documents = Documents { device: put(b, &starts), starts };
    let shape = AttentionShape { heads, kv_heads, head_dim, scale: 0.125, window: None };
    let [q, d_o] = [(); 2].map(|()| ones(b, tokens * heads * head_dim));
    let [k, v] = [(); 2].map(|()| ones(b, tokens * kv_heads * head_dim));
    let span = [3u32, 127];
    let on_device = put(b, &span);
    for version in ["flash64", "flash128", "wgmma", "baseline"] {
        with_version(version, || {
            let (mut o, mut lse) = (b.zeros(q.len()).unwrap(), b.zeros(heads * tokens).unwrap());
            let (kv, vv) = (k.view(), v.view());
            Attention {
                q: q.view(),
                k: kv,
                v: vv,
                o: o.view_mut(),
                lse: Some(lse.view_mut()),
                shape,
                documents: &documents,
            }
            .run(b)
            .unwrap();
            assert!(read(b, &o).iter().all(|x| *x == 1.0), "{version}, {}, heads of {head_dim}", b.name());
            let [mut dq, mut dk, mut dv] = [q.len(), k.len(), v.len()].map(|len| b.zeros(len).unwrap());
            let (dqv, dkv, dvv) = (dq.view_mut(), dk.view_mut(), dv.view_mut());
            let (qv, kv, vv, ov, lv, dov) = (q.view(), k.view(), v.view(), o.view(), lse.view(), d_o.view());
            AttentionBackward {
                q: qv,
                k: kv,
                v: vv,
                o: ov,
                lse: lv,
                d_o: dov,
                dq: dqv,
                dk: dkv,
                dv: dvv,
                shape,
                documents: &documents,
            }
            .run(b)
            .unwrap();
            assert!(
                read(b, &dv)[..head_dim].iter().all(|x| (*x / heads as f32 - 11.0 / 6.0).abs() < 0.02),
                "{version}"
            );
            let mut o = b.zeros(heads * head_dim).unwrap();
            let last = q.range(0..heads * head_dim);
            AttentionDecode {
                q: last,
                k: k.view(),
                v: v.view(),
                o: o.view_mut(),
                spans: DecodeSpans { host: &span, device: on_device.view() },
                shape,
            }
            .run(b)
            .unwrap();
            assert!(read(b, &o).iter().all(|x| *x == 1.0), "{version}, {}, decoding", b.name());
        });
    }
}

/// Equal logits: the loss is the logarithm of the vocabulary size.
fn cross_entropy<B: Backend>(b: &B) {
    for vocab in [24_575, 24_576, 32_000, 32_767, 49_152, 152_064] {
        for version in ["vec8", "baseline"] {
            with_version(version, || {
                let (mut logits, mut loss) = (ones(b, 2 * vocab), b.zeros::<f32>(2).unwrap());
                let targets = put(b, &[0, vocab as u32 - 1]);
                CrossEntropy {
                    logits: logits.view_mut(),
                    targets: targets.view(),
                    losses: loss.view_mut(),
                    vocab,
                    scale: Some(1.0),
                    terms: None,
                }
                .run(b)
                .unwrap();
                let expected = (vocab as f32).ln();
                assert!(read(b, &loss).iter().all(|loss| (loss - expected).abs() < 1e-4), "{vocab}, {version}");
                let gradient = read(b, &logits);
                assert!((gradient[0] + 1.0).abs() < 0.01 && (gradient[2 * vocab - 1] + 1.0).abs() < 0.01, "{vocab}");
                assert!((gradient[1] * vocab as f32 - 1.0).abs() < 0.01, "{vocab}, {version}");
            });
        }
    }
}

fn sampling<B: Backend>(b: &B) {
    let vocab = 32_000;
    let mut logits = ones(b, vocab);
    b.write(&[B::Float::from_f32(60.0)], logits.range_mut(vocab - 1..vocab)).unwrap();
    let uniforms = put(b, &[0.5f32]);
    for sampling in [(0.0, 1.0), (1.0, 1.0), (1.0, 0.9)].map(|(temperature, top_p)| Sampling { temperature, top_p }) {
        let mut token = b.zeros::<u32>(1).unwrap();
        Sample { logits: logits.view(), uniforms: uniforms.view(), tokens: token.view_mut(), vocab, sampling }
            .run(b)
            .unwrap();
        let mut drawn = [0];
        b.read(token.view(), &mut drawn).unwrap();
        assert_eq!(drawn, [vocab as u32 - 1], "{sampling:?}");
    }
}

fn products<P: Precision>(b: &Cuda<P>) {
    let (m, n, k) = (136, 264, 128);
    let hopper = b.capability() == (9, 0);
    for (layout, [a_len, b_len]) in
        [(GemmLayout::Tn, [m * k, n * k]), (GemmLayout::Nn, [m * k, n * k]), (GemmLayout::Nt, [m * k, n * k])]
    {
        let shape = GemmShape { layout, m, n, k };
        let (left, right) = (ones(b, a_len), ones(b, b_len));
        for version in GemmVersion::ALL
            .into_iter()
            .filter(|version| version.supports(shape, GemmSupport { aligned: true, hopper }))
        {
            let mut c = b.zeros::<half::bf16>(m * n).unwrap();
            let plan = GemmPlan { version, splits: 1 };
            with_plan(plan, || b.gemm(left.view(), right.view(), c.view_mut(), shape, Epilogue::default())).unwrap();
            assert!(read(b, &c).iter().all(|x| *x == k as f32), "{version:?} of {shape:?}");
        }
    }
}

fn operations<P: Precision>(ordinal: u32) {
    let Some(b) = standin::open::<P>(ordinal) else { return };
    attention(&b, 64);
    attention(&b, 128);
    cross_entropy(&b);
    sampling(&b);
    products(&b);
}

/// Every kernel of a model's forward and backward pass.
fn model<P: Precision>(ordinal: u32) {
    let Some(b) = standin::open::<P>(ordinal) else { return };
    let config = ModelConfig { vocab: 32_000, ..wide(1, 64) };
    let model = decoder_on(&b, &config, 5);
    let mut gradients = Gradients::new(&model, |_| true).unwrap();
    let batch = batch(&config, &[70, 5], 3);
    let mut losses = model.losses_of(batch.trained_tokens()).unwrap();
    model.queue_gradients(&batch, &mut gradients, GradientOptions::scaled(1.0), &mut losses).unwrap();
    let loss = losses.sum().unwrap() / batch.trained_tokens() as f64;
    assert!((5.0..20.0).contains(&loss), "{loss}");
}

#[test]
fn every_version_of_a_kernel_is_launched() {
    for ordinal in devices().iter().copied() {
        if ordinal % 2 == 0 { operations::<F32State>(ordinal) } else { operations::<Bf16State>(ordinal) }
    }
}

#[test]
fn a_model_of_such_sizes_runs() {
    for ordinal in devices().iter().copied() {
        if ordinal % 2 == 0 { model::<F32State>(ordinal) } else { model::<Bf16State>(ordinal) }
    }
}
