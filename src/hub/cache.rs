//! The cache of repositories, shared with `huggingface_hub`.

use super::HubName;
use super::names::is_part;
use crate::error::{Error, FileOp, Result};
use crate::io::input::read_text;
use crate::io::write_atomic;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Deepest folder of a snapshot that is listed, and most files.
const MAX_DEPTH: usize = 6;
const MAX_FILES: usize = 100_000;

/// A repository in the cache.
pub(super) struct Repository {
    dir: PathBuf,
    locks: PathBuf,
}

impl Repository {
    pub(super) fn new(cache: &Path, name: &HubName) -> Self {
        let folder = format!("{}--{}", name.plural(), name.repo().replace('/', "--"));
        Self { dir: cache.join(&folder), locks: cache.join(".locks").join(folder) }
    }

    /// Directory of a commit's files.
    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.dir.join("snapshots").join(commit)
    }

    /// The cached snapshot of a branch, tag or commit.
    pub(super) fn cached(&self, revision: &str) -> Result<Option<PathBuf>> {
        let reference = self.dir.join("refs").join(revision);
        let commit =
            if reference.is_file() { read_text(&reference, 1 << 10)?.trim().to_owned() } else { revision.into() };
        let dir = self.snapshot(&commit);
        Ok((is_part(&commit) && dir.is_dir()).then_some(dir))
    }

    /// Records the commit of a branch or tag, once its files are there.
    pub(super) fn write_ref(&self, revision: &str, commit: &str) -> Result<()> {
        let reference = self.dir.join("refs").join(revision);
        if revision == commit || fs::read_to_string(&reference).is_ok_and(|text| text == commit) {
            return Ok(());
        }
        create_parent(&reference)?;
        write_atomic(&reference, commit.as_bytes())
    }

    /// The content of a file with this ETag.
    pub(super) fn blob(&self, etag: &str) -> PathBuf {
        self.dir.join("blobs").join(etag)
    }

    /// What there is of a content that is being downloaded.
    pub(super) fn incomplete(&self, etag: &str) -> PathBuf {
        self.dir.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Keeps other processes from downloading the same content; they wait.
    pub(super) fn lock(&self, etag: &str) -> Result<File> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        create_parent(&self.blob(etag))?;
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(Error::io(&path, FileOp::Create))?;
        file.lock().map_err(Error::io(&path, FileOp::Lock))?;
        Ok(file)
    }

    /// Makes the content with this ETag the file `name` of a snapshot.
    pub(super) fn link(&self, commit: &str, name: &str, etag: &str) -> Result<()> {
        let path = self.snapshot(commit).join(name);
        create_parent(&path)?;
        let _ = fs::remove_file(&path);
        #[cfg(unix)]
        {
            let up = "../".repeat(2 + name.matches('/').count());
            if std::os::unix::fs::symlink(format!("{up}blobs/{etag}"), &path).is_ok() {
                return Ok(());
            }
        }
        // Some file systems have no links.
        fs::copy(self.blob(etag), &path).map(drop).map_err(Error::io(&path, FileOp::Write))
    }
}

fn create_parent(path: &Path) -> Result<()> {
    let Some(parent) = path.parent() else { return Ok(()) };
    fs::create_dir_all(parent).map_err(Error::io(parent, FileOp::Create))
}

/// Paths of all files in a snapshot, with `/`; links that lead nowhere are left out.
pub(super) fn list(dir: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    let mut folders = vec![(dir.to_owned(), String::new(), 0)];
    while let Some((folder, prefix, depth)) = folders.pop() {
        for entry in fs::read_dir(&folder).map_err(Error::io(&folder, FileOp::Read))? {
            let entry = entry.map_err(Error::io(&folder, FileOp::Read))?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            let real = entry.file_type().is_ok_and(|kind| kind.is_dir());
            if real && depth < MAX_DEPTH {
                folders.push((entry.path(), format!("{name}/"), depth + 1));
            } else if entry.path().is_file() && files.len() < MAX_FILES {
                files.push(name);
            }
        }
    }
    files.sort();
    Ok(files)
}
