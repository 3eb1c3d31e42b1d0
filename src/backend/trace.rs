//! What ran when: spans of phases, layers, operations and kernels, recorded on request for `swat profile`.
//!
//! While nothing records, a span costs one relaxed load. There is one recording in a process; spans that come from a GPU
//! arrive when its backend is synchronised.

use super::Cost;
use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What a span is a span of; the outer ones contain the inner ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Lane {
    /// A part of a step: `forward`, `backward`, `optimizer`, `sweep`, `decode`.
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
    /// The phase around it; its own name for a phase, empty outside all phases.
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

static ON: AtomicBool = AtomicBool::new(false);
static RECORDER: Mutex<Option<Recorder>> = Mutex::new(None);

struct Recorder {
    began: Instant,
    spans: Vec<Span>,
}

thread_local! {
    /// The phase and the layer that this thread is in.
    static PLACE: RefCell<Place> = const { RefCell::new(Place { phase: "", layer: None }) };
}

/// Where in a step a thread is.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) phase: &'static str,
    pub(super) layer: Option<usize>,
}

/// A running recording; dropped, it records no more.
pub struct Recording(());

/// Starts to record; `None` where something records already.
pub fn record() -> Option<Recording> {
    let mut recorder = recorder();
    if recorder.is_some() {
        return None;
    }
    *recorder = Some(Recorder { began: Instant::now(), spans: Vec::new() });
    ON.store(true, Ordering::Relaxed);
    Some(Recording(()))
}

impl Recording {
    /// The spans so far, in the order of their ends. The backend must have been synchronised.
    pub fn take(&self) -> Vec<Span> {
        recorder().as_mut().map(|recorder| std::mem::take(&mut recorder.spans)).unwrap_or_default()
    }

    /// Nanoseconds since it began.
    pub fn now_ns(&self) -> u64 {
        now_ns()
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        ON.store(false, Ordering::Relaxed);
        *recorder() = None;
    }
}

fn recorder() -> MutexGuard<'static, Option<Recorder>> {
    RECORDER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether something records.
#[inline]
pub(super) fn on() -> bool {
    ON.load(Ordering::Relaxed)
}

/// Nanoseconds since the recording began; 0 where there is none.
pub(super) fn now_ns() -> u64 {
    recorder().as_ref().map_or(0, |recorder| recorder.began.elapsed().as_nanos() as u64)
}

/// The phase and layer of this thread.
pub(super) fn place() -> Place {
    PLACE.with_borrow(|place| *place)
}

/// Adds a span that was timed elsewhere.
pub(super) fn push(span: Span) {
    if let Some(recorder) = recorder().as_mut() {
        recorder.spans.push(span);
    }
}

/// A span that ends when this is dropped.
#[must_use = "a span ends when its guard is dropped"]
pub struct Guard(Option<Open>);

struct Open {
    lane: Lane,
    name: &'static str,
    start_ns: u64,
    cost: Cost,
    /// What this thread was in before.
    outer: Place,
}

/// A part of a step.
#[inline]
pub fn phase(name: &'static str) -> Guard {
    open(Lane::Phase, name, |place| *place = Place { phase: name, layer: None }, || Cost::default())
}

/// A layer of the model.
#[inline]
pub fn layer(index: usize) -> Guard {
    open(Lane::Layer, "layer", |place| place.layer = Some(index), || Cost::default())
}

/// An operation of a backend.
#[inline]
pub(super) fn op(name: &'static str, cost: impl FnOnce() -> Cost) -> Guard {
    open(Lane::Op, name, |_| {}, cost)
}

#[inline]
fn open(lane: Lane, name: &'static str, enter: impl FnOnce(&mut Place), cost: impl FnOnce() -> Cost) -> Guard {
    if !on() {
        return Guard(None);
    }
    let outer = place();
    PLACE.with_borrow_mut(enter);
    Guard(Some(Open { lane, name, start_ns: now_ns(), cost: cost(), outer }))
}

impl Drop for Guard {
    fn drop(&mut self) {
        let Some(Open { lane, name, start_ns, cost, outer }) = self.0.take() else { return };
        let Place { phase, layer } = place();
        PLACE.with_borrow_mut(|place| *place = outer);
        let duration_ns = now_ns().saturating_sub(start_ns);
        push(Span { lane, name, phase, layer, start_ns, duration_ns, cost });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_nest_and_know_their_place() {
        drop(phase("before"));
        let recording = record().unwrap();
        assert!(record().is_none(), "one recording in a process");
        {
            let _phase = phase("forward");
            let _layer = layer(3);
            drop(op("linear", || Cost { bytes: 8, flops: 2 }));
        }
        drop(op("copy", Cost::default));
        let mut spans = recording.take();
        // Other tests of this process may run operations meanwhile.
        spans.retain(|s| s.phase == "forward" || s.name == "copy");
        let names: Vec<_> = spans.iter().map(|s| (s.lane, s.name, s.phase, s.layer)).collect();
        let expected = [
            (Lane::Op, "linear", "forward", Some(3)),
            (Lane::Layer, "layer", "forward", Some(3)),
            (Lane::Phase, "forward", "forward", None),
        ];
        // A guard of a layer closes before that of its phase, which has left the layer by then.
        assert_eq!(names[..3], expected);
        assert!(names[3..].contains(&(Lane::Op, "copy", "", None)));
        assert_eq!(spans[0].cost, Cost { bytes: 8, flops: 2 });
        assert!(spans[0].start_ns >= spans[2].start_ns);
        drop(recording);
        assert!(record().is_some());
    }
}
