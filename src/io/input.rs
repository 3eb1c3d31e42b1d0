//! Bounded reads of untrusted files.

use crate::error::{Error, FileOp, Result};
use std::fs::{self, File};
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

/// The path of the file `name` in `dir`; `None` where there is none.
///
/// The name must not contain folders or `..`, the target must be a regular file, and a symbolic link must not leave the
/// directory. The exception is the Hugging Face cache, whose `snapshots/REVISION/` links into `blobs/`.
///
/// # Errors
/// [`Error::Input`] for another name or target; [`Error::Io`].
pub(crate) fn file_in(dir: &Path, name: &str) -> Result<Option<PathBuf>> {
    let place = dir.join(name).display().to_string();
    if name.is_empty() || name == "." || name == ".." || name.contains(['/', '\\', '\0']) {
        let found = format!("the file name `{}`", name.escape_debug());
        return Err(Error::input(dir.display().to_string(), found, "the name of a file inside the model directory"));
    }
    let path = dir.join(name);
    let target = match fs::canonicalize(&path) {
        Ok(target) => target,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(&path, FileOp::Read)(e)),
    };
    let root = fs::canonicalize(dir).map_err(Error::io(dir, FileOp::Read))?;
    if !target.starts_with(&root) && !in_hub_cache(&root, &target) {
        return Err(Error::input(place, "a link that leaves the model directory", "a file inside the model directory"));
    }
    if !fs::metadata(&target).map_err(Error::io(&path, FileOp::Read))?.is_file() {
        return Err(Error::input(place, "something that is not a regular file", "a file"));
    }
    Ok(Some(path))
}

/// Whether `root` is `…/snapshots/REVISION` and `target` lies in `…/blobs` of the same model.
fn in_hub_cache(root: &Path, target: &Path) -> bool {
    let Some(snapshots) = root.parent().filter(|p| p.ends_with("snapshots")) else { return false };
    snapshots.parent().is_some_and(|model| target.parent() == Some(&model.join("blobs")))
}

/// Reads a regular file of at most `max_bytes`.
pub(crate) fn read_bytes(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    let metadata = fs::metadata(path).map_err(Error::io(path, FileOp::Read))?;
    if !metadata.is_file() {
        return Err(Error::input(path.display().to_string(), "something that is not a regular file", "a file"));
    }
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(Error::io(path, FileOp::Open))?;
    file.take(max_bytes + 1).read_to_end(&mut bytes).map_err(Error::io(path, FileOp::Read))?;
    if bytes.len() as u64 > max_bytes {
        let found = format!("more than {max_bytes} bytes");
        return Err(Error::input(path.display().to_string(), found, format!("at most {max_bytes} bytes")));
    }
    Ok(bytes)
}

/// Reads a UTF-8 file of at most `max_bytes`.
pub(crate) fn read_text(path: &Path, max_bytes: u64) -> Result<String> {
    String::from_utf8(read_bytes(path, max_bytes)?).map_err(|e| {
        let found = format!("a byte that is not UTF-8 at offset {}", e.utf8_error().valid_up_to());
        Error::input(path.display().to_string(), found, "text in UTF-8")
    })
}

/// A parser's message on one line, with control characters escaped; it may quote its input.
pub(crate) fn printable(message: &impl ToString) -> String {
    message
        .to_string()
        .chars()
        .flat_map(|c| if c.is_control() { c.escape_debug().collect() } else { vec![c] })
        .collect()
}

/// Runs a third-party parser on untrusted input; a panic becomes an error about `place`.
pub(crate) fn guarded<T>(place: &str, what: &str, run: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run))
        .map_err(|_| Error::input(place, format!("contents that make the {what} panic"), "a well-formed file"))
}
