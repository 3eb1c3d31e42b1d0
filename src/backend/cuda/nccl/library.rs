//! NVIDIA's library of collective operations, <https://docs.nvidia.com/deeplearning/nccl>, opened on the first
//! request: swat runs without it.
//!
//! cudarc has the types. Its loader looks for `libnccl.so` and for CUDA's version numbers behind it, and panics where
//! there is neither; packages without headers install `libnccl.so.2` alone.

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use libloading::Library;
use std::error::Error as _;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::OnceLock;

/// As packages install it without and with its headers.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The oldest version that has all that is used (`ncclCommFinalize`, `ncclConfig_t` of 2.17), in its own form.
const OLDEST: c_int = 21_800;

/// `ncclSuccess`.
pub(super) const SUCCESS: c_int = 0;
/// `ncclInProgress`: a call of a communicator that does not block goes on.
pub(super) const IN_PROGRESS: c_int = 7;

/// Results are numbers here, since a newer library may return some that cudarc's enumeration has not.
macro_rules! functions {
    ($($name:ident: $symbol:literal($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions of the library that is open until the process ends.
        pub(super) struct Nccl {
            $(pub(super) $name: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Nccl {
            /// # Safety
            /// The library is NCCL 2, and is never closed.
            unsafe fn of(library: &Library) -> Result<Self, libloading::Error> {
                // SAFETY: the functions have these types in NCCL 2.
                unsafe { Ok(Self { $($name: *library.get(concat!($symbol, "\0").as_bytes())?,)* }) }
            }
        }
    };
}

functions! {
    version: "ncclGetVersion"(*mut c_int) -> c_int;
    unique_id: "ncclGetUniqueId"(*mut ncclUniqueId) -> c_int;
    init: "ncclCommInitRankConfig"(*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t) -> c_int;
    state: "ncclCommGetAsyncError"(ncclComm_t, *mut c_int) -> c_int;
    finalize: "ncclCommFinalize"(ncclComm_t) -> c_int;
    destroy: "ncclCommDestroy"(ncclComm_t) -> c_int;
    abort: "ncclCommAbort"(ncclComm_t) -> c_int;
    text: "ncclGetErrorString"(c_int) -> *const c_char;
    last_error: "ncclGetLastError"(ncclComm_t) -> *const c_char;
    group_start: "ncclGroupStart"() -> c_int;
    group_end: "ncclGroupEnd"() -> c_int;
    reduce_scatter: "ncclReduceScatter"(
        *const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, ncclComm_t, cudaStream_t
    ) -> c_int;
    reduce: "ncclReduce"(
        *const c_void, *mut c_void, usize, ncclDataType_t, ncclRedOp_t, c_int, ncclComm_t, cudaStream_t
    ) -> c_int;
    all_gather: "ncclAllGather"(*const c_void, *mut c_void, usize, ncclDataType_t, ncclComm_t, cudaStream_t) -> c_int;
    broadcast: "ncclBroadcast"(
        *const c_void, *mut c_void, usize, ncclDataType_t, c_int, ncclComm_t, cudaStream_t
    ) -> c_int;
}

/// The library, or why there is none that can be used.
pub(super) fn find() -> Result<&'static Nccl, String> {
    static FOUND: OnceLock<Result<Nccl, String>> = OnceLock::new();
    FOUND.get_or_init(open).as_ref().map_err(Clone::clone)
}

fn open() -> Result<Nccl, String> {
    let told = |error: libloading::Error| error.source().map_or_else(|| error.to_string(), ToString::to_string);
    // SAFETY: what the library runs when it is loaded is its own initialisation.
    let open = |name: &str| unsafe { Library::new(name) }.map_err(told);
    let library = open(NAMES[0]).or_else(|why| open(NAMES[1]).map_err(|_| why))?;
    // SAFETY: the name is NCCL's, and it is not closed.
    let nccl = unsafe { Nccl::of(&library) }.map_err(told)?;
    std::mem::forget(library);
    let version = nccl.version_number();
    if version < OLDEST {
        return Err(format!("version {}, and swat needs {}", show(version), show(OLDEST)));
    }
    Ok(nccl)
}

impl Nccl {
    /// The version in its own form: 22403 for 2.24.3.
    pub(super) fn version_number(&self) -> c_int {
        let mut version = 0;
        // SAFETY: writes one integer.
        let known = unsafe { (self.version)(&mut version) };
        if known == SUCCESS { version } else { 0 }
    }

    /// What the library says of a result, and of its cause where it says more.
    pub(super) fn describe(&self, result: c_int, communicator: ncclComm_t) -> String {
        // SAFETY: both return texts that live until the next error of the communicator, which may be null.
        let [text, cause] = unsafe { [(self.text)(result), (self.last_error)(communicator)] }.map(|text| {
            if text.is_null() {
                return String::new();
            }
            // SAFETY: a text of the library.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().trim().to_owned()
        });
        if cause.is_empty() { text } else { format!("{text} ({cause})") }
    }
}

/// `2.24.3` of 22403.
pub(super) fn show(version: c_int) -> String {
    format!("{}.{}.{}", version / 10_000, version % 10_000 / 100, version % 100)
}
