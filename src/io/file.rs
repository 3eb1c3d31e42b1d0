//! Outputs that are single files.

use super::IfExists;
use super::output::{exists, split};
use crate::error::{Error, FileOp, Result};
use std::fs;
use std::path::Path;

/// Checks, before any work, that a file may be written: its directory can be written to (it is created if missing), and
/// what exists there may be replaced and is `ours`.
///
/// # Errors
/// [`Error::Exists`]; [`Error::Input`] where another file, or a directory, is in the way; [`Error::Io`].
pub fn check_file(path: &Path, if_exists: IfExists, ours: impl Fn(&Path) -> bool) -> Result<()> {
    let (parent, _) = split(path)?;
    let place = || path.display().to_string();
    if path.is_dir() {
        return Err(Error::input(place(), "a directory", "the name of a file to write"));
    }
    if exists(path) {
        if !path.is_file() || !ours(path) {
            let expected = "another name: only what this command wrote is ever replaced";
            return Err(Error::input(place(), "a file that this command did not write", expected));
        }
        if if_exists == IfExists::Fail {
            return Err(Error::Exists { path: path.to_owned() });
        }
    }
    fs::create_dir_all(&parent).map_err(Error::io(&parent, FileOp::Create))?;
    let tried = tempfile::Builder::new().prefix(".swat.").tempfile_in(&parent);
    tried.map(drop).map_err(Error::io(path, FileOp::Create))
}

/// Whether a JSON file states a format that begins with `prefix`, such as `swat.robustness/`.
pub(crate) fn has_format(path: &Path, prefix: &str, max_bytes: u64) -> bool {
    let value: Option<serde_json::Value> = super::json::read(path, max_bytes, "JSON").ok();
    value.is_some_and(|value| value["format"].as_str().is_some_and(|format| format.starts_with(prefix)))
}

/// Whether a file begins with this text.
pub(crate) fn begins_with(path: &Path, text: &str) -> bool {
    use std::io::Read;
    let mut start = vec![0; text.len()];
    fs::File::open(path).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == text.as_bytes()
}
