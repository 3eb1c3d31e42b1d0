//! The host's cores, in f32 or in bf16 with f32 sums: rayon tasks over fixed blocks, loops compiled for the widest
//! vectors of the machine.
//!
//! Results do not depend on the number of threads: blocks are cut by shape alone, and sums over blocks are added in
//! their order. Called from a thread of the pool (`rayon::scope`), an operation saves two context switches.

mod adamw;
mod attention;
mod cross_entropy;
mod embedding;
mod gemm;
mod matrix;
mod noise;
mod perturb;
mod rmsnorm;
mod rope;
mod sampling;
mod simd;
mod storage;
mod swiglu;
mod wide;

pub use storage::Memory;

use super::ops::*;
use super::{Backend, Buffer, Cost, Element, FloatElement, Precision, View, ViewMut, trace};
use crate::error::{Error, Result};
use half::bf16;
use std::marker::PhantomData;
use std::sync::Arc;
use storage::{Arena, slice, slice_mut};

/// What tensors are kept in: f32 alone, or bf16 weights and activations with a [`Precision`] of gradients and moments.
pub trait Elements: Send + Sync + 'static {
    /// Weights and activations.
    type Float: FloatElement;
    /// Weight gradients.
    type Grad: FloatElement;
    /// AdamW's moments.
    type Moment: FloatElement;
}

/// f32 throughout.
pub struct F32;

impl Elements for F32 {
    type Float = f32;
    type Grad = f32;
    type Moment = f32;
}

impl<P: Precision> Elements for P {
    type Float = bf16;
    type Grad = P::Grad;
    type Moment = P::Moment;
}

/// The host: all cores that rayon's global pool has (`RAYON_NUM_THREADS`).
pub struct Cpu<E: Elements = F32> {
    arena: Arc<Arena>,
    elements: PhantomData<E>,
}

impl Cpu {
    /// The host, in f32.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether large products go to the matrix unit (AMX) of this machine.
    pub fn matrix_unit() -> bool {
        gemm::matrix_unit()
    }

    /// Whether this machine has instructions for products of bf16.
    pub fn bf16_products() -> bool {
        gemm::bf16_products()
    }
}

impl<E: Elements> Default for Cpu<E> {
    fn default() -> Self {
        Self { arena: Arc::default(), elements: PhantomData }
    }
}

impl<E: Elements> Clone for Cpu<E> {
    fn clone(&self) -> Self {
        Self { arena: Arc::clone(&self.arena), elements: PhantomData }
    }
}

/// Operators that are a function of this backend: `method(Arguments) = function;`
macro_rules! operators {
    ($($method:ident($op:ident) = $function:path;)*) => {
        $(fn $method(&self, op: $op<'_, Self>) -> Result<()> {
            $function(op);
            Ok(())
        })*
    };
}

impl<E: Elements> Backend for Cpu<E> {
    type Float = E::Float;
    type Grad = E::Grad;
    type Moment = E::Moment;
    type Storage<T: Element> = Memory<T>;

    fn name(&self) -> String {
        "cpu".into()
    }

    fn saturating_rows(&self) -> usize {
        1024
    }

    fn zeros<T: Element>(&self, len: usize) -> Result<Buffer<Self, T>> {
        let _span = trace::op("zeros", Cost::default);
        let memory = Memory::zeroed(len, &self.arena).ok_or_else(|| {
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

    operators! {
        linear(Linear) = gemm::linear;
        linear_each(LinearEach) = gemm::linear_each;
        linear_backward_input(LinearBackwardInput) = gemm::linear_backward_input;
        linear_backward_input_each(LinearBackwardInputEach) = gemm::linear_backward_input_each;
        linear_backward_weight(LinearBackwardWeight) = gemm::linear_backward_weight;
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

    fn sum_squares<T: FloatElement>(&self, op: SumSquares<'_, Self, T>) -> Result<()> {
        adamw::sum_squares(op);
        Ok(())
    }

    fn adamw_masked(&self, op: AdamWMasked<'_, '_, Self>) -> Result<()> {
        adamw::adamw_masked(op);
        Ok(())
    }

    fn update_means(&self, op: UpdateMeans<'_, '_, Self>) -> Result<()> {
        adamw::update_means(op);
        Ok(())
    }

    fn proximal_gradients(&self, op: ProximalGradients<'_, '_, Self>) -> Result<()> {
        adamw::proximal_gradients(op);
        Ok(())
    }

    fn squared_norm(&self, op: SquaredNorm<'_, Self>) -> Result<Buffer<Self, f64>> {
        let mut squares = self.zeros(1)?;
        slice_mut(squares.view_mut())[0] = adamw::squared_norm(slice(&op.w));
        Ok(squares)
    }
}
