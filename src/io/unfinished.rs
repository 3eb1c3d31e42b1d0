//! The directory of an unfinished run, beside its output.

use super::apart::resolve;
use super::output::{is_in_place, remove};
use crate::error::{Error, FileOp, Result};
use std::fs;
use std::path::{Path, PathBuf};

/// Its name in an output that is written in place.
pub(super) const INSIDE: &str = ".swat.unfinished";
/// What a run writes into it.
const OURS: [&str; 7] =
    ["metrics.jsonl", "updates.json", "run.json", "screening.json", "reference.safetensors", "checkpoints", "best"];

/// `OUT.unfinished`, or `OUT/.swat.unfinished` where OUT is written in place.
pub(crate) fn path(out: &Path) -> PathBuf {
    let followed = fs::symlink_metadata(out).is_ok_and(|m| m.is_symlink()) || out.file_name().is_none();
    let out = if followed { resolve(out).unwrap_or_else(|_| out.to_owned()) } else { out.to_owned() };
    if is_in_place(&out) {
        return out.join(INSIDE);
    }
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(".unfinished");
    out.with_file_name(name)
}

/// Checks that there is nothing in it that no run wrote.
///
/// # Errors
/// [`Error::Input`] names what is there.
pub(crate) fn check(dir: &Path) -> Result<()> {
    for name in names(dir)? {
        // `write_atomic` leaves such a file if it is killed.
        let temporary = name.starts_with('.') && name.ends_with(".partial");
        if !OURS.contains(&name.as_str()) && !temporary {
            let found = format!("`{}`, which swat did not write", name.escape_debug());
            let expected = "an unfinished run and nothing else; move the rest away";
            return Err(Error::input(dir.display().to_string(), found, expected));
        }
    }
    Ok(())
}

/// Removes what a run wrote, and the directory unless something else is in it.
pub(crate) fn remove_run(dir: &Path) -> Result<()> {
    for name in names(dir)? {
        if OURS.contains(&name.as_str()) || name.starts_with('.') && name.ends_with(".partial") {
            remove(&dir.join(name))?;
        }
    }
    let _ = fs::remove_dir(dir);
    Ok(())
}

fn names(dir: &Path) -> Result<Vec<String>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(dir).map_err(Error::io(dir, FileOp::Read))?;
    let name = |entry: std::io::Result<fs::DirEntry>| {
        Ok(entry.map_err(Error::io(dir, FileOp::Read))?.file_name().to_string_lossy().into_owned())
    };
    entries.map(name).collect()
}
