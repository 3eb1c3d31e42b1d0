//! Host memory on cache-line boundaries, and slices that several tasks write.

use super::{Cpu, Elements};
use crate::backend::{Element, View, ViewMut};
use memmap2::{MmapMut, MmapRaw};
use rayon::prelude::*;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// One cache line: a vector load never crosses two where rows are multiples of it.
#[derive(Clone, Copy, bytemuck::Pod, bytemuck::Zeroable)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// From this size memory is cut from a chunk of an [`Arena`].
const CUT_BYTES: usize = 1 << 17;
/// Bytes of a chunk; larger memory has a chunk of its own.
const CHUNK_BYTES: usize = 1 << 26;
/// Memory of a chunk begins on a page.
const PAGE_BYTES: usize = 1 << 12;

/// Address space in huge pages, where the system has them, cut into the memory of tensors from front to back. Tensors
/// that are allocated one after the other share their huge pages, which small ones could not fill: reading all weights
/// once, as a decoding step does, takes an eighth less time than with half of them in small pages.
///
/// What is dropped goes back to the system at once, but its addresses are not used again: a chunk is unmapped when all
/// that was cut from it is gone.
#[derive(Default)]
pub(super) struct Arena {
    open: Mutex<Option<Open>>,
}

/// The chunk that memory is cut from, and the bytes that are taken.
struct Open {
    chunk: Arc<Chunk>,
    taken: usize,
}

/// A mapping whose parts belong to one [`Piece`] each.
struct Chunk(MmapRaw);

/// Part of a chunk.
struct Piece {
    chunk: Arc<Chunk>,
    start: usize,
    size: usize,
}

impl Arena {
    /// Zeroed memory; `None` where the system refuses.
    fn cut(&self, size: usize) -> Option<Piece> {
        let room = size.checked_next_multiple_of(PAGE_BYTES)?;
        if room > CHUNK_BYTES / 2 {
            return Some(Piece { chunk: Chunk::map(room)?, start: 0, size });
        }
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.as_ref().is_none_or(|open| CHUNK_BYTES - open.taken < room) {
            *open = Some(Open { chunk: Chunk::map(CHUNK_BYTES)?, taken: 0 });
        }
        let open = open.as_mut()?;
        let piece = Piece { chunk: Arc::clone(&open.chunk), start: open.taken, size };
        open.taken += room;
        Some(piece)
    }
}

impl Chunk {
    fn map(size: usize) -> Option<Arc<Self>> {
        let map = MmapRaw::from(MmapMut::map_anon(size).ok()?);
        // A hint: without it the pages are small.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Some(Arc::new(Self(map)))
    }
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        // SAFETY: in the mapping, which lives as long as the piece, and of no other piece.
        unsafe { std::slice::from_raw_parts(self.chunk.0.as_ptr().add(self.start), self.size) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.chunk.0.as_mut_ptr().add(self.start), self.size) }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        #[cfg(target_os = "linux")]
        if Arc::strong_count(&self.chunk) > 1 {
            let room = self.size.next_multiple_of(PAGE_BYTES);
            // SAFETY: no other piece has these pages, and nothing reads them again.
            let _ =
                unsafe { self.chunk.0.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, self.start, room) };
        }
    }
}

enum Bytes {
    Heap(Vec<Line>),
    Cut(Piece),
}

/// Zeroed memory for a fixed number of elements, aligned to 64 bytes.
pub struct Memory<T> {
    bytes: Bytes,
    len: usize,
    element: PhantomData<T>,
}

impl<T: Element> Memory<T> {
    /// Memory for `len` elements, all zero; `None` where the system refuses.
    pub(super) fn zeroed(len: usize, arena: &Arena) -> Option<Self> {
        let size = len.checked_mul(size_of::<T>())?;
        let bytes = if size >= CUT_BYTES {
            Bytes::Cut(arena.cut(size)?)
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
            Bytes::Cut(piece) => piece.bytes(),
        };
        bytemuck::cast_slice(&bytes[..self.len * size_of::<T>()])
    }

    fn as_mut_slice(&mut self) -> &mut [T] {
        let bytes: &mut [u8] = match &mut self.bytes {
            Bytes::Heap(lines) => bytemuck::cast_slice_mut(lines),
            Bytes::Cut(piece) => piece.bytes_mut(),
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces of a chunk are zero, aligned and disjoint; one that is dropped takes no other with it.
    #[test]
    fn memory_is_cut_from_chunks() {
        let arena = Arena::default();
        let lens = [CUT_BYTES / 4, CUT_BYTES / 4 + 3, CHUNK_BYTES / 8, 5, CHUNK_BYTES / 4 + 1, CHUNK_BYTES / 16];
        let mut all: Vec<Memory<u32>> = lens.iter().map(|len| Memory::zeroed(*len, &arena).unwrap()).collect();
        for (i, (memory, len)) in (1..).zip(all.iter_mut().zip(lens)) {
            let values = memory.as_mut_slice();
            assert_eq!((values.len(), values.as_ptr() as usize % 64), (len, 0));
            assert!(values.iter().all(|x| *x == 0));
            values.fill(i);
        }
        drop(all.remove(2));
        for (i, memory) in [1, 2, 4, 5, 6].into_iter().zip(&all) {
            assert!(memory.as_slice().iter().all(|x| *x == i), "memory {i}");
        }
        let chunks: Vec<_> = all
            .iter()
            .filter_map(|m| if let Bytes::Cut(piece) = &m.bytes { Some(Arc::as_ptr(&piece.chunk)) } else { None })
            .collect();
        assert!(
            chunks[0] == chunks[1] && chunks[1] != chunks[2],
            "small ones share a chunk, large ones have their own"
        );
        assert!(Memory::<u32>::zeroed(usize::MAX / 4, &arena).is_none());
    }
}
