//! NVTX ranges, which `nsys` and `ncu` show and filter by: <https://nvidia.github.io/NVTX>. The library is opened
//! on the first request for ranges.

use crate::error::{Error, Result};
use libloading::Library;
use std::error::Error as _;
use std::ffi::{CString, c_char, c_int};
use std::sync::OnceLock;

/// Exports the ranges; part of the CUDA toolkit and of the package `nvidia-nvtx`.
const LIBRARY: &str = "libnvtx3interop.so.1";

struct Ranges {
    push: unsafe extern "C" fn(*const c_char) -> c_int,
    pop: unsafe extern "C" fn() -> c_int,
    /// The functions are valid while it is open.
    _library: Library,
}

static RANGES: OnceLock<Ranges> = OnceLock::new();

/// Opens the library, if it is not open.
pub(super) fn find() -> Result<()> {
    if RANGES.get().is_none() {
        let ranges = open().map_err(|why| {
            let why = why.source().map_or_else(|| why.to_string(), ToString::to_string);
            Error::input(
                "--nvtx",
                why,
                "the library where LD_LIBRARY_PATH points: from the CUDA toolkit, or nvidia-nvtx",
            )
        })?;
        // Another thread may have been first.
        let _ = RANGES.set(ranges);
    }
    Ok(())
}

fn open() -> Result<Ranges, libloading::Error> {
    // SAFETY: what the library runs when it is loaded is its own initialisation; the functions have these types in
    // NVTX 3.
    unsafe {
        let library = Library::new(LIBRARY)?;
        let (push, pop) = (*library.get(b"nvtxRangePushA\0")?, *library.get(b"nvtxRangePop\0")?);
        Ok(Ranges { push, pop, _library: library })
    }
}

/// Begins a range on this thread.
pub(super) fn push(name: &str) {
    if let (Some(ranges), Ok(name)) = (RANGES.get(), CString::new(name)) {
        // SAFETY: a function of the open library; it copies the text.
        unsafe { (ranges.push)(name.as_ptr()) };
    }
}

/// Ends the innermost range of this thread.
pub(super) fn pop() {
    if let Some(ranges) = RANGES.get() {
        // SAFETY: a function of the open library.
        unsafe { (ranges.pop)() };
    }
}
