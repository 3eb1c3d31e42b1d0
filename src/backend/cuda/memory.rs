//! Device memory and copies. Freed buffers stay in the arena for the next of their size, so that a step allocates
//! nothing after the first; one stream orders the old user before the new one.

use super::arena::Arena;
use super::context::lock;
use super::device::Device;
use super::launch::Arg;
use super::{Cuda, Precision};
use crate::backend::{Cost, Element, View, ViewMut};
use crate::error::{Error, Result};
use cudarc::driver::{DriverError, result, sys};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// Every allocation is a multiple of this; the driver aligns each to 256 bytes.
const GRANULE_BYTES: usize = 16;
/// More than any device has, so that rounding up cannot overflow.
const MOST_BYTES: usize = 1 << 56;

/// Memory of a device for a fixed number of elements.
pub struct Memory<T> {
    device: Arc<Device>,
    pointer: sys::CUdeviceptr,
    bytes: usize,
    element: PhantomData<T>,
}

impl<T: Element> Memory<T> {
    /// Uninitialised memory for `len` elements.
    ///
    /// # Errors
    /// [`Error::Memory`] with the planned and the free bytes.
    pub(super) fn new(device: &Arc<Device>, len: usize) -> Result<Self> {
        Self::in_multiples(device, len, |_| GRANULE_BYTES)
    }

    /// Uninitialised memory for an operator's intermediate values, rounded up to one of eight sizes between powers of two, so
    /// that batches of different lengths share blocks of the arena. At most an eighth is unused.
    ///
    /// # Errors
    /// As [`Memory::new`].
    pub(super) fn workspace(device: &Arc<Device>, len: usize) -> Result<Self> {
        Self::in_multiples(device, len, |bytes| (bytes.next_power_of_two() / 16).max(GRANULE_BYTES))
    }

    fn in_multiples(device: &Arc<Device>, len: usize, granule: impl FnOnce(usize) -> usize) -> Result<Self> {
        let too_much = || Error::failed(format!("{len} elements of {} exceed any memory", T::NAME), "use less");
        let bytes = len.checked_mul(size_of::<T>()).filter(|bytes| *bytes < MOST_BYTES).ok_or_else(too_much)?;
        let bytes = bytes.next_multiple_of(granule(bytes));
        let memory = |pointer| Self { device: device.clone(), pointer, bytes, element: PhantomData };
        if bytes == 0 {
            return Ok(memory(0));
        }
        device.context.bind()?;
        let mut arena = lock(&device.arena);
        let pointer = match arena.take(bytes) {
            Some(pointer) => pointer,
            None => Self::allocate(device, &mut arena, bytes)?,
        };
        arena.add_used(bytes);
        Ok(memory(pointer))
    }

    fn allocate(device: &Arc<Device>, arena: &mut Arena, bytes: usize) -> Result<sys::CUdeviceptr> {
        // SAFETY: the context is current.
        let first = unsafe { result::malloc_sync(bytes) };
        let error = match first {
            Ok(pointer) => return Ok(pointer),
            Err(error) => error,
        };
        if error != DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY) {
            return Err(device.context.failed("allocation failed", error));
        }
        device.drop_graphs()?;
        // SAFETY: the context is current and the stream is idle; then as above.
        unsafe {
            arena.flush();
            result::malloc_sync(bytes)
        }
        .or_else(|_| {
            let (free, _) = device.memory()?;
            Err(Error::Memory {
                what: format!(
                    "a buffer of {} on {}, beside {} bytes in use,",
                    T::NAME,
                    device.context.label(),
                    arena.used_bytes()
                ),
                planned_bytes: bytes as u64,
                free_bytes: free,
                help: "use a smaller batch, a shorter --max-length or --recompute; `swat plan` shows what fits".into(),
            })
        })
    }

    fn slice(&self, range: Range<usize>) -> Slice<'_, T> {
        debug_assert!(range.end * size_of::<T>() <= self.bytes);
        Slice { pointer: self.pointer + (range.start * size_of::<T>()) as u64, len: range.len(), borrow: PhantomData }
    }

    /// The first `len` elements; a workspace has no more.
    pub(super) fn all(&mut self, len: usize) -> SliceMut<'_, T> {
        assert!(len * size_of::<T>() <= self.bytes);
        SliceMut(self.slice(0..len))
    }
}

impl<T> Drop for Memory<T> {
    fn drop(&mut self) {
        if self.bytes > 0 {
            lock(&self.device.arena).give_back(self.pointer, self.bytes);
        }
    }
}

/// Elements that are read: address and number.
pub(super) struct Slice<'a, T> {
    pointer: sys::CUdeviceptr,
    len: usize,
    borrow: PhantomData<&'a T>,
}

impl<T> Clone for Slice<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Slice<'_, T> {}

impl<'a, T> Slice<'a, T> {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn pointer(&self) -> sys::CUdeviceptr {
        self.pointer
    }

    /// Whether the address is a multiple of `bytes`.
    pub(super) fn aligned(&self, bytes: u64) -> bool {
        self.pointer.is_multiple_of(bytes)
    }
}

/// Elements that are written: no other view of them lives.
pub(super) struct SliceMut<'a, T>(Slice<'a, T>);

impl<T> SliceMut<'_, T> {
    /// The same for a shorter lifetime, so that it can be passed twice.
    pub(super) fn reborrow(&mut self) -> SliceMut<'_, T> {
        SliceMut(self.0)
    }
}

impl<'a, T> std::ops::Deref for SliceMut<'a, T> {
    type Target = Slice<'a, T>;
    fn deref(&self) -> &Slice<'a, T> {
        &self.0
    }
}

impl<T> From<Slice<'_, T>> for Arg {
    fn from(slice: Slice<'_, T>) -> Self {
        Self::Pointer(slice.pointer)
    }
}
impl<T> From<&SliceMut<'_, T>> for Arg {
    fn from(slice: &SliceMut<'_, T>) -> Self {
        Self::Pointer(slice.pointer)
    }
}
impl<T> From<Option<Slice<'_, T>>> for Arg {
    fn from(slice: Option<Slice<'_, T>>) -> Self {
        Self::Pointer(slice.map_or(0, |slice| slice.pointer))
    }
}
impl<T> From<Option<&SliceMut<'_, T>>> for Arg {
    fn from(slice: Option<&SliceMut<'_, T>>) -> Self {
        Self::Pointer(slice.map_or(0, |slice| slice.pointer))
    }
}

pub(super) fn slice<'a, T: Element, P: Precision>(view: &View<'a, Cuda<P>, T>) -> Slice<'a, T> {
    view.storage.slice(view.range.clone())
}

pub(super) fn slice_mut<'a, T: Element, P: Precision>(view: ViewMut<'a, Cuda<P>, T>) -> SliceMut<'a, T> {
    let storage: &'a Memory<T> = view.storage;
    SliceMut(storage.slice(view.range))
}

/// Sets every byte to 0.
pub(super) fn clear<T: Element>(device: &Device, to: &SliceMut<'_, T>) -> Result<()> {
    if to.len == 0 {
        return Ok(());
    }
    let bytes = to.len * size_of::<T>();
    // SAFETY: the memory is borrowed mutably.
    if unsafe { lock(&device.graphs).record_memset(to.pointer, bytes) } {
        return Ok(());
    }
    device.context.bind()?;
    // SAFETY: as many bytes as the borrowed memory has.
    let clear = || unsafe { result::memset_d8_async(to.pointer, 0, bytes, device.context.stream()) };
    device
        .timed("memset", Cost::moved(bytes), clear)
        .map_err(|error| device.context.failed("cannot clear memory", error))
}

/// Host to device. The host's bytes may change once this returns: the driver stages pageable memory first; where the device
/// accesses it directly instead, this waits for the copy.
pub(super) fn write<T: Element>(device: &Device, from: &[T], to: &SliceMut<'_, T>) -> Result<()> {
    assert_eq!(from.len(), to.len);
    if from.is_empty() {
        return Ok(());
    }
    device.flush()?;
    device.context.bind()?;
    // SAFETY: both sides have `len` elements, and the host's are read before this function returns.
    let copy = || unsafe { result::memcpy_htod_async(to.pointer, from, device.context.stream()) };
    device
        .timed("memcpy_host_to_device", Cost::moved(size_of_val(from)), copy)
        .map_err(|error| device.context.failed("cannot copy from the host", error))?;
    if device.reads_host_pages { device.synchronize() } else { Ok(()) }
}

/// Device to host; synchronizes.
pub(super) fn read<T: Element>(device: &Device, from: Slice<'_, T>, to: &mut [T]) -> Result<()> {
    assert_eq!(from.len, to.len());
    if to.is_empty() {
        return device.synchronize();
    }
    device.flush()?;
    device.context.bind()?;
    let cost = Cost::moved(size_of_val(to));
    // SAFETY: both sides have `len` elements, and the host's are borrowed until the copy is done.
    let copy = || unsafe { result::memcpy_dtoh_async(to, from.pointer, device.context.stream()) };
    device
        .timed("memcpy_device_to_host", cost, copy)
        .map_err(|error| device.context.failed("cannot copy to the host", error))?;
    device.synchronize()
}

/// Device to device.
pub(super) fn copy<T: Element>(device: &Device, from: Slice<'_, T>, to: &SliceMut<'_, T>) -> Result<()> {
    assert_eq!(from.len, to.len);
    if from.len == 0 {
        return Ok(());
    }
    device.flush()?;
    device.context.bind()?;
    let bytes = from.len * size_of::<T>();
    // SAFETY: both sides have `len` elements, and a buffer is not borrowed to read and to write at once.
    let copy = || unsafe { result::memcpy_dtod_async(to.pointer, from.pointer, bytes, device.context.stream()) };
    device
        .timed("memcpy_device_to_device", Cost::moved(2 * bytes), copy)
        .map_err(|error| device.context.failed("cannot copy", error))
}
