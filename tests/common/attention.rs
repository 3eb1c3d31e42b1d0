//! Attention by its definition in f64, optionally with the roundings of the kernels. Tensor-core sums are emulated by
//! [`Cores`] where they matter beside these: in the scores, and so in the log-sum-exp.

use half::bf16;
use std::ops::Range;
use swat_standin::cores::Cores;

/// Sizes of a call over documents of `lengths`.
#[derive(Clone, Copy, Debug)]
pub struct Sizes<'a> {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub window: Option<usize>,
    pub lengths: &'a [usize],
}

impl Sizes<'_> {
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }
    pub fn q_len(&self) -> usize {
        self.tokens() * self.heads * self.head_dim
    }
    pub fn kv_len(&self) -> usize {
        self.tokens() * self.kv_heads * self.head_dim
    }
    pub fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// Each row of the documents, with the rows that it attends to.
    fn rows(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        let mut start = 0;
        let documents = self.lengths.iter().map(move |len| {
            start += len;
            start - len..start
        });
        let reach = self.window.unwrap_or(usize::MAX);
        documents.flat_map(move |document| {
            document.clone().map(move |row| (row, (row + 1).saturating_sub(reach).max(document.start)..row + 1))
        })
    }

    /// Offset of the key and the value of row `row` for query head `head`.
    fn key_at(&self, row: usize, head: usize) -> usize {
        (row * self.kv_heads + head * self.kv_heads / self.heads) * self.head_dim
    }
}

/// Arithmetic of the products.
#[derive(Clone, Copy)]
pub enum Products {
    Exact,
    /// P and dS are rounded to bf16 first.
    Rounded,
    /// The same, with sums as on these tensor cores.
    Cores(Cores),
}

pub fn to_bf16(x: f64) -> f64 {
    bf16::from_f64(x).to_f64()
}

impl Products {
    fn round(self, x: f64) -> f64 {
        if matches!(self, Self::Exact) { x } else { to_bf16(x) }
    }

    /// Σ aᵢ·bᵢ.
    fn dot(self, a: &[f64], b: &[f64]) -> f64 {
        let Self::Cores(cores) = self else { return a.iter().zip(b).map(|(a, b)| a * b).sum() };
        let narrow = |x: &[f64]| x.iter().map(|x| *x as f32).collect::<Vec<_>>();
        f64::from(cores.dot(&narrow(a), &narrow(&b[..a.len()])))
    }
}

/// (O, log-sum-exp); unless `products` is exact, the weights are rounded, before the division by their sum.
pub fn attend_rounding(s: &Sizes, q: &[f64], k: &[f64], v: &[f64], products: Products) -> (Vec<f64>, Vec<f64>) {
    let (mut o, mut lse) = (vec![0.0; s.q_len()], vec![0.0; s.heads * s.tokens()]);
    let width = s.heads * s.head_dim;
    for (row, keys) in s.rows() {
        let own = row * width..(row + 1) * width;
        for (head, x) in attend_query(s, &q[own.clone()], k, v, keys, &mut o[own], products).into_iter().enumerate() {
            lse[head * s.tokens() + row] = x;
        }
    }
    (o, lse)
}

/// One query (all its heads) over the rows `keys`: adds to `o`; returns the log-sum-exp of each head.
pub fn attend_query(
    s: &Sizes,
    q: &[f64],
    k: &[f64],
    v: &[f64],
    keys: Range<usize>,
    o: &mut [f64],
    products: Products,
) -> Vec<f64> {
    let heads = q.chunks_exact(s.head_dim).zip(o.chunks_exact_mut(s.head_dim)).enumerate();
    let attend = |(head, (q, o)): (usize, (&[f64], &mut [f64]))| {
        let scores: Vec<f64> = keys.clone().map(|key| s.scale() * products.dot(q, &k[s.key_at(key, head)..])).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total: f64 = scores.iter().map(|x| (x - top).exp()).sum();
        for (key, score) in keys.clone().zip(&scores) {
            let p = products.round((score - top).exp()) / total;
            o.iter_mut().zip(&v[s.key_at(key, head)..]).for_each(|(o, v)| *o += p * v);
        }
        top + total.ln()
    };
    heads.map(attend).collect()
}

/// [dQ, dK, dV] from O and the log-sum-exp; unless `products` is exact, P and dS are rounded before the products with
/// them.
pub fn gradients(s: &Sizes, [q, k, v, o, lse, d_o]: [&[f64]; 6], products: Products) -> [Vec<f64>; 3] {
    let (mut dq, mut dk, mut dv) = (vec![0.0; s.q_len()], vec![0.0; s.kv_len()], vec![0.0; s.kv_len()]);
    for (query, keys) in s.rows() {
        for head in 0..s.heads {
            let row = (query * s.heads + head) * s.head_dim..(query * s.heads + head + 1) * s.head_dim;
            let delta = Products::Exact.dot(&o[row.clone()], &d_o[row.clone()]);
            for key in keys.clone() {
                let at = s.key_at(key, head);
                let key = at..at + s.head_dim;
                let score = s.scale() * products.dot(&q[row.clone()], &k[key.clone()]);
                let p = (score - lse[head * s.tokens() + query]).exp();
                let ds = products.round(p * (products.dot(&d_o[row.clone()], &v[key.clone()]) - delta));
                let p = products.round(p);
                for (q_at, k_at) in row.clone().zip(key) {
                    dq[q_at] += s.scale() * ds * k[k_at];
                    dk[k_at] += s.scale() * ds * q[q_at];
                    dv[k_at] += p * d_o[q_at];
                }
            }
        }
    }
    [dq, dk, dv]
}
