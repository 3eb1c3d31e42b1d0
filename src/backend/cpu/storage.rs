//! Host memory on cache-line boundaries, and slices that several tasks write.

use super::{Cpu, Elements};
use crate::backend::{Element, View, ViewMut};
use memmap2::MmapMut;
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;

/// One cache line: a vector load never crosses two where rows are multiples of it.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// From this size memory is mapped in huge pages, where the system has them: a decoding step, which reads every weight
/// once, is a quarter faster.
const MAPPED_BYTES: usize = 1 << 20;

enum Bytes {
    Heap(Vec<Line>),
    Mapped(MmapMut),
}

/// Zeroed memory for a fixed number of elements, aligned to 64 bytes.
pub struct Memory<T> {
    bytes: Bytes,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> Memory<T> {
    /// Memory for `len` elements, all zero; `None` where the system refuses.
    pub(super) fn zeroed(len: usize) -> Option<Self> {
        let size = len.checked_mul(size_of::<T>())?;
        let bytes = if size >= MAPPED_BYTES {
            let map = MmapMut::map_anon(size).ok()?;
            // A hint: without it the pages are small.
            #[cfg(target_os = "linux")]
            let _ = map.advise(memmap2::Advice::HugePage);
            Bytes::Mapped(map)
        } else {
            let mut lines = Vec::new();
            lines.try_reserve_exact(size.div_ceil(64)).ok()?;
            lines.resize(size.div_ceil(64), Line([0; 64]));
            Bytes::Heap(lines)
        };
        Some(Self { bytes, len, element: PhantomData })
    }

    fn as_slice(&self) -> &[T] {
        let bytes: &[u8] = match &self.bytes {
            Bytes::Heap(lines) => bytemuck::cast_slice(lines),
            Bytes::Mapped(map) => map,
        };
        bytemuck::cast_slice(&bytes[..self.len * size_of::<T>()])
    }

    fn as_mut_slice(&mut self) -> &mut [T] {
        let bytes: &mut [u8] = match &mut self.bytes {
            Bytes::Heap(lines) => bytemuck::cast_slice_mut(lines),
            Bytes::Mapped(map) => map,
        };
        bytemuck::cast_slice_mut(&mut bytes[..self.len * size_of::<T>()])
    }
}

/// The elements of a view.
pub(super) fn slice<'a, E: Elements, T: Element>(view: &View<'a, Cpu<E>, T>) -> &'a [T] {
    &view.storage.as_slice()[view.range.clone()]
}

/// The elements of a view, to write.
pub(super) fn slice_mut<'a, E: Elements, T: Element>(view: ViewMut<'a, Cpu<E>, T>) -> &'a mut [T] {
    &mut view.storage.as_mut_slice()[view.range]
}

/// A slice whose parts several tasks write; the parts are disjoint but not contiguous (columns of a matrix).
pub(super) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: it is only a pointer to elements that may be sent; `Shared::range` puts disjointness on its caller.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    /// Shares `slice` for as long as it is borrowed.
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// Where the elements of `range` begin. Panics outside the slice.
    #[inline(always)]
    pub(super) fn pointer(&self, range: Range<usize>) -> *mut T {
        assert!(range.start <= range.end && range.end <= self.len, "{range:?} of {} elements", self.len);
        self.start.wrapping_add(range.start)
    }

    /// The elements of `range`, to write. Panics outside the slice.
    ///
    /// # Safety
    /// No two live ranges overlap.
    #[allow(clippy::mut_from_ref)]
    #[inline(always)]
    pub(super) unsafe fn range(&self, range: Range<usize>) -> &mut [T] {
        let len = range.len();
        // SAFETY: inside the borrowed slice, and disjoint from every other range by this function's contract.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(range), len) }
    }
}

/// Copies in parallel where it pays.
pub(super) fn copy<T: Element>(from: &[T], to: &mut [T]) {
    const BLOCK: usize = 1 << 16;
    assert_eq!(from.len(), to.len());
    to.par_chunks_mut(BLOCK).zip(from.par_chunks(BLOCK)).for_each(|(to, from)| to.copy_from_slice(from));
}
