//! Outputs that appear whole or not at all.

use crate::error::{Error, Result};
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

/// A directory that is written beside its final place and renamed when it is complete.
///
/// While it lives, `.NAME.lock` beside it keeps other processes away. An interrupted run leaves the old output (or
/// nothing) at the path, and `.NAME.partial`, which the next run clears; a run that is killed in the instant between
/// the two renames of a replacement leaves the old output as `.NAME.old`, which the next run puts back.
#[derive(Debug)]
pub struct OutputDir {
    path: PathBuf,
    partial: PathBuf,
    old: PathBuf,
    force: bool,
    committed: bool,
    // Dropped last: the lock must outlive the clearing of the directory.
    _lock: Lock,
}

impl OutputDir {
    /// Locks `path` and makes the temporary directory. A path that another process writes to is [`Error::InUse`]; one
    /// that exists is [`Error::Exists`] unless `force`.
    ///
    /// # Errors
    /// [`Error::InUse`], [`Error::Exists`]; [`Error::Io`] where the parent cannot be written.
    pub fn create(path: &Path, force: bool) -> Result<Self> {
        let (parent, name) = split(path)?;
        fs::create_dir_all(&parent).map_err(Error::io(&parent, "create"))?;
        let lock = Lock::take(parent.join(format!(".{name}.lock")), path)?;
        let old = parent.join(format!(".{name}.old"));
        if exists(&old) && !exists(path) {
            fs::rename(&old, path).map_err(Error::io(path, "rename"))?;
        }
        if exists(path) && !force {
            return Err(Error::Exists { path: path.to_owned() });
        }
        let partial = parent.join(format!(".{name}.partial"));
        remove(&partial)?;
        fs::create_dir(&partial).map_err(Error::io(&partial, "create"))?;
        Ok(Self { path: path.to_owned(), partial, old, force, committed: false, _lock: lock })
    }

    /// The temporary directory: write here.
    pub fn dir(&self) -> &Path {
        &self.partial
    }

    /// Writes everything through to the disk and renames into place; with `force` an old output is moved aside first
    /// and removed afterwards.
    ///
    /// # Errors
    /// [`Error::Io`]; the old output is then still in place.
    pub fn commit(mut self) -> Result<()> {
        sync_tree(&self.partial)?;
        let replaces = exists(&self.path);
        if replaces {
            if !self.force {
                return Err(Error::Exists { path: self.path.clone() });
            }
            remove(&self.old)?;
            fs::rename(&self.path, &self.old).map_err(Error::io(&self.path, "rename"))?;
        }
        if let Err(source) = fs::rename(&self.partial, &self.path) {
            if replaces {
                fs::rename(&self.old, &self.path).map_err(Error::io(&self.path, "rename"))?;
            }
            return Err(Error::io(&self.path, "rename")(source));
        }
        self.committed = true;
        sync_parent(&self.path)?;
        if replaces { remove(&self.old) } else { Ok(()) }
    }
}

impl Drop for OutputDir {
    fn drop(&mut self) {
        if !self.committed {
            // What cannot be removed now is cleared by the next run.
            let _ = remove(&self.partial);
        }
    }
}

/// Writes a file beside its final place, through to the disk, and renames it: readers see the old bytes or the new.
/// An existing file is replaced.
///
/// # Errors
/// [`Error::Io`]; the old file is then still in place.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let (parent, name) = split(path)?;
    let mut file = tempfile::Builder::new()
        .prefix(&format!(".{name}."))
        .suffix(".partial")
        .make_in(&parent, |temporary| File::create_new(temporary))
        .map_err(Error::io(path, "create"))?;
    file.write_all(bytes).map_err(Error::io(path, "write"))?;
    file.as_file().sync_all().map_err(Error::io(path, "write"))?;
    file.persist(path).map_err(|e| Error::io(path, "rename")(e.error))?;
    sync_parent(path)
}

/// An exclusive lock on a file, which is removed with the lock.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    fn take(path: PathBuf, output: &Path) -> Result<Self> {
        loop {
            let options = File::options().create(true).truncate(false).write(true).open(&path);
            let file = options.map_err(Error::io(&path, "create"))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(Error::InUse { path: output.to_owned() }),
                Err(TryLockError::Error(source)) => return Err(Error::io(&path, "lock")(source)),
            }
            // The last holder may have removed the file between our opening and our locking it.
            if same_file(&file, &path) {
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Still locked here, so nobody else can hold the file that is removed.
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

/// Whether anything is there, a dangling link included.
fn exists(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok()
}

/// Removes a file, a link or a whole directory, if it is there.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
    let removed = if metadata.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
    removed.map_err(Error::io(path, "remove"))
}

/// fsync of a directory and of everything in it.
fn sync_tree(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir, "read"))? {
        let entry = entry.map_err(Error::io(dir, "read"))?;
        let path = entry.path();
        let kind = entry.file_type().map_err(Error::io(&path, "read"))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            File::open(&path).and_then(|f| f.sync_all()).map_err(Error::io(&path, "write"))?;
        }
    }
    sync_dir(dir)
}

fn sync_parent(path: &Path) -> Result<()> {
    sync_dir(&split(path)?.0)
}

/// A rename is only durable once its directory is.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    if cfg!(unix) { File::open(dir).and_then(|f| f.sync_all()).map_err(Error::io(dir, "write")) } else { Ok(()) }
}
