//! The error type of the crate. Every variant says what happened, where, and what to do.

use std::fmt;
use std::path::{Path, PathBuf};

/// Result with [`Error`] by default.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A file operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum FileOp {
    Open,
    Read,
    Map,
    Release,
    Resolve,
    Lock,
    Create,
    Write,
    Rename,
    Remove,
}

impl fmt::Display for FileOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

fn signal_name(signal: i32) -> String {
    match signal {
        1 => "SIGHUP".into(),
        2 => "SIGINT".into(),
        10 => "SIGUSR1".into(),
        12 => "SIGUSR2".into(),
        15 => "SIGTERM".into(),
        24 => "SIGXCPU".into(),
        other => format!("signal {other}"),
    }
}

/// An error; [`Error::exit_code`] is the exit code of the process.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Invalid command line, configuration or input file. Exit code 2.
    #[error("{place}: found {found}; expected {expected}")]
    Input {
        /// File, line or field, for example `train.jsonl:17` or `config.json: rope_scaling.type`.
        place: String,
        /// What is there.
        found: String,
        /// What should be there, or what to do.
        expected: String,
    },
    /// A valid input with a feature that the engine lacks. Exit code 2.
    #[error("{place}: {what} is not supported; {help}")]
    Unsupported {
        /// File and field.
        place: String,
        /// The feature.
        what: String,
        /// What to use instead.
        help: String,
    },
    /// An output that exists. Exit code 2.
    #[error("{path}: already exists; choose another --out, or pass --force to replace it")]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// An output directory that another process writes to. Exit code 2.
    #[error("{path}: another swat process is writing here; wait for it, or choose another --out")]
    InUse {
        /// The output.
        path: PathBuf,
    },
    /// A failed file operation. Exit code 1; 2 for reading and opening inputs.
    #[error("{path}: cannot {doing}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The operation.
        doing: FileOp,
        /// Cause reported by the operating system.
        source: std::io::Error,
    },
    /// Not enough memory. Exit code 1.
    #[error("{what} needs {planned_bytes} bytes and {free_bytes} are free; {help}")]
    Memory {
        /// What the memory is for.
        what: String,
        /// What it needs.
        planned_bytes: u64,
        /// What there is.
        free_bytes: u64,
        /// How to make it fit.
        help: String,
    },
    /// A device or driver failed, or the requested device does not exist. Exit code 1.
    #[error("device {device}: {what}; {help}")]
    Device {
        /// `cpu`, `cuda:0`.
        device: String,
        /// What happened.
        what: String,
        /// What to do.
        help: String,
    },
    /// A signal ended the run; its work is saved. Exit code 128 + the signal's number.
    #[error(
        "stopped by {} after step {step}; the run is saved: `swat tune` continues it with --resume, `swat run`, `swat \
         secure` and `swat demo` when they are started again",
        signal_name(*.signal)
    )]
    Interrupted {
        /// Number of the signal.
        signal: i32,
        /// Steps that are saved.
        step: u64,
    },
    /// A model exceeds the limits that it was checked against. Exit code 3.
    #[error("not held: {what}; {help}")]
    NotHeld {
        /// The gates that failed.
        what: String,
        /// What to try.
        help: String,
    },
    /// The computation failed. Exit code 1.
    #[error("{what}; {help}")]
    Failed {
        /// What happened.
        what: String,
        /// What to do.
        help: String,
    },
}

impl Error {
    /// An [`Error::Input`].
    pub fn input(place: impl Into<String>, found: impl Into<String>, expected: impl Into<String>) -> Self {
        Self::Input { place: place.into(), found: found.into(), expected: expected.into() }
    }

    /// An [`Error::Unsupported`].
    pub fn unsupported(place: impl Into<String>, what: impl Into<String>, help: impl Into<String>) -> Self {
        Self::Unsupported { place: place.into(), what: what.into(), help: help.into() }
    }

    /// An [`Error::Failed`].
    pub fn failed(what: impl Into<String>, help: impl Into<String>) -> Self {
        Self::Failed { what: what.into(), help: help.into() }
    }

    /// The same error about an input at `place`, such as a line of a file, which is put before its own place; an empty one adds nothing.
    pub fn at(self, at: &str) -> Self {
        match self {
            same if at.is_empty() => same,
            Self::Input { place, found, expected } => Self::input(format!("{at}: {place}"), found, expected),
            Self::Unsupported { place, what, help } => Self::unsupported(format!("{at}: {place}"), what, help),
            other => other,
        }
    }

    /// Adapter for `map_err` on file operations: `File::open(p).map_err(Error::io(p, FileOp::Open))`.
    pub fn io(path: &Path, doing: FileOp) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { path, doing, source }
    }

    /// Exit code of the process: 2 for invalid command lines, configuration and inputs, 3 for a verdict of `swat
    /// check` that is not held, 128 + N for signal N, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Input { .. } | Self::Unsupported { .. } | Self::Exists { .. } | Self::InUse { .. } => 2,
            Self::Io { doing: FileOp::Open | FileOp::Read, .. } => 2,
            Self::NotHeld { .. } => 3,
            Self::Interrupted { signal, .. } => u8::try_from(128 + signal).unwrap_or(1),
            _ => 1,
        }
    }
}
