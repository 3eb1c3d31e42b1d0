//! The same bytes on any number of threads.

use super::*;
use swat::backend::cpu::Cpu;
use swat::backend::{AdamW, AdamWModule, Attention, Direction, Epilogue, LinearShape, NoiseKey, Rounding};

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
            B.linear(x.view(), w.view(), y.view_mut(), shape, Epilogue::default()).unwrap();
            let (mut dx, mut dw) = (float(4, tokens * inputs), float(5, outputs * inputs));
            B.linear_backward_input(y.view(), w.view(), dx.view_mut(), shape, 1.0, true).unwrap();
            B.linear_backward_weight(y.view(), x.view(), dw.view_mut(), shape, 1.0, true).unwrap();
            let mut dbias = float(6, outputs);
            B.linear_backward_bias(y.view(), dbias.view_mut(), tokens, outputs, true).unwrap();
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
            let shape = Attention { heads: 6, kv_heads: 2, head_dim: 64, scale: 0.125, window, documents: &documents };
            let (q_len, kv_len) = (tokens * 6 * 64, tokens * 2 * 64);
            let (q, k, v, d_o) = (float(1, q_len), float(2, kv_len), float(3, kv_len), float(4, q_len));
            let (mut o, mut lse) = (float(5, q_len), float(5, tokens * 6));
            B.attention(q.view(), k.view(), v.view(), o.view_mut(), Some(lse.view_mut()), &shape).unwrap();
            let (mut dq, mut dk, mut dv) = (float(6, q_len), float(6, kv_len), float(6, kv_len));
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
            let mut last = float(7, 6 * 64);
            let spans = put_u32(&B, &[0, lengths[0] as u32]);
            let (q, spans) = (q.range(0..6 * 64), spans.view());
            B.attention_decode(q, k.view(), v.view(), last.view_mut(), spans, lengths[0], &shape).unwrap();
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
        B.rmsnorm(x.view(), weight.view(), y.view_mut(), Some(rstd.view_mut()), width, 1e-6).unwrap();
        let (mut dx, mut dw) = (float(5, rows * width), float(6, width));
        let (dxv, dwv) = (Some(dx.view_mut()), Some(dw.view_mut()));
        B.rmsnorm_backward(dy.view(), x.view(), weight.view(), rstd.view(), dxv, dwv, width, true, true).unwrap();
        let chosen = put_u32(&B, &(0..rows as u32).map(|r| r * r % 13).collect::<Vec<_>>());
        let mut table = float(7, 13 * width);
        B.embedding_backward(dy.view(), chosen.view(), table.view_mut(), width).unwrap();
        let (mut losses, targets) = (float(8, rows), put_u32(&B, &vec![5; rows]));
        B.cross_entropy(y.view_mut(), targets.view(), losses.view_mut(), width, Some(0.1)).unwrap();
        [y, rstd, dx, dw, table, losses].iter().flat_map(|t| read(&B, t)).collect()
    });
}

#[test]
fn steps_and_perturbations() {
    let len = 200_000;
    same_on_any_pool(|| {
        let (mut w, g, mut m, mut v) = (float(1, len), float(2, len), float(3, len), float(4, len));
        let mut squares = float(5, 1);
        B.sum_squares(&[g.view()], squares.view_mut()).unwrap();
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
        B.adamw_masked(&mut table, squares.view(), hyper).unwrap();
        let key = NoiseKey { seed: 1, stream: 2 };
        let mut out = vec![];
        for direction in [
            Direction::Gaussian(key),
            Direction::Rademacher(key),
            Direction::LowRank { key, rank: 8, rows: 400 },
            Direction::Given(g.view()),
        ] {
            let (mut plus, mut minus) = (float(6, len), float(7, len));
            B.perturb(g.view(), None, &direction, 0.3, plus.view_mut(), Some(minus.view_mut())).unwrap();
            out.extend([plus, minus].iter().flat_map(|t| read(&B, t)));
        }
        out.extend([w, m, v, squares].iter().flat_map(|t| read(&B, t)));
        out
    });
}
