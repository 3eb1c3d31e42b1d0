//! What every backend asserts of an operation's arguments before it touches memory. A failed check is a mistake in the engine.

use super::{
    Attention, Backend, Direction, Epilogue, In, InputGradient, LinearShape, Out, Projection, View, ViewMut,
    WeightGradient,
};

/// [`Backend::linear`].
pub(super) fn linear<B: Backend>(x: &In<B>, w: &In<B>, y: &Out<B>, shape: LinearShape, epilogue: &Epilogue<B>) {
    let LinearShape { tokens, inputs, outputs } = shape;
    assert_eq!([x.len(), w.len(), y.len()], [tokens * inputs, outputs * inputs, tokens * outputs], "{shape:?}");
    assert!(epilogue.bias.as_ref().is_none_or(|b| b.len() == outputs), "{shape:?}");
    assert!(epilogue.residual.as_ref().is_none_or(|r| r.len() == tokens * outputs), "{shape:?}");
}

/// [`Backend::linear_backward_input`].
pub(super) fn linear_backward_input<B: Backend>(dy: &In<B>, w: &In<B>, dx: &Out<B>, shape: LinearShape) {
    let LinearShape { tokens, inputs, outputs } = shape;
    assert_eq!([dy.len(), w.len(), dx.len()], [tokens * outputs, outputs * inputs, tokens * inputs], "{shape:?}");
}

/// [`Backend::linear_backward_weight`].
pub(super) fn linear_backward_weight<B: Backend>(dy: &In<B>, x: &In<B>, dw: &ViewMut<B, B::Grad>, shape: LinearShape) {
    let LinearShape { tokens, inputs, outputs } = shape;
    assert_eq!([dy.len(), x.len(), dw.len()], [tokens * outputs, tokens * inputs, outputs * inputs], "{shape:?}");
}

/// Layers of `tokens` rows and `width` inputs or outputs in all: as one layer. Tensors of a layer are (W, Y).
fn layers(tokens: usize, inputs: usize, tensors: impl Iterator<Item = (usize, usize)>) -> LinearShape {
    assert!(tokens > 0 && inputs > 0, "{tokens} tokens, {inputs} inputs");
    let outputs = tensors.map(|(w, y)| {
        let outputs = w / inputs;
        assert_eq!([w, y], [outputs * inputs, tokens * outputs], "{tokens} tokens, {inputs} inputs");
        outputs
    });
    LinearShape { tokens, inputs, outputs: outputs.sum() }
}

/// [`Backend::linear_each`]: the shape of a layer with the outputs of all.
pub(super) fn linear_each<B: Backend>(x: &In<B>, each: &[Projection<B>], tokens: usize) -> LinearShape {
    let shape = layers(tokens, x.len() / tokens.max(1), each.iter().map(|layer| (layer.w.len(), layer.y.len())));
    assert_eq!(x.len(), tokens * shape.inputs);
    for Projection { w, bias, .. } in each {
        assert!(bias.as_ref().is_none_or(|bias| bias.len() == w.len() / shape.inputs));
    }
    shape
}

/// [`Backend::gated_linear`]: the shape of gate, and of up.
pub(super) fn gated_linear<B: Backend>(x: &In<B>, [gate, up]: [&In<B>; 2], y: &Out<B>, tokens: usize) -> LinearShape {
    let shape = layers(tokens, x.len() / tokens.max(1), std::iter::once((gate.len(), y.len())));
    assert_eq!([x.len(), up.len()], [tokens * shape.inputs, gate.len()]);
    shape
}

/// [`Backend::linear_backward_input_each`]: the same.
pub(super) fn linear_backward_input_each<B: Backend>(
    each: &[InputGradient<B>],
    dx: &Out<B>,
    tokens: usize,
) -> LinearShape {
    let shape = layers(tokens, dx.len() / tokens.max(1), each.iter().map(|layer| (layer.w.len(), layer.dy.len())));
    assert_eq!(dx.len(), tokens * shape.inputs);
    shape
}

/// [`Backend::linear_backward_weight_each`]: the same.
pub(super) fn linear_backward_weight_each<B: Backend>(
    x: &In<B>,
    each: &[WeightGradient<B>],
    tokens: usize,
) -> LinearShape {
    let shape = layers(tokens, x.len() / tokens.max(1), each.iter().map(|layer| (layer.dw.len(), layer.dy.len())));
    assert_eq!(x.len(), tokens * shape.inputs);
    shape
}

/// The sizes of a packed attention call: q, k, v, and what must be as long as q and as k. Returns the tokens.
pub(super) fn attention<B: Backend>(
    q: usize,
    k: usize,
    v: usize,
    like_q: &[usize],
    like_k: &[usize],
    lse: Option<usize>,
    shape: &Attention<B>,
) -> usize {
    heads(shape, k);
    let tokens = q / (shape.heads * shape.head_dim);
    assert_eq!(q, tokens * shape.heads * shape.head_dim);
    assert_eq!([k, v], [tokens * shape.kv_heads * shape.head_dim; 2]);
    assert!(like_q.iter().all(|len| *len == q) && like_k.iter().all(|len| *len == k));
    assert!(lse.is_none_or(|len| len == shape.heads * tokens));
    let starts = &shape.documents.starts;
    assert!(starts.is_sorted() && starts.first() == Some(&0));
    assert_eq!(starts.last().map(|end| *end as usize), Some(tokens));
    tokens
}

/// The heads of an attention call, and that rows of k are whole.
pub(super) fn heads<B: Backend>(shape: &Attention<B>, k: usize) {
    let Attention { heads, kv_heads, head_dim, window, .. } = *shape;
    assert!(kv_heads > 0 && head_dim > 0 && heads % kv_heads == 0, "{heads} heads on {kv_heads}");
    assert!(k.is_multiple_of(kv_heads * head_dim) && window != Some(0));
}

/// [`Backend::rmsnorm`]: the rows.
pub(super) fn rmsnorm<B: Backend>(x: &In<B>, weight: &In<B>, y: usize, rstd: Option<usize>, width: usize) -> usize {
    assert!(width > 0 && x.len().is_multiple_of(width) && weight.len() == width);
    assert_eq!(x.len(), y);
    assert!(rstd.is_none_or(|rstd| rstd == x.len() / width));
    x.len() / width
}

/// [`Backend::rope`].
pub(super) fn rope<B: Backend>(x: &Out<B>, positions: &View<B, u32>, heads: usize, head_dim: usize) {
    assert!(head_dim > 0 && head_dim.is_multiple_of(2) && heads > 0);
    assert_eq!(x.len(), positions.len() * heads * head_dim);
}

/// Rows of `width`, one for each of `rows`.
pub(super) fn rows<B: Backend>(values: usize, rows: &View<B, u32>, width: usize) {
    assert!(width > 0 && values == rows.len() * width);
}

/// [`Backend::cross_entropy`] and [`Backend::sample`]: rows of logits, and what has one element a row.
pub(super) fn logits(logits: usize, vocab: usize, like_rows: [usize; 2]) {
    assert!(vocab > 0 && like_rows[0] == like_rows[1] && logits == like_rows[0] * vocab);
}

/// [`Backend::perturb`].
pub(super) fn perturb<B: Backend>(w: &In<B>, direction: &Direction<B>, plus: &Out<B>, minus: Option<&Out<B>>) {
    assert_eq!(w.len(), plus.len());
    assert!(minus.is_none_or(|m| m.len() == w.len()));
    match direction {
        Direction::LowRank { rank, rows, .. } => {
            assert!(*rank > 0 && *rows > 0 && w.len().is_multiple_of(*rows));
        }
        Direction::Given(n) => assert_eq!(n.len(), w.len()),
        Direction::Gaussian(_) | Direction::Rademacher(_) | Direction::Scale => {}
    }
}
