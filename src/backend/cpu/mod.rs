//! f32 on the host's cores: rayon tasks over fixed blocks, loops compiled for the widest vectors of the machine.
//!
//! Results do not depend on the number of threads: blocks are cut by shape alone, and sums over blocks are added in
//! their order. Called from a thread of the pool (`rayon::scope`), an operation saves two context switches.

mod adamw;
mod attention;
mod cross_entropy;
mod embedding;
mod gemm;
mod matrix;
mod perturb;
mod rmsnorm;
mod rope;
mod sampling;
mod simd;
mod storage;
mod swiglu;

pub use storage::Memory;

use super::ops::*;
use super::{Backend, Buffer, Cost, Element, FloatElement, View, ViewMut, trace};
use crate::error::{Error, Result};
use storage::{slice, slice_mut};

/// The host.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cpu;

impl Cpu {
    /// All cores that rayon's global pool has (`RAYON_NUM_THREADS`).
    pub fn new() -> Self {
        Self
    }

    /// Whether large products go to the matrix unit (AMX) of this machine.
    pub fn matrix_unit() -> bool {
        gemm::matrix_unit()
    }
}

impl Backend for Cpu {
    type Float = f32;
    type Grad = f32;
    type Moment = f32;
    type Storage<T: Element> = Memory<T>;

    fn name(&self) -> String {
        "cpu".into()
    }

    fn saturating_rows(&self) -> usize {
        1024
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<Self, T>> {
        let _span = trace::op("zeros", Cost::default);
        let memory = Memory::zeroed(len).ok_or_else(|| {
            Error::failed(
                format!("no memory for {len} elements of {}", T::NAME),
                "use a smaller batch, or a machine with more memory",
            )
        })?;
        Ok(Buffer::new(memory, len))
    }

    fn write<T: Element>(&self, host: &[T], to: ViewMut<'_, Self, T>) -> Result<()> {
        let _span = trace::op("write", || Cost::moved(2 * size_of_val(host)));
        slice_mut(to).copy_from_slice(host);
        Ok(())
    }

    fn read<T: Element>(&self, from: View<'_, Self, T>, host: &mut [T]) -> Result<()> {
        let _span = trace::op("read", || Cost::moved(2 * size_of_val(host)));
        host.copy_from_slice(slice(&from));
        Ok(())
    }

    fn copy<T: Element>(&self, from: View<'_, Self, T>, to: ViewMut<'_, Self, T>) -> Result<()> {
        let _span = trace::op("copy", || Cost::moved(2 * from.len() * size_of::<T>()));
        storage::copy(slice(&from), slice_mut(to));
        Ok(())
    }

    fn clear<T: Element>(&self, to: ViewMut<'_, Self, T>) -> Result<()> {
        let _span = trace::op("clear", || Cost::moved(to.len() * size_of::<T>()));
        slice_mut(to).fill(bytemuck::Zeroable::zeroed());
        Ok(())
    }

    fn synchronize(&self) -> Result<()> {
        Ok(())
    }

    fn linear(&self, op: Linear<'_, Self>) -> Result<()> {
        gemm::linear(op);
        Ok(())
    }

    fn linear_each(&self, op: LinearEach<'_, Self>) -> Result<()> {
        gemm::linear_each(op);
        Ok(())
    }

    fn linear_backward_input(&self, op: LinearBackwardInput<'_, Self>) -> Result<()> {
        gemm::linear_backward_input(op);
        Ok(())
    }

    fn linear_backward_weight(&self, op: LinearBackwardWeight<'_, Self>) -> Result<()> {
        gemm::linear_backward_weight(op);
        Ok(())
    }

    fn linear_backward_bias(&self, op: LinearBackwardBias<'_, Self>) -> Result<()> {
        gemm::linear_backward_bias(op);
        Ok(())
    }

    fn attention(&self, op: Attention<'_, Self>) -> Result<()> {
        attention::attention(op);
        Ok(())
    }

    fn attention_backward(&self, op: AttentionBackward<'_, Self>) -> Result<()> {
        attention::attention_backward(op);
        Ok(())
    }

    fn attention_decode(&self, op: AttentionDecode<'_, Self>) -> Result<()> {
        attention::attention_decode(op);
        Ok(())
    }

    fn rmsnorm(&self, op: RmsNorm<'_, Self>) -> Result<()> {
        rmsnorm::rmsnorm(op);
        Ok(())
    }

    fn rmsnorm_backward(&self, op: RmsNormBackward<'_, Self>) -> Result<()> {
        rmsnorm::rmsnorm_backward(op);
        Ok(())
    }

    fn rope(&self, op: Rope<'_, Self>) -> Result<()> {
        rope::rope(op);
        Ok(())
    }

    fn swiglu(&self, op: SwiGlu<'_, Self>) -> Result<()> {
        swiglu::swiglu(op);
        Ok(())
    }

    fn swiglu_backward(&self, op: SwiGluBackward<'_, Self>) -> Result<()> {
        swiglu::swiglu_backward(op);
        Ok(())
    }

    fn gather_rows(&self, op: GatherRows<'_, Self>) -> Result<()> {
        embedding::gather_rows(op);
        Ok(())
    }

    fn scatter_rows(&self, op: ScatterRows<'_, Self>) -> Result<()> {
        embedding::scatter_rows(op);
        Ok(())
    }

    fn embedding_backward(&self, op: EmbeddingBackward<'_, Self>) -> Result<()> {
        embedding::embedding_backward(op);
        Ok(())
    }

    fn cross_entropy(&self, op: CrossEntropy<'_, Self>) -> Result<()> {
        cross_entropy::cross_entropy(op);
        Ok(())
    }

    fn sample(&self, op: Sample<'_, Self>) -> Result<()> {
        sampling::sample(op);
        Ok(())
    }

    fn sum_squares<T: FloatElement>(&self, op: SumSquares<'_, Self, T>) -> Result<()> {
        adamw::sum_squares(op);
        Ok(())
    }

    fn adamw_masked(&self, op: AdamWMasked<'_, '_, Self>) -> Result<()> {
        adamw::adamw_masked(op);
        Ok(())
    }

    fn squared_norm(&self, op: SquaredNorm<'_, Self>) -> Result<Buffer<Self, f64>> {
        let mut squares = self.zeros(1)?;
        slice_mut(squares.view_mut())[0] = adamw::squared_norm(slice(&op.w));
        Ok(squares)
    }

    fn perturb(&self, op: Perturb<'_, Self>) -> Result<()> {
        perturb::perturb(op);
        Ok(())
    }
}
