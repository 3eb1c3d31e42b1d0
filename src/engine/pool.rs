//! Working memory that is kept between calls, so that a step allocates nothing after the first of its size.

use crate::backend::{Backend, Buffer, Element, View, ViewMut};
use crate::error::Result;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Free buffers of one element type.
pub(super) struct Shelf<B: Backend, T: Element> {
    free: Mutex<Vec<Buffer<B, T>>>,
}

impl<B: Backend, T: Element> Default for Shelf<B, T> {
    fn default() -> Self {
        Self { free: Mutex::new(Vec::new()) }
    }
}

impl<B: Backend, T: Element> Shelf<B, T> {
    fn lock(&self) -> MutexGuard<'_, Vec<Buffer<B, T>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `len` elements of unspecified content.
    pub(super) fn take(&self, backend: &B, len: usize) -> Result<Scratch<'_, B, T>> {
        // Batches differ in length from step to step: a longer buffer serves a shorter batch, so that the pool holds what
        // the longest one needed and no more; but a small request must not take the place of a large one.
        let fits = |b: &Buffer<B, T>| b.len() >= len && b.len() / 4 <= len + 64;
        let mut free = self.lock();
        let best = free.iter().enumerate().filter(|(_, b)| fits(b)).min_by_key(|(_, b)| b.len()).map(|(i, _)| i);
        let buffer = match best {
            Some(i) => free.swap_remove(i),
            None => {
                // What is too small for this request would otherwise pile up while batches grow.
                if let Some(i) = free.iter().position(|b| b.len() < len && b.len() >= len / 2) {
                    free.swap_remove(i);
                }
                drop(free);
                backend.zeros(len + len / 16)?
            }
        };
        Ok(Scratch { buffer: Some(buffer), len, shelf: self })
    }

    fn clear(&self) {
        self.lock().clear();
    }

    fn bytes(&self) -> usize {
        self.lock().iter().map(Buffer::bytes).sum()
    }
}

/// The working memory of a decoder.
pub(super) struct Pool<B: Backend> {
    pub(super) floats: Shelf<B, B::Float>,
    pub(super) stats: Shelf<B, f32>,
    pub(super) indices: Shelf<B, u32>,
}

impl<B: Backend> Default for Pool<B> {
    fn default() -> Self {
        Self { floats: Shelf::default(), stats: Shelf::default(), indices: Shelf::default() }
    }
}

impl<B: Backend> Pool<B> {
    /// Gives everything that is free back to the backend.
    pub(super) fn clear(&self) {
        self.floats.clear();
        self.stats.clear();
        self.indices.clear();
    }

    /// Bytes kept for later.
    pub(super) fn bytes(&self) -> usize {
        self.floats.bytes() + self.stats.bytes() + self.indices.bytes()
    }
}

/// Statistics of rows, lent by the pool.
pub(super) type Stats<'p, B> = Scratch<'p, B, f32>;

/// Activations lent by the pool.
pub(super) type Floats<'p, B> = Scratch<'p, B, <B as Backend>::Float>;

/// A buffer lent by a shelf; it goes back when dropped.
pub(super) struct Scratch<'p, B: Backend, T: Element> {
    buffer: Option<Buffer<B, T>>,
    len: usize,
    shelf: &'p Shelf<B, T>,
}

impl<B: Backend, T: Element> Scratch<'_, B, T> {
    fn buffer(&self) -> &Buffer<B, T> {
        self.buffer.as_ref().expect("present until dropped")
    }

    pub(super) fn view(&self) -> View<'_, B, T> {
        self.buffer().range(0..self.len)
    }

    pub(super) fn view_mut(&mut self) -> ViewMut<'_, B, T> {
        let len = self.len;
        self.range_mut(0..len)
    }

    pub(super) fn range(&self, range: Range<usize>) -> View<'_, B, T> {
        assert!(range.end <= self.len, "{range:?} of {}", self.len);
        self.buffer().range(range)
    }

    pub(super) fn range_mut(&mut self, range: Range<usize>) -> ViewMut<'_, B, T> {
        assert!(range.end <= self.len, "{range:?} of {}", self.len);
        self.buffer.as_mut().expect("present until dropped").range_mut(range)
    }
}

impl<B: Backend, T: Element> Drop for Scratch<'_, B, T> {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.shelf.lock().push(buffer);
        }
    }
}
