//! Arithmetic: buffers and operations, one operation a kernel family.
//!
//! The engine owns the order of operations; a [`Backend`] owns the arithmetic and nothing else.
//! [`cpu`] computes in f32, [`cuda`] in bf16 with f32 sums. Every tensor is dense and row-major; `tokens` counts the rows of a
//! packed batch, in which documents follow one another without padding.
//!
//! Operations take [`View`]s and check every length: a wrong shape is a mistake in the engine, and
//! panics. Errors are for what a device may refuse (memory, a lost device).

mod buffer;
mod check;
pub mod cost;
pub mod cpu;
pub mod cuda;
mod noise;
mod roofline;
pub mod trace;

pub use buffer::{Buffer, Element, FloatElement, View, ViewMut};
pub use cost::Cost;
pub use noise::{Direction, NoiseKey};
pub use roofline::Roofline;

use crate::error::Result;
use cost::AttentionSize;

/// A read-only view of activations, weights.
pub type In<'a, B> = View<'a, B, <B as Backend>::Float>;
/// A writable view of activations, weights.
pub type Out<'a, B> = ViewMut<'a, B, <B as Backend>::Float>;

/// Marks a position that carries no loss.
pub const IGNORE: u32 = u32::MAX;

/// Rows and columns of a linear layer: X [tokens, inputs] · Wᵀ [inputs, outputs].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearShape {
    /// Rows of X and Y.
    pub tokens: usize,
    /// Columns of X and of W.
    pub inputs: usize,
    /// Columns of Y, rows of W.
    pub outputs: usize,
}

/// What a linear layer does to its product before it is stored: `y = alpha·x·wᵀ + bias + residual (+ y)`.
pub struct Epilogue<'a, B: Backend> {
    /// Factor on the product.
    pub alpha: f32,
    /// \[outputs\]
    pub bias: Option<In<'a, B>>,
    /// [tokens, outputs]
    pub residual: Option<In<'a, B>>,
    /// Add to what `y` holds.
    pub accumulate: bool,
}

impl<B: Backend> Epilogue<'_, B> {
    /// Elements that are added to a product of `y` elements.
    fn addends(&self, y: usize) -> usize {
        let bias = self.bias.as_ref().map_or(0, View::len);
        bias + self.residual.as_ref().map_or(0, View::len) + if self.accumulate { y } else { 0 }
    }
}

impl<B: Backend> Default for Epilogue<'_, B> {
    fn default() -> Self {
        Self { alpha: 1.0, bias: None, residual: None, accumulate: false }
    }
}

/// One of several linear layers of the same X.
pub struct Projection<'a, B: Backend> {
    /// [outputs, inputs]
    pub w: In<'a, B>,
    /// \[outputs\]
    pub bias: Option<In<'a, B>>,
    /// [tokens, outputs]
    pub y: Out<'a, B>,
}

/// One of several linear layers whose input is the same: what it adds to the gradient of that.
pub struct InputGradient<'a, B: Backend> {
    /// [tokens, outputs]
    pub dy: In<'a, B>,
    /// [outputs, inputs]
    pub w: In<'a, B>,
}

/// One of several linear layers of the same X: the gradient of its weight.
pub struct WeightGradient<'a, B: Backend> {
    /// [tokens, outputs]
    pub dy: In<'a, B>,
    /// [outputs, inputs]
    pub dw: ViewMut<'a, B, B::Grad>,
}

/// Where the documents of a packed batch begin: `starts[i]..starts[i+1]` are the rows of document i.
pub struct Documents<B: Backend> {
    /// documents + 1 entries, the first 0, the last the number of tokens, ascending.
    pub starts: Vec<u32>,
    /// The same on the device.
    pub device: Buffer<B, u32>,
}

/// Causal grouped-query attention inside documents.
pub struct Attention<'a, B: Backend> {
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
    /// Documents of the batch.
    pub documents: &'a Documents<B>,
}

impl<B: Backend> Attention<'_, B> {
    /// Its sizes over its documents.
    fn size(&self) -> AttentionSize {
        let tokens = self.documents.starts.last().map_or(0, |end| *end as usize);
        self.decode_size(tokens, cost::attention_pairs(&self.documents.starts, self.window))
    }

    /// Its sizes over queries that see `pairs` rows in all.
    fn decode_size(&self, tokens: usize, pairs: u64) -> AttentionSize {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        AttentionSize { tokens, heads, kv_heads, head_dim, pairs }
    }
}

/// How a step stores what is narrower than f32: bf16 weights and moments. Backends that keep them in f32 ignore it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Rounding {
    /// Up or down with probabilities that keep the expectation, by [`AdamW::seed`]: updates smaller than half a unit in
    /// the last place (2⁻⁹ to 2⁻⁸ of a bf16 weight) still count on average.
    #[default]
    Stochastic,
    /// To nearest even: smaller updates are lost, and a second moment in bf16 cannot decay at beta2 = 0.999.
    Nearest,
}

/// Hyper-parameters of one AdamW step (Loshchilov and Hutter, arXiv 1711.05101; as `torch.optim.AdamW`).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Decay of the first moment.
    pub beta1: f32,
    /// Decay of the second moment.
    pub beta2: f32,
    /// Added to √v̂.
    pub eps: f32,
    /// Counts from 1; bias correction uses it.
    pub step: u32,
    /// Clip the global norm of all gradients of the table to this; `None` = no clipping.
    pub max_grad_norm: Option<f32>,
    /// Seeds stochastic rounding, together with `step`, a module's place in the table and an element's in the module.
    pub seed: u64,
    /// How bf16 weights and moments are rounded.
    pub rounding: Rounding,
}

/// One row of the module table of a masked step.
pub struct AdamWModule<'a, B: Backend> {
    /// The tensor.
    pub weight: Out<'a, B>,
    /// Its gradient.
    pub grad: View<'a, B, B::Grad>,
    /// First moment.
    pub m: ViewMut<'a, B, B::Moment>,
    /// Second moment.
    pub v: ViewMut<'a, B, B::Moment>,
    /// Learning rate, the schedule applied.
    pub lr: f32,
    /// Decoupled weight decay.
    pub weight_decay: f32,
}

/// How the next token is drawn from a row of logits.
#[derive(Clone, Copy, Debug, PartialEq, clap::Args)]
pub struct Sampling {
    /// Sampling temperature; 0 = greedy (the first of equals)
    #[arg(long, default_value_t = 0.0)]
    pub temperature: f32,
    /// Nucleus sampling: draw from the smallest set of tokens whose probability reaches this; 1 = all
    #[arg(long, default_value_t = 1.0)]
    pub top_p: f32,
}

impl Sampling {
    /// log₂e / temperature: what an exponent of 2 has for each unit of a logit. Finite.
    fn exponent_scale(self) -> f32 {
        ((std::f64::consts::LOG2_E / self.temperature as f64) as f32).min(f32::MAX)
    }
}

/// Buffers and operations. One method = one kernel family. Clones are the same device. Every operation is a span of
/// [`trace`] with its [`cost`].
pub trait Backend: Clone + Send + Sync + 'static {
    /// Weights and activations.
    type Float: FloatElement;
    /// Weight gradients.
    type Grad: FloatElement;
    /// AdamW's moments.
    type Moment: FloatElement;
    /// Memory for `T`s.
    type Storage<T: Element>: Send + Sync;

    /// `cpu`, `cuda:0`.
    fn name(&self) -> String;

    /// Rows from which a product is no faster for having more. Where nothing is kept for backward the engine works in
    /// pieces of about this many, whose intermediate values then stay in a cache; no limit by default.
    fn enough_tokens(&self) -> usize {
        usize::MAX
    }

    /// Scratch bytes of a product of [m, k] by [k, n] beside operands and result: none by default.
    fn product_scratch_bytes(_m: usize, _n: usize, _k: usize) -> u64 {
        0
    }

    /// Rows of logits, of `vocab` columns, that are in memory at once: about 64 MiB of them by default.
    fn logit_rows(vocab: usize) -> usize {
        ((64 << 20) / (vocab * size_of::<Self::Float>())).max(1)
    }

    /// Zeroed memory.
    fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<Self, T>>;
    /// Host to device.
    fn write<T: Element>(&self, host: &[T], to: ViewMut<'_, Self, T>) -> Result<()>;
    /// Device to host; waits for the device.
    fn read<T: Element>(&self, from: View<'_, Self, T>, host: &mut [T]) -> Result<()>;
    /// Device to device.
    fn copy<T: Element>(&self, from: View<'_, Self, T>, to: ViewMut<'_, Self, T>) -> Result<()>;
    /// Sets every element to zero.
    fn clear<T: Element>(&self, to: ViewMut<'_, Self, T>) -> Result<()>;
    /// Waits until everything queued is done.
    fn synchronize(&self) -> Result<()>;
    /// Tells an outside profiler (nsys, ncu) that what it is to look at begins, or ends. Nothing on the CPU.
    fn profiler(&self, _begins: bool) -> Result<()> {
        Ok(())
    }

    /// Most bytes of the device's own memory that buffers held at once; `None` where they are in the memory of the process.
    fn device_peak_bytes(&self) -> Option<u64> {
        None
    }
    /// Runs `work`, a part of a step that comes again and again: it queues operations, and neither reads from the device nor
    /// writes to it. A GPU may hold its operations back until `work` is done, and get all of them in one launch where they
    /// are those of an earlier step. The values are the same either way; by default nothing is held back.
    fn replay<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        work()
    }

    // ---- gemm
    /// Y [tokens, outputs] = epilogue(X [tokens, inputs] · W [outputs, inputs]ᵀ).
    fn linear(
        &self,
        x: In<'_, Self>,
        w: In<'_, Self>,
        y: Out<'_, Self>,
        shape: LinearShape,
        epilogue: Epilogue<'_, Self>,
    ) -> Result<()>;
    /// Several layers of one X [tokens, inputs] (q, k and v; gate and up): each Y = X·Wᵀ + bias. One after another by
    /// default.
    fn linear_each(&self, x: In<'_, Self>, layers: &mut [Projection<'_, Self>], tokens: usize) -> Result<()> {
        let inputs = x.len() / tokens;
        for Projection { w, bias, y } in layers {
            let shape = LinearShape { tokens, inputs, outputs: w.len() / inputs };
            let epilogue = Epilogue { bias: bias.clone(), ..Epilogue::default() };
            self.linear(x.clone(), w.clone(), y.reborrow(), shape, epilogue)?;
        }
        Ok(())
    }
    /// Y [tokens, outputs] = silu(X·gateᵀ) · (X·upᵀ) of X [tokens, inputs] and weights [outputs, inputs], without the two
    /// products in memory; the same bits as [`Backend::linear_each`] and [`Backend::swiglu`]. `false`, and Y left as it was,
    /// where no kernel does that for these tensors: always by default.
    fn gated_linear(
        &self,
        _x: In<'_, Self>,
        _gate: In<'_, Self>,
        _up: In<'_, Self>,
        _y: Out<'_, Self>,
        _tokens: usize,
    ) -> Result<bool> {
        Ok(false)
    }
    /// dX [tokens, inputs] = alpha · dY · W, added to what dX holds if `accumulate`.
    fn linear_backward_input(
        &self,
        dy: In<'_, Self>,
        w: In<'_, Self>,
        dx: Out<'_, Self>,
        shape: LinearShape,
        alpha: f32,
        accumulate: bool,
    ) -> Result<()>;
    /// dW [outputs, inputs] = alpha · dYᵀ · X, added to what dW holds if `accumulate`.
    fn linear_backward_weight(
        &self,
        dy: In<'_, Self>,
        x: In<'_, Self>,
        dw: ViewMut<'_, Self, Self::Grad>,
        shape: LinearShape,
        alpha: f32,
        accumulate: bool,
    ) -> Result<()>;
    /// Backward of [`Backend::linear_each`]: dX [tokens, inputs] = Σ dY·W over the layers, added to what dX holds if
    /// `accumulate`. One after another by default, each added to a dX that is stored in between.
    fn linear_backward_input_each(
        &self,
        layers: &[InputGradient<'_, Self>],
        mut dx: Out<'_, Self>,
        tokens: usize,
        accumulate: bool,
    ) -> Result<()> {
        let inputs = dx.len() / tokens;
        for (i, InputGradient { dy, w }) in layers.iter().enumerate() {
            let shape = LinearShape { tokens, inputs, outputs: w.len() / inputs };
            self.linear_backward_input(dy.clone(), w.clone(), dx.reborrow(), shape, 1.0, accumulate || i > 0)?;
        }
        Ok(())
    }
    /// Backward of [`Backend::linear_each`]: each dW = dYᵀ·X, added to what dW holds if `accumulate`. One after another by
    /// default.
    fn linear_backward_weight_each(
        &self,
        x: In<'_, Self>,
        layers: &mut [WeightGradient<'_, Self>],
        tokens: usize,
        accumulate: bool,
    ) -> Result<()> {
        let inputs = x.len() / tokens;
        for WeightGradient { dy, dw } in layers {
            let shape = LinearShape { tokens, inputs, outputs: dw.len() / inputs };
            self.linear_backward_weight(dy.clone(), x.clone(), dw.reborrow(), shape, 1.0, accumulate)?;
        }
        Ok(())
    }
    /// dbias \[outputs\] = column sums of dY [tokens, outputs].
    fn linear_backward_bias(
        &self,
        dy: In<'_, Self>,
        dbias: ViewMut<'_, Self, Self::Grad>,
        tokens: usize,
        outputs: usize,
        accumulate: bool,
    ) -> Result<()>;

    // ---- attention
    /// O = softmax(scale · Q·Kᵀ, causal inside documents) · V. Q, O [tokens, heads·head_dim]; K, V
    /// [tokens, kv_heads·head_dim]; `lse` [heads, tokens] = log-sum-exp of each row of scores, kept for backward.
    fn attention(
        &self,
        q: In<'_, Self>,
        k: In<'_, Self>,
        v: In<'_, Self>,
        o: Out<'_, Self>,
        lse: Option<ViewMut<'_, Self, f32>>,
        shape: &Attention<'_, Self>,
    ) -> Result<()>;
    /// Gradients of [`Backend::attention`]; dQ, dK, dV are overwritten.
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        q: In<'_, Self>,
        k: In<'_, Self>,
        v: In<'_, Self>,
        o: In<'_, Self>,
        lse: View<'_, Self, f32>,
        d_o: In<'_, Self>,
        dq: Out<'_, Self>,
        dk: Out<'_, Self>,
        dv: Out<'_, Self>,
        shape: &Attention<'_, Self>,
    ) -> Result<()>;
    /// One query a span: query i (Q, O [spans, heads·head_dim]) sees the rows of K and V (any number of rows, e.g. a key-value
    /// cache) that `spans` [spans, 2] names by (start, rows); the last of them is its own position. `longest` is the largest
    /// number of rows (or more: it bounds the work). `shape.documents` is not used.
    #[allow(clippy::too_many_arguments)]
    fn attention_decode(
        &self,
        q: In<'_, Self>,
        k: In<'_, Self>,
        v: In<'_, Self>,
        o: Out<'_, Self>,
        spans: View<'_, Self, u32>,
        longest: usize,
        shape: &Attention<'_, Self>,
    ) -> Result<()>;

    // ---- rmsnorm
    /// y = x / √(mean(x²) + eps) · weight over rows of `width`; `rstd` \[rows\] is kept for backward. Also the per-head
    /// q and k norms (rows = tokens·heads, width = head_dim).
    fn rmsnorm(
        &self,
        x: In<'_, Self>,
        weight: In<'_, Self>,
        y: Out<'_, Self>,
        rstd: Option<ViewMut<'_, Self, f32>>,
        width: usize,
        eps: f32,
    ) -> Result<()>;
    /// dx = ∂/∂x, added to what `dx` holds if `accumulate_dx` (the residual path); dweight likewise.
    #[allow(clippy::too_many_arguments)]
    fn rmsnorm_backward(
        &self,
        dy: In<'_, Self>,
        x: In<'_, Self>,
        weight: In<'_, Self>,
        rstd: View<'_, Self, f32>,
        dx: Option<Out<'_, Self>>,
        dweight: Option<ViewMut<'_, Self, Self::Grad>>,
        width: usize,
        accumulate_dx: bool,
        accumulate_dweight: bool,
    ) -> Result<()>;

    // ---- rope
    /// Rotates halves in place: x [tokens, heads·head_dim]; `table` [positions, head_dim]: cosines of the head_dim/2
    /// frequencies, then sines (attention factor included). `inverse` = the backward pass.
    #[allow(clippy::too_many_arguments)]
    fn rope(
        &self,
        x: Out<'_, Self>,
        table: View<'_, Self, f32>,
        positions: View<'_, Self, u32>,
        heads: usize,
        head_dim: usize,
        inverse: bool,
    ) -> Result<()>;

    // ---- swiglu
    /// y = silu(gate) · up.
    fn swiglu(&self, gate: In<'_, Self>, up: In<'_, Self>, y: Out<'_, Self>) -> Result<()>;
    /// In place: `gate` becomes dgate, `up` becomes dup.
    fn swiglu_backward(&self, gate: Out<'_, Self>, up: Out<'_, Self>, dy: In<'_, Self>) -> Result<()>;

    // ---- embedding
    /// to\[i\] = from[rows\[i\]], rows of `width`. The embedding, and the choice of rows that go on.
    fn gather_rows(&self, from: In<'_, Self>, rows: View<'_, Self, u32>, to: Out<'_, Self>, width: usize)
    -> Result<()>;
    /// to[rows\[i\]] = from\[i\]; rows are distinct. Fills a key-value cache.
    fn scatter_rows(
        &self,
        from: In<'_, Self>,
        rows: View<'_, Self, u32>,
        to: Out<'_, Self>,
        width: usize,
    ) -> Result<()>;
    /// dtable[rows\[i\]] += dy\[i\], in a fixed order of i; rows may repeat.
    fn embedding_backward(
        &self,
        dy: In<'_, Self>,
        rows: View<'_, Self, u32>,
        dtable: ViewMut<'_, Self, Self::Grad>,
        width: usize,
    ) -> Result<()>;

    // ---- cross-entropy
    /// Per row of `logits` [rows, vocab]: losses\[row\] = −log softmax(row)\[target\], 0 where the target is [`IGNORE`].
    /// With `scale`, logits become scale · dloss/dlogits (0 for ignored rows).
    fn cross_entropy(
        &self,
        logits: Out<'_, Self>,
        targets: View<'_, Self, u32>,
        losses: ViewMut<'_, Self, f32>,
        vocab: usize,
        scale: Option<f32>,
    ) -> Result<()>;

    // ---- sampling
    /// Draws a token a row of `logits` [rows, vocab]; `uniforms` \[rows\] in [0, 1) decide (unused when greedy).
    fn sample(
        &self,
        logits: In<'_, Self>,
        uniforms: View<'_, Self, f32>,
        tokens: ViewMut<'_, Self, u32>,
        vocab: usize,
        sampling: Sampling,
    ) -> Result<()>;

    // ---- adamw
    /// squares\[i\] = Σ parts\[i\]². Sums in f64 or in a fixed pairwise order.
    fn sum_squares<T: FloatElement>(&self, parts: &[View<'_, Self, T>], squares: ViewMut<'_, Self, f32>) -> Result<()>;
    /// One step over the table. `squares` \[table\] comes from [`Backend::sum_squares`] over the same gradients: it gives the
    /// clip factor min(1, max_grad_norm / (norm + 1e-6)), and where its sum is not finite nothing at all is changed.
    fn adamw_masked(
        &self,
        table: &mut [AdamWModule<'_, Self>],
        squares: View<'_, Self, f32>,
        hyper: AdamW,
    ) -> Result<()>;

    // ---- perturb
    /// Σ w² in parts, as [`Backend::perturb`] takes it: made once for many draws.
    fn squares(&self, w: In<'_, Self>) -> Result<Buffer<Self, f64>>;
    /// Out of place and at equal relative norm: plus = w + epsilon·‖w‖/‖n‖·n, minus = w − the same, with one draw of n.
    /// ‖w‖ comes from `squares`, which are [`Backend::squares`] of w; `None`: they are made for this draw.
    fn perturb(
        &self,
        w: In<'_, Self>,
        squares: Option<View<'_, Self, f64>>,
        direction: &Direction<'_, Self>,
        epsilon: f32,
        plus: Out<'_, Self>,
        minus: Option<Out<'_, Self>>,
    ) -> Result<()>;
}
