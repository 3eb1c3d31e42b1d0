//! Loops written for f32, over elements of either type: f32 is taken where it lies, bf16 widened a part at a time and
//! rounded once.

use super::simd::simd_kernel;
use crate::backend::{Element, FloatElement};
use rayon::prelude::*;
use std::any::TypeId;

/// Whether two names stand for one type.
#[inline(always)]
pub(super) fn is<T: Element, U: Element>() -> bool {
    TypeId::of::<T>() == TypeId::of::<U>()
}

/// A slice as one of the same type under another name; `None` where the types differ.
#[inline(always)]
pub(super) fn same<T: Element, U: Element>(x: &[T]) -> Option<&[U]> {
    if is::<T, U>() { Some(bytemuck::cast_slice(x)) } else { None }
}

/// [`same`], to write.
#[inline(always)]
pub(super) fn same_mut<T: Element, U: Element>(x: &mut [T]) -> Option<&mut [U]> {
    if is::<T, U>() { Some(bytemuck::cast_slice_mut(x)) } else { None }
}

simd_kernel! {
    /// Widens or narrows, to nearest even.
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

/// The elements as f32: themselves, or widened into `space`.
#[inline(always)]
pub(super) fn widen<'s, T: FloatElement>(x: &'s [T], space: &'s mut Vec<f32>) -> &'s [f32] {
    if let Some(x) = same(x) {
        return x;
    }
    if space.len() < x.len() {
        space.resize(x.len(), 0.0);
    }
    convert(x, &mut space[..x.len()]);
    &space[..x.len()]
}

/// Gives `f` the elements as f32, and stores what becomes of them: in place, or by way of `space`.
#[inline(always)]
pub(super) fn edit<T: FloatElement, R>(x: &mut [T], space: &mut Vec<f32>, f: impl FnOnce(&mut [f32]) -> R) -> R {
    if let Some(x) = same_mut(x) {
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
