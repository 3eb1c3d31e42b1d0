//! What ran when: spans of phases, layers, operations and kernels, recorded on request for `swat profile`; and the same phases
//! and layers as NVTX ranges, for `nsys` and `ncu`.
//!
//! A recording holds the spans of its thread, which is where the engine runs; operations that compute on several threads
//! begin and end there. While nothing records or annotates, a span costs one load. Spans that come from a GPU arrive when its
//! backend is synchronised.

use super::Cost;
use super::cuda::nvtx;
use crate::error::Result;
use std::cell::{Cell, RefCell};
use std::marker::PhantomData;
use std::time::Instant;

/// What a span is a span of; the outer ones contain the inner ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// A part of a step: `forward`, `head`, `backward`, `optimizer`, `cache`, `prefill`, `decode`, `sweep`; inside of others,
    /// `recompute` and `perturb`.
    Phase,
    /// A layer of the model.
    Layer,
    /// An operation of the backend on the host: its computation on the CPU, its launch on a GPU.
    Op,
    /// A kernel on a GPU, by the GPU's clock.
    Kernel,
}

/// Something that ran.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// What it is a span of.
    pub lane: Lane,
    /// `forward`, `layer`, `linear`, `gemm_tn_mma128_bf16`.
    pub name: &'static str,
    /// The innermost phase around it; its own name for a phase, empty outside all phases.
    pub phase: &'static str,
    /// The layer around it.
    pub layer: Option<usize>,
    /// Since the recording began.
    pub start_ns: u64,
    /// How long.
    pub duration_ns: u64,
    /// What an operation or a kernel had to move and to compute.
    pub cost: Cost,
}

const RECORD: u8 = 1;
const ANNOTATE: u8 = 2;

thread_local! {
    /// Who wants to know of this thread's spans: [`RECORD`], [`ANNOTATE`].
    static WANTED: Cell<u8> = const { Cell::new(0) };
    /// The phase and the layer that this thread is in.
    static PLACE: Cell<Place> = const { Cell::new(Place { phase: "", layer: None }) };
    static RECORDER: RefCell<Option<Recorder>> = const { RefCell::new(None) };
}

struct Recorder {
    began: Instant,
    spans: Vec<Span>,
}

/// Where in a step a thread is.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) phase: &'static str,
    pub(super) layer: Option<usize>,
}

/// A running recording of this thread; dropped, it records no more.
pub struct Recording(PhantomData<*const ()>);

/// Starts to record this thread; `None` where something records it already.
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

/// From now on phases and layers of this thread are NVTX ranges too.
///
/// # Errors
/// [`crate::Error::Input`] where NVTX's library is not found.
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
pub(super) fn place() -> Place {
    PLACE.get()
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
    lane: Lane,
    name: &'static str,
    start_ns: u64,
    cost: Cost,
    /// Whether it is a range of NVTX.
    annotated: bool,
    /// What this thread was in before.
    outer: Place,
}

impl Guard {
    /// Ends the span of an operation that turned out not to run, and records nothing.
    pub(super) fn cancel(mut self) {
        if let Some(open) = self.0.take() {
            PLACE.set(open.outer);
        }
    }
}

/// A part of a step.
#[inline]
pub fn phase(name: &'static str) -> Guard {
    open(Lane::Phase, name, |_| Place { phase: name, layer: None }, Cost::default)
}

/// A layer of the model; nothing inside of a span of the same layer.
#[inline]
pub fn layer(index: usize) -> Guard {
    open(Lane::Layer, "layer", |outer| Place { layer: Some(index), ..outer }, Cost::default)
}

/// An operation of a backend.
#[inline]
pub(super) fn op(name: &'static str, cost: impl FnOnce() -> Cost) -> Guard {
    open(Lane::Op, name, |outer| outer, cost)
}

#[inline]
fn open(lane: Lane, name: &'static str, enter: impl FnOnce(Place) -> Place, cost: impl FnOnce() -> Cost) -> Guard {
    match WANTED.get() {
        0 => Guard(None),
        wanted => open_wanted(wanted, lane, name, enter, cost),
    }
}

#[cold]
fn open_wanted(
    wanted: u8,
    lane: Lane,
    name: &'static str,
    enter: impl FnOnce(Place) -> Place,
    cost: impl FnOnce() -> Cost,
) -> Guard {
    let outer = place();
    let here = enter(outer);
    let annotated = wanted & ANNOTATE != 0 && lane != Lane::Op;
    if (wanted & RECORD == 0 && !annotated) || (lane == Lane::Layer && here.layer == outer.layer) {
        return Guard(None);
    }
    PLACE.set(here);
    if annotated {
        match here.layer.filter(|_| lane == Lane::Layer) {
            Some(layer) => nvtx::push(&format!("layer {layer}")),
            None => nvtx::push(name),
        }
    }
    Guard(Some(Open { lane, name, start_ns: now_ns(), cost: cost(), annotated, outer }))
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
fn close(Open { lane, name, start_ns, cost, annotated, outer }: Open) {
    let Place { phase, layer } = PLACE.replace(outer);
    let duration_ns = now_ns().saturating_sub(start_ns);
    push(Span { lane, name, phase, layer, start_ns, duration_ns, cost });
    if annotated {
        nvtx::pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_nest_and_know_their_place() {
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
        let names: Vec<_> = spans.iter().map(|s| (s.lane, s.name, s.phase, s.layer)).collect();
        let expected = [
            (Lane::Op, "linear", "forward", Some(3)),
            (Lane::Layer, "layer", "forward", Some(3)),
            // The guard of a layer closes before that of its phase, which has left the layer by then.
            (Lane::Phase, "forward", "forward", None),
            (Lane::Op, "copy", "", None),
        ];
        assert_eq!(names, expected);
        assert_eq!(spans[0].cost, Cost { bytes: 8, flops: 2 });
        assert!(spans[0].start_ns >= spans[2].start_ns);
        drop(recording);
        assert!(record().is_some());
    }
}
