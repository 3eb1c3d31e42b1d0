//! One GPU: its context, its stream, the images loaded on it, and the one place that launches kernels.

use super::Image;
use super::graph::Graphs;
use super::memory::Arena;
use super::timing::Pending;
use crate::backend::Cost;
use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUfunction_attribute as FunctionAttribute};
use cudarc::driver::{DriverError, result};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// What the kernels are compiled with: an older driver cannot load them.
const DRIVER_VERSION: i32 = 13000;
/// The oldest compute capability that the images hold code for.
const CAPABILITY: (i32, i32) = (8, 0);
/// Hopper images hold code for exactly this one.
const HOPPER: (i32, i32) = (9, 0);
/// `off`: every kernel is launched by itself.
const GRAPHS: &str = "SWAT_CUDA_GRAPHS";
/// What a kernel may use without asking for more.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;

/// A kernel, found once.
#[derive(Clone)]
pub(super) struct Function {
    pub(super) raw: sys::CUfunction,
    /// Bytes of each parameter, as compiled.
    pub(super) parameters: Arc<[usize]>,
    /// Dynamic shared memory that it was allowed so far.
    shared_bytes: u32,
}

/// An open GPU. Everything goes through one stream, so that operations run in the order of the calls.
pub(super) struct Device {
    ordinal: u32,
    raw: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: Mutex<HashMap<&'static str, Function>>,
    /// Kernels that are being timed.
    pub(super) pending: Mutex<Pending>,
    /// Free memory, kept for the next buffer of its size.
    pub(super) arena: Mutex<Arena>,
    /// What is queued again and again.
    pub(super) graphs: Mutex<Graphs>,
    /// Whether that is made a graph.
    pub(super) replays: AtomicBool,
    /// Major, minor.
    pub(super) capability: (i32, i32),
    /// Streaming multiprocessors.
    pub(super) multiprocessors: u32,
    /// Most shared memory that a block may ask for.
    pub(super) shared_bytes_block: u32,
}

// SAFETY: the handles of the driver may be used from any thread; each call binds the context to its thread first, and what
// changes is behind a mutex.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

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
    /// Dynamic shared memory of a block.
    pub(super) shared_bytes: u32,
    /// What it must read, write and compute.
    pub(super) cost: Cost,
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
    fn pointer(&self) -> *mut c_void {
        match self {
            Self::Pointer(value) => std::ptr::from_ref(value) as *mut c_void,
            Self::U32(value) => std::ptr::from_ref(value) as *mut c_void,
            Self::U64(value) => std::ptr::from_ref(value) as *mut c_void,
            Self::F32(value) => std::ptr::from_ref(value) as *mut c_void,
            Self::TensorMap(value) => std::ptr::from_ref(value) as *mut c_void,
        }
    }

    fn bytes(&self) -> usize {
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
    ($($value:expr),* $(,)?) => { &[$($crate::backend::cuda::device::Arg::from($value)),*] };
}
pub(super) use args;

/// Blocks of `size` that cover `count`.
pub(super) fn blocks(count: usize, size: usize) -> u32 {
    u32::try_from(count.div_ceil(size)).expect("a grid beyond 2³² blocks")
}

/// The image of a stem, where the library was built with nvcc.
fn image(stem: &str) -> Option<&'static [u8]> {
    IMAGES.iter().find(|(name, image)| *name == stem && !image.is_empty()).map(|(_, image)| *image)
}

/// Kernel files whose code is embedded.
pub(super) fn images() -> impl Iterator<Item = Image> {
    IMAGES.iter().filter(|(_, image)| !image.is_empty()).map(|(stem, image)| Image {
        stem,
        bytes: image.len(),
        architectures: if stem.ends_with("_sm90") { HOPPER_CODE } else { CODE },
    })
}

/// Whether there is a driver.
pub(super) fn driver() -> bool {
    // SAFETY: only opens the driver's library.
    unsafe { sys::is_culib_present() }
}

/// How many devices the driver shows; the reason where there is no driver, or an old one.
pub(super) fn count() -> Result<u32, String> {
    if !driver() {
        return Err("no NVIDIA driver (libcuda) on this machine".into());
    }
    let mut version = 0;
    // SAFETY: the driver is there, and writes one integer; it may be asked before cuInit.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(describe)?;
    if version < DRIVER_VERSION {
        let show = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
        return Err(format!("a driver for CUDA {}; the kernels need {}", show(version), show(DRIVER_VERSION)));
    }
    result::init().map_err(describe)?;
    Ok(result::device::get_count().map_err(describe)?.max(0) as u32)
}

fn describe(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => format!("{error:?}"),
    }
}

impl Device {
    /// Opens GPU `ordinal` and loads the kernels on it.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no such device, no driver, or no kernels for it; [`Error::Device`] where it fails.
    pub(super) fn open(ordinal: u32) -> Result<Self> {
        let place = format!("--device cuda:{ordinal}");
        let refuse =
            |found: String| Error::input(&place, found, "a GPU of compute capability 8.0 or newer; or --device cpu");
        if images().next().is_none() {
            return Err(Error::input(
                &place,
                "a build without CUDA kernels",
                "one made where nvcc is; or --device cpu",
            ));
        }
        let devices = count().map_err(refuse)?;
        if ordinal >= devices {
            return Err(refuse(format!("{devices} device(s)")));
        }
        let failed = |error: DriverError| failed(ordinal, "cannot be opened", error);
        let raw = result::device::get(ordinal as i32).map_err(failed)?;
        // SAFETY: `raw` is a device of the driver.
        let attribute = |which| unsafe { result::device::get_attribute(raw, which) }.map_err(failed);
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        if capability < CAPABILITY {
            return Err(refuse(format!("a GPU of compute capability {}.{}", capability.0, capability.1)));
        }
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as u32;
        let shared_bytes_block = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32;
        // SAFETY: `raw` is a device of the driver; the context is released by `drop`.
        let context = unsafe { result::primary_ctx::retain(raw) }.map_err(failed)?;
        let mut device = Self {
            ordinal,
            raw,
            context,
            stream: std::ptr::null_mut(),
            modules: HashMap::new(),
            functions: Mutex::default(),
            pending: Mutex::default(),
            arena: Mutex::default(),
            graphs: Mutex::default(),
            replays: AtomicBool::new(std::env::var_os(GRAPHS).is_none_or(|value| value != "off")),
            capability,
            multiprocessors,
            shared_bytes_block,
        };
        device.bind()?;
        device.stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed)?;
        for (stem, bytes) in IMAGES.iter().copied() {
            if !device.runs(stem) {
                continue;
            }
            // SAFETY: a whole fatbin, as nvcc wrote it.
            let module = unsafe { result::module::load_data(bytes.as_ptr().cast()) };
            let module =
                module.map_err(|error| device.failed(&format!("does not load the kernels of {stem}"), error))?;
            device.modules.insert(stem, module);
        }
        Ok(device)
    }

    /// `cuda:0`.
    pub(super) fn label(&self) -> String {
        format!("cuda:{}", self.ordinal)
    }

    /// The product's name.
    pub(super) fn product(&self) -> Result<String> {
        result::device::get_name(self.raw).map_err(|error| self.failed("does not tell its name", error))
    }

    /// Whether an image of this stem is embedded and holds code for this device.
    pub(super) fn runs(&self, stem: &str) -> bool {
        image(stem).is_some() && (!stem.ends_with("_sm90") || self.capability == HOPPER)
    }

    /// Free and total bytes of its memory.
    pub(super) fn memory(&self) -> Result<(u64, u64)> {
        self.bind()?;
        let (free, total) = result::mem_get_info().map_err(|error| self.failed("does not tell its memory", error))?;
        Ok((free as u64, total as u64))
    }

    /// Makes this thread's driver calls go to this device.
    pub(super) fn bind(&self) -> Result<()> {
        // SAFETY: the context is retained until `drop`.
        unsafe { result::ctx::set_current(self.context) }
            .map_err(|error| self.failed("cannot be bound to a thread", error))
    }

    /// The stream of everything.
    pub(super) fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// The context of everything.
    pub(super) fn context(&self) -> sys::CUcontext {
        self.context
    }

    /// Waits until everything queued is done.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.flush()?;
        self.bind()?;
        // SAFETY: the stream lives as long as the device.
        unsafe { result::stream::synchronize(self.stream) }
            .and_then(|()| self.settle())
            .map_err(|error| self.failed("failed in its work", error))
    }

    /// An [`Error::Device`] of this device.
    pub(super) fn failed(&self, what: &str, error: DriverError) -> Error {
        failed(self.ordinal, what, error)
    }

    /// Queues a kernel.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver refuses it.
    ///
    /// # Panics
    /// Where the number or the sizes of the arguments are not those of the compiled kernel.
    ///
    /// # Safety
    /// The arguments mean what the kernel's parameters mean; every pointer leads to as much live memory as the kernel
    /// touches, and what it writes is borrowed mutably.
    pub(super) unsafe fn launch(&self, launch: Launch, arguments: &[Arg]) -> Result<()> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        self.bind()?;
        let function = self.function(&launch)?;
        let given = arguments.iter().map(Arg::bytes);
        assert!(
            given.clone().eq(function.parameters.iter().copied()),
            "{}: parameters of {:?} bytes, arguments of {:?}",
            launch.kernel,
            function.parameters,
            given.collect::<Vec<_>>()
        );
        // SAFETY: the arguments were checked; the rest is this function's own contract.
        if unsafe { self.put_down(&launch, &function, arguments) } {
            return Ok(());
        }
        let mut pointers: Vec<*mut c_void> = arguments.iter().map(Arg::pointer).collect();
        let [x, y, z] = launch.grid;
        let (block, shared_bytes) = ((launch.block, 1, 1), launch.shared_bytes);
        self.timed(launch.kernel, launch.cost, || {
            // SAFETY: a function of a loaded module with as many arguments, of the sizes it was compiled for; the rest is
            // this function's own contract.
            unsafe { result::launch_kernel(function.raw, (x, y, z), block, shared_bytes, self.stream, &mut pointers) }
        })
        .map_err(|error| self.failed(&format!("refused the kernel {}", launch.kernel), error))
    }

    fn function(&self, launch: &Launch) -> Result<Function> {
        let mut functions = self.functions.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let refused = |error| self.failed(&format!("refused the kernel {}", launch.kernel), error);
        let function = match functions.entry(launch.kernel) {
            std::collections::hash_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::hash_map::Entry::Vacant(entry) => {
                let module = self.modules.get(launch.image);
                let module = *module.unwrap_or_else(|| panic!("{} holds no code for this device", launch.image));
                let name = CString::new(launch.kernel).expect("a symbol without NUL");
                // SAFETY: a loaded module.
                let raw = unsafe { result::module::get_function(module, name) }.map_err(refused)?;
                entry.insert(Function { raw, parameters: parameters(raw), shared_bytes: DEFAULT_SHARED_BYTES })
            }
        };
        if launch.shared_bytes > function.shared_bytes {
            let which = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of a loaded module.
            unsafe { result::function::set_function_attribute(function.raw, which, launch.shared_bytes as i32) }
                .map_err(refused)?;
            function.shared_bytes = launch.shared_bytes;
        }
        Ok(function.clone())
    }
}

/// Bytes of each parameter of a kernel.
fn parameters(function: sys::CUfunction) -> Arc<[usize]> {
    let size = |index| {
        let (mut offset, mut size) = (0, 0);
        // SAFETY: writes two integers; an index past the end is an error and nothing else.
        let found = unsafe { sys::cuFuncGetParamInfo(function, index, &mut offset, &mut size) }.result();
        found.ok().map(|()| size)
    };
    (0..).map_while(size).collect()
}

fn failed(ordinal: u32, what: &str, error: DriverError) -> Error {
    Error::Device {
        device: format!("cuda:{ordinal}"),
        what: format!("{what}: {}", describe(error)),
        help: "see `nvidia-smi`; --device cpu needs no GPU".into(),
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        // Nothing can be done where the driver refuses here; the process's end frees it all.
        // SAFETY: every buffer holds this device, so that nothing uses the handles any more.
        unsafe {
            if !self.stream.is_null() {
                let _ = result::stream::synchronize(self.stream);
            }
            self.pending.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()).destroy();
            self.graphs.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()).clear();
            self.arena.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner()).flush();
            for module in self.modules.values() {
                let _ = result::module::unload(*module);
            }
            if !self.stream.is_null() {
                let _ = result::stream::destroy(self.stream);
            }
            let _ = result::primary_ctx::release(self.raw);
        }
    }
}
