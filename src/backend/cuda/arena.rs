//! Freed device memory, cached for the next buffer of its size.

use cudarc::driver::{result, sys};
use std::collections::{BTreeSet, HashMap};

/// Caching allocator with usage counters: free blocks by size, the lowest address first, so that a step that asks for
/// the same sizes again gets the same addresses.
#[derive(Default)]
pub(super) struct Arena {
    free: HashMap<usize, BTreeSet<sys::CUdeviceptr>>,
    used_bytes: usize,
    peak_bytes: usize,
}

impl Arena {
    /// Frees all cached blocks.
    ///
    /// # Safety
    /// The context of the device is current and its stream is idle.
    pub(super) unsafe fn flush(&mut self) {
        for pointer in self.free.drain().flat_map(|(_, pointers)| pointers) {
            // SAFETY: an allocation of the driver without a user. An error leaks it until the process ends.
            let _ = unsafe { result::free_sync(pointer) };
        }
    }

    /// Bytes of cached blocks. They are freed when an allocation would fail otherwise.
    pub(super) fn cached_bytes(&self) -> usize {
        self.free.iter().map(|(bytes, pointers)| bytes * pointers.len()).sum()
    }

    /// Most bytes in use at once.
    pub(super) fn peak_bytes(&self) -> usize {
        self.peak_bytes
    }

    /// A cached block of exactly `bytes`.
    pub(super) fn take(&mut self, bytes: usize) -> Option<sys::CUdeviceptr> {
        self.free.get_mut(&bytes)?.pop_first()
    }

    /// Counts an allocation.
    pub(super) fn add_used(&mut self, bytes: usize) {
        self.used_bytes += bytes;
        self.peak_bytes = self.peak_bytes.max(self.used_bytes);
    }

    /// Bytes in use.
    pub(super) fn used_bytes(&self) -> usize {
        self.used_bytes
    }

    /// Caches a block that is used no more.
    pub(super) fn give_back(&mut self, pointer: sys::CUdeviceptr, bytes: usize) {
        self.used_bytes -= bytes;
        self.free.entry(bytes).or_default().insert(pointer);
    }
}
