//! The same bytes on any number of threads.

use super::*;
use swat::backend::cpu::Cpu;

/// Runs `f` in pools of 1, 2 and 5 threads and compares what it returns bit by bit.
#[track_caller]
fn same_on_any_pool(f: impl Fn() -> Vec<f32> + Sync) {
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(&f).into_iter().map(f32::to_bits).collect::<Vec<u32>>()
    };
    let alone = on(1);
    for threads in [2, 2, 5] {
        assert!(alone == on(threads), "{threads} threads");
    }
}

const B: Cpu = Cpu;

fn float(stream: u64, len: usize) -> Buffer<Cpu, f32> {
    put::<Cpu, f32>(&B, &normals(stream, len)).device
}

#[test]
fn linear_layers() {
    for (tokens, inputs, outputs) in [(1, 576, 1536), (4, 1536, 576), (300, 576, 1000), (1024, 576, 192)] {
        same_on_any_pool(|| {
            let shape = LinearShape { tokens, inputs, outputs };
            let (x, w, mut y) = (float(1, tokens * inputs), float(2, outputs * inputs), float(3, tokens * outputs));
            Linear::new(x.view(), w.view(), y.view_mut(), shape).run(&B).unwrap();
            let (mut dx, mut dw) = (float(4, tokens * inputs), float(5, outputs * inputs));
            LinearBackwardInput {
                accumulate: true,
                ..LinearBackwardInput::new(y.view(), w.view(), dx.view_mut(), shape)
            }
            .run(&B)
            .unwrap();
            LinearBackwardWeight {
                accumulate: true,
                ..LinearBackwardWeight::new(y.view(), x.view(), dw.view_mut(), shape)
            }
            .run(&B)
            .unwrap();
            let mut dbias = float(6, outputs);
            LinearBackwardBias { dy: y.view(), dbias: dbias.view_mut(), accumulate: true }.run(&B).unwrap();
            [y, dx, dw, dbias].iter().flat_map(|t| read(&B, t)).collect()
        });
    }
}

#[test]
fn attention() {
    for (lengths, window) in [(&[300usize, 7, 1, 90][..], None), (&[400, 30], Some(50))] {
        same_on_any_pool(|| {
            let tokens: usize = lengths.iter().sum();
            let documents = documents(&B, lengths);
            let shape = AttentionShape { heads: 6, kv_heads: 2, head_dim: 64, scale: 0.125, window };
            let (q_len, kv_len) = (tokens * 6 * 64, tokens * 2 * 64);
            let (q, k, v, d_o) = (float(1, q_len), float(2, kv_len), float(3, kv_len), float(4, q_len));
            let (mut o, mut lse) = (float(5, q_len), float(5, tokens * 6));
            Attention {
                q: q.view(),
                k: k.view(),
                v: v.view(),
                o: o.view_mut(),
                lse: Some(lse.view_mut()),
                shape,
                documents: &documents,
            }
            .run(&B)
            .unwrap();
            let (mut dq, mut dk, mut dv) = (float(6, q_len), float(6, kv_len), float(6, kv_len));
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
            .run(&B)
            .unwrap();
            let mut last = float(7, 6 * 64);
            let span = [0, lengths[0] as u32];
            let on_device = put_u32(&B, &span);
            let (q, spans) = (q.range(0..6 * 64), DecodeSpans { host: &span, device: on_device.view() });
            AttentionDecode { q, k: k.view(), v: v.view(), o: last.view_mut(), spans, shape }.run(&B).unwrap();
            [o, lse, dq, dk, dv, last].iter().flat_map(|t| read(&B, t)).collect()
        });
    }
}

#[test]
fn reductions_over_rows() {
    let (rows, width) = (700, 192);
    same_on_any_pool(|| {
        let (x, dy, weight) = (float(1, rows * width), float(2, rows * width), float(3, width));
        let (mut y, mut rstd) = (float(4, rows * width), float(4, rows));
        RmsNorm { x: x.view(), weight: weight.view(), y: y.view_mut(), rstd: Some(rstd.view_mut()), eps: 1e-6 }
            .run(&B)
            .unwrap();
        let (mut dx, mut dw) = (float(5, rows * width), float(6, width));
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
        .run(&B)
        .unwrap();
        let chosen = put_u32(&B, &(0..rows as u32).map(|r| r * r % 13).collect::<Vec<_>>());
        let mut table = float(7, 13 * width);
        EmbeddingBackward { dy: dy.view(), rows: chosen.view(), dtable: table.view_mut(), width }.run(&B).unwrap();
        let (mut losses, targets) = (float(8, rows), put_u32(&B, &vec![5; rows]));
        CrossEntropy {
            logits: y.view_mut(),
            targets: targets.view(),
            losses: losses.view_mut(),
            vocab: width,
            scale: Some(0.1),
        }
        .run(&B)
        .unwrap();
        [y, rstd, dx, dw, table, losses].iter().flat_map(|t| read(&B, t)).collect()
    });
}

#[test]
fn steps_and_perturbations() {
    let len = 200_000;
    same_on_any_pool(|| {
        let (mut w, g, mut m, mut v) = (float(1, len), float(2, len), float(3, len), float(4, len));
        let mut squares = float(5, 1);
        SumSquares { parts: &[g.view()], squares: squares.view_mut() }.run(&B).unwrap();
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
            rounding: Rounding::Nearest,
        };
        AdamWMasked { table: &mut table, squares: squares.view(), hyper }.run(&B).unwrap();
        let key = NoiseKey { seed: 1, stream: 2 };
        let mut out = vec![];
        for direction in [
            Direction::Gaussian(key),
            Direction::Rademacher(key),
            Direction::LowRank { key, rank: 8, rows: 400 },
            Direction::Given(g.view()),
        ] {
            let (mut plus, mut minus) = (float(6, len), float(7, len));
            Perturb {
                w: g.view(),
                squares: None,
                direction,
                epsilon: 0.3,
                plus: plus.view_mut(),
                minus: Some(minus.view_mut()),
            }
            .run(&B)
            .unwrap();
            out.extend([plus, minus].iter().flat_map(|t| read(&B, t)));
        }
        out.extend([w, m, v, squares].iter().flat_map(|t| read(&B, t)));
        out
    });
}
