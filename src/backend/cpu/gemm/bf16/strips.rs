//! Dynamic scheduling of a product over strips of B (columns) and blocks of A (rows).
//!
//! A thread packs a strip of B into its own buffer, so that it stays in its L2, and multiplies it with one block of A
//! after another. When no strip is left, it takes blocks of strips that other threads have packed. There is no barrier
//! between packing and multiplying, only the join at the end: a thread that wakes late or is preempted delays the
//! product by one block at most.

use crate::backend::cpu::matrix::Threads;
use rayon::prelude::*;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

/// State of a buffer whose strip is being packed.
const PACKING: u64 = u64::MAX;
/// State of a buffer without a strip, with no block left.
const EMPTY: u64 = PACKING >> 32;

/// Parallel loop with dynamic scheduling: free threads take one task at a time.
pub(super) fn for_each(tasks: usize, threads: Threads, task: impl Fn(usize) + Sync + Send) {
    let next = AtomicUsize::new(0);
    on(workers(threads).min(tasks), |_| {
        while let Some(i) = take(&next, tasks) {
            task(i);
        }
    });
}

/// Number of threads that may work on a product.
pub(super) fn workers(threads: Threads) -> usize {
    match threads {
        Threads::All => rayon::current_num_threads(),
        Threads::One => 1,
    }
}

/// Calls `work` `workers` times, in parallel on free threads.
fn on(workers: usize, work: impl Fn(usize) + Sync + Send) {
    if workers > 1 {
        (0..workers).into_par_iter().with_max_len(1).for_each(work);
    } else {
        work(0);
    }
}

fn take(next: &AtomicUsize, end: usize) -> Option<usize> {
    let i = next.fetch_add(1, Ordering::AcqRel);
    (i < end).then_some(i)
}

/// Strips of B, and blocks of rows of A, each of which is multiplied with each strip.
#[derive(Clone, Copy)]
pub(super) struct Strips {
    pub strips: usize,
    pub blocks: usize,
    /// Buffers for packed strips: the number of strips that are packed at the same time.
    pub spaces: usize,
}

/// A buffer for a packed strip.
struct Space {
    /// The strip in the upper half, the next of its blocks in the lower one; or [`PACKING`], or [`EMPTY`].
    state: AtomicU64,
    finished: AtomicUsize,
}

impl Default for Space {
    fn default() -> Self {
        Self { state: AtomicU64::new(EMPTY), finished: AtomicUsize::new(0) }
    }
}

/// What a thread finds in a space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Taken {
    None,
    /// There will be blocks.
    Packing,
    /// A block of a strip, which is now the thread's.
    Block(usize, usize),
}

impl Space {
    fn take(&self, blocks: usize) -> Taken {
        let mut state = self.state.load(Ordering::Acquire);
        loop {
            let (strip, block) = ((state >> 32) as usize, (state & EMPTY) as usize);
            if state == PACKING {
                return Taken::Packing;
            }
            if block >= blocks {
                return Taken::None;
            }
            match self.state.compare_exchange_weak(state, state + 1, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Taken::Block(strip, block),
                Err(now) => state = now,
            }
        }
    }
}

impl Strips {
    /// `pack(space, strip)` for every strip and, after it, `multiply(space, strip, block)` for each of its blocks. A space
    /// is packed again once all blocks of its strip are multiplied.
    ///
    /// # Panics
    /// Where one of them does, on every thread.
    pub(super) fn run(
        self,
        threads: Threads,
        pack: impl Fn(usize, usize) + Sync,
        multiply: impl Fn(usize, usize, usize) + Sync,
    ) {
        let Self { strips, blocks, spaces } = self;
        assert!(strips.max(blocks) < EMPTY as usize && spaces > 0);
        let all: Vec<Space> = (0..spaces).map(|_| Space::default()).collect();
        let (next, owners, failed) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicBool::new(false));
        let multiply_one = |i: usize| {
            let taken = all[i].take(blocks);
            if let Taken::Block(strip, block) = taken {
                multiply(i, strip, block);
                all[i].finished.fetch_add(1, Ordering::AcqRel);
            }
            taken
        };
        on(workers(threads).min(strips * blocks), |_| {
            let _watch = Watch(&failed);
            let mut pause = Pause::new(&failed);
            if let Some(own) = take(&owners, spaces) {
                let space = &all[own];
                loop {
                    // Before the strip is taken: who sees that none is left waits for this one.
                    space.state.store(PACKING, Ordering::Release);
                    let Some(strip) = take(&next, strips) else { break };
                    pack(own, strip);
                    space.finished.store(0, Ordering::Release);
                    space.state.store((strip as u64) << 32, Ordering::Release);
                    while matches!(multiply_one(own), Taken::Block(..)) {}
                    while space.finished.load(Ordering::Acquire) < blocks {
                        pause.wait();
                    }
                }
                space.state.store(EMPTY, Ordering::Release);
            }
            loop {
                // What is empty after the last strip was taken remains so.
                let last = next.load(Ordering::Acquire) >= strips;
                let found = (0..spaces).map(&multiply_one).fold(Taken::None, Taken::max);
                match found {
                    Taken::None if last => break,
                    Taken::Block(..) => {}
                    _ => pause.wait(),
                }
            }
        });
    }
}

/// Tells the other threads of a panic: what they wait for will not come.
struct Watch<'a>(&'a AtomicBool);

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Release);
        }
    }
}

/// Waits for another thread, which works on at most one block.
struct Pause<'a> {
    waits: usize,
    failed: &'a AtomicBool,
}

impl<'a> Pause<'a> {
    /// Waits before a thread offers its core.
    const SPINS: usize = 64;

    fn new(failed: &'a AtomicBool) -> Self {
        Self { waits: 0, failed }
    }

    fn wait(&mut self) {
        assert!(!self.failed.load(Ordering::Acquire), "another thread of this product panicked");
        self.waits += 1;
        if self.waits.is_multiple_of(Self::SPINS) { std::thread::yield_now() } else { std::hint::spin_loop() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::time::Duration;

    /// Each block once, of the strip that its space has, however threads are held up.
    #[test]
    fn each_block_once() {
        for (strips, blocks, spaces) in [(1, 1, 1), (5, 1, 2), (1, 9, 2), (7, 3, 1), (4, 5, 3), (23, 4, 4)] {
            let packed: Vec<AtomicUsize> = (0..spaces).map(|_| AtomicUsize::new(usize::MAX)).collect();
            let done = Mutex::new(vec![0; strips * blocks]);
            let hold = |i: usize| std::thread::sleep(Duration::from_micros(37 * (i as u64 * 7 % 5)));
            rayon::ThreadPoolBuilder::new().num_threads(4).build().unwrap().install(|| {
                Strips { strips, blocks, spaces }.run(
                    Threads::All,
                    |space, strip| {
                        packed[space].store(usize::MAX, Ordering::SeqCst);
                        hold(strip);
                        packed[space].store(strip, Ordering::SeqCst);
                    },
                    |space, strip, block| {
                        assert_eq!(packed[space].load(Ordering::SeqCst), strip);
                        hold(strip + block);
                        assert_eq!(packed[space].load(Ordering::SeqCst), strip);
                        done.lock().unwrap()[strip * blocks + block] += 1;
                    },
                );
            });
            assert!(done.into_inner().unwrap().iter().all(|&times| times == 1), "{strips} {blocks} {spaces}");
        }
    }

    #[test]
    fn a_panic_ends_all_threads() {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap();
        for bad in [0, 5] {
            let run = || {
                let strips = Strips { strips: 8, blocks: 4, spaces: 3 };
                strips.run(Threads::All, |_, strip| assert_ne!(strip, bad), |_, _, _| {});
            };
            assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| pool.install(run))).is_err());
        }
    }

    #[test]
    fn each_task_once() {
        let done: Vec<AtomicUsize> = (0..1000).map(|_| AtomicUsize::new(0)).collect();
        for threads in [Threads::All, Threads::One] {
            for_each(done.len(), threads, |i| _ = done[i].fetch_add(1, Ordering::SeqCst));
            for_each(0, threads, |_| unreachable!());
        }
        assert!(done.iter().all(|times| times.load(Ordering::SeqCst) == 2));
    }
}
