//! f32 views of f32 or bf16 slices, for kernels that compute in f32: an f32 slice is borrowed, a bf16 slice is widened
//! into scratch memory and its results are rounded once.

use super::simd::simd_kernel;
use crate::backend::{Element, FloatElement};
use rayon::prelude::*;
use std::any::TypeId;

/// Whether `T` and `U` are the same type.
#[inline(always)]
pub(super) fn same_type<T: Element, U: Element>() -> bool {
    TypeId::of::<T>() == TypeId::of::<U>()
}

/// The slice as `&[U]` if `T` is `U`: lets generic code call what exists for one type only.
#[inline(always)]
pub(super) fn as_type<T: Element, U: Element>(x: &[T]) -> Option<&[U]> {
    if same_type::<T, U>() { Some(bytemuck::cast_slice(x)) } else { None }
}

/// [`as_type`] of a mutable slice.
#[inline(always)]
pub(super) fn as_type_mut<T: Element, U: Element>(x: &mut [T]) -> Option<&mut [U]> {
    if same_type::<T, U>() { Some(bytemuck::cast_slice_mut(x)) } else { None }
}

simd_kernel! {
    /// Converts between f32 and bf16; bf16 is rounded to nearest even.
    pub(super) fn convert<F: FloatElement, T: FloatElement>(_simd, from: &'a [F], to: &'a mut [T]) {
        for (to, x) in to.iter_mut().zip(from) {
            *to = T::from_f32(x.to_f32());
        }
    }
}

/// [`convert`] on all threads.
pub(super) fn convert_all<F: FloatElement, T: FloatElement>(from: &[F], to: &mut [T]) {
    const BLOCK: usize = 1 << 15;
    from.par_chunks(BLOCK).zip(to.par_chunks_mut(BLOCK)).for_each(|(from, to)| convert(from, to));
}

/// The slice in f32: itself, or widened into `space`.
#[inline(always)]
pub(super) fn widen<'s, T: FloatElement>(x: &'s [T], space: &'s mut Vec<f32>) -> &'s [f32] {
    if let Some(x) = as_type(x) {
        return x;
    }
    if space.len() < x.len() {
        space.resize(x.len(), 0.0);
    }
    convert(x, &mut space[..x.len()]);
    &space[..x.len()]
}

/// Lets `f` modify the slice in f32: in place, or widened into `space` and rounded back afterwards.
#[inline(always)]
pub(super) fn with_f32<T: FloatElement, R>(x: &mut [T], space: &mut Vec<f32>, f: impl FnOnce(&mut [f32]) -> R) -> R {
    if let Some(x) = as_type_mut(x) {
        return f(x);
    }
    if space.len() < x.len() {
        space.resize(x.len(), 0.0);
    }
    let wide = &mut space[..x.len()];
    convert(x, wide);
    let result = f(wide);
    convert(wide, x);
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::bf16;

    #[test]
    fn conversions_are_those_of_half() {
        let bits = (0..=u16::MAX)
            .flat_map(|high| [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| (high as u32) << 16 | low));
        let wide: Vec<f32> = bits.map(f32::from_bits).collect();
        let mut narrow = vec![bf16::ZERO; wide.len()];
        convert(&wide, &mut narrow);
        let mut again = vec![0.0f32; wide.len()];
        convert(&narrow, &mut again);
        for ((x, narrow), again) in wide.iter().zip(&narrow).zip(&again) {
            assert_eq!(narrow.to_bits(), bf16::from_f32(*x).to_bits(), "{x}");
            assert_eq!(again.to_bits(), narrow.to_f32().to_bits(), "{x}");
        }
    }
}
