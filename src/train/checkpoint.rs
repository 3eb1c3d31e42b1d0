//! Checkpoints: directories that appear atomically.
//!
//! `DIR/checkpoints/step-00000120/` holds `weights.safetensors` (the tensors that have trained so far),
//! `moments.safetensors`, `state.json`, and `manifest.json` with the size and hash of each file. It is written under a
//! temporary name, synced and renamed.

use crate::error::{Error, FileOp, Result};
use crate::io::safetensors::{Safetensors, SafetensorsWriter, TensorSpec};
use crate::io::{json, remove, sync_dir};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Directory of the checkpoints.
pub(super) const CHECKPOINTS: &str = "checkpoints";
/// Directory of the best weights.
pub(super) const BEST: &str = "best";
const MANIFEST: &str = "manifest.json";
const STATE: &str = "state.json";
const PREFIX: &str = "step-";
const UNFINISHED: &str = ".unfinished-";
/// Upper bound on the size of a run's state.
const MAX_JSON_BYTES: u64 = 1 << 28;
/// Expected content of the JSON files, in errors.
const OURS: &str = "a checkpoint of this version of swat";

/// Bytes of the files in a directory tree; 0 where there is none.
pub fn disk_bytes(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| match entry.metadata() {
        Ok(found) if found.is_dir() => disk_bytes(&entry.path()),
        Ok(found) => found.len(),
        Err(_) => 0,
    };
    entries.map(size).sum()
}

/// Checkpoints of a run.
pub(super) struct Checkpoints {
    dir: PathBuf,
}

impl Checkpoints {
    pub(super) fn new(run: &Path, name: &str) -> Self {
        Self { dir: run.join(name) }
    }

    fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("{PREFIX}{step:08}"))
    }

    /// Removes all checkpoints.
    pub(super) fn clear(&self) -> Result<()> {
        remove(&self.dir)
    }

    /// Steps of the existing checkpoints, ascending.
    fn steps(&self) -> Result<Vec<u64>> {
        let mut steps = Vec::new();
        for name in self.names()? {
            steps.extend(name.strip_prefix(PREFIX).and_then(|step| step.parse::<u64>().ok()));
        }
        steps.sort_unstable();
        Ok(steps)
    }

    fn names(&self) -> Result<Vec<String>> {
        if !self.dir.exists() {
            return Ok(Vec::new());
        }
        let entries = fs::read_dir(&self.dir).map_err(Error::io(&self.dir, FileOp::Read))?;
        let names = entries.map(|entry| Ok(entry.map_err(Error::io(&self.dir, FileOp::Read))?.file_name()));
        Ok(names.collect::<Result<Vec<_>>>()?.into_iter().filter_map(|name| name.into_string().ok()).collect())
    }

    /// Starts writing a checkpoint.
    pub(super) fn begin(&self, step: u64) -> Result<CheckpointWriter> {
        let draft = self.dir.join(format!("{UNFINISHED}{step:08}"));
        remove(&draft)?;
        fs::create_dir_all(&draft).map_err(Error::io(&draft, FileOp::Write))?;
        Ok(CheckpointWriter { dir: draft, target: self.path(step), files: BTreeMap::new() })
    }

    /// Opens the checkpoint of a step and verifies its hashes.
    pub(super) fn open(&self, step: u64) -> Result<Checkpoint> {
        let dir = self.path(step);
        let manifest: BTreeMap<String, FileMark> = json::read(&dir.join(MANIFEST), MAX_JSON_BYTES, OURS)?;
        for (name, expected) in &manifest {
            let path = dir.join(name);
            let found = FileMark::of(&path)?;
            if found != *expected {
                return Err(Error::input(
                    path.display().to_string(),
                    format!("{} bytes, blake3 {:.12}", found.bytes, found.blake3),
                    format!("{} bytes, blake3 {:.12}", expected.bytes, expected.blake3),
                ));
            }
        }
        if !manifest.contains_key(STATE) {
            return Err(Error::input(dir.join(MANIFEST).display().to_string(), "no state.json", "one"));
        }
        Ok(Checkpoint { dir })
    }

    /// The newest intact checkpoint; `damaged` is told of each that is not. `None` if there are no checkpoints.
    pub(super) fn newest(&self, mut damaged: impl FnMut(String)) -> Result<Option<Checkpoint>> {
        let steps = self.steps()?;
        for step in steps.iter().rev() {
            match self.open(*step) {
                Ok(saved) => return Ok(Some(saved)),
                Err(why) => damaged(format!("checkpoint of step {step} is damaged and ignored: {why}")),
            }
        }
        if steps.is_empty() {
            return Ok(None);
        }
        Err(Error::failed(
            format!("{}: all {} checkpoints are damaged", self.dir.display(), steps.len()),
            "start again without --resume",
        ))
    }

    /// Removes all checkpoints up to `newest` but the `keep_last` newest and the one of step `also`.
    pub(super) fn prune(&self, newest: u64, keep_last: usize, also: Option<u64>) -> Result<()> {
        let steps: Vec<u64> = self.steps()?.into_iter().filter(|step| *step <= newest).collect();
        for step in steps.iter().rev().skip(keep_last).filter(|step| Some(**step) != also) {
            remove(&self.path(*step))?;
        }
        for name in self.names()?.iter().filter(|name| name.starts_with(UNFINISHED)) {
            remove(&self.dir.join(name))?;
        }
        Ok(())
    }
}

impl Checkpoints {
    /// Removes all but the one of a step.
    pub(super) fn keep_only(&self, step: Option<u64>) -> Result<()> {
        let mut others = self.steps()?.into_iter().filter(|other| Some(*other) != step);
        others.try_for_each(|other| remove(&self.path(other)))
    }
}

/// A checkpoint that is being written.
pub(super) struct CheckpointWriter {
    dir: PathBuf,
    target: PathBuf,
    files: BTreeMap<String, FileMark>,
}

impl CheckpointWriter {
    /// Writes `NAME.safetensors`; `values` writes the tensors in the order of `specs`.
    pub(super) fn tensors(
        &mut self,
        name: &str,
        specs: &[TensorSpec],
        values: impl FnOnce(&mut SafetensorsWriter) -> Result<()>,
    ) -> Result<()> {
        let name = format!("{name}.safetensors");
        let path = self.dir.join(&name);
        let mut writer = SafetensorsWriter::create(&path, specs)?;
        values(&mut writer)?;
        writer.finish()?;
        self.files.insert(name, FileMark::of(&path)?);
        Ok(())
    }

    /// Writes state and manifest and renames the checkpoint into place.
    pub(super) fn commit(mut self, state: &impl serde::Serialize) -> Result<()> {
        let path = self.dir.join(STATE);
        json::write(&path, state)?;
        self.files.insert(STATE.into(), FileMark::of(&path)?);
        json::write(&self.dir.join(MANIFEST), &self.files)?;
        sync_dir(&self.dir)?;
        remove(&self.target)?;
        fs::rename(&self.dir, &self.target).map_err(Error::io(&self.target, FileOp::Rename))?;
        self.target.parent().map_or(Ok(()), sync_dir)
    }
}

/// An intact checkpoint.
pub(super) struct Checkpoint {
    pub(super) dir: PathBuf,
}

impl Checkpoint {
    pub(super) fn state<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        json::read(&self.dir.join(STATE), MAX_JSON_BYTES, OURS)
    }

    /// Opens `NAME.safetensors`, if the checkpoint has it.
    pub(super) fn tensors(&self, name: &str) -> Result<Option<Safetensors>> {
        let path = self.dir.join(format!("{name}.safetensors"));
        path.exists().then(|| Safetensors::open(&path)).transpose()
    }
}

/// Size and hash of a file, as in the manifest.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct FileMark {
    bytes: u64,
    blake3: String,
}

impl FileMark {
    fn of(path: &Path) -> Result<Self> {
        let mut file = fs::File::open(path).map_err(Error::io(path, FileOp::Open))?;
        let mut hasher = blake3::Hasher::new();
        let bytes = std::io::copy(&mut file, &mut hasher).map_err(Error::io(path, FileOp::Read))?;
        Ok(Self { bytes, blake3: hasher.finalize().to_hex().to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::safetensors::Dtype;

    fn save(store: &Checkpoints, step: u64) {
        let mut draft = store.begin(step).unwrap();
        let spec = TensorSpec { name: "w".into(), dtype: Dtype::F32, shape: vec![4] };
        let values = [step as f32; 4];
        draft.tensors("weights", &[spec], |writer| writer.write(bytemuck::cast_slice(&values))).unwrap();
        draft.commit(&step).unwrap();
    }

    fn newest(store: &Checkpoints) -> (Option<u64>, Vec<String>) {
        let mut notes = Vec::new();
        let saved = store.newest(|note| notes.push(note)).unwrap();
        (saved.map(|s| s.state().unwrap()), notes)
    }

    #[test]
    fn the_newest_whole_one_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let store = Checkpoints::new(dir.path(), CHECKPOINTS);
        assert_eq!(newest(&store), (None, vec![]));
        for step in [10, 20, 30] {
            save(&store, step);
        }
        assert_eq!(newest(&store), (Some(30), vec![]));
        // One bit of the weights, then a cut, then a missing file.
        let file = store.path(30).join("weights.safetensors");
        let mut bytes = fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(&file, &bytes).unwrap();
        let (found, notes) = newest(&store);
        assert_eq!(found, Some(20));
        assert!(notes[0].contains("step 30") && notes[0].contains("weights.safetensors"), "{notes:?}");
        fs::write(store.path(20).join(STATE), b"").unwrap();
        assert_eq!(newest(&store).0, Some(10));
        fs::remove_file(store.path(10).join(MANIFEST)).unwrap();
        let all = store.newest(|_| ()).err().unwrap().to_string();
        assert!(all.contains("all 3"), "{all}");
    }

    #[test]
    fn an_unfinished_one_is_not_seen_and_goes_away() {
        let dir = tempfile::tempdir().unwrap();
        let store = Checkpoints::new(dir.path(), CHECKPOINTS);
        save(&store, 1);
        let mut draft = store.begin(2).unwrap();
        draft.tensors("weights", &[], |_| Ok(())).unwrap();
        assert_eq!(newest(&store), (Some(1), vec![]));
        store.prune(1, 1, None).unwrap();
        assert_eq!(store.names().unwrap(), ["step-00000001"]);
    }

    #[test]
    fn pruning_keeps_the_last_and_the_start_of_the_phase() {
        let dir = tempfile::tempdir().unwrap();
        let store = Checkpoints::new(dir.path(), CHECKPOINTS);
        for step in [5, 10, 15, 20] {
            save(&store, step);
        }
        store.prune(20, 2, Some(5)).unwrap();
        assert_eq!(store.steps().unwrap(), [5, 15, 20]);
        // A damaged one from the future does not count.
        store.prune(15, 1, None).unwrap();
        assert_eq!(store.steps().unwrap(), [15, 20]);
    }

    #[test]
    fn writing_a_step_again_replaces_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = Checkpoints::new(dir.path(), CHECKPOINTS);
        save(&store, 7);
        fs::write(store.path(7).join("weights.safetensors"), b"junk").unwrap();
        save(&store, 7);
        assert_eq!(newest(&store), (Some(7), vec![]));
    }
}
