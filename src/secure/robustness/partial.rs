//! Finished cells of a map in a JSONL file: the checkpoint of an unfinished map, beside its output, and the part of a map
//! that one shard computes ([`super::part`]).
//!
//! The first line identifies the run; a checkpoint of another run, or a damaged one, is replaced. An incomplete last line
//! is dropped.

use super::map::{CellRobustness, EpsilonPoint};
use super::part::Part;
use crate::error::{Error, FileOp, Result};
use crate::io::{json, remove, write_atomic};
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

/// Upper bound on the size of the file.
pub(super) const MAX_BYTES: u64 = 1 << 28;

/// The first line.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Header {
    /// Hash of everything that determines the results.
    pub(crate) run: String,
    pub(crate) epsilon: f32,
    pub(crate) epsilon_sweep: Vec<EpsilonPoint>,
    /// Only in the part of a shard.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) part: Option<Box<Part>>,
}

/// Any other line.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Done {
    pub(crate) cell: CellRobustness,
    pub(crate) seconds: f64,
}

/// The file; a no-op without a path.
pub(crate) struct Partial {
    path: Option<PathBuf>,
}

impl Partial {
    /// The checkpoint of a map that is saved at `out`: `map.json.partial.jsonl`.
    pub(crate) fn new(out: Option<&Path>) -> Self {
        let path = out.map(|out| {
            let mut name = out.as_os_str().to_owned();
            name.push(".partial.jsonl");
            name.into()
        });
        Self { path }
    }

    /// The part of a map that is saved at `path` itself.
    pub(crate) fn at(path: &Path) -> Self {
        Self { path: Some(path.to_owned()) }
    }

    /// Header and cells of an earlier run with the same hash.
    pub(crate) fn read(&self, run: &str) -> Option<(Header, Vec<Done>)> {
        let file = File::open(self.path.as_ref()?).ok()?;
        let mut lines = BufReader::new(file.take(MAX_BYTES)).lines();
        let header: Header = serde_json::from_str(&lines.next()?.ok()?).ok()?;
        let cells = lines.map_while(|line| serde_json::from_str(&line.ok()?).ok());
        (header.run == run).then(|| (header, cells.collect()))
    }

    /// Starts the file with the known cells.
    pub(crate) fn begin(&self, header: &Header, done: &[Done]) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let mut text = json::line(header)?;
        for cell in done {
            text += &json::line(cell)?;
        }
        write_atomic(path, text.as_bytes())
    }

    /// Appends finished cells.
    pub(crate) fn append(&self, done: &[Done]) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let mut file = OpenOptions::new().append(true).open(path).map_err(Error::io(path, FileOp::Write))?;
        for cell in done {
            file.write_all(json::line(cell)?.as_bytes()).map_err(Error::io(path, FileOp::Write))?;
        }
        file.sync_data().map_err(Error::io(path, FileOp::Write))
    }

    /// Removes the file.
    pub(crate) fn remove(&self) -> Result<()> {
        self.path.as_deref().map_or(Ok(()), remove)
    }
}
