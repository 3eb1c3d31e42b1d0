//! The stand-in GPU itself: instructions with known answers, planted mistakes that it must detect, and the driver's
//! refusals.
//!
//! With `SWAT_TEST_CUDA=gpu` the instructions with known answers run on this machine's GPU, as nvcc compiles them: that
//! shows whether the stand-in is right.

mod driver_calls;
mod known;
mod limits;
mod planted;
mod streams;

use cudarc::driver::{result, sys};
use std::ffi::{CString, c_void};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use swat_standin as standin;

/// The fully functional devices.
const DEVICES: [i32; 4] = [0, 1, 2, 3];
const HOPPERS: [i32; 2] = [0, 1];

/// A device through raw driver calls, current in this thread.
struct Gpu;

/// A kernel argument: the address of a value.
fn arg<T>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

impl Gpu {
    /// A device of the stand-in; `None` if there is none, or tests use a real GPU.
    fn open(ordinal: i32) -> Option<Self> {
        if standin::real() { None } else { Self::any(ordinal) }
    }

    /// A device of the stand-in, or this machine's GPU, as ordinal 0.
    fn any(ordinal: i32) -> Option<Self> {
        if standin::real() && ordinal != 0 || !standin::real() && !available() {
            return None;
        }
        result::init().unwrap();
        let device = result::device::get(ordinal).unwrap();
        // SAFETY: a device of the driver.
        unsafe {
            let context = result::primary_ctx::retain(device).unwrap();
            result::ctx::set_current(context).unwrap();
        }
        Some(Self)
    }

    /// The same, if it has Hopper's instructions.
    fn hopper(ordinal: i32) -> Option<Self> {
        let gpu = Self::any(ordinal)?;
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
        // SAFETY: a device of the driver.
        let major = unsafe { result::device::get_attribute(result::device::get(ordinal).unwrap(), attribute) }.unwrap();
        if major != 9 {
            println!("skipped: this GPU does not have Hopper's instructions");
            return None;
        }
        Some(gpu)
    }

    fn module(&self, stem: &str) -> Result<sys::CUmodule, result::DriverError> {
        let image = if standin::real() { known::compiled(stem) } else { image(stem) };
        // SAFETY: an image that the stand-in knows, or nvcc's.
        unsafe { result::module::load_data(image.as_ptr().cast()) }
    }

    fn function(&self, stem: &str, kernel: &str) -> sys::CUfunction {
        let module = self.module(stem).unwrap();
        // SAFETY: a loaded module.
        unsafe { result::module::get_function(module, CString::new(kernel).unwrap()) }.unwrap()
    }

    fn put<T: bytemuck::Pod>(&self, values: &[T]) -> u64 {
        // SAFETY: as many bytes as the values have.
        unsafe {
            let pointer = result::malloc_sync(size_of_val(values)).unwrap();
            result::memcpy_htod_sync(pointer, values).unwrap();
            pointer
        }
    }

    fn get<T: bytemuck::Pod>(&self, pointer: u64, len: usize) -> Vec<T> {
        let mut values = vec![T::zeroed(); len];
        // SAFETY: the tests ask for what they allocated.
        unsafe { result::memcpy_dtoh_sync(&mut values, pointer) }.unwrap();
        values
    }

    /// Launches on the default stream, after raising the kernel's limit of dynamic shared memory to `shared` bytes.
    fn run(
        &self,
        function: sys::CUfunction,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        arguments: &mut [*mut c_void],
    ) {
        let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the tests name the kernels' own parameters.
        unsafe {
            result::function::set_function_attribute(function, limit, shared as i32).unwrap();
            self.launch(function, grid, block, shared, arguments).unwrap();
        }
    }

    /// # Safety
    /// The arguments are the kernel's parameters.
    unsafe fn launch(
        &self,
        function: sys::CUfunction,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        arguments: &mut [*mut c_void],
    ) -> Result<(), result::DriverError> {
        let ([gx, gy, gz], [bx, by, bz]) = (grid, block);
        // SAFETY: the caller's promise.
        unsafe { result::launch_kernel(function, (gx, gy, gz), (bx, by, bz), shared, std::ptr::null_mut(), arguments) }
    }
}

/// A fake image of a test's kernel file: the header of a fatbin, and the file's stem.
fn image(stem: &str) -> Vec<u8> {
    let mut bytes = vec![0x50, 0xed, 0x55, 0xba, 1, 0, 16, 0];
    bytes.extend((stem.len() as u64).to_le_bytes());
    bytes.extend(stem.bytes());
    bytes
}

/// A kernel file of these tests.
fn kernel_file(stem: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels").join(stem).with_extension("cu")
}

const STEMS: [&str; 5] = ["known", "known_sm90", "limits", "planted", "planted_sm90"];

/// Whether there is a stand-in; the first call loads it with the kernels of these tests.
fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        let compiler = match standin::start(Path::new(env!("CARGO_TARGET_TMPDIR"))) {
            Ok(compiler) => compiler,
            Err(reason) => return standin::skip(reason),
        };
        // Of compiled kernels, only the planted mistakes are run.
        let stems = if standin::compiled() { &["planted", "planted_sm90"][..] } else { &STEMS };
        let files: Vec<PathBuf> = stems.iter().map(|stem| kernel_file(stem)).collect();
        let sources = if standin::compiled() { compiler.translate(&files) } else { files.clone() };
        for ((library, stem), file) in compiler.libraries(&sources).iter().zip(stems).zip(&files) {
            standin::load(library, &image(stem), &compiler.resources(file, &compiler.cubins(file)));
        }
        true
    })
}

/// A tensor map of rows of `T`; `size` and `box_size` from the contiguous dimension on, rows `pitch` bytes apart,
/// planes of `size[1]` rows.
fn tensor_map<T: bytemuck::Pod>(
    base: u64,
    size: &[u64],
    pitch: u64,
    box_size: &[u32],
    swizzle: sys::CUtensorMapSwizzle,
) -> Result<sys::CUtensorMap, result::DriverError> {
    use sys::*;
    #[repr(align(64))]
    struct Aligned(CUtensorMap);
    // SAFETY: an opaque block of bytes.
    let mut map: Aligned = unsafe { std::mem::zeroed() };
    let mut strides = vec![pitch];
    strides.extend(size.get(1).map(|rows| pitch * rows));
    let kind = match size_of::<T>() {
        2 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    };
    // SAFETY: all arrays hold `rank` numbers.
    unsafe {
        cuTensorMapEncodeTiled(
            &mut map.0,
            kind,
            size.len() as u32,
            base as *mut c_void,
            size.as_ptr(),
            strides.as_ptr(),
            box_size.as_ptr(),
            [1; 5].as_ptr(),
            CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        .result()?;
    }
    Ok(map.0)
}
