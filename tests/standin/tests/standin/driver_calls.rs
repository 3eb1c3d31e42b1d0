//! The emulated driver's calls: what succeeds, and what is refused with which error.

use super::*;
use result::DriverError;
use sys::CUresult::{self, *};
use sys::CUtensorMapSwizzle::*;

pub(super) fn refused<T>(got: Result<T, DriverError>) -> CUresult {
    got.err().expect("a refusal").0
}

#[test]
fn launches_outside_the_limits_are_refused() {
    let Some(gpu) = Gpu::open(2) else { return };
    let function = gpu.function("known", "known_atomics");
    let sums = gpu.put(&[0u32; 3]);
    // SAFETY: the kernel's one parameter.
    let launch = |grid, block, shared| unsafe { gpu.launch(function, grid, block, shared, &mut [arg(&sums)]) };
    for (grid, block) in [
        ([0, 1, 1], [32, 1, 1]),
        ([1, 65536, 1], [32, 1, 1]),
        ([1, 1, 65536], [32, 1, 1]),
        ([1, 1, 1], [0, 1, 1]),
        ([1, 1, 1], [1025, 1, 1]),
        ([1, 1, 1], [512, 3, 1]),
        ([1, 1, 1], [1, 1, 65]),
    ] {
        assert_eq!(refused(launch(grid, block, 0)), CUDA_ERROR_INVALID_VALUE, "{grid:?} {block:?}");
    }
    assert_eq!(gpu.get::<u32>(sums, 3), [0; 3]);
    assert_eq!(launch([1, 1, 1], [128, 1, 1], 49152), Ok(()));
    assert_eq!(refused(launch([1, 1, 1], [128, 1, 1], 49153)), CUDA_ERROR_INVALID_VALUE);
    let limit = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    // SAFETY: a function of a loaded module.
    let allow = |bytes| unsafe { result::function::set_function_attribute(function, limit, bytes) };
    assert_eq!(refused(allow(166_913)), CUDA_ERROR_INVALID_VALUE);
    assert_eq!(allow(166_912), Ok(()));
    assert_eq!(launch([1, 1, 1], [128, 1, 1], 166_912), Ok(()));
}

#[test]
fn modules_hold_the_kernels_of_their_file() {
    for ordinal in DEVICES {
        let Some(gpu) = Gpu::open(ordinal) else { return };
        let module = gpu.module("known").unwrap();
        // SAFETY: a loaded module.
        let find = |kernel: &str| unsafe { result::module::get_function(module, CString::new(kernel).unwrap()) };
        assert!(find("known_mma").is_ok());
        assert_eq!(refused(find("known_mma2")), CUDA_ERROR_NOT_FOUND);
        assert_eq!(refused(find("missing_barrier_right")), CUDA_ERROR_NOT_FOUND);
        let hopper = gpu.module("known_sm90");
        match HOPPERS.contains(&ordinal) {
            true => assert!(hopper.is_ok()),
            false => assert_eq!(refused(hopper), CUDA_ERROR_NO_BINARY_FOR_GPU),
        }
        // SAFETY: readable bytes.
        let unknown = unsafe { result::module::load_data([0u8; 64].as_ptr().cast()) };
        assert_eq!(refused(unknown), CUDA_ERROR_INVALID_IMAGE);
    }
    for ordinal in [4, 6] {
        let Some(gpu) = Gpu::open(ordinal) else { return };
        assert_eq!(refused(gpu.module("known")), CUDA_ERROR_NO_BINARY_FOR_GPU);
    }
}

#[test]
fn memory_is_checked_and_counted() {
    let Some(_gpu) = Gpu::open(5) else { return };
    // SAFETY: the pointers are the test's own.
    unsafe {
        assert_eq!(result::mem_get_info().unwrap(), (1 << 20, 1 << 20));
        let pointer = result::malloc_sync(1000).unwrap();
        assert_eq!(pointer % 256, 0);
        assert_eq!((standin::allocations(5), standin::bytes(5)), (1, 1024));
        assert_eq!(refused(result::malloc_sync(1 << 20)), CUDA_ERROR_OUT_OF_MEMORY);
        let mut host = [0u8; 1001];
        result::memcpy_dtoh_sync(&mut host[..1000], pointer).unwrap();
        assert_eq!(host[..1000], [0xff; 1000], "fresh memory is NaN");
        assert_eq!(refused(result::memcpy_dtoh_sync(&mut host, pointer)), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(refused(result::memcpy_htod_sync(pointer + 8, &host[..1000])), CUDA_ERROR_INVALID_VALUE);
        sys::cuMemsetD32_v2(pointer + 4, 7, 2).result().unwrap();
        result::memcpy_dtoh_sync(&mut host[..16], pointer).unwrap();
        assert_eq!(host[..16], [255, 255, 255, 255, 7, 0, 0, 0, 7, 0, 0, 0, 255, 255, 255, 255]);
        result::free_sync(pointer).unwrap();
        assert_eq!(refused(result::free_sync(pointer)), CUDA_ERROR_INVALID_VALUE);
        assert_eq!(standin::bytes(5), 0);
    }
}

#[test]
fn graphs_replay_what_was_captured() {
    let Some(gpu) = Gpu::open(3) else { return };
    let function = gpu.function("known", "known_atomics");
    let sums = gpu.put(&[0u32; 3]);
    // SAFETY: the kernel's one parameter; handles are used while they live.
    unsafe {
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        let launch = || result::launch_kernel(function, (2, 1, 1), (128, 1, 1), 0, stream, &mut [arg(&sums)]).unwrap();
        result::stream::begin_capture(stream, mode).unwrap();
        launch();
        launch();
        let graph = result::stream::end_capture(stream).unwrap();
        assert_eq!(gpu.get::<u32>(sums, 2), [0, 0], "captured, not run");
        let mut executable = std::ptr::null_mut();
        sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result().unwrap();
        for _ in 0..3 {
            sys::cuGraphLaunch(executable, stream).result().unwrap();
        }
        result::stream::synchronize(stream).unwrap();
        assert_eq!(gpu.get::<u32>(sums, 2), [3 * 4 * 127 * 64, 3 * 4]);
        sys::cuGraphExecDestroy(executable).result().unwrap();
        sys::cuGraphDestroy(graph).result().unwrap();

        for forbidden in [&(|| result::stream::synchronize(stream)) as &dyn Fn() -> Result<(), DriverError>, &|| {
            result::memcpy_htod_async(sums, &[0u32; 3], stream)
        }] {
            result::stream::begin_capture(stream, mode).unwrap();
            assert_eq!(refused(forbidden()), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
            assert_eq!(refused(result::stream::end_capture(stream)), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        }
        result::stream::begin_capture(stream, mode).unwrap();
        assert_eq!(refused(result::malloc_sync(16)), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        sys::cuGraphDestroy(result::stream::end_capture(stream).unwrap()).result().unwrap();
        result::free_sync(result::malloc_sync(16).unwrap()).unwrap();
        result::stream::destroy(stream).unwrap();
    }
}

#[test]
fn graphs_are_built_node_by_node() {
    let Some(gpu) = Gpu::open(3) else { return };
    let function = gpu.function("known", "known_atomics");
    let sums = gpu.put(&[5u32; 3]);
    let mut arguments = [arg(&sums)];
    let parameters = arguments.as_mut_ptr();
    let params = |blocks| sys::CUDA_KERNEL_NODE_PARAMS {
        func: function,
        gridDimX: blocks,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: 128,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: 0,
        kernelParams: parameters,
        extra: std::ptr::null_mut(),
        kern: std::ptr::null_mut(),
        ctx: std::ptr::null_mut(),
    };
    // SAFETY: the kernel's one parameter; handles are used while they live.
    unsafe {
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
        let mut context = std::ptr::null_mut();
        sys::cuCtxGetCurrent(&mut context).result().unwrap();
        let run = |with_dependency| {
            let (mut graph, mut zero, mut kernel) = (std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
            sys::cuGraphCreate(&mut graph, 0).result().unwrap();
            let memset =
                sys::CUDA_MEMSET_NODE_PARAMS { dst: sums, pitch: 0, value: 0, elementSize: 1, width: 12, height: 1 };
            sys::cuGraphAddMemsetNode(&mut zero, graph, std::ptr::null(), 0, &memset, context).result().unwrap();
            let count = usize::from(with_dependency);
            let launch = params(2);
            sys::cuGraphAddKernelNode_v2(&mut kernel, graph, &zero, count, &launch).result().unwrap();
            let executable = result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)).unwrap();
            result::graph::launch(executable, stream).unwrap();
            let first = gpu.get::<u32>(sums, 2);
            let set = |node, params: &_| sys::cuGraphExecKernelNodeSetParams_v2(executable, node, params).result();
            set(kernel, &params(4)).unwrap();
            assert_eq!(refused(set(zero, &launch)), CUDA_ERROR_INVALID_VALUE, "not a kernel");
            assert_eq!(refused(set(kernel, &params(0))), CUDA_ERROR_INVALID_VALUE);
            result::graph::launch(executable, stream).unwrap();
            result::graph::destroy(graph).unwrap();
            assert_eq!(refused(set(kernel, &launch)), CUDA_ERROR_INVALID_VALUE, "of a graph that is gone");
            result::graph::exec_destroy(executable).unwrap();
            [first, gpu.get::<u32>(sums, 2)]
        };
        let blocks = |count: u32| vec![count * 127 * 64, count];
        assert_eq!(run(true), [blocks(2), blocks(4)]);
        assert_eq!(run(false), [vec![0, 0], vec![0, 0]], "a missing dependency shows");
        result::stream::destroy(stream).unwrap();
    }
}

#[test]
fn tensor_maps_are_checked() {
    let Some(gpu) = Gpu::open(0) else { return };
    let base = gpu.put(&[0u16; 64 * 64]);
    let encode =
        |base, pitch, width, swizzle| tensor_map::<u16>(base, &[64, 64], pitch, &[width, 8], swizzle).map(drop);
    assert_eq!(encode(base, 128, 64, CU_TENSOR_MAP_SWIZZLE_128B), Ok(()));
    for (base, pitch, width, swizzle) in [
        (base + 8, 128, 64, CU_TENSOR_MAP_SWIZZLE_128B),
        (base, 130, 64, CU_TENSOR_MAP_SWIZZLE_128B),
        (base, 128, 12, CU_TENSOR_MAP_SWIZZLE_NONE),
        (base, 128, 64, CU_TENSOR_MAP_SWIZZLE_64B),
        (base, 128, 264, CU_TENSOR_MAP_SWIZZLE_NONE),
    ] {
        assert_eq!(encode(base, pitch, width, swizzle), Err(DriverError(CUDA_ERROR_INVALID_VALUE)), "{pitch} {width}");
    }
}
