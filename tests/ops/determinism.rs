//! The same bytes on any number of threads.

use super::*;
use swat::backend::cpu::{Cpu, Elements};

/// Runs `f` in pools of 1, 2 and 5 threads and compares what it returns bit by bit.
#[track_caller]
fn same_on_any_pool(f: impl Fn() -> Vec<f64> + Sync) {
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(&f).into_iter().map(f64::to_bits).collect::<Vec<u64>>()
    };
    let alone = on(1);
    for threads in [2, 2, 5] {
        assert!(alone == on(threads), "{threads} threads");
    }
}

/// Runs these functions as tests in f32, and in bf16 with either state.
macro_rules! in_every_precision {
    ($($name:ident),* $(,)?) => {
        in_every_precision!(f32 swat::backend::cpu::F32: $($name),*);
        in_every_precision!(f32_state swat::backend::F32State: $($name),*);
        in_every_precision!(bf16_state swat::backend::Bf16State: $($name),*);
    };
    ($module:ident $elements:ty: $($name:ident),*) => {
        mod $module {
            $(#[test] fn $name() { super::$name(&swat::backend::cpu::Cpu::<$elements>::default()); })*
        }
    };
}

fn float<E: Elements, T: FloatElement>(b: &Cpu<E>, stream: u64, len: usize) -> Buffer<Cpu<E>, T> {
    put(b, &normals(stream, len)).device
}

fn linear_layers<E: Elements>(b: &Cpu<E>) {
    for (tokens, inputs, outputs) in [(1, 576, 1536), (4, 1536, 576), (300, 576, 1000), (1024, 576, 192)] {
        same_on_any_pool(|| {
            let shape = LinearShape { tokens, inputs, outputs };
            let (x, w, mut y) =
                (float(b, 1, tokens * inputs), float(b, 2, outputs * inputs), float(b, 3, tokens * outputs));
            Linear::new(x.view(), w.view(), y.view_mut(), shape).run(b).unwrap();
            let (mut dx, mut dw) = (float(b, 4, tokens * inputs), float(b, 5, outputs * inputs));
            LinearBackwardInput {
                accumulate: true,
                ..LinearBackwardInput::new(y.view(), w.view(), dx.view_mut(), shape)
            }
            .run(b)
            .unwrap();
            LinearBackwardWeight {
                accumulate: true,
                ..LinearBackwardWeight::new(y.view(), x.view(), dw.view_mut(), shape)
            }
            .run(b)
            .unwrap();
            let mut dbias = float(b, 6, outputs);
            LinearBackwardBias { dy: y.view(), dbias: dbias.view_mut(), accumulate: true }.run(b).unwrap();
            [get(b, &y), get(b, &dx), get(b, &dw), get(b, &dbias)].concat()
        });
    }
}

fn attention<E: Elements>(b: &Cpu<E>) {
    for (lengths, window) in [(&[300usize, 7, 1, 90][..], None), (&[400, 30], Some(50))] {
        same_on_any_pool(|| {
            let tokens: usize = lengths.iter().sum();
            let documents = documents(b, lengths);
            let shape = AttentionShape { heads: 6, kv_heads: 2, head_dim: 64, scale: 0.125, window };
            let (q_len, kv_len) = (tokens * 6 * 64, tokens * 2 * 64);
            let (q, k, v, d_o) = (float(b, 1, q_len), float(b, 2, kv_len), float(b, 3, kv_len), float(b, 4, q_len));
            let (mut o, mut lse) = (float(b, 5, q_len), float(b, 5, tokens * 6));
            Attention {
                q: q.view(),
                k: k.view(),
                v: v.view(),
                o: o.view_mut(),
                lse: Some(lse.view_mut()),
                shape,
                documents: &documents,
            }
            .run(b)
            .unwrap();
            let (mut dq, mut dk, mut dv) = (float(b, 6, q_len), float(b, 6, kv_len), float(b, 6, kv_len));
            AttentionBackward {
                q: q.view(),
                k: k.view(),
                v: v.view(),
                o: o.view(),
                lse: lse.view(),
                d_o: d_o.view(),
                dq: dq.view_mut(),
                dk: dk.view_mut(),
                dv: dv.view_mut(),
                shape,
                documents: &documents,
            }
            .run(b)
            .unwrap();
            let mut last = float(b, 7, 6 * 64);
            let span = [0, lengths[0] as u32];
            let on_device = put_u32(b, &span);
            let (q, spans) = (q.range(0..6 * 64), DecodeSpans { host: &span, device: on_device.view() });
            AttentionDecode { q, k: k.view(), v: v.view(), o: last.view_mut(), spans, shape }.run(b).unwrap();
            [get(b, &o), get(b, &lse), get(b, &dq), get(b, &dk), get(b, &dv), get(b, &last)].concat()
        });
    }
}

fn reductions_over_rows<E: Elements>(b: &Cpu<E>) {
    let (rows, width) = (700, 192);
    same_on_any_pool(|| {
        let (x, dy, weight) = (float(b, 1, rows * width), float(b, 2, rows * width), float(b, 3, width));
        let (mut y, mut rstd) = (float(b, 4, rows * width), float(b, 4, rows));
        RmsNorm { x: x.view(), weight: weight.view(), y: y.view_mut(), rstd: Some(rstd.view_mut()), eps: 1e-6 }
            .run(b)
            .unwrap();
        let (mut dx, mut dw) = (float(b, 5, rows * width), float(b, 6, width));
        let (dxv, dwv) = (Some(dx.view_mut()), Some(dw.view_mut()));
        RmsNormBackward {
            dy: dy.view(),
            x: x.view(),
            weight: weight.view(),
            rstd: rstd.view(),
            dx: dxv,
            dweight: dwv,
            accumulate_dx: true,
            accumulate_dweight: true,
        }
        .run(b)
        .unwrap();
        let chosen = put_u32(b, &(0..rows as u32).map(|r| r * r % 13).collect::<Vec<_>>());
        let mut table = float(b, 7, 13 * width);
        EmbeddingBackward { dy: dy.view(), rows: chosen.view(), dtable: table.view_mut(), width }.run(b).unwrap();
        let mut sums = float(b, 9, 13 * width);
        AddRows { from: dy.view(), rows: chosen.view(), to: sums.view_mut(), width }.run(b).unwrap();
        let (mut losses, targets) = (float(b, 8, rows), put_u32(b, &vec![5; rows]));
        CrossEntropy {
            logits: y.view_mut(),
            targets: targets.view(),
            losses: losses.view_mut(),
            vocab: width,
            scale: Some(0.1),
            terms: None,
        }
        .run(b)
        .unwrap();
        [get(b, &y), get(b, &rstd), get(b, &dx), get(b, &dw), get(b, &table), get(b, &sums), get(b, &losses)].concat()
    });
}

fn steps_and_perturbations<E: Elements>(b: &Cpu<E>) {
    let len = 200_000;
    same_on_any_pool(|| {
        let (mut w, g, mut m, mut v) = (float(b, 1, len), float(b, 2, len), float(b, 3, len), float(b, 4, len));
        let n = float(b, 8, len);
        let mut squares = float(b, 5, 1);
        SumSquares { parts: &[g.view()], squares: squares.view_mut() }.run(b).unwrap();
        let mut table = [AdamWModule {
            weight: w.view_mut(),
            grad: g.view(),
            m: m.view_mut(),
            v: v.view_mut(),
            lr: 1e-3,
            weight_decay: 0.1,
        }];
        let hyper = AdamW {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            step: 3,
            max_grad_norm: Some(1.0),
            seed: 1,
            rounding: Rounding::Stochastic,
        };
        AdamWMasked { table: &mut table, squares: squares.view(), hyper }.run(b).unwrap();
        let key = NoiseKey { seed: 1, stream: 2 };
        let mut out = vec![];
        for direction in [
            Direction::Gaussian(key),
            Direction::Rademacher(key),
            Direction::LowRank { key, rank: 8, rows: 400 },
            Direction::Given(n.view()),
        ] {
            let (mut plus, mut minus) = (float(b, 6, len), float(b, 7, len));
            Perturb {
                w: n.view(),
                squares: None,
                direction,
                epsilon: 0.3,
                plus: plus.view_mut(),
                minus: Some(minus.view_mut()),
            }
            .run(b)
            .unwrap();
            out.extend([get(b, &plus), get(b, &minus)].concat());
        }
        out.extend([get(b, &w), get(b, &m), get(b, &v), get(b, &squares)].concat());
        out
    });
}

in_every_precision!(linear_layers, attention, reductions_over_rows, steps_and_perturbations);
