//! Kernel times by the GPU's clock: events around launches, for the spans of [`crate::backend::trace`].

use super::context::Context;
use crate::backend::Cost;
use crate::backend::trace::{self, Scope, Span, SpanKind};
use cudarc::driver::sys::CUevent_flags::CU_EVENT_DEFAULT;
use cudarc::driver::{DriverError, result, sys};

/// Events around kernels, and the spans that wait for their times.
#[derive(Default)]
pub(super) struct EventTimer {
    /// One moment on both clocks: an event, and nanoseconds since the recording began.
    base: Option<(sys::CUevent, u64)>,
    spans: Vec<(Span, sys::CUevent, sys::CUevent)>,
    /// Events for reuse.
    free: Vec<sys::CUevent>,
}

// SAFETY: events of the driver may be used from any thread.
unsafe impl Send for EventTimer {}

impl EventTimer {
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

    /// Calls `launch` between two events. The context is current.
    pub(super) fn time(
        &mut self,
        context: &Context,
        kernel: &'static str,
        cost: Cost,
        launch: impl FnOnce() -> Result<(), DriverError>,
    ) -> Result<(), DriverError> {
        let record = |event| {
            // SAFETY: an event and the stream of the context, which is current.
            unsafe { result::event::record(event, context.stream()) }
        };
        if self.base.is_none() {
            let event = self.event()?;
            record(event)?;
            // SAFETY: an event of this context.
            unsafe { result::event::synchronize(event) }?;
            self.base = Some((event, trace::now_ns()));
        }
        let (start, end) = (self.event()?, self.event()?);
        record(start)?;
        launch()?;
        record(end)?;
        let Scope { phase, layer } = trace::scope();
        let span = Span { kind: SpanKind::Kernel, name: kernel, phase, layer, start_ns: 0, duration_ns: 0, cost };
        self.spans.push((span, start, end));
        Ok(())
    }

    /// Moves the spans of finished kernels to the trace. The stream is idle.
    pub(super) fn settle(&mut self) -> Result<(), DriverError> {
        let Some((base, base_ns)) = self.base.take() else { return Ok(()) };
        let between = |from, to| {
            // SAFETY: two recorded events of this context.
            let milliseconds = unsafe { result::event::elapsed(from, to) }?;
            Ok::<u64, DriverError>((f64::from(milliseconds.max(0.0)) * 1e6) as u64)
        };
        let mut free_ns = 0;
        for (mut span, start, end) in std::mem::take(&mut self.spans) {
            // One stream runs one kernel at a time, but each time is rounded by itself.
            span.start_ns = (base_ns + between(base, start)?).max(free_ns);
            span.duration_ns = between(start, end)?;
            free_ns = span.start_ns + span.duration_ns;
            trace::push(span);
            self.free.extend([start, end]);
        }
        self.free.push(base);
        Ok(())
    }
}
