//! Attention: packed, backward, decoding; every version of the CUDA kernels against an emulation of what they round.

use super::*;
use crate::common::attention::{Products, Sizes, attend_rounding, gradients, to_bf16};
use crate::cores::AMPERE;
use swat::backend::cpu::Cpu;
use swat::backend::cuda::with_version;

const SIZES: [Sizes; 9] = [
    Sizes { heads: 1, kv_heads: 1, head_dim: 16, window: None, lengths: &[1] },
    Sizes { heads: 9, kv_heads: 3, head_dim: 64, window: None, lengths: &[5, 1, 33, 20] },
    Sizes { heads: 4, kv_heads: 4, head_dim: 16, window: None, lengths: &[64, 65, 130] },
    Sizes { heads: 8, kv_heads: 1, head_dim: 16, window: Some(7), lengths: &[3, 7, 8, 90] },
    Sizes { heads: 2, kv_heads: 1, head_dim: 80, window: Some(1), lengths: &[70, 2] },
    Sizes { heads: 2, kv_heads: 2, head_dim: 128, window: None, lengths: &[17, 40] },
    Sizes { heads: 14, kv_heads: 2, head_dim: 64, window: Some(100), lengths: &[150] },
    Sizes { heads: 3, kv_heads: 1, head_dim: 16, window: None, lengths: &[500] },
    Sizes { heads: 2, kv_heads: 1, head_dim: 24, window: Some(64), lengths: &[1, 1, 200, 1] },
];

/// (O, log-sum-exp) by the definition.
fn attend(s: &Sizes, q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
    attend_rounding(s, q, k, v, Products::Exact)
}

fn shape(s: &Sizes) -> AttentionShape {
    let Sizes { heads, kv_heads, head_dim, window, .. } = *s;
    AttentionShape { heads, kv_heads, head_dim, scale: s.scale() as f32, window }
}

fn forward<B: Backend>(b: &B) {
    for s in &SIZES {
        let q = put::<B, B::Float>(b, &normals(1, s.q_len()));
        let k = put::<B, B::Float>(b, &normals(2, s.kv_len()));
        let v = put::<B, B::Float>(b, &normals(3, s.kv_len()));
        let (exact_o, exact_lse) = attend(s, &q.host, &k.host, &v.host);
        let documents = documents(b, s.lengths);
        let shape = shape(s);
        let mut o = put::<B, B::Float>(b, &vec![f64::NAN; s.q_len()]);
        let mut lse = put::<B, f32>(b, &vec![f64::NAN; s.heads * s.tokens()]);
        let (qv, kv, vv) = (q.device.view(), k.device.view(), v.device.view());
        let lse_view = Some(lse.device.view_mut());
        Attention {
            q: qv.clone(),
            k: kv.clone(),
            v: vv.clone(),
            o: o.device.view_mut(),
            lse: lse_view,
            shape,
            documents: &documents,
        }
        .run(b)
        .unwrap();
        let with_lse = get(b, &o.device);
        assert_close::<B>(&with_lse, &exact_o, 1e-5, &format!("o of {s:?}"));
        assert_close::<B>(&get(b, &lse.device), &exact_lse, 1e-5, &format!("lse of {s:?}"));
        Attention { q: qv, k: kv, v: vv, o: o.device.view_mut(), lse: None, shape, documents: &documents }
            .run(b)
            .unwrap();
        assert_eq!(get(b, &o.device), with_lse);
    }
}

/// dQ, dK and dV.
fn run_backward<B: Backend>(
    b: &B,
    s: &Sizes,
    [q, k, v, o, d_o]: [&Tensor<B, B::Float>; 5],
    lse: &Tensor<B, f32>,
    documents: &Documents<B>,
) -> [Tensor<B, B::Float>; 3] {
    let [mut dq, mut dk, mut dv] =
        [s.q_len(), s.kv_len(), s.kv_len()].map(|len| put::<B, B::Float>(b, &vec![f64::NAN; len]));
    AttentionBackward {
        q: q.device.view(),
        k: k.device.view(),
        v: v.device.view(),
        o: o.device.view(),
        lse: lse.device.view(),
        d_o: d_o.device.view(),
        dq: dq.device.view_mut(),
        dk: dk.device.view_mut(),
        dv: dv.device.view_mut(),
        shape: shape(s),
        documents,
    }
    .run(b)
    .unwrap();
    [dq, dk, dv]
}

fn backward<B: Backend>(b: &B) {
    for s in &SIZES {
        let [q, d_o] = [1, 4].map(|stream| put::<B, B::Float>(b, &normals(stream, s.q_len())));
        let [k, v] = [2, 3].map(|stream| put::<B, B::Float>(b, &normals(stream, s.kv_len())));
        let (o, lse) = attend(s, &q.host, &k.host, &v.host);
        let (o, lse) = (put::<B, B::Float>(b, &o), put::<B, f32>(b, &lse));
        let documents = documents(b, s.lengths);
        let [dq, dk, dv] = run_backward(b, s, [&q, &k, &v, &o, &d_o], &lse, &documents);
        let saved = [&q.host, &k.host, &v.host, &o.host, &lse.host, &d_o.host].map(Vec::as_slice);
        let exact = gradients(s, saved, Products::Exact);
        for (name, got, exact) in [("dq", dq, &exact[0]), ("dk", dk, &exact[1]), ("dv", dv, &exact[2])] {
            assert_close::<B>(&get(b, &got.device), exact, 2e-5, &format!("{name} of {s:?}"));
        }
    }
}

/// The gradients that the others are held against are those of [`attend`].
#[test]
fn gradients_are_differences() {
    for s in &SIZES {
        let [q, d_o] = [1, 4].map(|stream| normals(stream, s.q_len()));
        let [k, v] = [2, 3].map(|stream| normals(stream, s.kv_len()));
        let (o, lse) = attend(s, &q, &k, &v);
        let [dq, dk, dv] = gradients(s, [&q, &k, &v, &o, &lse, &d_o], Products::Exact);
        let what = |name| format!("{name} of {s:?}");
        assert_gradient::<Cpu>(&dq, |q| attend(s, q, &k, &v).0, &q, &d_o, &what("dq"));
        assert_gradient::<Cpu>(&dk, |k| attend(s, &q, k, &v).0, &k, &d_o, &what("dk"));
        assert_gradient::<Cpu>(&dv, |v| attend(s, &q, &k, v).0, &v, &d_o, &what("dv"));
    }
}

/// The last rows of documents, asked for as spans, are the last rows of packed attention.
fn decode_equals_packed<B: Backend>(b: &B) {
    for s in &SIZES {
        let q = put::<B, B::Float>(b, &normals(1, s.q_len()));
        let k = put::<B, B::Float>(b, &normals(2, s.kv_len()));
        let v = put::<B, B::Float>(b, &normals(3, s.kv_len()));
        let (exact, _) = attend(s, &q.host, &k.host, &v.host);
        let documents = documents(b, s.lengths);
        let spans: Vec<u32> = documents.starts.windows(2).flat_map(|w| [w[0], w[1] - w[0]]).collect();
        let on_device = put_u32(b, &spans);
        let spans = DecodeSpans { host: &spans, device: on_device.view() };
        let width = s.heads * s.head_dim;
        let last = |x: &[f64]| -> Vec<f64> {
            documents.starts[1..].iter().flat_map(|end| x[(*end as usize - 1) * width..][..width].to_vec()).collect()
        };
        let q_last = put::<B, B::Float>(b, &last(&q.host));
        let mut o = put::<B, B::Float>(b, &vec![f64::NAN; q_last.host.len()]);
        let (kv, vv) = (k.device.view(), v.device.view());
        let q_view = q_last.device.view();
        AttentionDecode { q: q_view, k: kv, v: vv, o: o.device.view_mut(), spans, shape: shape(s) }.run(b).unwrap();
        assert_close::<B>(&get(b, &o.device), &last(&exact), 1e-5, &format!("{s:?}"));
    }
}

/// Documents for three steps of the search, which leaves one 32nd a step; every fourth is empty.
const MANY_DOCUMENTS: [usize; 1100] = {
    let mut lengths = [0; 1100];
    let mut i = 0;
    while i < lengths.len() {
        lengths[i] = i % 4;
        i += 1;
    }
    lengths
};

/// Sizes for each version of the kernels: tiles of 64 and 128 rows that end, straddle and are skipped, every ratio of
/// heads.
const VERSION_SIZES: [Sizes; 13] = [
    Sizes { heads: 1, kv_heads: 1, head_dim: 64, window: None, lengths: &[1] },
    Sizes { heads: 2, kv_heads: 1, head_dim: 64, window: None, lengths: &[63] },
    Sizes { heads: 3, kv_heads: 3, head_dim: 64, window: None, lengths: &[64, 0, 65] },
    Sizes { heads: 6, kv_heads: 2, head_dim: 64, window: None, lengths: &[5, 1, 33, 20, 64, 70] },
    Sizes { heads: 7, kv_heads: 1, head_dim: 64, window: Some(40), lengths: &[150, 3, 130] },
    Sizes { heads: 2, kv_heads: 1, head_dim: 64, window: Some(300), lengths: &[600] },
    Sizes { heads: 20, kv_heads: 1, head_dim: 64, window: None, lengths: &[30] },
    Sizes { heads: 3, kv_heads: 1, head_dim: 128, window: None, lengths: &[130, 3] },
    Sizes { heads: 2, kv_heads: 2, head_dim: 128, window: Some(100), lengths: &[7, 257] },
    Sizes { heads: 2, kv_heads: 1, head_dim: 128, window: Some(1), lengths: &[65] },
    Sizes { heads: 4, kv_heads: 2, head_dim: 48, window: None, lengths: &[70, 2] },
    Sizes { heads: 2, kv_heads: 1, head_dim: 80, window: Some(33), lengths: &[66, 1] },
    Sizes { heads: 1, kv_heads: 1, head_dim: 64, window: Some(2), lengths: &MANY_DOCUMENTS },
];

/// More, for all but the baseline: tiles of 128 rows, several of them, windows within and across them.
const LONG_SIZES: [Sizes; 8] = [
    Sizes { heads: 3, kv_heads: 1, head_dim: 64, window: None, lengths: &[1, 63, 64, 65, 127, 129, 200] },
    Sizes { heads: 2, kv_heads: 1, head_dim: 128, window: None, lengths: &[200, 129, 127, 65, 64, 63, 1] },
    Sizes { heads: 2, kv_heads: 2, head_dim: 64, window: None, lengths: &[128] },
    Sizes { heads: 1, kv_heads: 1, head_dim: 128, window: None, lengths: &[650] },
    Sizes { heads: 2, kv_heads: 1, head_dim: 64, window: Some(129), lengths: &[500, 2, 140] },
    Sizes { heads: 3, kv_heads: 3, head_dim: 128, window: Some(3), lengths: &[2, 300, 1] },
    Sizes { heads: 1, kv_heads: 1, head_dim: 128, window: Some(256), lengths: &[520] },
    Sizes { heads: 5, kv_heads: 1, head_dim: 128, window: Some(1), lengths: &[129] },
];

/// More for forward on Hopper: 266 and 268 work tiles, of which 132 multiprocessors take two or three each, in both
/// orders.
const PERSISTENT_SIZES: [Sizes; 2] = [
    Sizes { heads: 133, kv_heads: 7, head_dim: 64, window: None, lengths: &[120, 12] },
    Sizes { heads: 134, kv_heads: 67, head_dim: 128, window: Some(30), lengths: &[129] },
];

/// More for backward on Hopper: so many key-value heads that two blocks share a group of three heads.
const SHARED_SIZE: Sizes = Sizes { heads: 201, kv_heads: 67, head_dim: 64, window: None, lengths: &[2, 3] };

/// The last is of Hopper alone, and of all but decoding; in that, `flash64` and `flash128` are the same.
const VERSIONS: [&str; 4] = ["baseline", "flash64", "flash128", "wgmma"];

/// How the kernels of `version` take products. Ampere's tensor cores are no more exact than Hopper's.
fn products(s: &Sizes, version: &str) -> Products {
    let flash = version != "baseline" && matches!(s.head_dim, 64 | 128);
    if flash { Products::Cores(AMPERE) } else { Products::Exact }
}

/// The largest error.
fn worst(got: &[f64], exact: &[f64]) -> f64 {
    got.iter().zip(exact).map(|(g, e)| (g - e).abs()).fold(0.0, f64::max)
}

/// Asserts that the largest error is at most twice that of the emulation, and a little. f32 gets a tolerance of its
/// own.
#[track_caller]
fn assert_rule<B: Backend>(got: &[f64], exact: &[f64], emulated: &[f64], what: &str) {
    let emulated: Vec<f64> = emulated.iter().map(|x| to_bf16(*x)).collect();
    let most = if B::Float::NAME == "f32" { 5e-5 } else { 2.0 * worst(&emulated, exact) + 2e-5 };
    assert_eq!(got.len(), exact.len(), "{what}");
    assert!(got.iter().all(|x| x.is_finite()), "{what}");
    let error = worst(got, exact);
    assert!(error <= most, "{what}: error {error}, allowed {most}");
}

/// Forward, of every version: the rule, the same bytes twice, and from both sizes of flash's blocks.
fn forward_versions<B: Backend>(b: &B) {
    let long = LONG_SIZES.iter().map(|s| (s, &VERSIONS[1..]));
    let long = long.chain(PERSISTENT_SIZES.iter().map(|s| (s, &VERSIONS[3..])));
    for (s, versions) in VERSION_SIZES.iter().map(|s| (s, &VERSIONS[..])).chain(long) {
        let q = put::<B, B::Float>(b, &normals(1, s.q_len()));
        let [k, v] = [2, 3].map(|stream| put::<B, B::Float>(b, &normals(stream, s.kv_len())));
        let (exact, exact_lse) = attend(s, &q.host, &k.host, &v.host);
        let documents = documents(b, s.lengths);
        let run = |version| {
            let mut o = put::<B, B::Float>(b, &vec![f64::NAN; s.q_len()]);
            let mut lse = put::<B, f32>(b, &vec![f64::NAN; s.heads * s.tokens()]);
            let (o_view, lse_view) = (o.device.view_mut(), Some(lse.device.view_mut()));
            with_version(version, || {
                Attention {
                    q: q.device.view(),
                    k: k.device.view(),
                    v: v.device.view(),
                    o: o_view,
                    lse: lse_view,
                    shape: shape(s),
                    documents: &documents,
                }
                .run(b)
            })
            .unwrap();
            (get(b, &o.device), get(b, &lse.device))
        };
        for version in versions {
            let (o, lse) = run(version);
            let (emulated, emulated_lse) = attend_rounding(s, &q.host, &k.host, &v.host, products(s, version));
            assert_rule::<B>(&o, &exact, &emulated, &format!("o, {version:?} of {s:?}"));
            // And what is f32 in it: the scores (of a few tens in units of log2 e), a sum of exponentials, its
            // logarithm.
            let allowed = 2.0 * worst(&emulated_lse, &exact_lse) + 4e-6;
            let error = worst(&lse, &exact_lse);
            assert!(error <= allowed, "lse: {error}, allowed {allowed}, {version:?} of {s:?}");
            assert_eq!(run(version), (o, lse), "{version:?} of {s:?}");
        }
        if versions.len() > 1 {
            assert_eq!(run("flash64"), run("flash128"), "{s:?}");
        }
    }
}

/// Backward, of every version: the rule, and the same bytes twice.
fn backward_versions<B: Backend>(b: &B) {
    let long = LONG_SIZES[..2].iter().map(|s| (s, &VERSIONS[1..])).chain([(&SHARED_SIZE, &VERSIONS[3..])]);
    for (s, versions) in VERSION_SIZES.iter().map(|s| (s, &VERSIONS[..])).chain(long) {
        let [q, d_o] = [1, 4].map(|stream| put::<B, B::Float>(b, &normals(stream, s.q_len())));
        let [k, v] = [2, 3].map(|stream| put::<B, B::Float>(b, &normals(stream, s.kv_len())));
        let (exact_o, exact_lse) = attend(s, &q.host, &k.host, &v.host);
        let (o, lse) = (put::<B, B::Float>(b, &exact_o), put::<B, f32>(b, &exact_lse));
        let exact = gradients(s, [&q.host, &k.host, &v.host, &exact_o, &exact_lse, &d_o.host], Products::Exact);
        let documents = documents(b, s.lengths);
        let run = |version| {
            let gradients = with_version(version, || run_backward(b, s, [&q, &k, &v, &o, &d_o], &lse, &documents));
            gradients.map(|d| get(b, &d.device))
        };
        for version in versions {
            let saved = [&q.host, &k.host, &v.host, &o.host, &lse.host, &d_o.host].map(Vec::as_slice);
            let emulated = gradients(s, saved, products(s, version));
            let got = run(version);
            for (name, i) in [("dq", 0), ("dk", 1), ("dv", 2)] {
                assert_rule::<B>(&got[i], &exact[i], &emulated[i], &format!("{name}, {version:?} of {s:?}"));
            }
            assert_eq!(run(version), got, "{version:?} of {s:?}");
        }
    }
}

/// Rows of packed attention asked for as spans, of every version: the rule, and the same bytes whatever else is
/// decoded.
fn decode_versions<B: Backend>(b: &B) {
    for s in &VERSION_SIZES {
        let q = put::<B, B::Float>(b, &normals(1, s.q_len()));
        let [k, v] = [2, 3].map(|stream| put::<B, B::Float>(b, &normals(stream, s.kv_len())));
        let documents = documents(b, s.lengths);
        let start = |row: usize| documents.starts[documents.starts.partition_point(|s| *s as usize <= row) - 1];
        let rows: Vec<usize> = (0..s.tokens()).filter(|row| row % 37 == 0 || row + 1 == s.tokens()).collect();
        let width = s.heads * s.head_dim;
        let choose = |x: &[f64]| -> Vec<f64> { rows.iter().flat_map(|r| x[r * width..][..width].to_vec()).collect() };
        let exact = choose(&attend(s, &q.host, &k.host, &v.host).0);
        let chosen = put::<B, B::Float>(b, &choose(&q.host));
        let spans: Vec<u32> = rows.iter().flat_map(|row| [start(*row), *row as u32 + 1 - start(*row)]).collect();
        let on_device = put_u32(b, &spans);
        let run = |version, range: std::ops::Range<usize>| {
            let mut o = put::<B, B::Float>(b, &vec![f64::NAN; range.len() * width]);
            let (q, to) = (chosen.device.range(range.start * width..range.end * width), o.device.view_mut());
            let range = 2 * range.start..2 * range.end;
            let spans = DecodeSpans { host: &spans[range.clone()], device: on_device.range(range) };
            with_version(version, || {
                AttentionDecode { q, k: k.device.view(), v: v.device.view(), o: to, spans, shape: shape(s) }.run(b)
            })
            .unwrap();
            get(b, &o.device)
        };
        for version in &VERSIONS[..2] {
            let o = run(version, 0..rows.len());
            let emulated = choose(&attend_rounding(s, &q.host, &k.host, &v.host, products(s, version)).0);
            assert_rule::<B>(&o, &exact, &emulated, &format!("{version:?} of {s:?}"));
            for i in 0..rows.len() {
                assert_eq!(run(version, i..i + 1), o[i * width..(i + 1) * width], "span {i}, {version:?} of {s:?}");
            }
        }
    }
}

/// Tensors that begin where no vector access may, and a batch of nothing.
fn unaligned_and_empty<B: Backend>(b: &B) {
    let s = Sizes { heads: 2, kv_heads: 1, head_dim: 64, window: None, lengths: &[70] };
    let [q, d_o] = [1, 4].map(|stream| put::<B, B::Float>(b, &normals(stream, s.q_len() + 1)));
    let [k, v] = [2, 3].map(|stream| put::<B, B::Float>(b, &normals(stream, s.kv_len() + 1)));
    let (exact_o, exact_lse) = attend(&s, &q.host[1..], &k.host[1..], &v.host[1..]);
    let saved = [&q.host[1..], &k.host[1..], &v.host[1..], &exact_o, &exact_lse, &d_o.host[1..]];
    let exact = gradients(&s, saved, Products::Exact);
    for lengths in [s.lengths, &[]] {
        let s = Sizes { lengths, ..s };
        let documents = documents(b, lengths);
        let shape = shape(&s);
        let (q_range, kv_range) = (1..1 + s.q_len(), 1..1 + s.kv_len());
        let [mut o, mut dq] = [(), ()].map(|_| put::<B, B::Float>(b, &vec![f64::NAN; s.q_len() + 1]));
        let [mut dk, mut dv] = [(), ()].map(|_| put::<B, B::Float>(b, &vec![f64::NAN; s.kv_len() + 1]));
        let mut lse = put::<B, f32>(b, &vec![f64::NAN; s.heads * s.tokens()]);
        let q_view = q.device.range(q_range.clone());
        let (k_view, v_view) = (k.device.range(kv_range.clone()), v.device.range(kv_range.clone()));
        let (o_view, lse_view) = (o.device.range_mut(q_range.clone()), Some(lse.device.view_mut()));
        Attention {
            q: q_view.clone(),
            k: k_view.clone(),
            v: v_view.clone(),
            o: o_view,
            lse: lse_view,
            shape,
            documents: &documents,
        }
        .run(b)
        .unwrap();
        AttentionBackward {
            q: q_view,
            k: k_view,
            v: v_view,
            o: o.device.range(q_range.clone()),
            lse: lse.device.view(),
            d_o: d_o.device.range(q_range.clone()),
            dq: dq.device.range_mut(q_range.clone()),
            dk: dk.device.range_mut(kv_range.clone()),
            dv: dv.device.range_mut(kv_range),
            shape,
            documents: &documents,
        }
        .run(b)
        .unwrap();
        let outside = [&o, &dq, &dk, &dv].map(|t| get(b, &t.device)[0]);
        assert!(outside.iter().all(|x| x.is_nan()), "{outside:?}");
        for (got, exact) in [(o, &exact_o), (dq, &exact[0]), (dk, &exact[1]), (dv, &exact[2])] {
            let got = &get(b, &got.device)[1..];
            assert_close::<B>(got, &exact[..got.len()], 1e-5, "unaligned");
        }
    }
}

/// Scores far apart neither overflow nor lose the largest.
fn large_scores<B: Backend>(b: &B) {
    let versions = VERSIONS.map(|version| (64, version));
    for (head_dim, version) in versions.into_iter().chain([(16, "baseline"), (128, "wgmma")]) {
        let s = Sizes { heads: 1, kv_heads: 1, head_dim, window: None, lengths: &[140] };
        let big: Vec<f64> = normals(1, s.q_len()).iter().map(|x| x * 64.0).collect();
        let (q, k) = (put::<B, B::Float>(b, &big), put::<B, B::Float>(b, &normals(2, s.kv_len())));
        let v = put::<B, B::Float>(b, &normals(3, s.kv_len()));
        let (exact, _) = attend(&s, &q.host, &k.host, &v.host);
        let documents = documents(b, s.lengths);
        let mut o = put::<B, B::Float>(b, &vec![0.0; s.q_len()]);
        let (qv, kv, vv) = (q.device.view(), k.device.view(), v.device.view());
        with_version(version, || {
            Attention {
                q: qv,
                k: kv,
                v: vv,
                o: o.device.view_mut(),
                lse: None,
                shape: shape(&s),
                documents: &documents,
            }
            .run(b)
            .unwrap();
        });
        assert_close::<B>(&get(b, &o.device), &exact, 2e-4, &format!("large scores, {version:?}, {head_dim}"));
    }
}

on_every_backend!(
    forward,
    backward,
    decode_equals_packed,
    forward_versions,
    backward_versions,
    decode_versions,
    unaligned_and_empty,
    large_scores,
);
