//! Checkpoints: directories that appear atomically.
//!
//! `DIR/checkpoints/step-00000120/` holds `weights.safetensors` (the tensors that have trained so far),
//! `moments.safetensors` or, where several ranks write, `moments-RANK-of-N.safetensors` of each, `state.json`, and
//! `manifest.json` with the size and hash of each file. It is written under a temporary name, synced and renamed.

use super::access::Access;
use super::parts::{TensorFiles, part_name};
use crate::backend::Backend;
use crate::error::{Error, FileOp, Result};
use crate::group::{Group, Share, from_each, from_first};
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
/// Prefix of what is not finished, and removed when a run begins or has saved the next checkpoint.
pub(super) const UNFINISHED: &str = ".unfinished-";
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

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    fn path(&self, step: u64) -> PathBuf {
        self.dir.join(format!("{PREFIX}{step:08}"))
    }

    /// The directory of a checkpoint that is being written.
    fn draft(&self, step: u64) -> PathBuf {
        self.dir.join(format!("{UNFINISHED}{step:08}"))
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
        let draft = self.draft(step);
        remove(&draft)?;
        fs::create_dir_all(&draft).map_err(Error::io(&draft, FileOp::Write))?;
        Ok(CheckpointWriter { dir: draft, target: self.path(step), files: BTreeMap::new(), committed: false })
    }

    /// Writes `NAME.safetensors` into the checkpoint of a step that another rank has begun; see
    /// [`CheckpointWriter::tensors`].
    pub(super) fn tensors(
        &self,
        step: u64,
        name: &str,
        specs: &[TensorSpec],
        values: impl FnOnce(&mut SafetensorsWriter) -> Result<()>,
    ) -> Result<FileMark> {
        let dir = self.draft(step);
        let (_, mark) = write_tensors(&dir, name, specs, values)?;
        sync_dir(&dir)?;
        Ok(mark)
    }

    /// Opens the checkpoint of a step and verifies its hashes.
    pub(super) fn open(&self, step: u64) -> Result<Checkpoint> {
        self.open_as(step, Share::WHOLE)
    }

    /// As [`Checkpoints::open`] by one of several ranks, each of which verifies every `size`-th file.
    fn open_as(&self, step: u64, share: Share) -> Result<Checkpoint> {
        let dir = self.path(step);
        let place = dir.join(MANIFEST);
        let files: BTreeMap<String, FileMark> = json::read(&place, MAX_JSON_BYTES, OURS)?;
        if let Some(name) = files.keys().find(|name| Path::new(name).file_name() != Some(name.as_ref())) {
            let found = format!("`{}`", name.escape_debug());
            return Err(Error::input(place.display().to_string(), found, "names of files beside it"));
        }
        for (name, expected) in files.iter().skip(share.rank).step_by(share.size) {
            expected.verify(&dir.join(name))?;
        }
        if !files.contains_key(STATE) {
            return Err(Error::input(place.display().to_string(), "no state.json", "one"));
        }
        Ok(Checkpoint { dir, files })
    }

    /// The newest intact checkpoint, on the ranks that have access to it; `damaged` is told of each that is not. `None` if
    /// there are no checkpoints.
    pub(super) fn newest<B: Backend>(
        &self,
        access: Access,
        group: &dyn Group<B>,
        mut damaged: impl FnMut(String),
    ) -> Result<Option<Checkpoint>> {
        let steps = from_first(group, || self.steps())?;
        let mut newest = None;
        for step in steps.iter().rev() {
            let own = match (access, group.share()) {
                (Access::Each, share) => self.open_as(*step, share).map(Some),
                (Access::First, Share { rank: 0, .. }) => self.open(*step).map(Some),
                (Access::First, _) => Ok(None),
            };
            let told = own.as_ref().map(|_| ()).map_err(Error::to_string);
            match from_each(group, &told)?.into_iter().find_map(Result::err) {
                None => return own,
                Some(why) => {
                    damaged(format!("checkpoint of step {step} is damaged and ignored: {why}"));
                    newest.get_or_insert(why);
                }
            }
        }
        let Some(why) = newest else { return Ok(None) };
        Err(Error::failed(
            format!("{}: all {} checkpoints are damaged; the newest: {why}", self.dir.display(), steps.len()),
            "put the files back as they were, or start again without --resume",
        ))
    }

    /// Removes all checkpoints up to `newest` but the `keep_last` newest and the one of step `also`.
    pub(super) fn prune(&self, newest: u64, keep_last: usize, also: Option<u64>) -> Result<()> {
        let steps: Vec<u64> = self.steps()?.into_iter().filter(|step| *step <= newest).collect();
        for step in steps.iter().rev().skip(keep_last).filter(|step| Some(**step) != also) {
            remove(&self.path(*step))?;
        }
        self.remove_unfinished()
    }

    /// Removes what was begun and never finished.
    pub(super) fn remove_unfinished(&self) -> Result<()> {
        let names = self.names()?;
        names.iter().filter(|name| name.starts_with(UNFINISHED)).try_for_each(|name| remove(&self.dir.join(name)))
    }

    /// Removes all but the one of a step.
    pub(super) fn keep_only(&self, step: Option<u64>) -> Result<()> {
        let mut others = self.steps()?.into_iter().filter(|other| Some(*other) != step);
        others.try_for_each(|other| remove(&self.path(other)))
    }
}

/// A checkpoint that is being written; it is removed where it is dropped before [`CheckpointWriter::commit`].
pub(super) struct CheckpointWriter {
    dir: PathBuf,
    target: PathBuf,
    files: BTreeMap<String, FileMark>,
    committed: bool,
}

impl CheckpointWriter {
    /// Writes `NAME.safetensors`; `values` writes the tensors in the order of `specs`.
    pub(super) fn tensors(
        &mut self,
        name: &str,
        specs: &[TensorSpec],
        values: impl FnOnce(&mut SafetensorsWriter) -> Result<()>,
    ) -> Result<()> {
        let (file, mark) = write_tensors(&self.dir, name, specs, values)?;
        self.files.insert(file, mark);
        Ok(())
    }

    /// Adds `NAME.safetensors`, which another rank has written.
    pub(super) fn add(&mut self, name: &str, mark: FileMark) -> Result<()> {
        let file = file_name(name);
        mark.check_size(&self.dir.join(&file))?;
        self.files.insert(file, mark);
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
        self.committed = true;
        self.target.parent().map_or(Ok(()), sync_dir)
    }
}

impl Drop for CheckpointWriter {
    fn drop(&mut self) {
        if !self.committed {
            // What is left, the next run removes.
            let _ = remove(&self.dir);
        }
    }
}

fn file_name(name: &str) -> String {
    format!("{name}.safetensors")
}

/// Writes `NAME.safetensors` into a directory; returns the name of the file and its mark.
fn write_tensors(
    dir: &Path,
    name: &str,
    specs: &[TensorSpec],
    values: impl FnOnce(&mut SafetensorsWriter) -> Result<()>,
) -> Result<(String, FileMark)> {
    let file = file_name(name);
    let path = dir.join(&file);
    let mut writer = SafetensorsWriter::create(&path, specs)?;
    values(&mut writer)?;
    writer.finish()?;
    let mark = FileMark::of(&path)?;
    Ok((file, mark))
}

/// An intact checkpoint.
pub(super) struct Checkpoint {
    pub(super) dir: PathBuf,
    files: BTreeMap<String, FileMark>,
}

impl Checkpoint {
    pub(super) fn state<T: serde::de::DeserializeOwned>(&self) -> Result<T> {
        json::read(&self.dir.join(STATE), MAX_JSON_BYTES, OURS)
    }

    /// Opens `NAME.safetensors`, if the checkpoint has it.
    pub(super) fn tensors(&self, name: &str) -> Result<Option<Safetensors>> {
        let path = self.dir.join(file_name(name));
        path.exists().then(|| Safetensors::open(&path)).transpose()
    }

    /// The files of its moments, of which so many ranks have written one each; 1 = `moments.safetensors`.
    pub(super) fn moments(&self, parts: usize) -> Result<TensorFiles> {
        let path = |rank: usize| {
            let file = file_name(&part_name(Share { rank, size: parts }));
            if self.files.contains_key(&file) {
                return Ok(self.dir.join(file));
            }
            let place = self.dir.join(MANIFEST).display().to_string();
            Err(Error::input(place, format!("no {file}"), format!("moments in {parts} files, as state.json says")))
        };
        Ok(TensorFiles::new((0..parts).map(path).collect::<Result<_>>()?))
    }
}

/// Size and hash of a file, as in the manifest.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct FileMark {
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

    /// Checks that there is a file of this size.
    fn check_size(&self, path: &Path) -> Result<()> {
        let found = fs::metadata(path).map_err(Error::io(path, FileOp::Open))?;
        let place = path.display().to_string();
        match (found.is_file(), found.len()) {
            (true, bytes) if bytes == self.bytes => Ok(()),
            (true, bytes) => Err(Error::input(place, format!("{bytes} bytes"), format!("{} bytes", self.bytes))),
            (false, _) => Err(Error::input(place, "no regular file", format!("one of {} bytes", self.bytes))),
        }
    }

    /// Checks a file, its size first.
    fn verify(&self, path: &Path) -> Result<()> {
        self.check_size(path)?;
        let found = Self::of(path)?;
        if found == *self {
            return Ok(());
        }
        Err(Error::input(
            path.display().to_string(),
            format!("{} bytes, blake3 {:.12}", found.bytes, found.blake3),
            format!("{} bytes, blake3 {:.12}", self.bytes, self.blake3),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::group::Alone;
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
        let saved = store.newest(Access::First, &Alone as &dyn Group<Cpu>, |note| notes.push(note)).unwrap();
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
        let all = store.newest(Access::First, &Alone as &dyn Group<Cpu>, |_| ()).err().unwrap().to_string();
        assert!(all.contains("all 3") && all.contains("weights.safetensors"), "{all}");
    }

    /// A manifest is not trusted: it names files of its directory alone, and no device is read as if it were a file.
    #[test]
    fn a_manifest_leads_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let store = Checkpoints::new(dir.path(), CHECKPOINTS);
        for name in ["/dev/zero", "../weights.safetensors", "..", ""] {
            save(&store, 3);
            let path = store.path(3).join(MANIFEST);
            let mut files: BTreeMap<String, FileMark> = json::read(&path, MAX_JSON_BYTES, OURS).unwrap();
            files.insert(name.into(), FileMark { bytes: 0, blake3: String::new() });
            json::write(&path, &files).unwrap();
            let error = store.open(3).err().unwrap().to_string();
            assert!(error.contains("manifest.json: found `") && error.contains("files beside it"), "{error}");
        }
        save(&store, 3);
        fs::create_dir(store.path(3).join("folder")).unwrap();
        let path = store.path(3).join(MANIFEST);
        let mut files: BTreeMap<String, FileMark> = json::read(&path, MAX_JSON_BYTES, OURS).unwrap();
        files.insert("folder".into(), FileMark { bytes: 0, blake3: String::new() });
        json::write(&path, &files).unwrap();
        let error = store.open(3).err().unwrap().to_string();
        assert!(error.contains("folder: found no regular file"), "{error}");
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

        // Nor does one that fails leave anything.
        let mut draft = store.begin(3).unwrap();
        draft.tensors("weights", &[], |_| Err(Error::failed("no space", "make some"))).unwrap_err();
        assert_eq!(store.names().unwrap().len(), 2);
        drop(draft);
        assert_eq!(store.names().unwrap(), ["step-00000001"]);
    }

    /// What another rank says that it has written must be there.
    #[test]
    fn a_file_of_another_rank_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let store = Checkpoints::new(dir.path(), CHECKPOINTS);
        let mut draft = store.begin(2).unwrap();
        let mark = store.tensors(2, "moments-1-of-2", &[], |_| Ok(())).unwrap();
        let longer = FileMark { bytes: mark.bytes + 1, ..mark.clone() };
        let error = draft.add("moments-1-of-2", longer).unwrap_err().to_string();
        assert!(error.contains("moments-1-of-2.safetensors: found"), "{error}");
        draft.add("moments-1-of-2", mark.clone()).unwrap();
        assert!(draft.add("moments-0-of-2", mark).unwrap_err().to_string().contains("moments-0-of-2.safetensors"));
        draft.commit(&2).unwrap();
        let saved = store.open(2).unwrap();
        let missing = saved.moments(2).err().unwrap().to_string();
        assert!(missing.contains("no moments-0-of-2.safetensors") && missing.contains("in 2 files"), "{missing}");
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
