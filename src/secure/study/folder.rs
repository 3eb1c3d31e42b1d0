//! The output directory of a study: taken by one process, and only if nothing else would be overwritten.

use crate::error::{Error, FileOp, Result};
use crate::io::json;
use crate::model::Clock;
use std::fs::File;
use std::path::Path;

/// What a study writes into its directory.
const OURS: [&str; 10] = [
    "report.html",
    "results.md",
    "outcome.json",
    "robustness.svg",
    "mods.svg",
    "probe.safetensors",
    "map.json",
    "mods.json",
    "stages",
    "tuned",
];
/// The lock, which is always empty and stays: the mark of a study's directory.
const LOCK: &str = ".lock";

/// Creates the directory of a study, and marks it. A directory without the mark must hold nothing of the names that the
/// study will write, nor of `more`.
///
/// # Errors
/// [`Error::Input`] names what is in the way; [`Error::Io`].
pub fn claim_folder(dir: &Path, more: &[&str]) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io(dir, FileOp::Create))?;
    let lock = dir.join(LOCK);
    if lock.is_file() && lock.metadata().is_ok_and(|found| found.len() == 0) {
        return Ok(());
    }
    for name in OURS.iter().chain(more).chain(&[LOCK]) {
        if std::fs::symlink_metadata(dir.join(name)).is_ok() {
            let found = format!("`{name}`, which no study wrote");
            let expected = "a new directory, or one of an earlier study";
            return Err(Error::input(dir.display().to_string(), found, expected));
        }
    }
    File::create_new(&lock).map(drop).map_err(Error::io(&lock, FileOp::Create))
}

/// Locks a claimed directory against other processes.
pub(super) fn lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    let file = File::options().write(true).open(&path).map_err(Error::io(&path, FileOp::Open))?;
    file.try_lock().map_err(|_| Error::InUse { path: dir.to_owned() })?;
    Ok(file)
}

/// The time at which the chat template of a study is rendered: `given`, else that of its first run, else now; kept in
/// `stages/date.json`.
pub(super) fn clock(dir: &Path, given: Option<Clock>) -> Result<Clock> {
    let path = dir.join("stages/date.json");
    let recorded = if path.exists() { Some(json::read(&path, 1 << 12, "the date of a study")?) } else { None };
    let clock = given.or(recorded).map_or_else(Clock::now, Ok)?;
    if recorded != Some(clock) {
        let stages = dir.join("stages");
        std::fs::create_dir_all(&stages).map_err(Error::io(&stages, FileOp::Create))?;
        json::write(&path, &clock)?;
    }
    Ok(clock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_others_are_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("notes.txt"), "mine").unwrap();
        std::fs::write(dir.path().join("report.html"), "mine").unwrap();
        let error = claim_folder(dir.path(), &[]).unwrap_err().to_string();
        assert!(error.contains("report.html"), "{error}");
        std::fs::remove_file(dir.path().join("report.html")).unwrap();
        std::fs::create_dir(dir.path().join("model")).unwrap();
        assert!(claim_folder(dir.path(), &["model"]).is_err());
        claim_folder(dir.path(), &[]).unwrap();
        // From then on it is a study's.
        std::fs::write(dir.path().join("report.html"), "the study's").unwrap();
        claim_folder(dir.path(), &["model"]).unwrap();
        // Its date is that of the first run.
        let first = clock(dir.path(), Some("2020-02-29".parse().unwrap())).unwrap();
        assert_eq!(clock(dir.path(), None).unwrap(), first);
        assert_eq!(first.to_string(), "2020-02-29T00:00:00Z");
        // The lock of another program is not emptied.
        let other = tempfile::tempdir().unwrap();
        std::fs::write(other.path().join(".lock"), "pid 7").unwrap();
        assert!(claim_folder(other.path(), &[]).is_err());
    }
}
