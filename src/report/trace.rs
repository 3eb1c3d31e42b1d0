//! Chrome trace-event JSON, which `chrome://tracing` and Perfetto open: complete events on named tracks.
//!
//! Format: "Trace Event Format", the JSON Object Format with `traceEvents`; times are microseconds, written from whole
//! nanoseconds, so that nothing is rounded.

use crate::error::{Error, Result};
use serde_json::{Map, Value, json};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// A row of the viewer; the format calls it a thread of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Track {
    /// The group of tracks, for example one a device.
    pub pid: u32,
    /// The track within it, for example one a stream.
    pub tid: u32,
}

/// Writes a trace into a temporary file beside its path, which [`TraceWriter::finish`] renames; dropped before that, it
/// leaves nothing.
///
/// Events of one track must nest or follow each other: viewers cannot draw two that overlap in part.
pub struct TraceWriter {
    path: PathBuf,
    file: BufWriter<tempfile::NamedTempFile>,
    events: u64,
}

impl TraceWriter {
    /// Starts the trace that will be at `path`.
    ///
    /// # Errors
    /// [`Error::Io`] where its directory cannot be written to.
    pub fn create(path: &Path) -> Result<Self> {
        let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = temporary(directory).map_err(Error::io(path, "write"))?;
        let mut writer = Self { path: path.to_owned(), file: BufWriter::new(file), events: 0 };
        writer.write(b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[")?;
        Ok(writer)
    }

    /// Names a group of tracks; groups are shown by ascending pid.
    ///
    /// # Errors
    /// [`Error::Io`] where writing fails, as in all methods that write.
    pub fn name_process(&mut self, pid: u32, name: &str) -> Result<()> {
        self.metadata(Track { pid, tid: 0 }, "process_name", json!({ "name": name }))?;
        self.metadata(Track { pid, tid: 0 }, "process_sort_index", json!({ "sort_index": pid }))
    }

    /// Names a track; tracks of a group are shown by ascending tid.
    pub fn name_track(&mut self, track: Track, name: &str) -> Result<()> {
        self.metadata(track, "thread_name", json!({ "name": name }))?;
        self.metadata(track, "thread_sort_index", json!({ "sort_index": track.tid }))
    }

    /// An event from `start_ns` for `duration_ns`. `category` is one word or several with commas; `args` are shown when
    /// it is selected.
    pub fn complete(
        &mut self,
        track: Track,
        name: &str,
        category: &str,
        start_ns: u64,
        duration_ns: u64,
        args: Map<String, Value>,
    ) -> Result<()> {
        let mut fields = format!(
            "{{\"ph\":\"X\",\"pid\":{},\"tid\":{},\"ts\":{},\"dur\":{},\"name\":{},\"cat\":{}",
            track.pid,
            track.tid,
            microseconds(start_ns),
            microseconds(duration_ns),
            Value::from(name),
            Value::from(category)
        );
        if !args.is_empty() {
            fields += &format!(",\"args\":{}", Value::Object(args));
        }
        fields.push('}');
        self.event(&fields)
    }

    /// Closes the trace and renames it to its path; returns the number of events.
    ///
    /// # Errors
    /// [`Error::Io`] where writing or renaming fails; nothing is left then.
    pub fn finish(mut self) -> Result<u64> {
        self.write(b"\n]}\n")?;
        let file = self.file.into_inner().map_err(|e| Error::io(&self.path, "write")(e.into_error()))?;
        file.persist(&self.path).map_err(|e| Error::io(&self.path, "rename")(e.error))?;
        Ok(self.events)
    }

    fn metadata(&mut self, track: Track, kind: &str, args: Value) -> Result<()> {
        let event = json!({ "ph": "M", "pid": track.pid, "tid": track.tid, "name": kind, "args": args });
        self.event(&event.to_string())
    }

    fn event(&mut self, json: &str) -> Result<()> {
        self.write(if self.events == 0 { b"\n" } else { b",\n" })?;
        self.events += 1;
        self.write(json.as_bytes())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(&self.path, "write"))
    }
}

/// A temporary file with the permissions of an ordinary one.
fn temporary(directory: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    let mut builder = tempfile::Builder::new();
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(directory)
}

/// Nanoseconds as a decimal number of microseconds, without rounding.
fn microseconds(ns: u64) -> String {
    format!("{}.{:03}", ns / 1000, ns % 1000)
}
