//! Working memory that is kept between calls, so that a step allocates nothing after the first of its size.

use crate::backend::{Backend, Buffer, Element, View, ViewMut};
use crate::error::Result;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Free buffers of one element type.
pub(super) struct Shelf<B: Backend, T: Element> {
    /// With the order of their allocation, which decides between equal sizes: a step with the same requests gets the
    /// same buffers.
    free: Mutex<Vec<(usize, Buffer<B, T>)>>,
    made: AtomicUsize,
    /// Tokens of the running training pass (0 = none), and of the longest so far.
    tokens: AtomicUsize,
    longest: AtomicUsize,
}

impl<B: Backend, T: Element> Default for Shelf<B, T> {
    fn default() -> Self {
        let zero = || AtomicUsize::new(0);
        Self { free: Mutex::default(), made: zero(), tokens: zero(), longest: zero() }
    }
}

impl<B: Backend, T: Element> Shelf<B, T> {
    fn lock(&self) -> MutexGuard<'_, Vec<(usize, Buffer<B, T>)>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A buffer of `len` elements of unspecified content.
    pub(super) fn take(&self, backend: &B, len: usize) -> Result<Scratch<'_, B, T>> {
        // Batches differ in length from step to step: a longer buffer serves a shorter batch, so that the pool holds
        // what the longest one needed and no more; but a small request must not take the place of a large one. A
        // training pass keeps what it takes: it gets no more than the same request in the longest pass would.
        let most = match self.tokens.load(Relaxed) {
            0 => 4 * (len + 64),
            tokens => len.div_ceil(tokens) * self.longest.load(Relaxed) / 4 * 5 + 64,
        };
        let fits = |b: &Buffer<B, T>| (len..=most.max(len)).contains(&b.len());
        let mut free = self.lock();
        let fitting = free.iter().enumerate().filter(|(_, (_, b))| fits(b));
        let best = fitting.min_by_key(|(_, (made, b))| (b.len(), *made)).map(|(i, _)| i);
        let (made, buffer) = match best {
            Some(i) => free.swap_remove(i),
            None => {
                // What is too small for this request would otherwise pile up while batches grow.
                if let Some(i) = free.iter().position(|(_, b)| b.len() < len && b.len() >= len / 2) {
                    free.swap_remove(i);
                }
                drop(free);
                (self.made.fetch_add(1, Relaxed), backend.zeros(len + len / 16)?)
            }
        };
        Ok(Scratch { buffer: Some(buffer), made, len, shelf: self })
    }

    fn clear(&self) {
        self.lock().clear();
        self.longest.store(0, Relaxed);
    }

    fn begin(&self, tokens: usize) {
        self.tokens.store(tokens, Relaxed);
        self.longest.fetch_max(tokens, Relaxed);
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
    /// Frees all unused buffers.
    pub(super) fn clear(&self) {
        self.floats.clear();
        self.stats.clear();
        self.indices.clear();
    }

    /// Begins a training pass over `tokens` tokens, which ends when the guard is dropped. At most one at a time.
    pub(super) fn pass(&self, tokens: usize) -> Pass<'_, B> {
        self.floats.begin(tokens);
        self.stats.begin(tokens);
        Pass { pool: self }
    }
}

/// A running training pass; ends when dropped.
pub(super) struct Pass<'p, B: Backend> {
    pool: &'p Pool<B>,
}

impl<B: Backend> Drop for Pass<'_, B> {
    fn drop(&mut self) {
        self.pool.floats.begin(0);
        self.pool.stats.begin(0);
    }
}

/// Statistics of rows (f32) in pooled memory.
pub(super) type Stats<'p, B> = Scratch<'p, B, f32>;

/// Activations in pooled memory.
pub(super) type Floats<'p, B> = Scratch<'p, B, <B as Backend>::Float>;

/// A buffer borrowed from a shelf; returned when dropped.
pub(super) struct Scratch<'p, B: Backend, T: Element> {
    buffer: Option<Buffer<B, T>>,
    made: usize,
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
            self.shelf.lock().push((self.made, buffer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;

    impl Pool<Cpu> {
        /// Bytes kept for later.
        fn bytes(&self) -> usize {
            self.floats.lock().iter().map(|(_, buffer)| buffer.bytes()).sum()
        }
    }

    /// The requests of a training pass: in each layer a wide buffer that is freed, and narrow ones that are kept.
    fn pass(pool: &Pool<Cpu>, tokens: usize) -> usize {
        let _pass = pool.pass(tokens);
        let mut kept = Vec::new();
        for _ in 0..10 {
            let wide = pool.floats.take(&Cpu::new(), tokens * 3).unwrap();
            drop(wide);
            kept.push(pool.floats.take(&Cpu::new(), tokens).unwrap());
        }
        drop(kept);
        pool.bytes()
    }

    #[test]
    fn kept_buffers_are_no_wider_than_needed() {
        let pool = Pool::default();
        let needed = (3 + 10) * 1000 * 4;
        let found = pass(&pool, 1000);
        assert!(found <= needed / 16 * 17, "{found} of {needed}");
        assert_eq!(pass(&pool, 1000), found);
    }

    #[test]
    fn the_longest_batch_decides() {
        let pool = Pool::default();
        pass(&pool, 400);
        let longest = pass(&pool, 1000);
        for tokens in [999, 300, 100, 700, 10, 1000] {
            assert_eq!(pass(&pool, tokens), longest, "{tokens}");
        }
        pool.clear();
        assert!(pass(&pool, 100) * 9 < longest, "forgotten");
    }

    #[test]
    fn outside_of_a_pass_a_buffer_serves_down_to_a_quarter() {
        let pool = Pool::<Cpu>::default();
        drop(pool.floats.take(&Cpu::new(), 4000).unwrap());
        let bytes = pool.bytes();
        drop(pool.floats.take(&Cpu::new(), 1100).unwrap());
        assert_eq!(pool.bytes(), bytes);
        drop(pool.floats.take(&Cpu::new(), 500).unwrap());
        assert!(pool.bytes() > bytes);
    }
}
