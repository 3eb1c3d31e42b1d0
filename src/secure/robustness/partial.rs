//! Finished cells of a map in the making: a JSONL file beside the output, so that an interrupted run goes on.
//!
//! The first line says what run it belongs to; a file of any other run, or a damaged one, is begun anew. A last line that
//! was cut off is dropped.

use super::map::{CellRobustness, EpsilonPoint};
use crate::error::{Error, Result};
use crate::io::{json, write_atomic};
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};

/// Far above any map.
const MOST_BYTES: u64 = 1 << 28;

/// The first line.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Header {
    /// blake3 of everything that decides the results.
    pub(crate) run: String,
    pub(crate) epsilon: f32,
    pub(crate) epsilon_sweep: Vec<EpsilonPoint>,
}

/// Any other line.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Done {
    pub(crate) cell: CellRobustness,
    pub(crate) seconds: f64,
}

/// The file; without a path nothing is kept.
pub(crate) struct Partial {
    path: Option<PathBuf>,
}

impl Partial {
    pub(crate) fn new(path: Option<&Path>) -> Self {
        Self { path: path.map(Path::to_owned) }
    }

    /// What an earlier run with the same hash left.
    pub(crate) fn read(&self, run: &str) -> Option<(Header, Vec<Done>)> {
        let file = File::open(self.path.as_ref()?).ok()?;
        let mut lines = BufReader::new(file.take(MOST_BYTES)).lines();
        let header: Header = serde_json::from_str(&lines.next()?.ok()?).ok()?;
        let cells = lines.map_while(|line| serde_json::from_str(&line.ok()?).ok());
        (header.run == run).then(|| (header, cells.collect()))
    }

    /// Begins the file anew with what is known.
    pub(crate) fn begin(&self, header: &Header, done: &[Done]) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let mut text = json::line(header)?;
        for cell in done {
            text += &json::line(cell)?;
        }
        write_atomic(path, text.as_bytes())
    }

    /// Adds finished cells.
    pub(crate) fn append(&self, done: &[Done]) -> Result<()> {
        let Some(path) = &self.path else { return Ok(()) };
        let mut file = OpenOptions::new().append(true).open(path).map_err(Error::io(path, "write"))?;
        for cell in done {
            file.write_all(json::line(cell)?.as_bytes()).map_err(Error::io(path, "write"))?;
        }
        file.sync_data().map_err(Error::io(path, "write"))
    }

    /// Removes the file once the map is saved.
    pub(crate) fn remove(path: &Path) -> Result<()> {
        match fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(path, "remove")(e)),
            _ => Ok(()),
        }
    }
}
