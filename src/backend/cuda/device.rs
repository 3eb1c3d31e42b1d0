//! One GPU: its context, its stream, the images loaded on it, and the one place that launches kernels.

use super::Image;
pub(super) use super::arguments::{Arg, args};
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
use std::sync::{Arc, Mutex, MutexGuard};

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// What the kernels are compiled with: an older driver cannot load them.
const DRIVER_VERSION: i32 = 13000;
/// The oldest compute capability that the images hold code for.
const CAPABILITY: (i32, i32) = (8, 0);
/// Hopper images hold code for exactly this one.
const HOPPER: (i32, i32) = (9, 0);
/// `off`: every kernel is launched by itself.
const GRAPHS: &str = "SWAT_CUDA_GRAPHS";
const MAX_DYNAMIC: FunctionAttribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;

/// A kernel, found once.
#[derive(Clone)]
pub(super) struct Function {
    pub(super) raw: sys::CUfunction,
    /// Bytes of each parameter, as compiled.
    pub(super) parameters: Arc<[usize]>,
    /// Dynamic shared memory that its file says it needs.
    needed_bytes: u32,
    /// Static shared memory, as compiled.
    static_bytes: u32,
    /// Most dynamic shared memory of a launch, by the driver; it grows when asked.
    dynamic_limit: u32,
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
    /// Most shared memory of a block, static and dynamic.
    shared_bytes_block: u32,
    /// Shared memory of a multiprocessor, and what of it the driver keeps a block.
    shared_bytes_multiprocessor: u32,
    reserved_bytes_block: u32,
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
    /// Dynamic shared memory of a block beside what the kernel's file says it needs (`SHARED_BYTES`).
    pub(super) shared_bytes: u32,
    /// What it must read, write and compute.
    pub(super) cost: Cost,
}

/// Blocks of `size` that cover `count`.
pub(super) fn blocks(count: usize, size: usize) -> u32 {
    u32::try_from(count.div_ceil(size)).expect("a grid beyond 2³² blocks")
}

/// The image of a stem, where the library was built with nvcc.
fn image(stem: &str) -> Option<&'static [u8]> {
    IMAGES.iter().find(|(name, image)| *name == stem && !image.is_empty()).map(|(_, image)| *image)
}

/// A number that a kernel file exports; `None` where it does not, or the library was built without nvcc.
fn exported(name: &str) -> Option<u32> {
    CONSTANTS.iter().find(|(constant, _)| *constant == name).map(|(_, value)| *value)
}

/// A number that a kernel file exports by CONSTANT.
///
/// # Panics
/// Where there is none of this name.
pub(super) fn constant(name: &str) -> u32 {
    exported(name).unwrap_or_else(|| panic!("no kernel file exports {name}"))
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
        let bytes = |which| attribute(which).map(|bytes| bytes.max(0) as u32);
        let shared_bytes_block = bytes(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let shared_bytes_multiprocessor = bytes(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?;
        let reserved_bytes_block = bytes(Attribute::CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK)?;
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
            shared_bytes_multiprocessor,
            reserved_bytes_block,
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
    /// [`Error::Device`] where the driver refuses it, as where it needs more shared memory than a block may have.
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
        let mut function = self.function(launch.image, launch.kernel)?;
        let launch = Launch { shared_bytes: function.needed_bytes + launch.shared_bytes, ..launch };
        if launch.shared_bytes > function.dynamic_limit {
            self.allow(&launch, &mut function)?;
        }
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

    /// Whether the device has the shared memory that a kernel needs.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver fails.
    pub(super) fn fits(&self, image: &'static str, kernel: &'static str) -> Result<bool> {
        let function = self.function(image, kernel)?;
        Ok(function.needed_bytes + function.static_bytes <= self.shared_bytes_block)
    }

    /// Most dynamic shared memory with which so many blocks of a kernel are on a multiprocessor at once.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver fails.
    pub(super) fn shared_room(&self, image: &'static str, kernel: &'static str, blocks: u32) -> Result<u32> {
        let function = self.function(image, kernel)?;
        let share = (self.shared_bytes_multiprocessor / blocks).saturating_sub(self.reserved_bytes_block);
        Ok(share.min(self.shared_bytes_block).saturating_sub(function.static_bytes))
    }

    fn functions(&self) -> MutexGuard<'_, HashMap<&'static str, Function>> {
        self.functions.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn function(&self, image: &'static str, kernel: &'static str) -> Result<Function> {
        if let Some(function) = self.functions().get(kernel) {
            return Ok(function.clone());
        }
        self.bind()?;
        let refused = |error| self.failed(&format!("refused the kernel {kernel}"), error);
        let module = *self.modules.get(image).unwrap_or_else(|| panic!("{image} holds no code for this device"));
        let name = CString::new(kernel).expect("a symbol without NUL");
        // SAFETY: a loaded module.
        let raw = unsafe { result::module::get_function(module, name) }.map_err(refused)?;
        let attribute = |which| {
            // SAFETY: a function of a loaded module.
            unsafe { result::function::get_function_attribute(raw, which) }.map_err(refused)
        };
        let function = Function {
            raw,
            parameters: parameters(raw),
            needed_bytes: exported(&format!("{kernel}_shared_bytes")).unwrap_or(0),
            static_bytes: attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?.max(0) as u32,
            dynamic_limit: attribute(MAX_DYNAMIC)?.max(0) as u32,
        };
        self.functions().insert(kernel, function.clone());
        Ok(function)
    }

    /// Allows launches of a function as much dynamic shared memory as this one asks for.
    fn allow(&self, launch: &Launch, function: &mut Function) -> Result<()> {
        let Launch { kernel, shared_bytes, .. } = *launch;
        // SAFETY: a function of a loaded module.
        unsafe { result::function::set_function_attribute(function.raw, MAX_DYNAMIC, shared_bytes as i32) }.map_err(
            |error| {
                let (own, most) = (function.static_bytes, self.shared_bytes_block);
                let what = format!(
                    "gives a block of {kernel} no {shared_bytes} bytes of shared memory beside {own} of its own \
                     (the most is {most})"
                );
                self.failed(&what, error)
            },
        )?;
        function.dynamic_limit = shared_bytes;
        self.functions().insert(kernel, function.clone());
        Ok(())
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
    let help = match ends_context(error) {
        true => {
            "a kernel has failed, and this process cannot use the GPU any more: start again; compute-sanitizer finds it"
        }
        false => "see `nvidia-smi`; --device cpu needs no GPU",
    };
    let what = format!("{what}: {}", describe(error));
    Error::Device { device: format!("cuda:{ordinal}"), what, help: help.into() }
}

/// Whether every later call of this process fails, too.
fn ends_context(error: DriverError) -> bool {
    use sys::CUresult::*;
    matches!(
        error.0,
        CUDA_ERROR_ILLEGAL_ADDRESS
            | CUDA_ERROR_LAUNCH_TIMEOUT
            | CUDA_ERROR_ASSERT
            | CUDA_ERROR_HARDWARE_STACK_ERROR
            | CUDA_ERROR_ILLEGAL_INSTRUCTION
            | CUDA_ERROR_MISALIGNED_ADDRESS
            | CUDA_ERROR_INVALID_ADDRESS_SPACE
            | CUDA_ERROR_INVALID_PC
            | CUDA_ERROR_LAUNCH_FAILED
    )
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
