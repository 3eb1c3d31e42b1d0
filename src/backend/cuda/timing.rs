//! The GPU's own clock: events around what is queued, for benches and for the spans of [`crate::backend::trace`].

use super::device::Device;
use super::{Cuda, Precision};
use crate::backend::Cost;
use crate::backend::trace::{self, Lane, Span};
use crate::error::Result;
use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::{DriverError, result, sys};
use std::time::Duration;

/// Spans of kernels whose events have not been read.
#[derive(Default)]
pub(super) struct Pending {
    /// One moment on both clocks: an event, and nanoseconds since the recording began.
    base: Option<(sys::CUevent, u64)>,
    spans: Vec<(Span, sys::CUevent, sys::CUevent)>,
    /// Events for reuse.
    free: Vec<sys::CUevent>,
}

// SAFETY: events of the driver may be used from any thread.
unsafe impl Send for Pending {}

impl Pending {
    fn event(&mut self) -> Result<sys::CUevent, DriverError> {
        self.free.pop().map_or_else(|| result::event::create(CU_EVENT_DEFAULT), Ok)
    }

    /// Destroys all events.
    ///
    /// # Safety
    /// The context is current and the stream is idle.
    pub(super) unsafe fn destroy(&mut self) {
        let spans = self.spans.drain(..).flat_map(|(_, start, end)| [start, end]);
        for event in spans.chain(self.free.drain(..)).chain(self.base.take().map(|(event, _)| event)) {
            // SAFETY: an event of this context that nothing waits for. An error leaks it until the process ends.
            let _ = unsafe { result::event::destroy(event) };
        }
    }
}

impl Device {
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
        let mut pending = self.pending.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let record = |event| {
            // SAFETY: an event and the stream of this device's context, which is current.
            unsafe { result::event::record(event, self.stream()) }
        };
        if pending.base.is_none() {
            let event = pending.event()?;
            record(event)?;
            // SAFETY: an event of this context.
            unsafe { result::event::synchronize(event) }?;
            pending.base = Some((event, trace::now_ns()));
        }
        let (start, end) = (pending.event()?, pending.event()?);
        record(start)?;
        launch()?;
        record(end)?;
        let trace::Place { phase, layer } = trace::place();
        let span = Span { lane: Lane::Kernel, name: kernel, phase, layer, start_ns: 0, duration_ns: 0, cost };
        pending.spans.push((span, start, end));
        Ok(())
    }

    /// `cuProfilerStart` and `cuProfilerStop`, behind everything queued.
    pub(super) fn profiler(&self, begins: bool) -> Result<()> {
        self.synchronize()?;
        // SAFETY: the context is current.
        let done = unsafe { if begins { sys::cuProfilerStart() } else { sys::cuProfilerStop() } }.result();
        done.map_err(|error| self.failed("cannot start or stop the profiler", error))
    }

    /// Moves the spans of finished kernels to the trace. The stream is idle.
    pub(super) fn settle(&self) -> Result<(), DriverError> {
        let mut pending = self.pending.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let Some((base, base_ns)) = pending.base.take() else { return Ok(()) };
        let between = |from, to| {
            // SAFETY: two recorded events of this context.
            let milliseconds = unsafe { result::event::elapsed(from, to) }?;
            Ok::<u64, DriverError>((f64::from(milliseconds.max(0.0)) * 1e6) as u64)
        };
        let mut free_ns = 0;
        for (mut span, start, end) in std::mem::take(&mut pending.spans) {
            // One stream runs one kernel at a time, but each time is rounded by itself.
            span.start_ns = (base_ns + between(base, start)?).max(free_ns);
            span.duration_ns = between(start, end)?;
            free_ns = span.start_ns + span.duration_ns;
            trace::push(span);
            pending.free.extend([start, end]);
        }
        pending.free.push(base);
        Ok(())
    }
}

impl<P: Precision> Cuda<P> {
    /// How long the GPU takes for what `queue` puts into its stream, by its own clock; waits for it.
    ///
    /// # Errors
    /// What `queue` returns; [`crate::Error::Device`] where the driver fails.
    pub fn time(&self, queue: impl FnOnce() -> Result<()>) -> Result<Duration> {
        let device = &self.device;
        device.flush()?;
        device.bind()?;
        let failed = |error| device.failed("cannot time queued work", error);
        let event = || result::event::create(CU_EVENT_DEFAULT).map_err(failed);
        let (start, end) = (event()?, event()?);
        // SAFETY: events and the stream of this device's context, which is current; the events are destroyed once,
        // after they were waited for.
        let milliseconds = unsafe {
            result::event::record(start, device.stream()).map_err(failed)?;
            let queued = queue();
            result::event::record(end, device.stream()).map_err(failed)?;
            result::event::synchronize(end).map_err(failed)?;
            let elapsed = result::event::elapsed(start, end).map_err(failed);
            let _ = (result::event::destroy(start), result::event::destroy(end));
            queued?;
            elapsed?
        };
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }
}
