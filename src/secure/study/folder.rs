//! The output directory of a study: taken by one process, and only if nothing else would be overwritten.

use crate::error::{Error, FileOp, Result};
use crate::io::{json, write_first};
use crate::model::Clock;
use crate::secure::screen::SCREENED_FILE;
use std::fs::{File, TryLockError};
use std::path::Path;

/// What a study writes into its directory.
const OURS: [&str; 18] = [
    "report.html",
    "results.md",
    "outcome.json",
    "robustness.svg",
    "mods.svg",
    "probe.safetensors",
    "map.json",
    "mods.json",
    "map-noise.json",
    "map-conflict.json",
    "map-update.json",
    "mods-noise.json",
    "mods-conflict.json",
    "mods-update.json",
    REPLAY_FILE,
    SCREENED_FILE,
    "stages",
    "tuned",
];
/// The model's own answers.
pub(super) const REPLAY_FILE: &str = "replay.jsonl";
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
    let claimed = || lock.is_file() && lock.metadata().is_ok_and(|found| found.len() == 0);
    if claimed() {
        return Ok(());
    }
    for name in OURS.iter().chain(more).chain(&[LOCK]) {
        // Another process of the same study may have claimed it meanwhile.
        if std::fs::symlink_metadata(dir.join(name)).is_ok() && !claimed() {
            let found = format!("`{name}`, which no study wrote");
            let expected = "a new directory, or one of an earlier study";
            return Err(Error::input(dir.display().to_string(), found, expected));
        }
    }
    match File::create_new(&lock) {
        Err(e) if !claimed() => Err(Error::io(&lock, FileOp::Create)(e)),
        _ => Ok(()),
    }
}

/// Locks a claimed directory against other processes.
pub(in crate::secure) fn lock(dir: &Path) -> Result<File> {
    let file = open_lock(dir)?;
    file.try_lock().map_err(|_| Error::InUse { path: dir.to_owned() })?;
    Ok(file)
}

/// Locks a claimed directory against processes that would have it alone, where its file system has locks.
pub(super) fn lock_shared(dir: &Path) -> Result<File> {
    let file = open_lock(dir)?;
    match file.try_lock_shared() {
        Err(TryLockError::WouldBlock) => Err(Error::InUse { path: dir.to_owned() }),
        _ => Ok(file),
    }
}

fn open_lock(dir: &Path) -> Result<File> {
    let path = dir.join(LOCK);
    File::options().write(true).open(&path).map_err(Error::io(&path, FileOp::Open))
}

/// The time at which the chat template of a study is rendered: `given`, else that of its first run, else now; kept in
/// `stages/date.json`.
pub(in crate::secure) fn clock(dir: &Path, given: Option<Clock>) -> Result<Clock> {
    let path = dir.join("stages/date.json");
    let recorded = || -> Result<Option<Clock>> {
        if path.exists() { json::read(&path, 1 << 12, "the date of a study").map(Some) } else { Ok(None) }
    };
    match (given, recorded()?) {
        (None, Some(clock)) => return Ok(clock),
        (Some(clock), recorded) if recorded == Some(clock) => return Ok(clock),
        _ => {}
    }
    let clock = given.map_or_else(Clock::now, Ok)?;
    let stages = dir.join("stages");
    std::fs::create_dir_all(&stages).map_err(Error::io(&stages, FileOp::Create))?;
    if given.is_some() {
        json::write(&path, &clock)?;
        return Ok(clock);
    }
    // Of processes that begin a study together, the first one's.
    write_first(&path, json::line(&clock)?.as_bytes())?;
    Ok(recorded()?.unwrap_or(clock))
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
