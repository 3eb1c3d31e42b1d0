//! Causal grouped-query attention inside packed documents (Ainslie et al., arXiv 2305.13245), and over a key-value
//! cache.

use super::Operator;
use crate::backend::cost::{self, AttentionSize};
use crate::backend::{Backend, Buffer, Cost, In, Out, View, ViewMut};
use crate::error::Result;

/// Heads, scale and window of an attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on q·k, usually 1/√head_dim.
    pub scale: f32,
    /// Sliding window: a query sees itself and the `window − 1` positions before it.
    pub window: Option<usize>,
}

impl AttentionShape {
    /// Columns of Q and O.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Columns of K and V.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Query heads that share a key-value head.
    pub fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    #[track_caller]
    fn check(&self) {
        let Self { heads, kv_heads, head_dim, window, .. } = *self;
        assert!(kv_heads > 0 && head_dim > 0 && heads % kv_heads == 0, "{heads} heads on {kv_heads}");
        assert!(window != Some(0));
    }

    /// Asserts the elements of Q, of K and V, and that the documents cover the rows.
    #[track_caller]
    fn check_packed<B: Backend>(&self, q: usize, kv: [usize; 2], documents: &Documents<B>) {
        self.check();
        let tokens = q / self.q_width();
        assert_eq!((q, kv), (tokens * self.q_width(), [tokens * self.kv_width(); 2]), "{self:?}");
        let starts = &documents.starts;
        assert!(starts.is_sorted() && starts.first() == Some(&0) && starts.len() == documents.device.len());
        assert_eq!(starts.last().map(|end| *end as usize), Some(tokens));
    }

    /// Sizes of a call over `tokens` queries; `pairs` counts the (query, key) pairs of one head.
    pub fn size(&self, tokens: usize, pairs: u64) -> AttentionSize {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        AttentionSize { tokens, heads, kv_heads, head_dim, pairs }
    }

    /// Sizes of packed documents.
    pub(in crate::backend) fn packed<B: Backend>(&self, documents: &Documents<B>) -> AttentionSize {
        self.size(documents.tokens(), cost::attention_pairs(&documents.starts, self.window))
    }
}

/// Where the documents of a packed batch begin: `starts[i]..starts[i+1]` are the rows of document i.
pub struct Documents<B: Backend> {
    /// documents + 1 entries, the first 0, the last the number of tokens, ascending.
    pub starts: Vec<u32>,
    /// The same on the device.
    pub device: Buffer<B, u32>,
}

impl<B: Backend> Documents<B> {
    /// Rows of the batch.
    pub fn tokens(&self) -> usize {
        self.starts.last().map_or(0, |end| *end as usize)
    }
}

/// O = softmax(scale · Q·Kᵀ, causal inside documents) · V.
pub struct Attention<'a, B: Backend> {
    /// [tokens, heads·head_dim]
    pub q: In<'a, B>,
    /// [tokens, kv_heads·head_dim]
    pub k: In<'a, B>,
    /// [tokens, kv_heads·head_dim]
    pub v: In<'a, B>,
    /// [tokens, heads·head_dim]
    pub o: Out<'a, B>,
    /// [heads, tokens]: log-sum-exp of each row of scores, kept for backward.
    pub lse: Option<ViewMut<'a, B, f32>>,
    /// Heads, scale and window.
    pub shape: AttentionShape,
    /// Documents of the batch.
    pub documents: &'a Documents<B>,
}

impl<B: Backend> Operator<B> for Attention<'_, B> {
    const NAME: &'static str = "attention";

    fn check(&self) {
        self.shape.check_packed(self.q.len(), [self.k.len(), self.v.len()], self.documents);
        assert_eq!(self.o.len(), self.q.len());
        let rows = self.shape.heads * self.documents.tokens();
        assert!(self.lse.as_ref().is_none_or(|lse| lse.len() == rows));
    }

    fn cost(&self) -> Cost {
        let size = self.shape.packed(self.documents);
        size.forward(size_of::<B::Float>()) + self.lse.as_ref().map_or(Cost::default(), |_| size.lse())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.attention(self)
    }
}

/// Gradients of [`Attention`] by recomputation (FlashAttention, Dao et al., arXiv 2205.14135, appendix B.4):
/// P = exp(S − lse), dV = Pᵀ·dO, dP = dO·Vᵀ, dS = P ∘ (dP − rowsum(dO ∘ O)), dQ = scale·dS·K, dK = scale·dSᵀ·Q.
pub struct AttentionBackward<'a, B: Backend> {
    /// [tokens, heads·head_dim]
    pub q: In<'a, B>,
    /// [tokens, kv_heads·head_dim]
    pub k: In<'a, B>,
    /// [tokens, kv_heads·head_dim]
    pub v: In<'a, B>,
    /// [tokens, heads·head_dim]
    pub o: In<'a, B>,
    /// [heads, tokens]
    pub lse: View<'a, B, f32>,
    /// [tokens, heads·head_dim]
    pub d_o: In<'a, B>,
    /// Like `q`; overwritten.
    pub dq: Out<'a, B>,
    /// Like `k`; overwritten.
    pub dk: Out<'a, B>,
    /// Like `v`; overwritten.
    pub dv: Out<'a, B>,
    /// Heads, scale and window.
    pub shape: AttentionShape,
    /// Documents of the batch.
    pub documents: &'a Documents<B>,
}

impl<B: Backend> Operator<B> for AttentionBackward<'_, B> {
    const NAME: &'static str = "attention_backward";

    fn check(&self) {
        self.shape.check_packed(self.q.len(), [self.k.len(), self.v.len()], self.documents);
        assert_eq!([self.o.len(), self.d_o.len(), self.dq.len()], [self.q.len(); 3]);
        assert_eq!([self.dk.len(), self.dv.len()], [self.k.len(); 2]);
        assert_eq!(self.lse.len(), self.shape.heads * self.documents.tokens());
    }

    fn cost(&self) -> Cost {
        self.shape.packed(self.documents).backward(size_of::<B::Float>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.attention_backward(self)
    }
}

/// The rows of K and V that each query of [`AttentionDecode`] sees, [queries, 2]: the first row and the number of rows,
/// of which the last is the query's own position.
#[derive(Clone)]
pub struct DecodeSpans<'a, B: Backend> {
    /// By which the call is checked, and work divided.
    pub host: &'a [u32],
    /// The same on the device.
    pub device: View<'a, B, u32>,
}

impl<B: Backend> DecodeSpans<'_, B> {
    /// Queries.
    pub fn queries(&self) -> usize {
        self.host.len() / 2
    }

    /// Rows of each span.
    fn rows(&self) -> impl Iterator<Item = usize> {
        self.host.iter().skip(1).step_by(2).map(|rows| *rows as usize)
    }

    /// Rows of the longest span; 0 without queries.
    pub fn longest(&self) -> usize {
        self.rows().max().unwrap_or(0)
    }
}

/// [`Attention`] of one query a span of K and V, which may have any number of rows, such as those of a key-value cache.
pub struct AttentionDecode<'a, B: Backend> {
    /// [queries, heads·head_dim]
    pub q: In<'a, B>,
    /// [rows, kv_heads·head_dim]
    pub k: In<'a, B>,
    /// [rows, kv_heads·head_dim]
    pub v: In<'a, B>,
    /// [queries, heads·head_dim]
    pub o: Out<'a, B>,
    /// What each query sees.
    pub spans: DecodeSpans<'a, B>,
    /// Heads, scale and window.
    pub shape: AttentionShape,
}

impl<B: Backend> Operator<B> for AttentionDecode<'_, B> {
    const NAME: &'static str = "attention_decode";

    fn check(&self) {
        self.shape.check();
        let (queries, rows) = (self.spans.queries(), self.k.len() / self.shape.kv_width());
        assert_eq!([self.q.len(), self.o.len()], [queries * self.shape.q_width(); 2]);
        assert_eq!([self.k.len(), self.v.len()], [rows * self.shape.kv_width(); 2]);
        assert_eq!([self.spans.host.len(), self.spans.device.len()], [2 * queries; 2]);
        let inside = |span: &[u32]| span[1] > 0 && span[0] as usize + span[1] as usize <= rows;
        assert!(self.spans.host.chunks_exact(2).all(inside), "spans beyond {rows} rows");
    }

    fn cost(&self) -> Cost {
        let seen = self.spans.rows().map(|rows| rows.min(self.shape.window.unwrap_or(usize::MAX)) as u64);
        let size = self.shape.size(self.spans.queries(), seen.sum());
        size.decode(self.k.len() / self.shape.kv_width(), size_of::<B::Float>())
    }

    fn launch(self, backend: &B) -> Result<()> {
        backend.attention_decode(self)
    }
}
