//! Typed memory of a backend, and views into it.

use super::Backend;
use crate::io::safetensors::Dtype;
use std::ops::Range;

/// An element type of buffers.
pub trait Element: bytemuck::Pod + Send + Sync + PartialEq + std::fmt::Debug {
    /// `f32`, `bf16`, `u32`, `f64`.
    const NAME: &'static str;
    /// Its type in a safetensors file.
    const DTYPE: Dtype;
}

/// A floating-point element.
pub trait FloatElement: Element {
    /// Exact.
    fn to_f32(self) -> f32;
    /// Rounds to nearest even.
    fn from_f32(x: f32) -> Self;
}

impl Element for f32 {
    const NAME: &'static str = "f32";
    const DTYPE: Dtype = Dtype::F32;
}
impl Element for u32 {
    const NAME: &'static str = "u32";
    const DTYPE: Dtype = Dtype::U32;
}
impl Element for f64 {
    const NAME: &'static str = "f64";
    const DTYPE: Dtype = Dtype::F64;
}
impl Element for half::bf16 {
    const NAME: &'static str = "bf16";
    const DTYPE: Dtype = Dtype::BF16;
}

impl FloatElement for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        x
    }
}
// Without branches, for loops to be vectorised.
impl FloatElement for half::bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_f32(x: f32) -> Self {
        let bits = x.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let quiet_nan = bits >> 16 | 0x40;
        Self::from_bits(if x.is_nan() { quiet_nan } else { rounded } as u16)
    }
}

/// Memory for `len` elements on a backend.
pub struct Buffer<B: Backend, T: Element> {
    storage: B::Storage<T>,
    len: usize,
}

impl<B: Backend, T: Element> Buffer<B, T> {
    /// Wraps a backend's memory; `len` elements of it are visible.
    pub fn new(storage: B::Storage<T>, len: usize) -> Self {
        Self { storage, len }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }

    /// All elements.
    pub fn view(&self) -> View<'_, B, T> {
        self.range(0..self.len)
    }

    /// All elements, to write.
    pub fn view_mut(&mut self) -> ViewMut<'_, B, T> {
        let len = self.len;
        self.range_mut(0..len)
    }

    /// Some of its elements.
    ///
    /// # Panics
    /// Where the range is not inside.
    pub fn range(&self, range: Range<usize>) -> View<'_, B, T> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of a buffer of {}", self.len);
        View { storage: &self.storage, range }
    }

    /// Some of its elements, to write.
    ///
    /// # Panics
    /// Where the range is not inside.
    pub fn range_mut(&mut self, range: Range<usize>) -> ViewMut<'_, B, T> {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of a buffer of {}", self.len);
        ViewMut { storage: &mut self.storage, range }
    }
}

/// A part of a [`Buffer`], to read.
pub struct View<'a, B: Backend, T: Element> {
    /// The memory.
    pub storage: &'a B::Storage<T>,
    /// Which elements of it.
    pub range: Range<usize>,
}

impl<B: Backend, T: Element> Clone for View<'_, B, T> {
    fn clone(&self) -> Self {
        Self { storage: self.storage, range: self.range.clone() }
    }
}

impl<'a, B: Backend, T: Element> View<'a, B, T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Some of its elements.
    ///
    /// # Panics
    /// Where the range is not inside.
    pub fn part(&self, range: Range<usize>) -> View<'a, B, T> {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} of a view of {}", self.len());
        View { storage: self.storage, range: self.range.start + range.start..self.range.start + range.end }
    }
}

/// A part of a [`Buffer`], to write.
pub struct ViewMut<'a, B: Backend, T: Element> {
    /// The memory.
    pub storage: &'a mut B::Storage<T>,
    /// Which elements of it.
    pub range: Range<usize>,
}

impl<B: Backend, T: Element> ViewMut<'_, B, T> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The same elements, to read.
    pub fn view(&self) -> View<'_, B, T> {
        View { storage: self.storage, range: self.range.clone() }
    }

    /// The same view for a shorter lifetime, so that it can be passed twice.
    pub fn reborrow(&mut self) -> ViewMut<'_, B, T> {
        ViewMut { storage: self.storage, range: self.range.clone() }
    }

    /// Some of its elements, to write.
    ///
    /// # Panics
    /// Where the range is not inside.
    pub fn part(&mut self, range: Range<usize>) -> ViewMut<'_, B, T> {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} of a view of {}", self.len());
        ViewMut { storage: self.storage, range: self.range.start + range.start..self.range.start + range.end }
    }
}
