//! What swat wrote into a directory: the record by which a directory may be replaced without losing anything else.

use super::json;
use super::names::{CONFIG, SIDE_FILES};
use crate::error::{Error, FileOp, Result};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Name of the record in an output directory.
pub(super) const RECORD: &str = ".swat.json";
const FORMAT: &str = "swat.output/1";
/// Names that swat keeps in a directory that it writes in place, and what a file system puts into its root.
const SERVICE: [&str; 5] =
    [RECORD, super::output::LOCK, super::output::PARTIAL, super::unfinished::INSIDE, "lost+found"];
/// Whether a file is the temporary file of a record, left by a run that was killed while it wrote it.
fn is_unfinished_record(name: &str) -> bool {
    name.strip_prefix('.').and_then(|rest| rest.strip_prefix(RECORD)).is_some_and(|rest| rest.ends_with(".partial"))
}

/// Files up to this size are hashed as a whole, larger ones by pieces.
const MAX_HASHED_BYTES: u64 = 1 << 20;
/// Pieces of a larger file, evenly from its first byte to its last, and their length.
const PIECES: u64 = 64;
const PIECE_BYTES: u64 = 1 << 14;
const MAX_RECORD_BYTES: u64 = 1 << 24;
/// Most names in an error.
const NAMED: usize = 3;
/// Deepest directory that is searched.
const MAX_DEPTH: usize = 8;

/// Whether versions without a record wrote a file of this name into a tuned model, weights aside.
fn is_of_tuned_model(name: &str) -> bool {
    [CONFIG, "metrics.jsonl", "updates.json", "tune.json"].contains(&name) || SIDE_FILES.contains(&name)
}

/// Size of a file, and the hash of its content or, of a large one, of [`PIECES`] of it: the same model trained further has
/// the same size.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Mark {
    bytes: u64,
    /// None of a large file in the records of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    blake3: Option<String>,
}

/// The record: files by their path from the directory, with `/`. A file without a mark may have any content.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Record {
    format: String,
    files: BTreeMap<String, Option<Mark>>,
}

impl Record {
    /// Of what is in a directory now.
    pub(super) fn of(dir: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        for name in walk(dir)?.files {
            let mark = Mark::of(&dir.join(&name))?;
            files.insert(name, Some(mark));
        }
        Ok(Self { format: FORMAT.into(), files })
    }

    /// Both records' files, of any content: during a replacement in place.
    pub(super) fn union(&self, other: &Self) -> Self {
        let names = self.files.keys().chain(other.files.keys());
        Self { format: FORMAT.into(), files: names.map(|name| (name.clone(), None)).collect() }
    }

    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.files.keys().map(String::as_str)
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        json::write(&dir.join(RECORD), self)
    }
}

impl Mark {
    fn of(path: &Path) -> Result<Self> {
        let read = |e| Error::io(path, FileOp::Read)(e);
        let mut file = fs::File::open(path).map_err(Error::io(path, FileOp::Open))?;
        let bytes = file.metadata().map_err(read)?.len();
        let mut content = Vec::new();
        if bytes <= MAX_HASHED_BYTES {
            file.read_to_end(&mut content).map_err(read)?;
        } else {
            for piece in 0..PIECES {
                // The last one ends with the file; no file is so large that this overflows.
                file.seek(SeekFrom::Start((bytes - PIECE_BYTES) * piece / (PIECES - 1))).map_err(read)?;
                file.by_ref().take(PIECE_BYTES).read_to_end(&mut content).map_err(read)?;
            }
        }
        Ok(Self { bytes, blake3: Some(blake3::hash(&content).to_hex()[..32].to_owned()) })
    }

    /// Whether a file with the mark `now` is the one that was recorded.
    fn is_of(&self, now: &Self) -> bool {
        self.bytes == now.bytes && (self.blake3.is_none() || self.blake3 == now.blake3)
    }
}

/// A directory that swat may replace: the files that it wrote.
pub(super) fn owned(dir: &Path) -> Result<Record> {
    let found = walk(dir)?;
    let mut foreign: Vec<String> = found.other.iter().map(|name| not_ours(name)).collect();
    let record = match read(dir) {
        Some(record) => record,
        None if is_tuned(dir) => {
            let known = found.files.iter().filter(|name| is_of_tuned_model(name) || is_weights(name));
            Record { format: FORMAT.into(), files: known.map(|name| (name.clone(), None)).collect() }
        }
        None => Record::default(),
    };
    for name in &found.files {
        match record.files.get(name) {
            None => foreign.push(not_ours(name)),
            Some(Some(mark)) if !mark.is_of(&Mark::of(&dir.join(name))?) => {
                foreign.push(format!("`{}`, which has changed since swat wrote it", name.escape_debug()));
            }
            Some(_) => {}
        }
    }
    // A directory that a recorded file lies in is swat's own.
    let folders: BTreeSet<&str> = record.files.keys().flat_map(|name| ancestors(name)).collect();
    for name in found.folders.iter().filter(|name| !folders.contains(name.as_str())) {
        foreign.push(format!("the directory `{}`, which swat did not write", name.escape_debug()));
    }
    refuse(dir, foreign).map(|()| record)
}

/// Checks the temporary directory of a version without a record, which holds files of a model and nothing else.
pub(super) fn check_model_files(dir: &Path) -> Result<()> {
    let found = walk(dir)?;
    let files = found.files.iter().filter(|name| !is_of_tuned_model(name) && !is_weights(name));
    refuse(dir, files.chain(&found.folders).chain(&found.other).map(|name| not_ours(name)).collect())
}

/// Writes the record of a directory of a model's files that an earlier version is known to have written.
pub(super) fn adopt(dir: &Path) -> Result<()> {
    if read(dir).is_some() {
        return Ok(());
    }
    check_model_files(dir)?;
    Record::of(dir)?.write(dir)
}

fn not_ours(name: &str) -> String {
    format!("`{}`, which swat did not write", name.escape_debug())
}

fn refuse(dir: &Path, foreign: Vec<String>) -> Result<()> {
    if foreign.is_empty() {
        return Ok(());
    }
    let more = foreign.len().saturating_sub(NAMED);
    let mut names: Vec<String> = foreign.into_iter().take(NAMED).collect();
    if more > 0 {
        names.push(format!("{more} more"));
    }
    let expected = "a new or empty directory, or one that holds only what swat wrote; move the rest away";
    Err(Error::input(dir.display().to_string(), names.join(", "), expected))
}

/// Removes the recorded files, and then the directories that are empty; whatever else has appeared meanwhile stays.
pub(super) fn remove_owned(dir: &Path, record: &Record) -> Result<()> {
    for name in record.names().chain([RECORD]) {
        let path = dir.join(name);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(Error::io(&path, FileOp::Remove)(e)),
            _ => {}
        }
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if is_unfinished_record(&entry.file_name().to_string_lossy())
            && entry.file_type().is_ok_and(|kind| kind.is_file())
        {
            fs::remove_file(entry.path()).map_err(Error::io(&entry.path(), FileOp::Remove))?;
        }
    }
    let mut folders: Vec<&str> = record.names().flat_map(ancestors).collect();
    folders.sort_by_key(|name| std::cmp::Reverse(name.len()));
    for folder in folders {
        let _ = fs::remove_dir(dir.join(folder));
    }
    Ok(())
}

/// Checks that an empty directory can be replaced by a rename: a run that wrote in place, where it was a mount point, may
/// have left its work in it.
pub(super) fn check_renamable(dir: &Path) -> Result<()> {
    let left = SERVICE.iter().filter(|name| **name != RECORD && dir.join(name).exists());
    refuse(dir, left.map(|name| format!("`{name}`, left by a run that wrote in place")).collect())
}

/// Removes the record of a directory whose files are gone.
pub(super) fn remove_record(dir: &Path) -> Result<()> {
    let path = dir.join(RECORD);
    if path.exists() { fs::remove_file(&path).map_err(Error::io(&path, FileOp::Remove)) } else { Ok(()) }
}

/// Whether a directory is empty, service files aside.
pub(super) fn is_empty(dir: &Path) -> Result<bool> {
    let found = walk(dir)?;
    Ok(found.files.is_empty() && found.other.is_empty() && found.folders.is_empty())
}

/// The directories above a path with `/`: `a` and `a/b` of `a/b/c`.
fn ancestors(name: &str) -> impl Iterator<Item = &str> {
    name.match_indices('/').map(move |(at, _)| &name[..at])
}

/// The record in a directory. A directory may come from an archive that somebody else made: a record with a name that
/// leads out of it is none.
fn read(dir: &Path) -> Option<Record> {
    let record: Record = json::read(&dir.join(RECORD), MAX_RECORD_BYTES, "a record of swat").ok()?;
    let is_inside = |name: &str| !name.contains('\\') && name.split('/').all(|part| !["", ".", ".."].contains(&part));
    (record.format == FORMAT && record.names().all(is_inside)).then_some(record)
}

/// Whether a directory without a record is a model that an earlier version tuned, by its `tune.json`.
fn is_tuned(dir: &Path) -> bool {
    let record: Option<Value> = json::read(&dir.join("tune.json"), MAX_RECORD_BYTES, "JSON").ok();
    record.is_some_and(|record| ["config", "job", "summary"].iter().all(|key| record.get(key).is_some()))
}

/// `model.safetensors`, its shards and their index.
fn is_weights(name: &str) -> bool {
    let shard = || name.strip_prefix("model-")?.strip_suffix(".safetensors");
    let numbers = |text: &str| text.split("-of-").all(|n| n.len() == 5 && n.bytes().all(|b| b.is_ascii_digit()));
    ["model.safetensors", "model.safetensors.index.json"].contains(&name) || shard().is_some_and(numbers)
}

/// Contents of a directory by their path from it.
#[derive(Default)]
struct Found {
    files: Vec<String>,
    folders: Vec<String>,
    /// Links, sockets, names that are not UTF-8, and what lies too deep.
    other: Vec<String>,
}

fn walk(dir: &Path) -> Result<Found> {
    let mut found = Found::default();
    let mut left = vec![(PathBuf::new(), 0)];
    while let Some((at, depth)) = left.pop() {
        let here = dir.join(&at);
        for entry in fs::read_dir(&here).map_err(Error::io(&here, FileOp::Read))? {
            let entry = entry.map_err(Error::io(&here, FileOp::Read))?;
            let kind = entry.file_type().map_err(Error::io(&here, FileOp::Read))?;
            let name = match entry.file_name().into_string() {
                Ok(name) => name,
                Err(name) => {
                    found.other.push(name.to_string_lossy().into_owned());
                    continue;
                }
            };
            if depth == 0 && (SERVICE.contains(&name.as_str()) || kind.is_file() && is_unfinished_record(&name)) {
                continue;
            }
            let path = at.join(&name);
            let shown = path.to_string_lossy().replace('\\', "/");
            if kind.is_file() {
                found.files.push(shown);
            } else if kind.is_dir() && depth < MAX_DEPTH {
                found.folders.push(shown);
                left.push((path, depth + 1));
            } else {
                found.other.push(shown);
            }
        }
    }
    found.files.sort();
    found.folders.sort();
    found.other.sort();
    Ok(found)
}
