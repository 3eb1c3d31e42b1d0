//! Attention: packed, backward, decoding.

use super::*;
use swat::backend::Attention;

#[derive(Clone, Copy, Debug)]
struct Sizes {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    window: Option<usize>,
    lengths: &'static [usize],
}

impl Sizes {
    fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }
    fn q_len(&self) -> usize {
        self.tokens() * self.heads * self.head_dim
    }
    fn kv_len(&self) -> usize {
        self.tokens() * self.kv_heads * self.head_dim
    }
    fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }
}

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
    let (mut o, mut lse) = (vec![0.0; s.q_len()], vec![0.0; s.heads * s.tokens()]);
    let mut start = 0;
    for len in s.lengths {
        for query in start..start + len {
            let first = (query + 1).saturating_sub(s.window.unwrap_or(usize::MAX)).max(start);
            for head in 0..s.heads {
                let q = &q[(query * s.heads + head) * s.head_dim..][..s.head_dim];
                let at = |key: usize| (key * s.kv_heads + head * s.kv_heads / s.heads) * s.head_dim;
                let score = |key: usize| s.scale() * q.iter().zip(&k[at(key)..]).map(|(q, k)| q * k).sum::<f64>();
                let scores: Vec<f64> = (first..=query).map(score).collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|x| (x - top).exp()).sum();
                lse[head * s.tokens() + query] = top + total.ln();
                for (key, score) in (first..=query).zip(&scores) {
                    let p = (score - top).exp() / total;
                    for d in 0..s.head_dim {
                        o[(query * s.heads + head) * s.head_dim + d] += p * v[at(key) + d];
                    }
                }
            }
        }
        start += len;
    }
    (o, lse)
}

fn shape<'a, B: Backend>(s: &Sizes, documents: &'a Documents<B>) -> Attention<'a, B> {
    let Sizes { heads, kv_heads, head_dim, window, .. } = *s;
    Attention { heads, kv_heads, head_dim, scale: s.scale() as f32, window, documents }
}

fn forward<B: Backend>(b: &B) {
    for s in &SIZES {
        let q = put::<B, B::Float>(b, &normals(1, s.q_len()));
        let k = put::<B, B::Float>(b, &normals(2, s.kv_len()));
        let v = put::<B, B::Float>(b, &normals(3, s.kv_len()));
        let (exact_o, exact_lse) = attend(s, &q.host, &k.host, &v.host);
        let documents = documents(b, s.lengths);
        let shape = shape(s, &documents);
        let mut o = put::<B, B::Float>(b, &vec![f64::NAN; s.q_len()]);
        let mut lse = put::<B, f32>(b, &vec![f64::NAN; s.heads * s.tokens()]);
        let (qv, kv, vv) = (q.device.view(), k.device.view(), v.device.view());
        let lse_view = Some(lse.device.view_mut());
        b.attention(qv.clone(), kv.clone(), vv.clone(), o.device.view_mut(), lse_view, &shape).unwrap();
        let with_lse = get(b, &o.device);
        assert_close::<B>(&with_lse, &exact_o, 1e-5, &format!("o of {s:?}"));
        assert_close::<B>(&get(b, &lse.device), &exact_lse, 1e-5, &format!("lse of {s:?}"));
        b.attention(qv, kv, vv, o.device.view_mut(), None, &shape).unwrap();
        assert_eq!(get(b, &o.device), with_lse);
    }
}

fn backward<B: Backend>(b: &B) {
    for s in &SIZES {
        let [q, d_o] = [1, 4].map(|stream| put::<B, B::Float>(b, &normals(stream, s.q_len())));
        let [k, v] = [2, 3].map(|stream| put::<B, B::Float>(b, &normals(stream, s.kv_len())));
        let (o, lse) = attend(s, &q.host, &k.host, &v.host);
        let (o, lse) = (put::<B, B::Float>(b, &o), put::<B, f32>(b, &lse));
        let documents = documents(b, s.lengths);
        let mut dq = put::<B, B::Float>(b, &vec![f64::NAN; s.q_len()]);
        let [mut dk, mut dv] = [(), ()].map(|_| put::<B, B::Float>(b, &vec![f64::NAN; s.kv_len()]));
        b.attention_backward(
            q.device.view(),
            k.device.view(),
            v.device.view(),
            o.device.view(),
            lse.device.view(),
            d_o.device.view(),
            dq.device.view_mut(),
            dk.device.view_mut(),
            dv.device.view_mut(),
            &shape(s, &documents),
        )
        .unwrap();
        let [dq, dk, dv] = [dq, dk, dv].map(|d| get(b, &d.device));
        let what = |name| format!("{name} of {s:?}");
        assert!([&dq, &dk, &dv].iter().all(|d| d.iter().all(|x| x.is_finite())), "{s:?}");
        assert_gradient::<B>(&dq, |q| attend(s, q, &k.host, &v.host).0, &q.host, &d_o.host, &what("dq"));
        assert_gradient::<B>(&dk, |k| attend(s, &q.host, k, &v.host).0, &k.host, &d_o.host, &what("dk"));
        assert_gradient::<B>(&dv, |v| attend(s, &q.host, &k.host, v).0, &v.host, &d_o.host, &what("dv"));
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
        let spans = put_u32(b, &spans);
        let longest = s.lengths.iter().copied().max().unwrap_or(0);
        let width = s.heads * s.head_dim;
        let last = |x: &[f64]| -> Vec<f64> {
            documents.starts[1..].iter().flat_map(|end| x[(*end as usize - 1) * width..][..width].to_vec()).collect()
        };
        let q_last = put::<B, B::Float>(b, &last(&q.host));
        let mut o = put::<B, B::Float>(b, &vec![f64::NAN; q_last.host.len()]);
        let (kv, vv) = (k.device.view(), v.device.view());
        let q_view = q_last.device.view();
        b.attention_decode(q_view, kv, vv, o.device.view_mut(), spans.view(), longest, &shape(s, &documents)).unwrap();
        assert_close::<B>(&get(b, &o.device), &last(&exact), 1e-5, &format!("{s:?}"));
    }
}

/// Scores far apart neither overflow nor lose the largest.
fn large_scores<B: Backend>(b: &B) {
    let s = Sizes { heads: 1, kv_heads: 1, head_dim: 16, window: None, lengths: &[40] };
    let big: Vec<f64> = normals(1, s.q_len()).iter().map(|x| x * 64.0).collect();
    let (q, k) = (put::<B, B::Float>(b, &big), put::<B, B::Float>(b, &normals(2, s.kv_len())));
    let v = put::<B, B::Float>(b, &normals(3, s.kv_len()));
    let (exact, _) = attend(&s, &q.host, &k.host, &v.host);
    let documents = documents(b, s.lengths);
    let mut o = put::<B, B::Float>(b, &vec![0.0; s.q_len()]);
    let (qv, kv, vv) = (q.device.view(), k.device.view(), v.device.view());
    b.attention(qv, kv, vv, o.device.view_mut(), None, &shape(&s, &documents)).unwrap();
    assert_close::<B>(&get(b, &o.device), &exact, 2e-4, "large scores");
}

on_every_backend!(forward, backward, decode_equals_packed, large_scores);
