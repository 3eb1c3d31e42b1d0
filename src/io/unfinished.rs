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

/// Directories of checkpoints among them.
const STEPS: [&str; 2] = ["checkpoints", "best"];

/// `OUT.unfinished`, or `OUT/.swat.unfinished` where OUT is written in place.
pub(crate) fn path(out: &Path) -> PathBuf {
    beside(out, ".unfinished").unwrap_or_else(|out| out.join(INSIDE))
}

/// `OUT` with `ending` behind its name; the directory itself where it is written in place, so that nothing lies beside it.
pub(crate) fn beside(out: &Path, ending: &str) -> std::result::Result<PathBuf, PathBuf> {
    let followed = fs::symlink_metadata(out).is_ok_and(|m| m.is_symlink()) || out.file_name().is_none();
    let out = if followed { resolve(out).unwrap_or_else(|_| out.to_owned()) } else { out.to_owned() };
    if is_in_place(&out) {
        return Err(out);
    }
    let mut name = out.file_name().unwrap_or_default().to_owned();
    name.push(ending);
    Ok(out.with_file_name(name))
}

/// Checks that there is nothing in it, nor in its checkpoints, that no run wrote.
///
/// # Errors
/// [`Error::Input`] names what is there.
pub(crate) fn check(dir: &Path) -> Result<()> {
    for name in names(dir)? {
        if !OURS.contains(&name.as_str()) && !is_temporary(&name) {
            return Err(foreign(dir, &name));
        }
        if STEPS.contains(&name.as_str()) {
            check_steps(&dir.join(&name))?;
        }
    }
    Ok(())
}

/// [`check`] for a directory of checkpoints.
fn check_steps(dir: &Path) -> Result<()> {
    let number = |name: &str| {
        let number = name.strip_prefix("step-").or_else(|| name.strip_prefix(".unfinished-"));
        number.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    for step in names(dir)? {
        if !number(&step) {
            return Err(foreign(dir, &step));
        }
        let checkpoint = dir.join(&step);
        let ours =
            |name: &String| name.ends_with(".safetensors") || ["state.json", "manifest.json"].contains(&name.as_str());
        if let Some(file) = names(&checkpoint)?.iter().find(|file| !ours(file) && !is_temporary(file)) {
            return Err(foreign(&checkpoint, file));
        }
    }
    Ok(())
}

/// The error for what no run wrote.
fn foreign(dir: &Path, name: &str) -> Error {
    let found = format!("`{}`, which swat did not write", name.escape_debug());
    Error::input(dir.display().to_string(), found, "an unfinished run and nothing else; move the rest away")
}

/// Whether a file is one that `write_atomic` leaves if it is killed.
fn is_temporary(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".partial")
}

/// Removes what a run wrote, and the directory unless something else is in it. Wherever it is killed, what is left is a run
/// without a checkpoint, which begins anew: not one that continues without its metrics, nor one whose checkpoint is damaged.
pub(crate) fn remove_run(dir: &Path) -> Result<()> {
    for steps in STEPS.map(|name| dir.join(name)) {
        for name in names(&steps)? {
            if let Some(number) = name.strip_prefix("step-") {
                let (from, to) = (steps.join(&name), steps.join(format!(".unfinished-{number}")));
                remove(&to)?;
                fs::rename(&from, &to).map_err(Error::io(&from, FileOp::Rename))?;
            }
        }
        remove(&steps)?;
    }
    for name in names(dir)? {
        if OURS.contains(&name.as_str()) || is_temporary(&name) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_is_left_of_a_removal_has_no_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("out.unfinished");
        let step = run.join("checkpoints/step-8");
        fs::create_dir_all(&step).unwrap();
        fs::write(run.join("metrics.jsonl"), "{}").unwrap();
        fs::write(step.join("state.json"), "{}").unwrap();
        // Nothing can be removed from a directory that may not be written, as if the process ended there.
        fs::set_permissions(&step, fs::Permissions::from_mode(0o555)).unwrap();
        let stopped = remove_run(&run).is_err();
        let left = run.join("checkpoints/.unfinished-8");
        if stopped {
            assert!(!step.exists() && left.join("state.json").exists() && run.join("metrics.jsonl").exists());
            fs::set_permissions(&left, fs::Permissions::from_mode(0o755)).unwrap();
            check(&run).unwrap();
            remove_run(&run).unwrap();
        }
        assert!(!run.exists());
    }
}
