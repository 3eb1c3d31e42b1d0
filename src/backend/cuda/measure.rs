//! Measurement: times by the GPU's clock, forced kernel versions, work captured once and replayed, and the handles with
//! which another library works in a device's stream.

use super::device::Device;
use super::{Cuda, Precision, slice};
use crate::backend::{Element, View};
use crate::error::Result;
use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::sys::{self, CUdevice_attribute as Attribute, CUstreamCaptureMode as Mode};
use cudarc::driver::{DriverError, result};
use std::cell::Cell;
use std::sync::Arc;
use std::thread::LocalKey;
use std::time::Duration;

thread_local! {
    static FORCED: Cell<Option<&'static str>> = const { Cell::new(None) };
}

/// Runs `f` with a version forced: operators called from this thread use the version of their kernels of this name (the
/// last part but one of a symbol: `baseline`, `vec8`, `row2048`) where they have one that fits the tensors, else what
/// they would have chosen. Matrix products are forced by [`with_plan`](super::with_plan).
pub fn with_version<R>(version: &'static str, f: impl FnOnce() -> R) -> R {
    with_forced(&FORCED, version, f)
}

/// Runs `f` with a cell set, which is then as it was before.
pub(super) fn with_forced<T: Copy + 'static, R>(
    cell: &'static LocalKey<Cell<Option<T>>>,
    value: T,
    f: impl FnOnce() -> R,
) -> R {
    struct Restore<T: Copy + 'static>(&'static LocalKey<Cell<Option<T>>>, Option<T>);
    impl<T: Copy + 'static> Drop for Restore<T> {
        fn drop(&mut self) {
            self.0.set(self.1);
        }
    }
    let _restore = Restore(cell, cell.replace(Some(value)));
    f()
}

/// The version that is forced.
pub(super) fn asked() -> Option<&'static str> {
    FORCED.get()
}

/// Whether baselines are forced.
pub(super) fn baseline() -> bool {
    asked() == Some("baseline")
}

/// Of the versions that fit, the best first: the forced one, else the first. `None`: the baseline.
pub(super) fn choose<T>(fitting: impl IntoIterator<Item = (&'static str, T)>) -> Option<T> {
    if baseline() {
        return None;
    }
    let mut first = None;
    for (name, version) in fitting {
        if asked() == Some(name) {
            return Some(version);
        }
        first.get_or_insert(version);
    }
    first
}

/// A graph captured from a stream, replayed without the host's cost of its launches.
pub struct Captured {
    device: Arc<Device>,
    executable: sys::CUgraphExec,
}

impl Captured {
    /// Queues a replay.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] where the driver fails.
    pub fn launch(&self) -> Result<()> {
        self.device.context.bind()?;
        // SAFETY: an executable graph and the stream of this device's context, which is current.
        unsafe { result::graph::launch(self.executable, self.device.context.stream()) }
            .map_err(|error| self.device.context.failed("cannot launch a captured graph", error))
    }
}

impl Drop for Captured {
    fn drop(&mut self) {
        // What still runs of it must end first. An error leaks it until the process ends.
        if self.device.synchronize().is_ok() {
            // SAFETY: an executable graph that nothing uses any more.
            let _ = unsafe { result::graph::exec_destroy(self.executable) };
        }
    }
}

impl<P: Precision> Cuda<P> {
    /// Time of the work that `queue` enqueues, by the GPU's clock; waits for it.
    ///
    /// # Errors
    /// What `queue` returns; [`crate::error::Error::Device`] where the driver fails.
    pub fn time(&self, queue: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let device = &self.device;
        device.flush()?;
        device.context.bind()?;
        let failed = |error| device.context.failed("cannot time queued work", error);
        let event = || result::event::create(CU_EVENT_DEFAULT).map_err(failed);
        let (start, end) = (event()?, event()?);
        // SAFETY: events and the stream of this device's context, which is current; the events are destroyed once,
        // after they were waited for.
        let milliseconds = unsafe {
            result::event::record(start, device.context.stream()).map_err(failed)?;
            let queued = queue();
            result::event::record(end, device.context.stream()).map_err(failed)?;
            result::event::synchronize(end).map_err(failed)?;
            let elapsed = result::event::elapsed(start, end).map_err(failed);
            let _ = (result::event::destroy(start), result::event::destroy(end));
            queued?;
            elapsed?
        };
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }

    /// Captures the work that `queue` enqueues, without running it. It must have run once before, so that it finds its
    /// workspace in the arena, and must not copy from the host: `adamw_masked` cannot be captured.
    ///
    /// # Errors
    /// What `queue` returns; [`crate::error::Error::Device`] where the driver refuses what it does.
    ///
    /// # Safety
    /// The buffers that `queue` uses outlive the returned graph. No memory is given back to the driver meanwhile (as
    /// where a buffer does not fit), and nothing else that keeps values in the workspace runs between launches.
    pub unsafe fn capture(&self, queue: impl FnOnce() -> Result<()>) -> Result<Captured> {
        let device = &self.device;
        device.synchronize()?;
        let failed = |error: DriverError| device.context.failed("cannot capture work", error);
        // SAFETY: the stream of this device's context, which is current; what the capture returns is a graph, which is
        // destroyed once, after it was made executable.
        unsafe {
            result::stream::begin_capture(device.context.stream(), Mode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
                .map_err(failed)?;
            let queued = queue();
            let graph = result::stream::end_capture(device.context.stream());
            let executable = graph.and_then(|graph| match &queued {
                Ok(()) => result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)).map(Some),
                Err(_) => Ok(None),
            });
            if let Ok(graph) = graph {
                let _ = result::graph::destroy(graph);
            }
            queued?;
            match executable.map_err(failed)? {
                Some(executable) => Ok(Captured { device: device.clone(), executable }),
                None => unreachable!("instantiated where the work was queued"),
            }
        }
    }

    /// Size of the L2 cache in bytes.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] where the driver fails.
    pub fn l2_bytes(&self) -> Result<u64> {
        self.device.context.bind()?;
        let failed = |error: DriverError| self.device.context.failed("cannot query the L2 cache size", error);
        let mut raw = 0;
        // SAFETY: a context is current; the call writes one integer.
        unsafe { sys::cuCtxGetDevice(&mut raw) }.result().map_err(failed)?;
        // SAFETY: `raw` is a device of the driver.
        let bytes = unsafe { result::device::get_attribute(raw, Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE) };
        Ok(bytes.map_err(failed)?.max(0) as u64)
    }

    /// The stream of all work, for another library; makes the context current.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] where the driver fails.
    pub fn stream(&self) -> Result<sys::CUstream> {
        self.device.context.bind()?;
        Ok(self.device.context.stream())
    }

    /// The device's address of a view's first element, for another library.
    pub fn address<T: Element>(&self, view: &View<'_, Self, T>) -> u64 {
        slice(view).pointer()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_chosen_by_name() {
        let fitting = || [("lanes", 1), ("warp", 2), ("row2048", 3)];
        assert_eq!(choose(fitting()), Some(1));
        assert_eq!(choose(fitting().into_iter().take(0)), None);
        assert_eq!(with_version("warp", || choose(fitting())), Some(2));
        assert_eq!(with_version("lanes", || choose(fitting())), Some(1));
        assert_eq!(with_version("vec8", || choose(fitting())), Some(1));
        assert_eq!(with_version("baseline", || with_version("row2048", || choose(fitting()))), Some(3));
        assert_eq!(with_version("baseline", || (choose(fitting()), baseline())), (None, true));
        assert_eq!((choose(fitting()), baseline()), (Some(1), false));
    }
}
