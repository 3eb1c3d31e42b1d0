//! Chrome trace-event JSON, which `chrome://tracing` and Perfetto open: complete events on named tracks.
//!
//! Format: "Trace Event Format", the JSON Object Format with `traceEvents`; times are microseconds, written from whole
//! nanoseconds, so that nothing is rounded.

use serde_json::{Map, Value, json};
use std::fmt::Write as _;

/// A row of the viewer; the format calls it a thread of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Track {
    /// Group of tracks, such as a device.
    pub pid: u32,
    /// Track within the group, such as a stream.
    pub tid: u32,
}

/// A trace in memory. Events of one track must nest or follow each other: viewers cannot draw partial overlaps.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    events: Vec<String>,
}

impl Trace {
    /// Names a group of tracks; groups are shown by ascending pid.
    pub fn name_process(&mut self, pid: u32, name: &str) {
        self.metadata(Track { pid, tid: 0 }, "process_name", json!({ "name": name }));
        self.metadata(Track { pid, tid: 0 }, "process_sort_index", json!({ "sort_index": pid }));
    }

    /// Names a track; tracks of a group are shown by ascending tid.
    pub fn name_track(&mut self, track: Track, name: &str) {
        self.metadata(track, "thread_name", json!({ "name": name }));
        self.metadata(track, "thread_sort_index", json!({ "sort_index": track.tid }));
    }

    /// Adds an event from `start_ns` for `duration_ns`. `category` is one word, or several separated by commas; `args`
    /// are shown when the event is selected.
    pub fn complete(
        &mut self,
        track: Track,
        name: &str,
        category: &str,
        (start_ns, duration_ns): (u64, u64),
        args: Map<String, Value>,
    ) {
        let (pid, tid, name, category) = (track.pid, track.tid, Value::from(name), Value::from(category));
        let (ts, dur) = (microseconds(start_ns), microseconds(duration_ns));
        let mut event = format!(
            "{{\"ph\":\"X\",\"pid\":{pid},\"tid\":{tid},\"ts\":{ts},\"dur\":{dur},\"name\":{name},\"cat\":{category}"
        );
        if !args.is_empty() {
            let _ = write!(event, ",\"args\":{}", Value::Object(args));
        }
        self.events.push(event + "}");
    }

    /// Number of events, those that name tracks included.
    pub fn events(&self) -> usize {
        self.events.len()
    }

    /// The trace as a JSON document.
    pub fn json(&self) -> String {
        format!("{{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n{}\n]}}\n", self.events.join(",\n"))
    }

    fn metadata(&mut self, track: Track, kind: &str, args: Value) {
        let event = json!({ "ph": "M", "pid": track.pid, "tid": track.tid, "name": kind, "args": args });
        self.events.push(event.to_string());
    }
}

/// Nanoseconds as a decimal number of microseconds, not rounded.
fn microseconds(ns: u64) -> String {
    format!("{}.{:03}", ns / 1000, ns % 1000)
}
