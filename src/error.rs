//! The one error type. Every variant says what happened, where, and what to do about it.

use std::path::{Path, PathBuf};

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Anything that can go wrong. [`Error::exit_code`] maps it to the process's exit code.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line, configuration or an input file is wrong. Exit code 2.
    #[error("{place}: found {found}; expected {expected}")]
    Input {
        /// File, line or field, for example `train.jsonl:17` or `config.json: rope_scaling.type`.
        place: String,
        /// What is there.
        found: String,
        /// What should be there, or what to do.
        expected: String,
    },
    /// A valid input that this engine does not handle, refused by name. Exit code 2.
    #[error("{place}: {what} is not supported; {help}")]
    Unsupported {
        /// File and field.
        place: String,
        /// The feature, by its own name.
        what: String,
        /// What works instead.
        help: String,
    },
    /// An output that is already there. Exit code 2.
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
    /// The operating system refused a file operation. Exit code 1, or 2 where an input is missing.
    #[error("{path}: cannot {doing}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// A verb: `read`, `write`, `rename`.
        doing: &'static str,
        /// The system's reason.
        source: std::io::Error,
    },
    /// More memory is needed than there is. Exit code 1.
    #[error("{what} needs {planned_bytes} bytes and {free_bytes} are free; {help}")]
    Memory {
        /// What was being allocated.
        what: String,
        /// What it needs.
        planned_bytes: u64,
        /// What there is.
        free_bytes: u64,
        /// What would make it fit.
        help: String,
    },
    /// The device or its driver failed. Exit code 1; 2 where the requested device does not exist.
    #[error("device {device}: {what}; {help}")]
    Device {
        /// `cpu`, `cuda:0`.
        device: String,
        /// What happened.
        what: String,
        /// What to do.
        help: String,
    },
    /// The work itself failed while running. Exit code 1.
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

    /// For `map_err` on file operations: `File::open(p).map_err(Error::io(p, "open"))`.
    pub fn io(path: &Path, doing: &'static str) -> impl FnOnce(std::io::Error) -> Self + use<> {
        let path = path.to_owned();
        move |source| Self::Io { path, doing, source }
    }

    /// 1: failed while running. 2: the command line, configuration or input is wrong.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Input { .. } | Self::Unsupported { .. } | Self::Exists { .. } | Self::InUse { .. } => 2,
            Self::Io { doing: "open" | "read", .. } => 2,
            _ => 1,
        }
    }
}
