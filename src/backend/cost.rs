//! Bytes and FLOPs of the operators by their sizes: one function a family, shared by the trace spans, the launches of
//! kernels, `swat plan` and the benches.
//!
//! Bytes count each tensor once, as it is read or written; small ones (positions, starts of documents) are left out.
//! FLOPs count a multiplication and an addition as two, a root, an exponential or a conversion as one. Backends differ
//! in their types: `float`, `grad` and `moment` are bytes of an element.

use std::iter::Sum;
use std::ops::Add;

/// Least bytes and FLOPs of an operation: a bound on its time on any machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Read and written, each tensor once.
    pub bytes: u64,
    /// Multiplications and additions.
    pub flops: u64,
}

impl Cost {
    /// `bytes`, and no FLOPs.
    pub fn moved(bytes: usize) -> Self {
        Self { bytes: bytes as u64, flops: 0 }
    }

    /// `bytes` and `flops` for each element.
    fn each(elements: usize, bytes: usize, flops: usize) -> Self {
        Self { bytes: elements as u64 * bytes as u64, flops: elements as u64 * flops as u64 }
    }
}

impl Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self { bytes: self.bytes + other.bytes, flops: self.flops + other.flops }
    }
}

impl Sum for Cost {
    fn sum<I: Iterator<Item = Self>>(costs: I) -> Self {
        costs.fold(Self::default(), Self::add)
    }
}

/// Sizes of a linear layer: X [tokens, inputs] · Wᵀ [inputs, outputs].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// Rows of X and Y.
    pub tokens: usize,
    /// Columns of X and of W.
    pub inputs: usize,
    /// Columns of Y, rows of W.
    pub outputs: usize,
}

/// C [m, n] = A·B over a depth of k; A and B have elements of `float` bytes, C of `result`.
pub fn product([m, n, k]: [usize; 3], float: usize, result: usize) -> Cost {
    let [m, n, k] = [m, n, k].map(|size| size as u64);
    Cost { bytes: float as u64 * (m * k + n * k) + result as u64 * m * n, flops: 2 * m * n * k }
}

/// Y = X·Wᵀ + addends: `addends` counts the elements of bias, residual and old Y.
pub fn linear(shape: LinearShape, addends: usize, float: usize) -> Cost {
    product([shape.tokens, shape.outputs, shape.inputs], float, float) + Cost::moved(addends * float)
}

/// Y = silu(X·gateᵀ) · (X·upᵀ): two layers of this shape, only Y is stored.
pub fn gated_linear(LinearShape { tokens, inputs, outputs }: LinearShape, float: usize) -> Cost {
    product([tokens, 2 * outputs, inputs], float, 0) + Cost::each(tokens * outputs, float, SWIGLU_FLOPS)
}

/// dX = dY·W, overwritten.
pub fn linear_backward_input(shape: LinearShape, float: usize) -> Cost {
    let LinearShape { tokens, inputs, outputs } = shape;
    product([tokens, inputs, outputs], float, float)
}

/// dW = dYᵀ·X, overwritten.
pub fn linear_backward_weight(shape: LinearShape, float: usize, grad: usize) -> Cost {
    let LinearShape { tokens, inputs, outputs } = shape;
    product([outputs, inputs, tokens], float, grad)
}

/// Column sums of a dY of `elements` elements, overwritten.
pub fn linear_backward_bias(elements: usize, columns: usize, float: usize, grad: usize) -> Cost {
    Cost::each(elements, float, 1) + Cost::moved(columns * grad)
}

/// Pairs of a query and a key that it sees, of one head, over documents that begin at `starts`.
pub fn attention_pairs(starts: &[u32], window: Option<usize>) -> u64 {
    let window = window.map_or(u64::MAX, |window| window as u64);
    let document = |len: u64| match len.checked_sub(window) {
        Some(whole) => window * (window + 1) / 2 + whole * window,
        None => len * (len + 1) / 2,
    };
    starts.windows(2).map(|w| document(u64::from(w[1] - w[0]))).sum()
}

/// Sizes of an attention call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionSize {
    /// Queries.
    pub tokens: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Pairs of a query and a key that it sees, of one head.
    pub pairs: u64,
}

impl AttentionSize {
    /// A pass over `q_tensors` tensors like Q, `kv_tensors` like K and `stats` like lse, with `flops` a pair, head and
    /// column.
    pub fn pass(self, q_tensors: usize, kv_tensors: usize, stats: usize, flops: u64, float: usize) -> Cost {
        let Self { tokens, heads, kv_heads, head_dim, pairs } = self;
        let row = (q_tensors * heads + kv_tensors * kv_heads) * head_dim * float + stats * heads * size_of::<f32>();
        Cost { bytes: tokens as u64 * row as u64, flops: pairs * flops * (heads * head_dim) as u64 }
    }

    /// O from Q, K and V: two products a pair.
    pub fn forward(self, float: usize) -> Cost {
        self.pass(2, 2, 0, 4, float)
    }

    /// The log-sum-exps that forward keeps.
    pub fn lse(self) -> Cost {
        Cost::moved(self.tokens * self.heads * size_of::<f32>())
    }

    /// dQ, dK and dV from Q, K, V, O, lse and dO: five products a pair.
    pub fn backward(self, float: usize) -> Cost {
        self.pass(4, 4, 1, 10, float)
    }

    /// O from Q and a cache of `rows` rows of K and V, each read once at most.
    pub fn decode(self, rows: usize, float: usize) -> Cost {
        let Self { tokens, heads, kv_heads, head_dim, pairs } = self;
        let read = pairs.min(rows as u64) * (2 * kv_heads * head_dim) as u64;
        let moved = read + (2 * tokens * heads * head_dim) as u64;
        Cost { bytes: float as u64 * moved, flops: 4 * pairs * (heads * head_dim) as u64 }
    }
}

/// y of `elements` in rows of `width`.
pub fn rmsnorm(elements: usize, width: usize, float: usize) -> Cost {
    Cost::each(elements, 2 * float, 4) + Cost::moved(width * float)
}

/// Gradients of RMSNorm that are wanted.
#[derive(Clone, Copy, Debug)]
pub struct NormGradients {
    /// dx; `Some(true)`: accumulated.
    pub dx: Option<bool>,
    /// dweight.
    pub dweight: bool,
}

/// Gradients of RMSNorm from dy, x, weight and rstd.
pub fn rmsnorm_backward(elements: usize, width: usize, wanted: NormGradients, float: usize) -> Cost {
    let written = wanted.dx.map_or(0, |accumulate| 1 + usize::from(accumulate));
    let flops = wanted.dx.map_or(0, |_| 8) + if wanted.dweight { 3 } else { 0 };
    Cost::each(elements, (2 + written) * float, flops)
        + Cost::moved(width * float + elements / width * size_of::<f32>())
}

/// Rotation in place.
pub fn rope(elements: usize, float: usize) -> Cost {
    Cost::each(elements, 2 * float, 3)
}

/// y = silu(gate) · up.
pub fn swiglu(elements: usize, float: usize) -> Cost {
    Cost::each(elements, 3 * float, SWIGLU_FLOPS)
}

/// dgate and dup replace gate and up.
pub fn swiglu_backward(elements: usize, float: usize) -> Cost {
    Cost::each(elements, 5 * float, 13)
}

/// `rows` rows of `width` from one place to another.
pub fn move_rows(rows: usize, width: usize, float: usize) -> Cost {
    Cost::moved(2 * rows * width * float + rows * size_of::<u32>())
}

/// `rows` rows of `width` elements of `float` bytes, added to rows of a table whose elements have `sum`.
pub fn add_rows(rows: usize, width: usize, float: usize, sum: usize) -> Cost {
    Cost::each(rows * width, float + 2 * sum, 1) + Cost::moved(rows * size_of::<u32>())
}

/// Losses of rows of logits.
pub fn cross_entropy(logits: usize, float: usize) -> Cost {
    Cost::each(logits, float, 4)
}

/// Losses, and gradients that replace the logits.
pub fn cross_entropy_gradient(logits: usize, float: usize) -> Cost {
    Cost::each(logits, 2 * float, 7)
}

/// The largest of each row of logits.
pub fn sample_greedy(logits: usize, float: usize) -> Cost {
    Cost::each(logits, float, 1)
}

/// A draw from the nucleus of each row of logits.
pub fn sample_nucleus(logits: usize, float: usize) -> Cost {
    Cost::each(logits, float, 80)
}

/// Σ x² of elements of `element` bytes.
pub fn sum_squares(elements: usize, element: usize) -> Cost {
    Cost::each(elements, element, 2)
}

/// A step of AdamW: weights and moments read and written, gradients read.
pub fn adamw(elements: usize, float: usize, grad: usize, moment: usize) -> Cost {
    Cost::each(elements, 2 * float + grad + 4 * moment, 14)
}

/// A step of moving averages, f32, of weights.
pub fn update_means(elements: usize, float: usize) -> Cost {
    Cost::each(elements, float + 2 * size_of::<f32>(), 3)
}

/// rho·(weight − anchor) added to gradients.
pub fn proximal_gradients(elements: usize, float: usize, grad: usize) -> Cost {
    Cost::each(elements, 2 * float + 2 * grad, 3)
}

/// `copies` perturbed copies of a tensor; the direction takes `bytes` and `flops` an element.
pub fn perturbed_copies(elements: usize, copies: usize, bytes: usize, flops: usize, float: usize) -> Cost {
    Cost::each(elements, (1 + copies) * float + bytes, 2 * copies + flops)
}

/// A step along a direction.
pub fn move_along(elements: usize, float: usize) -> Cost {
    Cost::each(elements, 3 * float, 2)
}

/// FLOPs of silu(gate) · up: a negation, an exponential, a sum, a quotient, a product.
const SWIGLU_FLOPS: usize = 5;

/// FLOPs of a normal, half a Box–Muller pair: two scalings, a logarithm, its double, a root, a sine, a cosine, two
/// products.
pub const NORMAL_FLOPS: usize = 5;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_counted_as_a_mask_would() {
        let counted = |starts: &[u32], window: Option<usize>| {
            let sees = |query: u32, key: u32| key <= query && window.is_none_or(|w| ((query - key) as usize) < w);
            let document = |w: &[u32]| (w[0]..w[1]).flat_map(|q| (w[0]..w[1]).map(move |k| (q, k))).collect::<Vec<_>>();
            starts.windows(2).flat_map(document).filter(|(q, k)| sees(*q, *k)).count() as u64
        };
        for window in [None, Some(1), Some(3), Some(7), Some(8), Some(100)] {
            for starts in [&[0, 7][..], &[0, 1, 9, 12], &[0]] {
                assert_eq!(attention_pairs(starts, window), counted(starts, window), "{window:?}");
            }
        }
    }

    #[test]
    fn tensors_are_counted_once() {
        let shape = LinearShape { tokens: 3, inputs: 5, outputs: 7 };
        assert_eq!(linear(shape, 7 + 21, 2), Cost { bytes: 2 * (15 + 35 + 21 + 7 + 21), flops: 210 });
        assert_eq!(gated_linear(shape, 2), Cost { bytes: 2 * (15 + 2 * 35 + 21), flops: 2 * 210 + 5 * 21 });
        assert_eq!(linear_backward_input(shape, 4), Cost { bytes: 4 * (21 + 35 + 15), flops: 210 });
        assert_eq!(linear_backward_weight(shape, 2, 4), Cost { bytes: 2 * (21 + 15) + 4 * 35, flops: 210 });
        assert_eq!(add_rows(3, 5, 2, 4), Cost { bytes: 3 * (5 * (2 + 2 * 4) + 4), flops: 15 });
        let size = AttentionSize { tokens: 4, heads: 2, kv_heads: 1, head_dim: 8, pairs: 10 };
        assert_eq!(size.forward(2) + size.lse(), Cost { bytes: 4 * (48 * 2 + 8), flops: 10 * 4 * 16 });
        // What several queries see is read once.
        let decode = AttentionSize { tokens: 2, ..size };
        assert_eq!(decode.decode(5, 4).bytes, 4 * (2 * 5 * 8 + 2 * 2 * 16));
        assert_eq!(decode.decode(50, 4), Cost { bytes: 4 * (2 * 10 * 8 + 2 * 2 * 16), flops: 4 * 10 * 16 });
        assert_eq!([linear(shape, 0, 2), linear(shape, 0, 2)].into_iter().sum::<Cost>().flops, 420);
    }
}
