//! bf16 with f32 sums on a GPU, in the kernels of `kernels/`.
//!
//! A kernel, its wrapper here, its CPU twin, its tests and its benches share a stem: `kernels/rmsnorm.cu`,
//! `backend/cuda/rmsnorm.rs`, `backend/cpu/rmsnorm.rs`, `tests/ops/rmsnorm.rs`. A wrapper checks what its kernel assumes,
//! chooses the version, and launches. All work of a device goes through one stream: nothing waits but
//! [`Backend::read`] and [`Backend::synchronize`], and results do not depend on timing.

mod adamw;
mod arguments;
mod attention;
mod cross_entropy;
mod device;
mod embedding;
mod gemm;
mod graph;
mod measure;
mod memory;
pub(super) mod nvtx;
mod perturb;
mod precision;
mod rmsnorm;
mod rope;
mod sampling;
mod survey;
mod swiglu;
mod tensor_map;
pub mod testing;
mod timing;

pub use gemm::{GemmLayout, GemmMember, GemmPlan, GemmShape, GemmVersion};
pub use measure::{Captured, with_version};
pub use memory::Memory;
pub use precision::{Bf16State, F32State, Precision};
pub use survey::{Image, Survey, survey};

use super::{
    AdamW, AdamWModule, Attention, Backend, Buffer, Cost, Direction, Element, Epilogue, FloatElement, In,
    InputGradient, LinearShape, Out, Projection, Sampling, View, ViewMut, WeightGradient, check, cost, trace,
};
use crate::error::Result;
use device::Device;
use half::bf16;
use memory::{slice, slice_mut};
use std::marker::PhantomData;
use std::sync::Arc;

/// Bytes of a weight or an activation.
const FLOAT: usize = size_of::<bf16>();

/// Rows of logits that are in memory at once, at least. Each chunk of them reads and writes the f32 gradient of the head's
/// weight, which takes as long as the product of 1,100 rows (at 800 TFLOP/s and 3.0 TB/s): a quarter of that of these.
const LOGIT_ROWS: usize = 4096;

/// A GPU. Clones are the same device.
pub struct Cuda<P: Precision = F32State> {
    device: Arc<Device>,
    tables: Arc<adamw::Tables>,
    precision: PhantomData<P>,
}

impl<P: Precision> Clone for Cuda<P> {
    fn clone(&self) -> Self {
        Self { device: self.device.clone(), tables: self.tables.clone(), precision: PhantomData }
    }
}

impl<P: Precision> Cuda<P> {
    /// Opens GPU `ordinal` and loads the kernels.
    ///
    /// # Errors
    /// [`crate::Error::Input`] where there is no such device, no driver for it, or no kernels are embedded;
    /// [`crate::Error::Device`] where the driver fails.
    pub fn open(ordinal: u32) -> Result<Self> {
        Ok(Self { device: Arc::new(Device::open(ordinal)?), tables: Arc::default(), precision: PhantomData })
    }

    /// The product's name, such as `NVIDIA H100 80GB HBM3`.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the driver fails.
    pub fn product(&self) -> Result<String> {
        self.device.product()
    }

    /// Major and minor of the compute capability.
    pub fn capability(&self) -> (i32, i32) {
        self.device.capability
    }

    /// Free and total bytes of the device's memory.
    ///
    /// # Errors
    /// [`crate::Error::Device`] where the driver fails.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.device.memory()
    }

    /// Most bytes of device memory that buffers held at once.
    pub fn peak_bytes(&self) -> u64 {
        self.device.arena.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).peak_bytes() as u64
    }

    /// Whether [`Backend::replay`] makes graphs; it does unless the environment says `SWAT_CUDA_GRAPHS=off`.
    pub fn replays(&self, on: bool) {
        self.device.replays.store(on, std::sync::atomic::Ordering::Relaxed);
    }
}

impl<P: Precision> Backend for Cuda<P> {
    type Float = bf16;
    type Grad = P::Grad;
    type Moment = P::Moment;
    type Storage<T: Element> = Memory<T>;

    fn name(&self) -> String {
        self.device.label()
    }

    fn product_scratch_bytes(m: usize, n: usize, k: usize) -> u64 {
        gemm::split_bytes(GemmShape { layout: GemmLayout::Nn, m, n, k })
    }

    fn logit_rows(vocab: usize) -> usize {
        ((64 << 20) / (vocab * FLOAT)).max(LOGIT_ROWS)
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<Self, T>> {
        let _span = trace::op("zeros", Cost::default);
        let mut memory = Memory::new(&self.device, len)?;
        memory::clear(&self.device, &memory.all(len))?;
        Ok(Buffer::new(memory, len))
    }

    fn write<T: Element>(&self, host: &[T], to: ViewMut<'_, Self, T>) -> Result<()> {
        let _span = trace::op("write", || Cost::moved(size_of_val(host)));
        memory::write(&self.device, host, &slice_mut(to))
    }

    fn read<T: Element>(&self, from: View<'_, Self, T>, host: &mut [T]) -> Result<()> {
        let _span = trace::op("read", || Cost::moved(size_of_val(host)));
        memory::read(&self.device, slice(&from), host)
    }

    fn copy<T: Element>(&self, from: View<'_, Self, T>, to: ViewMut<'_, Self, T>) -> Result<()> {
        let _span = trace::op("copy", || Cost::moved(2 * from.len() * size_of::<T>()));
        memory::copy(&self.device, slice(&from), &slice_mut(to))
    }

    fn clear<T: Element>(&self, to: ViewMut<'_, Self, T>) -> Result<()> {
        let _span = trace::op("clear", || Cost::moved(to.len() * size_of::<T>()));
        memory::clear(&self.device, &slice_mut(to))
    }

    fn synchronize(&self) -> Result<()> {
        self.device.synchronize()
    }

    fn profiler(&self, begins: bool) -> Result<()> {
        self.device.profiler(begins)
    }

    fn device_peak_bytes(&self) -> Option<u64> {
        Some(self.peak_bytes())
    }

    fn replay<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        self.device.replay(work)
    }

    fn linear(
        &self,
        x: In<'_, Self>,
        w: In<'_, Self>,
        y: Out<'_, Self>,
        shape: LinearShape,
        epilogue: Epilogue<'_, Self>,
    ) -> Result<()> {
        let _span = trace::op("linear", || cost::linear(shape, epilogue.addends(y.len()), FLOAT));
        check::linear(&x, &w, &y, shape, &epilogue);
        let addends = gemm::Addends {
            alpha: epilogue.alpha,
            bias: epilogue.bias.as_ref().map(slice),
            residual: epilogue.residual.as_ref().map(slice),
            accumulate: epilogue.accumulate,
        };
        gemm::linear(&self.device, slice(&x), slice(&w), slice_mut(y), shape, addends)
    }

    fn linear_each(&self, x: In<'_, Self>, layers: &mut [Projection<'_, Self>], tokens: usize) -> Result<()> {
        let shape = check::linear_each(&x, layers, tokens);
        let _span = trace::op("linear_each", || {
            let biases = layers.iter().filter_map(|layer| layer.bias.as_ref()).map(View::len).sum();
            cost::linear(shape, biases, FLOAT)
        });
        gemm::linear_each(&self.device, slice(&x), layers, shape)
    }

    fn gated_linear(
        &self,
        x: In<'_, Self>,
        gate: In<'_, Self>,
        up: In<'_, Self>,
        y: Out<'_, Self>,
        tokens: usize,
    ) -> Result<bool> {
        let shape = check::gated_linear(&x, [&gate, &up], &y, tokens);
        let gated = gemm::Gated { x: slice(&x), gate: slice(&gate), up: slice(&up), y: slice_mut(y), shape };
        let Some(version) = gated.choose(&self.device) else { return Ok(false) };
        let _span = trace::op("gated_linear", || cost::gated_linear(shape, FLOAT));
        gated.launch(&self.device, version).map(|()| true)
    }

    fn linear_backward_input(
        &self,
        dy: In<'_, Self>,
        w: In<'_, Self>,
        dx: Out<'_, Self>,
        shape: LinearShape,
        alpha: f32,
        accumulate: bool,
    ) -> Result<()> {
        let _span = trace::op("linear_backward_input", || cost::linear_backward_input(shape, accumulate, FLOAT));
        check::linear_backward_input(&dy, &w, &dx, shape);
        gemm::linear_backward_input(&self.device, slice(&dy), slice(&w), slice_mut(dx), shape, alpha, accumulate)
    }

    fn linear_backward_input_each(
        &self,
        layers: &[InputGradient<'_, Self>],
        dx: Out<'_, Self>,
        tokens: usize,
        accumulate: bool,
    ) -> Result<()> {
        let shape = check::linear_backward_input_each(layers, &dx, tokens);
        let cost = || cost::linear_backward_input(shape, accumulate, FLOAT);
        let _span = trace::op("linear_backward_input_each", cost);
        gemm::linear_backward_input_each(&self.device, layers, slice_mut(dx), shape, accumulate)
    }

    fn linear_backward_weight(
        &self,
        dy: In<'_, Self>,
        x: In<'_, Self>,
        dw: ViewMut<'_, Self, P::Grad>,
        shape: LinearShape,
        alpha: f32,
        accumulate: bool,
    ) -> Result<()> {
        let _span = trace::op("linear_backward_weight", || {
            cost::linear_backward_weight(shape, accumulate, FLOAT, size_of::<P::Grad>())
        });
        check::linear_backward_weight(&dy, &x, &dw, shape);
        gemm::linear_backward_weight(&self.device, slice(&dy), slice(&x), slice_mut(dw), shape, alpha, accumulate)
    }

    fn linear_backward_weight_each(
        &self,
        x: In<'_, Self>,
        layers: &mut [WeightGradient<'_, Self>],
        tokens: usize,
        accumulate: bool,
    ) -> Result<()> {
        let shape = check::linear_backward_weight_each(&x, layers, tokens);
        let cost = || cost::linear_backward_weight(shape, accumulate, FLOAT, size_of::<P::Grad>());
        let _span = trace::op("linear_backward_weight_each", cost);
        gemm::linear_backward_weight_each(&self.device, slice(&x), layers, shape, accumulate)
    }

    fn linear_backward_bias(
        &self,
        dy: In<'_, Self>,
        dbias: ViewMut<'_, Self, P::Grad>,
        tokens: usize,
        outputs: usize,
        accumulate: bool,
    ) -> Result<()> {
        let _span = trace::op("linear_backward_bias", || {
            cost::linear_backward_bias(tokens, outputs, accumulate, FLOAT, size_of::<P::Grad>())
        });
        assert_eq!([dy.len(), dbias.len()], [tokens * outputs, outputs]);
        gemm::linear_backward_bias(&self.device, slice(&dy), slice_mut(dbias), outputs, accumulate)
    }

    fn attention(
        &self,
        q: In<'_, Self>,
        k: In<'_, Self>,
        v: In<'_, Self>,
        o: Out<'_, Self>,
        lse: Option<ViewMut<'_, Self, f32>>,
        shape: &Attention<'_, Self>,
    ) -> Result<()> {
        let _span = trace::op("attention", || shape.size().forward(lse.is_some(), FLOAT));
        let lse_len = lse.as_ref().map(ViewMut::len);
        check::attention(q.len(), k.len(), v.len(), &[o.len()], &[], lse_len, shape);
        let shape = attention::Shape::new(shape);
        let lse = lse.map(slice_mut);
        attention::attention(&self.device, slice(&q), slice(&k), slice(&v), slice_mut(o), lse, shape)
    }

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
    ) -> Result<()> {
        let _span = trace::op("attention_backward", || shape.size().backward(FLOAT));
        let like_q = [o.len(), d_o.len(), dq.len()];
        check::attention(q.len(), k.len(), v.len(), &like_q, &[dk.len(), dv.len()], Some(lse.len()), shape);
        let saved = attention::Saved {
            q: slice(&q),
            k: slice(&k),
            v: slice(&v),
            o: slice(&o),
            lse: slice(&lse),
            d_o: slice(&d_o),
        };
        let shape = attention::Shape::new(shape);
        attention::attention_backward(&self.device, saved, slice_mut(dq), slice_mut(dk), slice_mut(dv), shape)
    }

    fn attention_decode(
        &self,
        q: In<'_, Self>,
        k: In<'_, Self>,
        v: In<'_, Self>,
        o: Out<'_, Self>,
        spans: View<'_, Self, u32>,
        longest: usize,
        shape: &Attention<'_, Self>,
    ) -> Result<()> {
        let _span = trace::op("attention_decode", || {
            let pairs = spans.len() / 2 * longest.min(shape.window.unwrap_or(usize::MAX));
            let rows = k.len() / (shape.kv_heads * shape.head_dim);
            shape.decode_size(spans.len() / 2, pairs as u64).decode(rows, FLOAT)
        });
        check::heads(shape, k.len());
        assert!(spans.len().is_multiple_of(2));
        assert_eq!([q.len(), o.len()], [spans.len() / 2 * shape.heads * shape.head_dim; 2]);
        assert_eq!(k.len(), v.len());
        let shape = attention::Shape::new(shape);
        let cache = [slice(&k), slice(&v)];
        attention::attention_decode(&self.device, slice(&q), cache, slice_mut(o), slice(&spans), longest, shape)
    }

    fn rmsnorm(
        &self,
        x: In<'_, Self>,
        weight: In<'_, Self>,
        y: Out<'_, Self>,
        rstd: Option<ViewMut<'_, Self, f32>>,
        width: usize,
        eps: f32,
    ) -> Result<()> {
        let _span = trace::op("rmsnorm", || cost::rmsnorm(x.len(), width, rstd.is_some(), FLOAT));
        check::rmsnorm(&x, &weight, y.len(), rstd.as_ref().map(ViewMut::len), width);
        rmsnorm::rmsnorm(&self.device, slice(&x), slice(&weight), slice_mut(y), rstd.map(slice_mut), width, eps)
    }

    fn rmsnorm_backward(
        &self,
        dy: In<'_, Self>,
        x: In<'_, Self>,
        weight: In<'_, Self>,
        rstd: View<'_, Self, f32>,
        dx: Option<Out<'_, Self>>,
        dweight: Option<ViewMut<'_, Self, P::Grad>>,
        width: usize,
        accumulate_dx: bool,
        accumulate_dweight: bool,
    ) -> Result<()> {
        let _span = trace::op("rmsnorm_backward", || {
            cost::rmsnorm_backward(x.len(), width, dx.as_ref().map(|_| accumulate_dx), dweight.is_some(), FLOAT)
        });
        check::rmsnorm(&x, &weight, dy.len(), Some(rstd.len()), width);
        assert!(dx.as_ref().is_none_or(|dx| dx.len() == x.len()));
        assert!(dweight.as_ref().is_none_or(|dw| dw.len() == width));
        let saved = rmsnorm::Saved { dy: slice(&dy), x: slice(&x), weight: slice(&weight), rstd: slice(&rstd) };
        let (dx, dweight) = (dx.map(slice_mut), dweight.map(slice_mut));
        rmsnorm::rmsnorm_backward(&self.device, saved, dx, dweight, width, accumulate_dx, accumulate_dweight)
    }

    fn rope(
        &self,
        x: Out<'_, Self>,
        table: View<'_, Self, f32>,
        positions: View<'_, Self, u32>,
        heads: usize,
        head_dim: usize,
        inverse: bool,
    ) -> Result<()> {
        let _span = trace::op("rope", || cost::rope(x.len(), FLOAT));
        check::rope(&x, &positions, heads, head_dim);
        rope::rope(&self.device, slice_mut(x), slice(&table), slice(&positions), heads, head_dim, inverse)
    }

    fn swiglu(&self, gate: In<'_, Self>, up: In<'_, Self>, y: Out<'_, Self>) -> Result<()> {
        let _span = trace::op("swiglu", || cost::swiglu(y.len(), FLOAT));
        swiglu::swiglu(&self.device, slice(&gate), slice(&up), slice_mut(y))
    }

    fn swiglu_backward(&self, gate: Out<'_, Self>, up: Out<'_, Self>, dy: In<'_, Self>) -> Result<()> {
        let _span = trace::op("swiglu_backward", || cost::swiglu_backward(dy.len(), FLOAT));
        swiglu::swiglu_backward(&self.device, slice_mut(gate), slice_mut(up), slice(&dy))
    }

    fn gather_rows(
        &self,
        from: In<'_, Self>,
        rows: View<'_, Self, u32>,
        to: Out<'_, Self>,
        width: usize,
    ) -> Result<()> {
        let _span = trace::op("gather_rows", || cost::move_rows(rows.len(), width, FLOAT));
        check::rows(to.len(), &rows, width);
        embedding::gather_rows(&self.device, slice(&from), slice(&rows), slice_mut(to), width)
    }

    fn scatter_rows(
        &self,
        from: In<'_, Self>,
        rows: View<'_, Self, u32>,
        to: Out<'_, Self>,
        width: usize,
    ) -> Result<()> {
        let _span = trace::op("scatter_rows", || cost::move_rows(rows.len(), width, FLOAT));
        check::rows(from.len(), &rows, width);
        embedding::scatter_rows(&self.device, slice(&from), slice(&rows), slice_mut(to), width)
    }

    fn embedding_backward(
        &self,
        dy: In<'_, Self>,
        rows: View<'_, Self, u32>,
        dtable: ViewMut<'_, Self, P::Grad>,
        width: usize,
    ) -> Result<()> {
        let _span = trace::op("embedding_backward", || {
            cost::embedding_backward(rows.len(), width, FLOAT, size_of::<P::Grad>())
        });
        check::rows(dy.len(), &rows, width);
        embedding::embedding_backward(&self.device, slice(&dy), slice(&rows), slice_mut(dtable), width)
    }

    fn cross_entropy(
        &self,
        logits: Out<'_, Self>,
        targets: View<'_, Self, u32>,
        losses: ViewMut<'_, Self, f32>,
        vocab: usize,
        scale: Option<f32>,
    ) -> Result<()> {
        let _span = trace::op("cross_entropy", || cost::cross_entropy(logits.len(), scale.is_some(), FLOAT));
        check::logits(logits.len(), vocab, [targets.len(), losses.len()]);
        let (logits, losses) = (slice_mut(logits), slice_mut(losses));
        cross_entropy::cross_entropy(&self.device, logits, slice(&targets), losses, vocab, scale)
    }

    fn sample(
        &self,
        logits: In<'_, Self>,
        uniforms: View<'_, Self, f32>,
        tokens: ViewMut<'_, Self, u32>,
        vocab: usize,
        sampling: Sampling,
    ) -> Result<()> {
        let _span = trace::op("sample", || cost::sample(logits.len(), sampling, FLOAT));
        check::logits(logits.len(), vocab, [uniforms.len(), tokens.len()]);
        sampling::sample(&self.device, slice(&logits), slice(&uniforms), slice_mut(tokens), vocab, sampling)
    }

    fn sum_squares<T: FloatElement>(&self, parts: &[View<'_, Self, T>], squares: ViewMut<'_, Self, f32>) -> Result<()> {
        let _span = trace::op("sum_squares", || cost::sum_squares(parts.iter().map(View::len).sum(), size_of::<T>()));
        assert_eq!(parts.len(), squares.len());
        let parts: Vec<_> = parts.iter().map(slice).collect();
        adamw::sum_squares(&self.device, &self.tables, &parts, slice_mut(squares))
    }

    fn adamw_masked(
        &self,
        table: &mut [AdamWModule<'_, Self>],
        squares: View<'_, Self, f32>,
        hyper: AdamW,
    ) -> Result<()> {
        let _span = trace::op("adamw_masked", || {
            cost::adamw(
                table.iter().map(|module| module.grad.len()).sum(),
                FLOAT,
                size_of::<P::Grad>(),
                size_of::<P::Moment>(),
            )
        });
        assert_eq!(table.len(), squares.len());
        let table: Vec<_> = table.iter_mut().map(adamw::Module::new).collect();
        adamw::adamw_masked(&self.device, &self.tables, &table, slice(&squares), hyper)
    }

    fn squares(&self, w: In<'_, Self>) -> Result<Buffer<Self, f64>> {
        let _span = trace::op("squares", || cost::sum_squares(w.len(), FLOAT));
        let parts = perturb::parts(w.len());
        let mut memory = Memory::new(&self.device, parts)?;
        perturb::squares(&self.device, slice(&w), &memory.all(parts))?;
        Ok(Buffer::new(memory, parts))
    }

    fn perturb(
        &self,
        w: In<'_, Self>,
        squares: Option<View<'_, Self, f64>>,
        direction: &Direction<'_, Self>,
        epsilon: f32,
        plus: Out<'_, Self>,
        minus: Option<Out<'_, Self>>,
    ) -> Result<()> {
        let copies = 1 + usize::from(minus.is_some());
        let _span = trace::op("perturb", || cost::perturb(w.len(), copies, direction, squares.is_some(), FLOAT));
        check::perturb(&w, direction, &plus, minus.as_ref());
        let noise = match direction {
            Direction::Gaussian(key) => perturb::Noise::Gaussian(*key),
            Direction::Rademacher(key) => perturb::Noise::Rademacher(*key),
            Direction::LowRank { key, rank, rows } => perturb::Noise::LowRank { key: *key, rank: *rank, rows: *rows },
            Direction::Scale => perturb::Noise::Scale,
            Direction::Given(n) => perturb::Noise::Given(slice(n)),
        };
        let (squares, minus) = (squares.as_ref().map(slice), minus.map(slice_mut));
        perturb::perturb(&self.device, slice(&w), squares, noise, epsilon, slice_mut(plus), minus)
    }
}
