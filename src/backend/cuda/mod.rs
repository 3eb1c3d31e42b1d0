//! bf16 with f32 sums on a GPU, in the kernels of `kernels/`.
//!
//! A kernel, its wrapper here, its CPU twin, its tests and its benches share a stem: `kernels/rmsnorm.cu`,
//! `backend/cuda/rmsnorm.rs`, `backend/cpu/rmsnorm.rs`, `tests/ops/rmsnorm.rs`. A wrapper checks what its kernel
//! assumes, chooses the version, and launches. All work of a device goes through one stream: only [`Backend::read`] and
//! [`Backend::synchronize`] wait, and results do not depend on timing.

mod adamw;
mod arena;
mod attention;
mod context;
mod cross_entropy;
mod device;
mod embedding;
mod gemm;
mod graph;
mod launch;
mod measure;
mod memory;
mod nccl;
mod perturb;
mod rmsnorm;
mod rope;
mod sampling;
mod survey;
mod swiglu;
mod tensor_map;
pub mod testing;
mod timer;

pub use super::precision::{Bf16State, F32State, Precision};
pub use device::Image;
pub use gemm::{GemmLayout, GemmPlan, GemmShape, GemmSupport, GemmVersion, with_plan};
pub use measure::{Captured, with_version};
pub use memory::Memory;
pub use nccl::{Alive, Communicator, NcclId, Part, Sums, nccl_id, nccl_version};
pub use survey::{Survey, survey};

use super::ops::*;
use super::{Backend, Buffer, Cost, Element, FloatElement, View, ViewMut, trace};
use crate::error::Result;
use context::lock;
use cudarc::driver::sys;
use device::Device;
use half::bf16;
use memory::{slice, slice_mut};
use std::marker::PhantomData;
use std::sync::Arc;

/// Bytes of a weight or an activation.
const FLOAT: usize = size_of::<bf16>();

/// Least rows of logits in memory at once. Each chunk of them reads and writes the f32 gradient of the head's weight,
/// which takes as long as the product of 1,100 rows (at 800 TFLOP/s and 3.0 TB/s), a quarter of the chunk's product.
const LOGIT_ROWS: usize = 4096;

/// How recurring parts of a step are launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaunchMode {
    /// Kernel by kernel.
    Eager,
    /// As one graph, where the same work was launched before.
    Graphs,
}

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
    /// [`crate::error::Error::Input`] where there is no such device, no driver for it, or no kernels are embedded;
    /// [`crate::error::Error::Device`] where the driver fails.
    pub fn open(ordinal: u32) -> Result<Self> {
        Ok(Self { device: Arc::new(Device::open(ordinal)?), tables: Arc::default(), precision: PhantomData })
    }

    /// The product's name, such as `NVIDIA H100 80GB HBM3`.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] where the driver fails.
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
    /// [`crate::error::Error::Device`] where the driver fails.
    pub fn memory(&self) -> Result<(u64, u64)> {
        self.device.memory()
    }

    /// Most bytes of device memory that buffers held at once.
    pub fn peak_bytes(&self) -> u64 {
        lock(&self.device.arena).peak_bytes() as u64
    }

    /// How [`Backend::replay`] launches: [`LaunchMode::Graphs`] unless the environment has `SWAT_CUDA_GRAPHS=off`.
    pub fn set_launch_mode(&self, mode: LaunchMode) {
        self.device.replays.store(mode == LaunchMode::Graphs, std::sync::atomic::Ordering::Relaxed);
    }
}

/// Operators that are a function of the device: `method(Arguments) = function;`
macro_rules! operators {
    ($($method:ident($op:ident) = $function:path;)*) => {
        $(fn $method(&self, op: $op<'_, Self>) -> Result<()> {
            $function(&self.device, op)
        })*
    };
}

impl<P: Precision> Backend for Cuda<P> {
    type Float = bf16;
    type Grad = P::Grad;
    type Moment = P::Moment;
    type Storage<T: Element> = Memory<T>;

    fn name(&self) -> String {
        self.device.context.label()
    }

    /// Enough rows for many tiles per multiprocessor, and few enough for 32-bit offsets.
    fn saturating_rows(&self) -> usize {
        1 << 16
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

    fn start_profiler(&self) -> Result<()> {
        self.device.synchronize()?;
        // SAFETY: the context is current.
        let started = unsafe { sys::cuProfilerStart() }.result();
        started.map_err(|error| self.device.context.failed("cannot start the profiler", error))
    }

    fn stop_profiler(&self) -> Result<()> {
        self.device.synchronize()?;
        // SAFETY: the context is current.
        let stopped = unsafe { sys::cuProfilerStop() }.result();
        stopped.map_err(|error| self.device.context.failed("cannot stop the profiler", error))
    }

    fn free_memory(&self) -> Option<super::FreeMemory> {
        let cached = lock(&self.device.arena).cached_bytes() as u64;
        self.memory().ok().map(|(bytes, _)| super::FreeMemory { bytes: bytes + cached, bound: "the GPU".into() })
    }

    fn device_peak_bytes(&self) -> Option<u64> {
        Some(self.peak_bytes())
    }

    fn replay<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        self.device.replay(work)
    }

    operators! {
        linear(Linear) = gemm::linear;
        linear_each(LinearEach) = gemm::linear_each;
        linear_backward_input(LinearBackwardInput) = gemm::linear_backward_input;
        linear_backward_input_each(LinearBackwardInputEach) = gemm::linear_backward_input_each;
        linear_backward_weight(LinearBackwardWeight) = gemm::linear_backward_weight;
        linear_backward_weight_each(LinearBackwardWeightEach) = gemm::linear_backward_weight_each;
        linear_backward_bias(LinearBackwardBias) = gemm::linear_backward_bias;
        attention(Attention) = attention::attention;
        attention_backward(AttentionBackward) = attention::attention_backward;
        attention_decode(AttentionDecode) = attention::attention_decode;
        rmsnorm(RmsNorm) = rmsnorm::rmsnorm;
        rmsnorm_backward(RmsNormBackward) = rmsnorm::rmsnorm_backward;
        rope(Rope) = rope::rope;
        swiglu(SwiGlu) = swiglu::swiglu;
        swiglu_backward(SwiGluBackward) = swiglu::swiglu_backward;
        gather_rows(GatherRows) = embedding::gather_rows;
        scatter_rows(ScatterRows) = embedding::scatter_rows;
        add_rows(AddRows) = embedding::add_rows;
        embedding_backward(EmbeddingBackward) = embedding::embedding_backward;
        cross_entropy(CrossEntropy) = cross_entropy::cross_entropy;
        sample(Sample) = sampling::sample;
        perturb(Perturb) = perturb::perturb;
        move_along(MoveAlong) = perturb::move_along;
    }

    fn gated_linear(&self, op: GatedLinear<'_, Self>) -> Result<bool> {
        gemm::gated_linear(&self.device, op)
    }

    fn sum_squares<T: FloatElement>(&self, op: SumSquares<'_, Self, T>) -> Result<()> {
        adamw::sum_squares(&self.device, &self.tables, op)
    }

    fn update_means(&self, op: UpdateMeans<'_, '_, Self>) -> Result<()> {
        adamw::update_means(&self.device, &self.tables, op)
    }

    fn proximal_gradients(&self, op: ProximalGradients<'_, '_, Self>) -> Result<()> {
        adamw::proximal_gradients(&self.device, &self.tables, op)
    }

    fn adamw_masked(&self, op: AdamWMasked<'_, '_, Self>) -> Result<()> {
        adamw::adamw_masked(&self.device, &self.tables, op)
    }

    fn squared_norm(&self, op: SquaredNorm<'_, Self>) -> Result<Buffer<Self, f64>> {
        perturb::squared_norm(&self.device, op)
    }
}
