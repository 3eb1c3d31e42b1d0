//! The arguments of a kernel.

use cudarc::driver::sys;
use std::ffi::c_void;

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
    /// Where it is, as the driver wants it.
    pub(super) fn pointer(&self) -> *mut c_void {
        match self {
            Self::Pointer(value) => std::ptr::from_ref(value) as *mut c_void,
            Self::U32(value) => std::ptr::from_ref(value) as *mut c_void,
            Self::U64(value) => std::ptr::from_ref(value) as *mut c_void,
            Self::F32(value) => std::ptr::from_ref(value) as *mut c_void,
            Self::TensorMap(value) => std::ptr::from_ref(value) as *mut c_void,
        }
    }

    /// As many as the kernel's parameter has.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Pointer(_) | Self::U64(_) => 8,
            Self::U32(_) | Self::F32(_) => 4,
            Self::TensorMap(_) => size_of::<sys::CUtensorMap>(),
        }
    }

    /// Its bytes, each value from the first byte of a word on.
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
    ($($value:expr),* $(,)?) => { &[$($crate::backend::cuda::arguments::Arg::from($value)),*] };
}
pub(super) use args;
