//! One GPU: the images loaded on it, its memory, its graphs and its timer, and the one place that launches kernels.

use super::arena::Arena;
use super::context::{Context, cannot_open, describe, lock};
use super::graph::GraphCache;
use super::launch::{Arg, Function, Launch};
use super::timer::EventTimer;
use crate::backend::{Cost, trace};
use crate::error::{Error, Result};
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUfunction_attribute as FunctionAttribute};
use cudarc::driver::{DriverError, result};
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// CUDA version of the kernels; an older driver cannot load them.
const DRIVER_VERSION: i32 = 13000;
/// The oldest compute capability that the images hold code for.
const CAPABILITY: (i32, i32) = (8, 0);
/// The only compute capability of the Hopper images.
const HOPPER: (i32, i32) = (9, 0);
/// Environment variable; `off` launches every kernel eagerly.
const GRAPHS: &str = "SWAT_CUDA_GRAPHS";
const MAX_DYNAMIC: FunctionAttribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;

/// The embedded code of a kernel file.
#[derive(serde::Serialize)]
pub struct Image {
    /// Stem of the kernel file.
    pub stem: &'static str,
    /// Compressed size.
    pub bytes: usize,
    /// `sm_80` for code of a compute capability, `compute_80` for PTX that the driver compiles for newer ones.
    pub architectures: &'static [&'static str],
}

/// An open GPU with the kernels loaded on it.
pub(super) struct Device {
    pub(super) context: Context,
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: Mutex<HashMap<&'static str, Function>>,
    timer: Mutex<EventTimer>,
    pub(super) arena: Mutex<Arena>,
    pub(super) graphs: Mutex<GraphCache>,
    /// Whether [`Device::replay`] records.
    pub(super) replays: AtomicBool,
    /// Major, minor.
    pub(super) capability: (i32, i32),
    /// Streaming multiprocessors.
    pub(super) multiprocessors: u32,
    /// Whether the device accesses pageable host memory directly (GH200), so that copies from it may be asynchronous.
    pub(super) reads_host_pages: bool,
    /// Most shared memory of a block, static and dynamic.
    shared_bytes_block: u32,
    /// Shared memory of a multiprocessor, and the driver's share of it for each block.
    shared_bytes_multiprocessor: u32,
    reserved_bytes_block: u32,
}

// SAFETY: modules and functions of the driver may be used from any thread; each call binds the context to its thread first, and
// what changes is behind a mutex.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

/// The image of a stem, where the library was built with nvcc.
fn image(stem: &str) -> Option<&'static [u8]> {
    IMAGES.iter().find(|(name, image)| *name == stem && !image.is_empty()).map(|(_, image)| *image)
}

/// A number that a kernel file exports; `None` where it does not, or the library was built without nvcc.
fn exported(name: &str) -> Option<u32> {
    CONSTANTS.iter().find(|(constant, _)| *constant == name).map(|(_, value)| *value)
}

/// A number that a kernel file exports by `CONSTANT`.
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

impl Device {
    /// Opens GPU `ordinal` and loads the kernels on it.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no such device, no driver, or no kernels for it; [`Error::Device`] where it
    /// fails.
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
        let failed = |error: DriverError| cannot_open(ordinal, error);
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
        let host_pages = attribute(Attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES)?;
        let bytes = |which| attribute(which).map(|bytes| bytes.max(0) as u32);
        let shared_bytes_block = bytes(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        let shared_bytes_multiprocessor = bytes(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?;
        let reserved_bytes_block = bytes(Attribute::CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK)?;
        let mut device = Self {
            context: Context::open(ordinal, raw)?,
            modules: HashMap::new(),
            functions: Mutex::default(),
            timer: Mutex::default(),
            arena: Mutex::default(),
            graphs: Mutex::default(),
            replays: AtomicBool::new(std::env::var_os(GRAPHS).is_none_or(|value| value != "off")),
            capability,
            multiprocessors,
            reads_host_pages: host_pages != 0,
            shared_bytes_block,
            shared_bytes_multiprocessor,
            reserved_bytes_block,
        };
        for (stem, bytes) in IMAGES.iter().copied() {
            if !device.runs(stem) {
                continue;
            }
            // SAFETY: a whole fatbin, as nvcc wrote it.
            let module = unsafe { result::module::load_data(bytes.as_ptr().cast()) };
            let module =
                module.map_err(|error| device.context.failed(&format!("cannot load the kernels of {stem}"), error))?;
            device.modules.insert(stem, module);
        }
        Ok(device)
    }

    /// The product's name.
    pub(super) fn product(&self) -> Result<String> {
        result::device::get_name(self.context.raw())
            .map_err(|error| self.context.failed("cannot query the device name", error))
    }

    /// Whether an image of this stem is embedded and holds code for this device.
    pub(super) fn runs(&self, stem: &str) -> bool {
        image(stem).is_some() && (!stem.ends_with("_sm90") || self.capability == HOPPER)
    }

    /// Free and total bytes of its memory.
    pub(super) fn memory(&self) -> Result<(u64, u64)> {
        self.context.bind()?;
        let (free, total) =
            result::mem_get_info().map_err(|error| self.context.failed("cannot query free memory", error))?;
        Ok((free as u64, total as u64))
    }

    /// Waits until everything queued is done.
    pub(super) fn synchronize(&self) -> Result<()> {
        self.flush()?;
        self.context.bind()?;
        let done = self.context.wait().and_then(|()| lock(&self.timer).settle());
        done.map_err(|error| self.context.failed("kernel execution failed", error))
    }

    /// Calls `launch`, between two events while a trace is recorded.
    pub(super) fn timed(
        &self,
        kernel: &'static str,
        cost: Cost,
        launch: impl FnOnce() -> Result<(), DriverError>,
    ) -> Result<(), DriverError> {
        if !trace::on() {
            return launch();
        }
        lock(&self.timer).time(&self.context, kernel, cost, launch)
    }

    /// Runs `work`, a part of a step that recurs, and launches what it records: as one graph where that is known.
    pub(super) fn replay<R>(&self, work: impl FnOnce() -> Result<R>) -> Result<R> {
        if trace::on() || !self.replays.load(Relaxed) || !lock(&self.graphs).begin() {
            return work();
        }
        let done = work();
        // Also where `work` has failed: memory that it gave back may have another user, whose work comes behind this.
        let queued = lock(&self.graphs).finish(&self.context);
        done.and_then(|result| queued.map(|()| result))
    }

    /// Launches eagerly what is being recorded, before work that cannot be recorded.
    pub(super) fn flush(&self) -> Result<()> {
        lock(&self.graphs).flush(&self.context)
    }

    /// Launches what is being recorded, as a part of its own, before work of another stream that waits for it; what follows
    /// is the next part.
    pub(super) fn split(&self) -> Result<()> {
        lock(&self.graphs).split(&self.context)
    }

    /// Frees all cached graphs; waits for the device.
    pub(super) fn drop_graphs(&self) -> Result<()> {
        self.synchronize()?;
        // SAFETY: bound and idle.
        unsafe { lock(&self.graphs).clear() };
        Ok(())
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
        self.context.bind()?;
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
        if unsafe { lock(&self.graphs).record_launch(&launch, &function, arguments) } {
            return Ok(());
        }
        let mut pointers: Vec<*mut c_void> = arguments.iter().map(Arg::pointer).collect();
        let [x, y, z] = launch.grid;
        let (block, shared_bytes, stream) = ((launch.block, 1, 1), launch.shared_bytes, self.context.stream());
        self.timed(launch.kernel, launch.cost, || {
            // SAFETY: a function of a loaded module with as many arguments, of the sizes it was compiled for; the rest is
            // this function's own contract.
            unsafe { result::launch_kernel(function.raw, (x, y, z), block, shared_bytes, stream, &mut pointers) }
        })
        .map_err(|error| self.context.failed(&format!("cannot launch the kernel {}", launch.kernel), error))
    }

    /// Whether the device has the shared memory that a kernel needs.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver fails.
    pub(super) fn fits(&self, image: &'static str, kernel: &'static str) -> Result<bool> {
        let function = self.function(image, kernel)?;
        Ok(function.needed_bytes + function.static_bytes <= self.shared_bytes_block)
    }

    /// Most dynamic shared memory with which `blocks` blocks of a kernel fit on a multiprocessor.
    ///
    /// # Errors
    /// [`Error::Device`] where the driver fails.
    pub(super) fn shared_room(&self, image: &'static str, kernel: &'static str, blocks: u32) -> Result<u32> {
        let function = self.function(image, kernel)?;
        let share = (self.shared_bytes_multiprocessor / blocks).saturating_sub(self.reserved_bytes_block);
        Ok(share.min(self.shared_bytes_block).saturating_sub(function.static_bytes))
    }

    fn function(&self, image: &'static str, kernel: &'static str) -> Result<Function> {
        if let Some(function) = lock(&self.functions).get(kernel) {
            return Ok(function.clone());
        }
        self.context.bind()?;
        let refused = |error| self.context.failed(&format!("cannot load the kernel {kernel}"), error);
        let module = *self.modules.get(image).unwrap_or_else(|| panic!("{image} holds no code for this device"));
        let name = CString::new(kernel).expect("a symbol without NUL");
        // SAFETY: a loaded module.
        let raw = unsafe { result::module::get_function(module, name) }.map_err(refused)?;
        let attribute = |which| {
            // SAFETY: a function of a loaded module.
            unsafe { result::function::get_function_attribute(raw, which) }.map_err(refused)
        };
        let function = Function {
            kernel,
            raw,
            parameters: parameters(raw),
            needed_bytes: exported(&format!("{kernel}_shared_bytes")).unwrap_or(0),
            static_bytes: attribute(FunctionAttribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?.max(0) as u32,
            dynamic_limit: attribute(MAX_DYNAMIC)?.max(0) as u32,
        };
        lock(&self.functions).insert(kernel, function.clone());
        Ok(function)
    }

    /// Raises a function's limit of dynamic shared memory to the launch's.
    fn allow(&self, launch: &Launch, function: &mut Function) -> Result<()> {
        let Launch { kernel, shared_bytes, .. } = *launch;
        // SAFETY: a function of a loaded module.
        unsafe { result::function::set_function_attribute(function.raw, MAX_DYNAMIC, shared_bytes as i32) }.map_err(
            |error| {
                let (own, most) = (function.static_bytes, self.shared_bytes_block);
                let what = format!(
                    "cannot give a block of {kernel} {shared_bytes} bytes of dynamic shared memory beside {own} of static (at \
                     most {most} together)"
                );
                self.context.failed(&what, error)
            },
        )?;
        function.dynamic_limit = shared_bytes;
        lock(&self.functions).insert(kernel, function.clone());
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

impl Drop for Device {
    fn drop(&mut self) {
        if self.context.bind().is_err() {
            return;
        }
        // Nothing can be done where the driver refuses here; the process's end frees it all.
        // SAFETY: every buffer holds this device, so that nothing uses the handles any more.
        unsafe {
            let _ = self.context.wait();
            lock(&self.timer).destroy();
            lock(&self.graphs).clear();
            lock(&self.arena).flush();
            for module in self.modules.values() {
                let _ = result::module::unload(*module);
            }
        }
    }
}
