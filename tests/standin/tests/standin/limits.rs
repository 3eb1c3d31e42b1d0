//! Limits of a multiprocessor: launches that need too much are refused as CUDA refuses them, and a kernel's resources
//! are those of its cubin.

use super::*;
use driver_calls::refused;
use sys::CUfunction_attribute::*;
use sys::CUresult::*;

/// One device of each compute capability.
const ONE_OF_EACH: [i32; 2] = [0, 2];
const DYNAMIC: u32 = 48 << 10;

fn attribute(function: sys::CUfunction, which: sys::CUfunction_attribute) -> u32 {
    // SAFETY: a function of a loaded module.
    unsafe { result::function::get_function_attribute(function, which) }.unwrap() as u32
}

fn allow(function: sys::CUfunction, bytes: u32) -> Result<(), result::DriverError> {
    let which = CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: as above.
    unsafe { result::function::set_function_attribute(function, which, bytes as i32) }
}

/// 48 KiB of dynamic plus 1 KiB of static shared memory exceed the default limit.
#[test]
fn static_shared_memory_counts() {
    for ordinal in ONE_OF_EACH {
        let Some(gpu) = Gpu::open(ordinal) else { return };
        let x: Vec<f32> = (0..256).map(|i| i as f32).collect();
        let (from, to) = (gpu.put(&x), gpu.put(&[0f32; 256]));
        let function = gpu.function("limits", "much_shared");
        // SAFETY: the kernel's parameters.
        let launch = |bytes: u32| unsafe {
            gpu.launch(function, [1; 3], [256, 1, 1], bytes, &mut [arg(&from), arg(&to), arg(&bytes)])
        };
        let own = attribute(function, CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES);
        assert!(own >= 1024, "{own}");
        assert_eq!(attribute(function, CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES), DYNAMIC - own);
        // Who asks for more only above 48 KiB does not ask here.
        assert_eq!(refused(launch(DYNAMIC)), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(launch(DYNAMIC - own), Ok(()));
        allow(function, DYNAMIC).unwrap();
        assert_eq!(launch(DYNAMIC), Ok(()));
        assert_eq!(gpu.get::<f32>(to, 256), [255.0; 256]);

        let most = if ordinal == 0 { 227 << 10 } else { 163 << 10 };
        assert_eq!(refused(allow(function, most)), CUDA_ERROR_INVALID_VALUE);
        allow(function, most - own).unwrap();
        assert_eq!(launch(most - own), Ok(()));
        assert_eq!(refused(launch(most)), CUDA_ERROR_INVALID_VALUE);
    }
}

#[test]
fn registers_and_launch_bounds_count() {
    for ordinal in ONE_OF_EACH {
        let Some(gpu) = Gpu::open(ordinal) else { return };
        let (from, to) = (gpu.put(&[1f32; 96 * 1024]), gpu.put(&[0f32; 96 * 1024]));
        let function = gpu.function("limits", "many_registers");
        // SAFETY: the kernel's parameters.
        let launch = |threads| unsafe { gpu.launch(function, [1; 3], [threads, 1, 1], 0, &mut [arg(&from), arg(&to)]) };
        let registers = attribute(function, CU_FUNC_ATTRIBUTE_NUM_REGS);
        assert!((96..=255).contains(&registers), "{registers}");
        assert_eq!(launch(256), Ok(()));
        assert_eq!(refused(launch(1024)), CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);
        // The most warps by fours, each with its registers by eights.
        let fitting = 65536 / (registers.next_multiple_of(8) * 32) / 4 * 4;
        assert_eq!(launch(fitting * 32), Ok(()));
        assert_eq!(refused(launch(fitting * 32 + 32)), CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);

        let bounded = gpu.function("limits", "much_shared");
        assert_eq!(attribute(bounded, CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK), 256);
        let bytes = 1024u32;
        // SAFETY: the kernel's parameters.
        let launch = |threads| unsafe {
            gpu.launch(bounded, [1; 3], [threads, 1, 1], bytes, &mut [arg(&from), arg(&to), arg(&bytes)])
        };
        assert_eq!(refused(launch(288)), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(launch(256), Ok(()));
    }
}
