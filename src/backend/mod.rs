//! Arithmetic: buffers, and operators on them ([`ops`]).
//!
//! The engine owns the order of operators; a [`Backend`] owns the arithmetic and nothing else. [`cpu`] computes in f32, [`cuda`]
//! in bf16 with f32 sums. Operators check every shape: a wrong one is a bug of the engine, and panics. Errors are for what a
//! device may refuse (memory, a lost device).

mod buffer;
pub mod cost;
pub mod cpu;
pub mod cuda;
pub mod ops;
mod roofline;
pub mod trace;

pub use buffer::{Buffer, Element, FloatElement, View, ViewMut};
pub use cost::Cost;
pub use ops::*;
pub use roofline::Roofline;

use crate::error::Result;

/// A read-only view of weights or activations.
pub type In<'a, B> = View<'a, B, <B as Backend>::Float>;
/// A writable view of weights or activations.
pub type Out<'a, B> = ViewMut<'a, B, <B as Backend>::Float>;

/// A device: its memory, and the arithmetic of the operators. Clones are the same device.
///
/// Operators are called by [`Operator::run`], which checks and traces; their methods here neither check nor trace.
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

    /// See [`Linear`].
    fn linear(&self, op: Linear<'_, Self>) -> Result<()>;
    /// See [`LinearEach`]. One layer after another by default.
    fn linear_each(&self, op: LinearEach<'_, Self>) -> Result<()> {
        let (x, LinearShape { tokens, inputs, .. }) = (&op.x, op.shape());
        op.layers.iter_mut().try_for_each(|Projection { w, bias, y }| {
            let shape = LinearShape { tokens, inputs, outputs: w.len() / inputs };
            let epilogue = Epilogue { bias: bias.clone(), ..Epilogue::default() };
            self.linear(Linear { epilogue, ..Linear::new(x.clone(), w.clone(), y.reborrow(), shape) })
        })
    }
    /// See [`GatedLinear`]. `false` by default.
    fn gated_linear(&self, _op: GatedLinear<'_, Self>) -> Result<bool> {
        Ok(false)
    }
    /// See [`LinearBackwardInput`].
    fn linear_backward_input(&self, op: LinearBackwardInput<'_, Self>) -> Result<()>;
    /// See [`LinearBackwardInputEach`]. By default one layer after another, each added to a dX that is stored in between.
    fn linear_backward_input_each(&self, mut op: LinearBackwardInputEach<'_, Self>) -> Result<()> {
        let LinearShape { tokens, inputs, .. } = op.shape();
        op.layers.iter().enumerate().try_for_each(|(i, InputGradient { dy, w })| {
            let shape = LinearShape { tokens, inputs, outputs: w.len() / inputs };
            let product = LinearBackwardInput::new(dy.clone(), w.clone(), op.dx.reborrow(), shape);
            self.linear_backward_input(LinearBackwardInput { accumulate: op.accumulate || i > 0, ..product })
        })
    }
    /// See [`LinearBackwardWeight`].
    fn linear_backward_weight(&self, op: LinearBackwardWeight<'_, Self>) -> Result<()>;
    /// See [`LinearBackwardWeightEach`]. One layer after another by default.
    fn linear_backward_weight_each(&self, op: LinearBackwardWeightEach<'_, Self>) -> Result<()> {
        let (x, accumulate, LinearShape { tokens, inputs, .. }) = (&op.x, op.accumulate, op.shape());
        op.layers.iter_mut().try_for_each(|WeightGradient { dy, dw }| {
            let shape = LinearShape { tokens, inputs, outputs: dw.len() / inputs };
            let product = LinearBackwardWeight::new(dy.clone(), x.clone(), dw.reborrow(), shape);
            self.linear_backward_weight(LinearBackwardWeight { accumulate, ..product })
        })
    }
    /// See [`LinearBackwardBias`].
    fn linear_backward_bias(&self, op: LinearBackwardBias<'_, Self>) -> Result<()>;
    /// See [`Attention`].
    fn attention(&self, op: Attention<'_, Self>) -> Result<()>;
    /// See [`AttentionBackward`].
    fn attention_backward(&self, op: AttentionBackward<'_, Self>) -> Result<()>;
    /// See [`AttentionDecode`].
    fn attention_decode(&self, op: AttentionDecode<'_, Self>) -> Result<()>;
    /// See [`RmsNorm`].
    fn rmsnorm(&self, op: RmsNorm<'_, Self>) -> Result<()>;
    /// See [`RmsNormBackward`].
    fn rmsnorm_backward(&self, op: RmsNormBackward<'_, Self>) -> Result<()>;
    /// See [`Rope`].
    fn rope(&self, op: Rope<'_, Self>) -> Result<()>;
    /// See [`SwiGlu`].
    fn swiglu(&self, op: SwiGlu<'_, Self>) -> Result<()>;
    /// See [`SwiGluBackward`].
    fn swiglu_backward(&self, op: SwiGluBackward<'_, Self>) -> Result<()>;
    /// See [`GatherRows`].
    fn gather_rows(&self, op: GatherRows<'_, Self>) -> Result<()>;
    /// See [`ScatterRows`].
    fn scatter_rows(&self, op: ScatterRows<'_, Self>) -> Result<()>;
    /// See [`EmbeddingBackward`].
    fn embedding_backward(&self, op: EmbeddingBackward<'_, Self>) -> Result<()>;
    /// See [`CrossEntropy`].
    fn cross_entropy(&self, op: CrossEntropy<'_, Self>) -> Result<()>;
    /// See [`Sample`].
    fn sample(&self, op: Sample<'_, Self>) -> Result<()>;
    /// See [`SumSquares`].
    fn sum_squares<T: FloatElement>(&self, op: SumSquares<'_, Self, T>) -> Result<()>;
    /// See [`AdamWMasked`].
    fn adamw_masked(&self, op: AdamWMasked<'_, '_, Self>) -> Result<()>;
    /// See [`SquaredNorm`].
    fn squared_norm(&self, op: SquaredNorm<'_, Self>) -> Result<Buffer<Self, f64>>;
    /// See [`Perturb`].
    fn perturb(&self, op: Perturb<'_, Self>) -> Result<()>;
}
