//! What ran when: spans of phases, layers, operations and kernels, recorded on request for `swat profile`; and the same
//! phases and layers as NVTX ranges, for `nsys` and `ncu`.
//!
//! A recording holds the spans of its thread, which is where the engine runs; operations that compute on several
//! threads begin and end there. While nothing records or annotates, a span costs one load. Spans that come from a GPU
//! arrive when its backend is synchronised.

mod nvtx;

use super::Cost;
use crate::error::Result;
use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::time::Instant;

/// What a span times; the outer kinds contain the inner ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SpanKind {
    /// A part of a step: `forward`, `head`, `backward`, `optimizer`, `cache`, `prefill`, `decode`, `sweep`; `recompute`
    /// and `perturb` inside others.
    Phase,
    /// A layer of the model.
    Layer,
    /// An operation of the backend on the host: its computation on the CPU, its launch on a GPU.
    Op,
    /// A kernel on a GPU, by the GPU's clock.
    Kernel,
}

/// A timed phase, layer, operation or kernel.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// What it times.
    pub kind: SpanKind,
    /// `forward`, `layer`, `linear`, `gemm_tn_mma128_bf16`.
    pub name: &'static str,
    /// The innermost phase around it; its own name for a phase, empty outside all phases.
    pub phase: &'static str,
    /// The layer around it.
    pub layer: Option<usize>,
    /// Nanoseconds since the recording began.
    pub start_ns: u64,
    /// Nanoseconds.
    pub duration_ns: u64,
    /// Of an operation or a kernel.
    pub cost: Cost,
}

const RECORD: u8 = 1;
const ANNOTATE: u8 = 2;

thread_local! {
    /// Consumers of this thread's spans: [`RECORD`] | [`ANNOTATE`].
    static WANTED: Cell<u8> = const { Cell::new(0) };
    static SCOPE: Cell<Scope> = const { Cell::new(Scope { phase: "", layer: None }) };
    static RECORDER: RefCell<Option<Recorder>> = const { RefCell::new(None) };
}

struct Recorder {
    began: Instant,
    spans: Vec<Span>,
}

/// The phase and the layer that a thread is in.
#[derive(Clone, Copy)]
pub(super) struct Scope {
    pub(super) phase: &'static str,
    pub(super) layer: Option<usize>,
}

/// A recording of this thread, which ends when this is dropped.
pub struct Recording(PhantomData<*const ()>);

/// Starts to record this thread; `None` while another recording runs on it.
pub fn record() -> Option<Recording> {
    RECORDER.with_borrow_mut(|recorder| {
        if recorder.is_some() {
            return None;
        }
        *recorder = Some(Recorder { began: Instant::now(), spans: Vec::new() });
        WANTED.set(WANTED.get() | RECORD);
        Some(Recording(PhantomData))
    })
}

/// Emits phases and layers of this thread as NVTX ranges from now on.
///
/// # Errors
/// [`crate::error::Error::Input`] where NVTX's library is not found.
pub fn annotate() -> Result<()> {
    nvtx::find()?;
    WANTED.set(WANTED.get() | ANNOTATE);
    Ok(())
}

impl Recording {
    /// The spans so far, in the order of their ends. The backend must have been synchronised.
    pub fn take(&self) -> Vec<Span> {
        RECORDER
            .with_borrow_mut(|recorder| recorder.as_mut().map(|recorder| std::mem::take(&mut recorder.spans)))
            .unwrap_or_default()
    }

    /// Nanoseconds since it began.
    pub fn now_ns(&self) -> u64 {
        now_ns()
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        WANTED.set(WANTED.get() & !RECORD);
        RECORDER.set(None);
    }
}

/// Whether something records this thread.
#[inline]
pub(super) fn on() -> bool {
    WANTED.get() & RECORD != 0
}

/// Nanoseconds since the recording began; 0 where there is none.
pub(super) fn now_ns() -> u64 {
    RECORDER.with_borrow(|recorder| recorder.as_ref().map_or(0, |recorder| recorder.began.elapsed().as_nanos() as u64))
}

/// The phase and layer of this thread.
pub(super) fn scope() -> Scope {
    SCOPE.get()
}

/// Adds a span that was timed elsewhere.
pub(super) fn push(span: Span) {
    RECORDER.with_borrow_mut(|recorder| {
        if let Some(recorder) = recorder {
            recorder.spans.push(span);
        }
    });
}

/// A span that ends when this is dropped.
#[must_use = "a span ends when its guard is dropped"]
pub struct Guard(Option<Open>);

struct Open {
    kind: SpanKind,
    name: &'static str,
    start_ns: u64,
    cost: Cost,
    /// Whether it is a range of NVTX.
    annotated: bool,
    /// What this thread was in before.
    outer: Scope,
}

impl Guard {
    /// Discards the span of an operation that did not run.
    pub(super) fn cancel(mut self) {
        if let Some(open) = self.0.take() {
            SCOPE.set(open.outer);
        }
    }
}

/// A part of a step.
#[inline]
pub fn phase(name: &'static str) -> Guard {
    open(SpanKind::Phase, name, |_| Scope { phase: name, layer: None }, Cost::default)
}

/// A layer of the model; no span inside a span of the same layer.
#[inline]
pub fn layer(index: usize) -> Guard {
    open(SpanKind::Layer, "layer", |outer| Scope { layer: Some(index), ..outer }, Cost::default)
}

/// An operation of a backend.
#[inline]
pub(super) fn op(name: &'static str, cost: impl FnOnce() -> Cost) -> Guard {
    open(SpanKind::Op, name, |outer| outer, cost)
}

#[inline]
fn open(kind: SpanKind, name: &'static str, enter: impl FnOnce(Scope) -> Scope, cost: impl FnOnce() -> Cost) -> Guard {
    match WANTED.get() {
        0 => Guard(None),
        wanted => open_wanted(wanted, kind, name, enter, cost),
    }
}

#[cold]
fn open_wanted(
    wanted: u8,
    kind: SpanKind,
    name: &'static str,
    enter: impl FnOnce(Scope) -> Scope,
    cost: impl FnOnce() -> Cost,
) -> Guard {
    let outer = scope();
    let here = enter(outer);
    let annotated = wanted & ANNOTATE != 0 && kind != SpanKind::Op;
    if (wanted & RECORD == 0 && !annotated) || (kind == SpanKind::Layer && here.layer == outer.layer) {
        return Guard(None);
    }
    SCOPE.set(here);
    if annotated {
        match here.layer.filter(|_| kind == SpanKind::Layer) {
            Some(layer) => nvtx::push(&format!("layer {layer}")),
            None => nvtx::push(name),
        }
    }
    Guard(Some(Open { kind, name, start_ns: now_ns(), cost: cost(), annotated, outer }))
}

impl Drop for Guard {
    #[inline]
    fn drop(&mut self) {
        if let Some(open) = self.0.take() {
            close(open);
        }
    }
}

#[cold]
fn close(Open { kind, name, start_ns, cost, annotated, outer }: Open) {
    let Scope { phase, layer } = SCOPE.replace(outer);
    let duration_ns = now_ns().saturating_sub(start_ns);
    push(Span { kind, name, phase, layer, start_ns, duration_ns, cost });
    if annotated {
        nvtx::pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_nest_and_know_their_scope() {
        drop(phase("before"));
        let recording = record().unwrap();
        assert!(record().is_none(), "one recording of a thread");
        {
            let _phase = phase("forward");
            let _layer = layer(3);
            drop(layer(3));
            drop(op("linear", || Cost { bytes: 8, flops: 2 }));
        }
        drop(op("copy", Cost::default));
        // Another thread's spans are its own.
        std::thread::spawn(|| drop(phase("elsewhere"))).join().unwrap();
        let spans = recording.take();
        let names: Vec<_> = spans.iter().map(|s| (s.kind, s.name, s.phase, s.layer)).collect();
        let expected = [
            (SpanKind::Op, "linear", "forward", Some(3)),
            (SpanKind::Layer, "layer", "forward", Some(3)),
            // The guard of a layer closes before that of its phase, which has left the layer by then.
            (SpanKind::Phase, "forward", "forward", None),
            (SpanKind::Op, "copy", "", None),
        ];
        assert_eq!(names, expected);
        assert_eq!(spans[0].cost, Cost { bytes: 8, flops: 2 });
        assert!(spans[0].start_ns >= spans[2].start_ns);
        drop(recording);
        assert!(record().is_some());
    }
}
