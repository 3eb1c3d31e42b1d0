//! Arithmetic: buffers, and operators on them ([`ops`]).
//!
//! The engine owns the order of operators; a [`Backend`] owns the arithmetic and nothing else. [`cpu`] computes in f32
//! or bf16, [`cuda`] in bf16 with f32 sums. Operators check every shape: a wrong one is a bug of the engine, and
//! panics. Errors are for what a device may refuse (memory, a lost device).

mod buffer;
pub mod cost;
pub mod cpu;
pub mod cuda;
mod free;
pub mod ops;
mod precision;
mod roofline;
pub mod trace;

pub use buffer::{Buffer, Element, FloatElement, View, ViewMut};
pub use cost::Cost;
pub use free::FreeMemory;
pub use ops::*;
pub use precision::{Bf16State, DtypeChoice, F32State, Precision};
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

    /// Rows at which the throughput of matrix products saturates. Where nothing is kept for backward the engine works
    /// in pieces of about as many rows, whose intermediate values stay in a cache. No limit by default.
    fn saturating_rows(&self) -> usize {
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

    /// Memory for `len` elements, all zero.
    ///
    /// # Errors
    /// [`crate::error::Error::Memory`] or [`crate::error::Error::Failed`] where there is none,
    /// [`crate::error::Error::Device`] where the device fails.
    fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<Self, T>>;

    /// Host to device.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] where the device fails.
    fn write<T: Element>(&self, host: &[T], to: ViewMut<'_, Self, T>) -> Result<()>;

    /// Device to host; waits for the device.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] where the device fails.
    fn read<T: Element>(&self, from: View<'_, Self, T>, host: &mut [T]) -> Result<()>;

    /// Device to device.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] where the device fails.
    fn copy<T: Element>(&self, from: View<'_, Self, T>, to: ViewMut<'_, Self, T>) -> Result<()>;

    /// Sets every element to zero.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] where the device fails.
    fn clear<T: Element>(&self, to: ViewMut<'_, Self, T>) -> Result<()>;

    /// Waits until everything queued is done.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] where the device fails.
    fn synchronize(&self) -> Result<()>;

    /// Starts the range that an outside profiler (nsys, ncu) captures, behind everything queued. No effect on the CPU.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] where the driver fails.
    fn start_profiler(&self) -> Result<()> {
        Ok(())
    }

    /// Ends the range of [`Backend::start_profiler`].
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] where the driver fails.
    fn stop_profiler(&self) -> Result<()> {
        Ok(())
    }

    /// Most bytes of the device's own memory that buffers held at once; `None` where they are in the memory of the
    /// process.
    fn device_peak_bytes(&self) -> Option<u64> {
        None
    }

    /// Memory that buffers can still take; `None` where the system does not say.
    fn free_memory(&self) -> Option<FreeMemory> {
        FreeMemory::now()
    }

    /// Runs `work`, a part of a step that recurs and that queues operators, but neither reads from the device nor
    /// writes to it. A GPU may record its launches and replay them as one graph where an earlier step had the same. The
    /// values are the same either way; by default `work` just runs.
    ///
    /// # Errors
    /// Those of `work`; [`crate::error::Error::Device`] where the driver fails.
    fn replay<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        work()
    }

    /// See [`Linear`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn linear(&self, op: Linear<'_, Self>) -> Result<()>;

    /// See [`LinearEach`]. One layer after another by default.
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn linear_each(&self, op: LinearEach<'_, Self>) -> Result<()> {
        let (x, LinearShape { tokens, inputs, .. }) = (&op.x, op.shape());
        op.layers.iter_mut().try_for_each(|Projection { w, bias, y }| {
            let shape = LinearShape { tokens, inputs, outputs: w.len() / inputs };
            let epilogue = Epilogue { bias: bias.clone(), ..Epilogue::default() };
            self.linear(Linear { epilogue, ..Linear::new(x.clone(), w.clone(), y.reborrow(), shape) })
        })
    }

    /// See [`GatedLinear`]. `false` by default.
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn gated_linear(&self, _op: GatedLinear<'_, Self>) -> Result<bool> {
        Ok(false)
    }

    /// See [`LinearBackwardInput`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn linear_backward_input(&self, op: LinearBackwardInput<'_, Self>) -> Result<()>;

    /// See [`LinearBackwardInputEach`]. By default one layer after another, each added to a dX that is stored in
    /// between.
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn linear_backward_input_each(&self, mut op: LinearBackwardInputEach<'_, Self>) -> Result<()> {
        let LinearShape { tokens, inputs, .. } = op.shape();
        op.layers.iter().enumerate().try_for_each(|(i, InputGradient { dy, w })| {
            let shape = LinearShape { tokens, inputs, outputs: w.len() / inputs };
            let product = LinearBackwardInput::new(dy.clone(), w.clone(), op.dx.reborrow(), shape);
            self.linear_backward_input(LinearBackwardInput { accumulate: op.accumulate || i > 0, ..product })
        })
    }

    /// See [`LinearBackwardWeight`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn linear_backward_weight(&self, op: LinearBackwardWeight<'_, Self>) -> Result<()>;

    /// See [`LinearBackwardWeightEach`]. One layer after another by default.
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn linear_backward_weight_each(&self, op: LinearBackwardWeightEach<'_, Self>) -> Result<()> {
        let (x, accumulate, LinearShape { tokens, inputs, .. }) = (&op.x, op.accumulate, op.shape());
        op.layers.iter_mut().try_for_each(|WeightGradient { dy, dw }| {
            let shape = LinearShape { tokens, inputs, outputs: dw.len() / inputs };
            let product = LinearBackwardWeight::new(dy.clone(), x.clone(), dw.reborrow(), shape);
            self.linear_backward_weight(LinearBackwardWeight { accumulate, ..product })
        })
    }

    /// See [`LinearBackwardBias`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn linear_backward_bias(&self, op: LinearBackwardBias<'_, Self>) -> Result<()>;

    /// See [`Attention`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn attention(&self, op: Attention<'_, Self>) -> Result<()>;

    /// See [`AttentionBackward`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn attention_backward(&self, op: AttentionBackward<'_, Self>) -> Result<()>;

    /// See [`AttentionDecode`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn attention_decode(&self, op: AttentionDecode<'_, Self>) -> Result<()>;

    /// See [`RmsNorm`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn rmsnorm(&self, op: RmsNorm<'_, Self>) -> Result<()>;

    /// See [`RmsNormBackward`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn rmsnorm_backward(&self, op: RmsNormBackward<'_, Self>) -> Result<()>;

    /// See [`Rope`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn rope(&self, op: Rope<'_, Self>) -> Result<()>;

    /// See [`SwiGlu`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn swiglu(&self, op: SwiGlu<'_, Self>) -> Result<()>;

    /// See [`SwiGluBackward`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn swiglu_backward(&self, op: SwiGluBackward<'_, Self>) -> Result<()>;

    /// See [`GatherRows`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn gather_rows(&self, op: GatherRows<'_, Self>) -> Result<()>;

    /// See [`ScatterRows`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn scatter_rows(&self, op: ScatterRows<'_, Self>) -> Result<()>;

    /// See [`AddRows`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn add_rows(&self, op: AddRows<'_, Self>) -> Result<()>;

    /// See [`EmbeddingBackward`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn embedding_backward(&self, op: EmbeddingBackward<'_, Self>) -> Result<()>;

    /// See [`CrossEntropy`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn cross_entropy(&self, op: CrossEntropy<'_, Self>) -> Result<()>;

    /// See [`Sample`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn sample(&self, op: Sample<'_, Self>) -> Result<()>;

    /// See [`SumSquares`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn sum_squares<T: FloatElement>(&self, op: SumSquares<'_, Self, T>) -> Result<()>;

    /// See [`AdamWMasked`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn adamw_masked(&self, op: AdamWMasked<'_, '_, Self>) -> Result<()>;

    /// See [`UpdateMeans`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn update_means(&self, op: UpdateMeans<'_, '_, Self>) -> Result<()>;

    /// See [`ProximalGradients`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn proximal_gradients(&self, op: ProximalGradients<'_, '_, Self>) -> Result<()>;

    /// See [`SquaredNorm`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn squared_norm(&self, op: SquaredNorm<'_, Self>) -> Result<Buffer<Self, f64>>;

    /// See [`Perturb`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn perturb(&self, op: Perturb<'_, Self>) -> Result<()>;

    /// See [`MoveAlong`].
    ///
    /// # Errors
    /// As [`Operator::run`].
    fn move_along(&self, op: MoveAlong<'_, Self>) -> Result<()>;
}
