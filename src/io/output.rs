//! Atomic output directories and files.

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

/// An output directory that is written under a temporary name and renamed when complete.
///
/// `.NAME.lock` beside it excludes other processes. An interrupted run leaves the old output (or nothing) in place, and
/// `.NAME.partial`, which the next run removes. A run killed between the two renames of a replacement leaves the old
/// output as `.NAME.old`, which the next run restores.
#[derive(Debug)]
pub struct OutputDir {
    path: PathBuf,
    partial: PathBuf,
    old: PathBuf,
    if_exists: IfExists,
    committed: bool,
    // Dropped last: the lock must outlive the removal of the directory.
    _lock: Lock,
}

impl OutputDir {
    /// Locks `path` and creates the temporary directory.
    ///
    /// # Errors
    /// [`Error::InUse`] where another process writes to `path`; [`Error::Exists`] where it exists and must not be
    /// replaced; [`Error::Io`].
    pub fn create(path: &Path, if_exists: IfExists) -> Result<Self> {
        let (parent, name) = split(path)?;
        fs::create_dir_all(&parent).map_err(Error::io(&parent, FileOp::Create))?;
        let lock = Lock::take(parent.join(format!(".{name}.lock")), path)?;
        let old = parent.join(format!(".{name}.old"));
        if exists(&old) && !exists(path) {
            fs::rename(&old, path).map_err(Error::io(path, FileOp::Rename))?;
        }
        if exists(path) && if_exists == IfExists::Fail {
            return Err(Error::Exists { path: path.to_owned() });
        }
        let partial = parent.join(format!(".{name}.partial"));
        remove(&partial)?;
        fs::create_dir(&partial).map_err(Error::io(&partial, FileOp::Create))?;
        Ok(Self { path: path.to_owned(), partial, old, if_exists, committed: false, _lock: lock })
    }

    /// The temporary directory, to write into.
    pub fn dir(&self) -> &Path {
        &self.partial
    }

    /// Syncs the directory to disk and renames it into place. An old output to be replaced is moved aside first and
    /// removed afterwards.
    ///
    /// # Errors
    /// [`Error::Io`], with the old output still in place; [`Error::Exists`] where an output has appeared meanwhile.
    pub fn commit(mut self) -> Result<()> {
        sync_tree(&self.partial)?;
        let replaces = exists(&self.path);
        if replaces {
            if self.if_exists == IfExists::Fail {
                return Err(Error::Exists { path: self.path.clone() });
            }
            remove(&self.old)?;
            fs::rename(&self.path, &self.old).map_err(Error::io(&self.path, FileOp::Rename))?;
        }
        if let Err(source) = fs::rename(&self.partial, &self.path) {
            if replaces {
                fs::rename(&self.old, &self.path).map_err(Error::io(&self.path, FileOp::Rename))?;
            }
            return Err(Error::io(&self.path, FileOp::Rename)(source));
        }
        self.committed = true;
        sync_parent(&self.path)?;
        if replaces { remove(&self.old) } else { Ok(()) }
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

/// Writes a file under a temporary name, syncs it to disk, and renames it, replacing an existing file: readers see the
/// old bytes or the new.
///
/// # Errors
/// [`Error::Io`], with the old file still in place.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let (parent, name) = split(path)?;
    let mut file = tempfile::Builder::new()
        .prefix(&format!(".{name}."))
        .suffix(".partial")
        .make_in(&parent, |temporary| File::create_new(temporary))
        .map_err(Error::io(path, FileOp::Create))?;
    file.write_all(bytes).map_err(Error::io(path, FileOp::Write))?;
    file.as_file().sync_all().map_err(Error::io(path, FileOp::Write))?;
    file.persist(path).map_err(|e| Error::io(path, FileOp::Rename)(e.error))?;
    sync_parent(path)
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
fn split(path: &Path) -> Result<(PathBuf, String)> {
    let Some(name) = path.file_name() else {
        return Err(Error::input(path.display().to_string(), "no file name", "the path of a file or directory"));
    };
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok((parent.to_owned(), name.to_string_lossy().into_owned()))
}

/// Whether the path exists, even as a dangling link.
fn exists(path: &Path) -> bool {
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
