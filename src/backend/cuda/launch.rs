//! Kernels and their launches.

use crate::backend::Cost;
use cudarc::driver::sys;
use std::ffi::c_void;
use std::sync::Arc;

/// A kernel of a loaded module.
#[derive(Clone)]
pub(super) struct Function {
    /// Its symbol.
    pub(super) kernel: &'static str,
    pub(super) raw: sys::CUfunction,
    /// Bytes of each parameter, as compiled.
    pub(super) parameters: Arc<[usize]>,
    /// Dynamic shared memory that its file declares (`SHARED_BYTES`).
    pub(super) needed_bytes: u32,
    /// Static shared memory, as compiled.
    pub(super) static_bytes: u32,
    /// Most dynamic shared memory of a launch; raised on demand.
    pub(super) dynamic_limit: u32,
}

/// A launch: which kernel, on how much.
pub(super) struct Launch {
    /// The stem of the kernel's file.
    pub(super) image: &'static str,
    /// Its symbol.
    pub(super) kernel: &'static str,
    /// Blocks in x, y, z; a launch of no blocks does nothing.
    pub(super) grid: [u32; 3],
    /// Threads of a block.
    pub(super) block: u32,
    /// Dynamic shared memory of a block in addition to the kernel's own (`SHARED_BYTES`).
    pub(super) shared_bytes: u32,
    /// Bytes and FLOPs.
    pub(super) cost: Cost,
}

/// Blocks of `size` that cover `count`.
pub(super) fn blocks(count: usize, size: usize) -> u32 {
    u32::try_from(count.div_ceil(size)).expect("a grid beyond 2³² blocks")
}

impl Launch {
    /// A launch without extra dynamic shared memory. `grid` has up to three extents.
    pub(super) fn new<const N: usize>(
        image: &'static str,
        kernel: &'static str,
        grid: [u32; N],
        block: u32,
        cost: Cost,
    ) -> Self {
        let grid = std::array::from_fn(|i| grid.get(i).copied().unwrap_or(1));
        Self { image, kernel, grid, block, shared_bytes: 0, cost }
    }
}

/// An argument of a kernel.
#[derive(Clone, Copy)]
pub(super) enum Arg {
    /// Device memory; 0 = none.
    Pointer(sys::CUdeviceptr),
    /// `uint32_t`
    U32(u32),
    /// `uint64_t`
    U64(u64),
    /// `float`
    F32(f32),
    /// `const __grid_constant__ CUtensorMap`
    TensorMap(sys::CUtensorMap),
}

impl Arg {
    /// The address of the value, as the driver takes it.
    pub(super) fn pointer(&self) -> *mut c_void {
        match self {
            Self::Pointer(value) => std::ptr::from_ref(value) as *mut c_void,
            Self::U32(value) => std::ptr::from_ref(value) as *mut c_void,
            Self::U64(value) => std::ptr::from_ref(value) as *mut c_void,
            Self::F32(value) => std::ptr::from_ref(value) as *mut c_void,
            Self::TensorMap(value) => std::ptr::from_ref(value) as *mut c_void,
        }
    }

    /// Bytes of the parameter.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Pointer(_) | Self::U64(_) => 8,
            Self::U32(_) | Self::F32(_) => 4,
            Self::TensorMap(_) => size_of::<sys::CUtensorMap>(),
        }
    }

    /// The value in words of eight bytes, padded with zeros.
    pub(super) fn words(&self) -> impl Iterator<Item = u64> {
        let narrow = |bytes: [u8; 4]| {
            let [a, b, c, d] = bytes;
            u64::from_ne_bytes([a, b, c, d, 0, 0, 0, 0])
        };
        let (one, map) = match self {
            Self::Pointer(value) | Self::U64(value) => (Some(*value), None),
            Self::U32(value) => (Some(narrow(value.to_ne_bytes())), None),
            Self::F32(value) => (Some(narrow(value.to_ne_bytes())), None),
            Self::TensorMap(value) => (None, Some(value.opaque)),
        };
        one.into_iter().chain(map.into_iter().flatten())
    }
}

impl From<u32> for Arg {
    fn from(value: u32) -> Self {
        Self::U32(value)
    }
}
impl From<u64> for Arg {
    fn from(value: u64) -> Self {
        Self::U64(value)
    }
}
impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::F32(value)
    }
}
impl From<sys::CUtensorMap> for Arg {
    fn from(value: sys::CUtensorMap) -> Self {
        Self::TensorMap(value)
    }
}

/// The arguments of a launch in the order of the kernel's parameters.
macro_rules! args {
    ($($value:expr),* $(,)?) => { &[$($crate::backend::cuda::launch::Arg::from($value)),*] };
}
pub(super) use args;
