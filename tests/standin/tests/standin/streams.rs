//! Streams that run late, and what orders them.

use super::*;
use sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
use sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;

/// A value goes from one stream to another: how often the second was too early, with an event between them or
/// without; and how often the event was not yet reached.
fn too_early(gpu: &Gpu, waits: bool) -> (usize, usize) {
    let [from, between, to] = [0; 3].map(|zero: u32| gpu.put(&[zero]));
    let (mut early, mut unreached) = (0, 0);
    // SAFETY: the test's own memory, streams and event.
    unsafe {
        let stream = || result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
        let (first, second) = (stream(), stream());
        let event = result::event::create(CU_EVENT_DISABLE_TIMING).unwrap();
        for round in 1..=200u32 {
            sys::cuMemsetD32Async(from, round, 1, first).result().unwrap();
            result::memcpy_dtod_async(between, from, 4, first).unwrap();
            result::event::record(event, first).unwrap();
            if waits {
                result::stream::wait_event(second, event, CU_EVENT_WAIT_DEFAULT).unwrap();
            }
            unreached += usize::from(
                result::event::query(event) == Err(result::DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)),
            );
            result::memcpy_dtod_async(to, between, 4, second).unwrap();
            result::stream::synchronize(second).unwrap();
            early += usize::from(gpu.get::<u32>(to, 1) != [round]);
            result::stream::synchronize(first).unwrap();
            assert_eq!(gpu.get::<u32>(between, 1), [round]);
        }
        result::stream::destroy(first).unwrap();
        result::stream::destroy(second).unwrap();
        result::event::destroy(event).unwrap();
    }
    (early, unreached)
}

#[test]
fn a_missing_event_shows() {
    let Some(gpu) = Gpu::open(2) else { return };
    for seed in [1, 2] {
        standin::streams(seed);
        let (early, unreached) = too_early(&gpu, true);
        assert!(early == 0 && unreached > 0, "seed {seed}: {early}, {unreached}");
        let (early, _) = too_early(&gpu, false);
        assert!(early > 0, "seed {seed}: nothing shows that an event is missing");
    }
    standin::streams(0);
}

/// Pageable memory may be used again when a copy from it returns, and holds what a copy to it brings.
#[test]
fn pageable_memory_is_copied_before_the_call_returns() {
    let Some(gpu) = Gpu::open(2) else { return };
    standin::streams(3);
    let pointer = gpu.put(&[0u32]);
    // SAFETY: the test's own memory and stream.
    unsafe {
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
        for round in 0..100u32 {
            let mut host = [round];
            result::memcpy_htod_async(pointer, &host, stream).unwrap();
            host[0] = u32::MAX;
            result::memcpy_dtoh_async(&mut host, pointer, stream).unwrap();
            assert_eq!(host, [round]);
        }
        result::stream::destroy(stream).unwrap();
    }
    standin::streams(0);
}
