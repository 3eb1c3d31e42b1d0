//! Atomic output directories and files.

use super::owned::{self, Record};
use crate::error::{Error, FileOp, Result};
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// What to do with an output that exists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IfExists {
    /// Return [`Error::Exists`].
    Fail,
    /// Replace it once the new output is complete.
    Replace,
}

impl IfExists {
    /// The meaning of the flag `--force`.
    pub fn from_force(force: bool) -> Self {
        if force { Self::Replace } else { Self::Fail }
    }
}

/// Lock of a directory that is written in place.
pub(super) const LOCK: &str = ".swat.lock";
/// Temporary directory of a directory that is written in place.
pub(super) const PARTIAL: &str = ".swat.partial";

/// An output directory that is written under a temporary name and moved into place when complete. The record
/// `.swat.json` in it lists what swat wrote: nothing else is ever replaced.
///
/// `.NAME.lock` beside it excludes other processes. An interrupted run leaves the old output (or nothing) in place, and
/// `.NAME.partial`, which the next run removes. A run killed between the two renames of a replacement leaves the old
/// output as `.NAME.old`, which the next run restores.
///
/// A directory that cannot be renamed, as it is a mount point or its parent cannot be written to, is written in place:
/// lock and temporary directory lie in it, and files are moved one by one, `config.json` last.
#[derive(Debug)]
pub struct OutputDir {
    path: PathBuf,
    partial: PathBuf,
    /// Where an old output is moved; none for a directory that is written in place.
    old: Option<PathBuf>,
    if_exists: IfExists,
    committed: bool,
    // Dropped last: the lock must outlive the removal of the directory.
    _lock: Lock,
}

impl OutputDir {
    /// Locks `path` and creates the temporary directory. An empty directory counts as no output.
    ///
    /// # Errors
    /// [`Error::InUse`] where another process writes to `path`; [`Error::Exists`] where it exists and must not be
    /// replaced; [`Error::Input`] where it holds what swat did not write; [`Error::Io`].
    pub fn create(path: &Path, if_exists: IfExists) -> Result<Self> {
        Self::create_over(path, if_exists, |_| false)
    }

    /// As [`OutputDir::create`], for a kind of output that versions without a record wrote as well: a directory of a
    /// model's files alone that is `recognised` may be replaced.
    ///
    /// # Errors
    /// As [`OutputDir::create`].
    pub fn create_over(path: &Path, if_exists: IfExists, recognised: impl Fn(&Path) -> bool) -> Result<Self> {
        let path = &target(path)?;
        let (parent, name) = split(path)?;
        fs::create_dir_all(&parent).map_err(Error::io(&parent, FileOp::Create))?;
        let in_place = is_in_place(path);
        let lock = if in_place { path.join(LOCK) } else { parent.join(format!(".{name}.lock")) };
        let lock = Lock::take(lock, path)?;
        let old = parent.join(format!(".{name}.old"));
        if !in_place && exists(&old) && !exists(path) {
            fs::rename(&old, path).map_err(Error::io(path, FileOp::Rename))?;
        }
        if path.is_dir() && if_exists == IfExists::Replace && recognised(path) {
            owned::adopt(path)?;
        }
        check_replaceable(path, if_exists)?;
        if !in_place && path.is_dir() {
            owned::check_renamable(path)?;
        }
        if !in_place && exists(&old) {
            owned::owned(&old)?;
        }
        let partial = if in_place { path.join(PARTIAL) } else { parent.join(format!(".{name}.partial")) };
        remove_partial(&partial)?;
        fs::create_dir(&partial).map_err(Error::io(&partial, FileOp::Create))?;
        Record::default().write(&partial)?;
        let old = (!in_place).then_some(old);
        Ok(Self { path: path.to_owned(), partial, old, if_exists, committed: false, _lock: lock })
    }

    /// The temporary directory, to write into.
    pub fn dir(&self) -> &Path {
        &self.partial
    }

    /// Syncs the directory to disk and moves it into place. An old output to be replaced is moved aside first and
    /// removed afterwards.
    ///
    /// # Errors
    /// [`Error::Io`], with the old output still in place; [`Error::Exists`] and [`Error::Input`] where an output, or
    /// something that swat did not write, has appeared meanwhile.
    pub fn commit(mut self) -> Result<()> {
        let record = Record::of(&self.partial)?;
        record.write(&self.partial)?;
        sync_tree(&self.partial)?;
        let replaced = check_replaceable(&self.path, self.if_exists)?;
        let Some(old) = self.old.clone() else {
            self.move_files(&record, &replaced.unwrap_or_default())?;
            self.committed = true;
            return Ok(());
        };
        if replaced.is_some() {
            if exists(&old) {
                remove_recorded(&old, &owned::owned(&old)?)?;
            }
            fs::rename(&self.path, &old).map_err(Error::io(&self.path, FileOp::Rename))?;
        } else if exists(&self.path) {
            owned::remove_record(&self.path)?;
        }
        if let Err(source) = fs::rename(&self.partial, &self.path) {
            if replaced.is_some() {
                fs::rename(&old, &self.path).map_err(Error::io(&self.path, FileOp::Rename))?;
            }
            return Err(Error::io(&self.path, FileOp::Rename)(source));
        }
        self.committed = true;
        sync_parent(&self.path)?;
        replaced.map_or(Ok(()), |record| remove_recorded(&old, &record))
    }

    /// Moves the files of a directory that is written in place. Until the last one is there, there is no `config.json`.
    fn move_files(&self, record: &Record, replaced: &Record) -> Result<()> {
        const LAST: &str = "config.json";
        replaced.union(record).write(&self.path)?;
        let _ = fs::remove_file(self.path.join(LAST));
        for name in replaced.names().filter(|name| !record.contains(name)) {
            remove(&self.path.join(name))?;
        }
        let last = record.contains(LAST).then_some(LAST);
        for name in record.names().filter(|name| *name != LAST).chain(last) {
            let to = self.path.join(name);
            if let Some(parent) = to.parent() {
                fs::create_dir_all(parent).map_err(Error::io(parent, FileOp::Create))?;
            }
            fs::rename(self.partial.join(name), &to).map_err(Error::io(&to, FileOp::Rename))?;
        }
        record.write(&self.path)?;
        sync_dir(&self.path)?;
        remove(&self.partial)
    }
}

impl Drop for OutputDir {
    fn drop(&mut self) {
        if !self.committed {
            // The next run removes what is left.
            let _ = remove(&self.partial);
        }
    }
}

/// The directory that an output path names: a link to a directory is followed, and `.` has a name.
fn target(path: &Path) -> Result<PathBuf> {
    match fs::metadata(path) {
        Ok(found) if !found.is_dir() => {
            Err(Error::input(path.display().to_string(), "a file", "a new or empty directory"))
        }
        Ok(_) if path.file_name().is_none() || fs::symlink_metadata(path).is_ok_and(|m| m.is_symlink()) => {
            fs::canonicalize(path).map_err(Error::io(path, FileOp::Resolve))
        }
        Err(_) if exists(path) => {
            Err(Error::input(path.display().to_string(), "a link that leads nowhere", "a new or empty directory"))
        }
        _ => Ok(path.to_owned()),
    }
}

/// Whether a directory exists that cannot be renamed: a mount point, or one whose parent cannot be written to.
///
/// Its lock, its temporary directory and its unfinished run then lie inside it.
pub fn is_in_place(path: &Path) -> bool {
    let (Ok(real), Ok((parent, _))) = (fs::canonicalize(path), split(path)) else { return false };
    real.is_dir() && (is_mount_point(&real) || tempfile::Builder::new().prefix(".swat.").tempfile_in(parent).is_err())
}

/// Whether the canonical `path` is listed in `/proc/self/mountinfo`, whose fifth field escapes blanks in octal.
fn is_mount_point(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let escaped = path.to_string_lossy().replace('\\', "\\134").replace(' ', "\\040").replace('\t', "\\011");
    mounts.lines().any(|line| line.split(' ').nth(4) == Some(escaped.as_str()))
}

/// What swat wrote into an output that exists and may be replaced; `None` where there is none, or an empty directory.
fn check_replaceable(path: &Path, if_exists: IfExists) -> Result<Option<Record>> {
    if !exists(path) || owned::is_empty(path)? {
        return Ok(None);
    }
    let record = owned::owned(path)?;
    if if_exists == IfExists::Fail {
        return Err(Error::Exists { path: path.to_owned() });
    }
    Ok(Some(record))
}

/// Removes an old output's files; the directory stays where something else has appeared in it.
fn remove_recorded(dir: &Path, record: &Record) -> Result<()> {
    owned::remove_owned(dir, record)?;
    let _ = fs::remove_dir(dir);
    Ok(())
}

/// Removes the temporary directory of an interrupted run, which begins with its record.
fn remove_partial(partial: &Path) -> Result<()> {
    if partial.is_dir() && !partial.join(owned::RECORD).is_file() {
        owned::check_model_files(partial)?;
    }
    remove(partial)
}

/// Writes a file under a temporary name, syncs it to disk, and renames it, replacing an existing file: readers see the
/// old bytes or the new.
///
/// # Errors
/// [`Error::Io`], with the old file still in place.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = temporary(path, bytes)?;
    file.persist(path).map_err(|e| Error::io(path, FileOp::Rename)(e.error))?;
    sync_parent(path)
}

/// As [`write_atomic`], unless the file exists: of several processes one writes it, and all read the same.
///
/// # Errors
/// [`Error::Io`].
pub(crate) fn write_first(path: &Path, bytes: &[u8]) -> Result<()> {
    let file = temporary(path, bytes)?;
    match file.persist_noclobber(path) {
        Err(e) if e.error.kind() != std::io::ErrorKind::AlreadyExists => Err(Error::io(path, FileOp::Rename)(e.error)),
        _ => sync_parent(path),
    }
}

/// A synced file beside `path`.
fn temporary(path: &Path, bytes: &[u8]) -> Result<tempfile::NamedTempFile<File>> {
    let (parent, name) = split(path)?;
    let mut file = tempfile::Builder::new()
        .prefix(&format!(".{name}."))
        .suffix(".partial")
        .make_in(&parent, |temporary| File::create_new(temporary))
        .map_err(Error::io(path, FileOp::Create))?;
    file.write_all(bytes).map_err(Error::io(path, FileOp::Write))?;
    file.as_file().sync_all().map_err(Error::io(path, FileOp::Write))?;
    Ok(file)
}

/// An exclusive lock file, removed when dropped.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    fn take(path: PathBuf, output: &Path) -> Result<Self> {
        loop {
            let options = File::options().create(true).truncate(false).write(true).open(&path);
            let file = options.map_err(Error::io(&path, FileOp::Create))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(Error::InUse { path: output.to_owned() }),
                Err(TryLockError::Error(source)) => return Err(Error::io(&path, FileOp::Lock)(source)),
            }
            // The last holder may have removed the file after it was opened here.
            if same_file(&file, &path) {
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Still locked, so nobody else can hold it.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(unix)]
fn same_file(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

#[cfg(not(unix))]
fn same_file(_file: &File, path: &Path) -> bool {
    path.exists()
}

/// Parent directory and file name.
pub(super) fn split(path: &Path) -> Result<(PathBuf, String)> {
    let Some(name) = path.file_name() else {
        return Err(Error::input(path.display().to_string(), "no file name", "the path of a file or directory"));
    };
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((parent.to_owned(), name.to_string_lossy().into_owned()))
}

/// Whether the path exists, even as a dangling link.
pub(super) fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Removes a file, link or directory tree, if it exists.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    let removed = if metadata.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(Error::io(path, FileOp::Remove))
}

/// Syncs a directory tree to disk.
fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir, FileOp::Read))? {
        let entry = entry.map_err(Error::io(dir, FileOp::Read))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(Error::io(&path, FileOp::Read))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            File::open(&path).and_then(|f| f.sync_all()).map_err(Error::io(&path, FileOp::Write))?;
        }
    }
    sync_dir(dir)
}

fn sync_parent(path: &Path) -> Result<()> {
    sync_dir(&split(path)?.0)
}

/// Syncs a directory, which makes renames in it durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) { File::open(dir).and_then(|f| f.sync_all()).map_err(Error::io(dir, FileOp::Write)) } else { Ok(()) }
}
