//! The emulated driver of this process: loading it, its counters, and the faults that a test can inject.

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::Path;
use std::sync::OnceLock;

static DRIVER: OnceLock<Library> = OnceLock::new();

/// Loads the driver's library once, with its symbols visible to kernel libraries and to whoever opens `libcuda.so`.
///
/// # Panics
/// If the library cannot be opened.
pub(crate) fn open(library: &Path) {
    DRIVER.get_or_init(|| {
        // SAFETY: loading it runs the initializers of its own statics, nothing else.
        let driver = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_GLOBAL) };
        driver.unwrap_or_else(|e| panic!("{}: {e}", library.display()))
    });
}

/// Loads the emulated NCCL once, so that whoever opens `libnccl.so.2` has it. The driver is loaded.
///
/// # Panics
/// If the library cannot be opened.
pub(crate) fn open_nccl(library: &Path) {
    static NCCL: OnceLock<Library> = OnceLock::new();
    NCCL.get_or_init(|| {
        // SAFETY: loading it runs the initializers of its own statics, nothing else.
        let nccl = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_LOCAL) };
        nccl.unwrap_or_else(|e| panic!("{}: {e}", library.display()))
    });
}

/// Loads the library of a kernel file. `cuModuleLoadData` of `image` gives a module with its kernels; `resources` is
/// the file of [`crate::Compiler::resources`].
///
/// # Panics
/// If the library cannot be opened, or no driver is loaded.
pub fn load(library: &Path, image: &[u8], resources: &Path) {
    // SAFETY: loading it registers its kernels with the driver.
    let loaded = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_LOCAL) }.unwrap_or_else(|e| panic!("{e}"));
    std::mem::forget(loaded);
    let name = library.file_stem().and_then(|s| s.to_str()).expect("STEM-HASH.so");
    let stem = CString::new(name.rsplit_once('-').expect("STEM-HASH.so").0).expect("no NUL");
    let resources = CString::new(resources.to_str().expect("a UTF-8 path")).expect("no NUL");
    type Image = unsafe extern "C" fn(*const c_char, *const u8, usize, *const c_char);
    // SAFETY: exported with this type; it copies the bytes and reads the file.
    unsafe { hook::<Image>("standin_image")(stem.as_ptr(), image.as_ptr(), image.len(), resources.as_ptr()) }
}

/// An exported function of the emulated driver.
///
/// # Safety
/// `F` is the type of that function.
///
/// # Panics
/// If no driver is loaded, or it exports no such function.
pub unsafe fn hook<F: Copy>(name: &str) -> F {
    let driver = DRIVER.get().expect("the stand-in is loaded");
    // SAFETY: the caller's promise.
    *unsafe { driver.get::<F>(name) }.unwrap_or_else(|e| panic!("{e}"))
}

fn counter(name: &str, ordinal: i32) -> u64 {
    // SAFETY: the driver exports its counters with this type.
    unsafe { hook::<unsafe extern "C" fn(i32) -> u64>(name)(ordinal) }
}

fn set(name: &str, ordinal: i32, value: u64) {
    // SAFETY: the driver exports its setters of one number with this type.
    unsafe { hook::<unsafe extern "C" fn(i32, u64)>(name)(ordinal, value) }
}

/// Kernel launches of device `ordinal` so far.
pub fn launches(ordinal: i32) -> u64 {
    counter("standin_launches", ordinal)
}

/// Kernel launches of device `ordinal` between `cuProfilerStart` and `cuProfilerStop`.
pub fn profiled(ordinal: i32) -> u64 {
    counter("standin_profiled", ordinal)
}

/// Allocations that device `ordinal` has made so far.
pub fn allocations(ordinal: i32) -> u64 {
    counter("standin_allocations", ordinal)
}

/// Bytes that are allocated on device `ordinal` now.
pub fn bytes(ordinal: i32) -> u64 {
    counter("standin_bytes", ordinal)
}

/// Calls of the driver function `name` for device `ordinal`; launches, copies, memory and synchronization are counted.
///
/// # Panics
/// If `name` holds a NUL.
pub fn calls(ordinal: i32, name: &str) -> u64 {
    let name = CString::new(name).expect("no NUL");
    // SAFETY: exported with this type; it reads the name.
    unsafe { hook::<unsafe extern "C" fn(i32, *const c_char) -> u64>("standin_calls")(ordinal, name.as_ptr()) }
}

/// From now on each kernel and each on-device copy of device `ordinal` takes `ns` by the device's events; 0: wall time.
pub fn each_takes(ordinal: i32, ns: u64) {
    set("standin_each_takes", ordinal, ns);
}

/// Which driver calls report a fault once a kernel has faulted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultScope {
    /// Calls that use the device.
    Work,
    /// These, and making a context current.
    WorkAndBinding,
}

/// The `n`-th kernel of device `ordinal` from now on faults, and the fault is sticky, as on a GPU.
pub fn faults(ordinal: i32, n: u64, scope: FaultScope) {
    let binding = scope == FaultScope::WorkAndBinding;
    // SAFETY: exported with this type.
    unsafe { hook::<unsafe extern "C" fn(i32, u64, bool)>("standin_faults")(ordinal, n, binding) }
}

/// From now on operations wait in their streams, and run in an order and with pauses by this seed; 0: at once, where
/// nothing before them waits.
///
/// # Panics
/// If the stand-in is not loaded.
pub fn streams(seed: u64) {
    // SAFETY: exported with this type.
    unsafe { hook::<unsafe extern "C" fn(u64)>("standin_streams")(seed) }
}

/// Sparse mode for huge tensors: from now on device `ordinal` has 64 TiB of memory, mapped when touched and zero
/// before, and runs only the first and the last `ends` blocks of each grid.
pub fn sparse(ordinal: i32, ends: u64) {
    set("standin_sparse", ordinal, ends);
}

/// Watches memory accesses of compiled kernels: for [`accesses`] and the race detector.
pub(crate) fn watch() {
    // SAFETY: exported with this type.
    unsafe { hook::<unsafe extern "C" fn()>("standin_watch")() }
}

/// A kernel that a kernel file has registered with `EXPORT`.
#[derive(Debug)]
pub struct Kernel {
    /// Its symbol.
    pub name: String,
    /// Stem of its file.
    pub stem: String,
    /// Offset and bytes of each parameter.
    pub parameters: Vec<(u32, u32)>,
}

/// Every registered kernel.
pub fn kernels() -> Vec<Kernel> {
    unsafe extern "C" fn visit(to: *mut c_void, name: *const c_char, stem: *const c_char, at: *const [u32; 2], n: i32) {
        // SAFETY: the driver hands back `to` with two C strings and n pairs.
        unsafe {
            let parameters = (0..n as usize).map(|i| (*at.add(i)).into()).collect();
            (*to.cast::<Vec<Kernel>>()).push(Kernel { name: text(name), stem: text(stem), parameters });
        }
    }
    type Visit = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char, *const [u32; 2], i32);
    let mut all: Vec<Kernel> = Vec::new();
    // SAFETY: exported with this type; `all` outlives the call.
    unsafe { hook::<unsafe extern "C" fn(*mut c_void, Visit)>("standin_kernels")((&raw mut all).cast(), visit) };
    all
}

/// What one load or store instruction of a compiled kernel has touched, in the units of a GPU's counters.
#[derive(Debug, Clone)]
pub struct Access {
    /// Symbol of the kernel.
    pub kernel: String,
    /// `file:line` of the source.
    pub place: String,
    /// Shared memory, not global.
    pub shared: bool,
    /// Requests, one a warp.
    pub requests: u64,
    /// Sectors of 32 bytes (global) or cycles (shared) that the requests took.
    pub moved: u64,
    /// Sectors or cycles that their bytes need at least.
    pub needed: u64,
}

/// Accesses since the start; only compiled kernels (`SWAT_TEST_CUDA=ptx`) are watched.
pub fn accesses() -> Vec<Access> {
    #[repr(C)]
    struct Site {
        kernel: *const c_char,
        file: *const c_char,
        line: c_int,
        bytes: c_int,
        shared: bool,
        writes: bool,
        joined: bool,
    }
    unsafe extern "C" fn visit(to: *mut c_void, site: *const Site, counts: *const [u64; 3]) {
        // SAFETY: the driver hands back `to` with a site whose texts are C strings, and three numbers.
        unsafe {
            let (site, [requests, moved, needed]) = (&*site, *counts);
            let place = format!("{}:{}", text(site.file), site.line);
            let access = Access { kernel: text(site.kernel), place, shared: site.shared, requests, moved, needed };
            (*to.cast::<Vec<Access>>()).push(access);
        }
    }
    type Visit = unsafe extern "C" fn(*mut c_void, *const Site, *const [u64; 3]);
    let mut all: Vec<Access> = Vec::new();
    // SAFETY: exported with this type; `all` outlives the call.
    unsafe { hook::<unsafe extern "C" fn(*mut c_void, Visit)>("standin_accesses")((&raw mut all).cast(), visit) };
    all
}

/// # Safety
/// `p` is a C string.
unsafe fn text(p: *const c_char) -> String {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(p) }.to_str().expect("ASCII").to_owned()
}
