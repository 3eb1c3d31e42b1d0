//! Inputs and outputs of a command must lie apart, whatever their paths look like.

use crate::error::{Error, FileOp, Result};
use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Checks that no input lies in an output or is one, that no output lies in an input, and that no two outputs are the
/// same. Each path comes with the option that names it. Files are compared by what they are, not by their names: links,
/// `..`, bind mounts and upper and lower case of a file system that ignores it make no difference. Files that an input
/// directory links to count as inputs. Paths that do not exist are skipped as inputs.
///
/// # Errors
/// [`Error::Input`] names both options; [`Error::Io`].
pub fn check_apart(outputs: &[(&str, &Path)], inputs: &[(&str, &Path)]) -> Result<()> {
    check(outputs, inputs, Inputs::Outside)
}

/// As [`check_apart`], for outputs that may hold inputs, as they are never replaced as a whole.
///
/// # Errors
/// As [`check_apart`].
pub fn check_not_in(outputs: &[(&str, &Path)], inputs: &[(&str, &Path)]) -> Result<()> {
    check(outputs, inputs, Inputs::Anywhere)
}

/// Whether an output, which may not exist yet, is or lies in a directory, which may not exist yet either.
///
/// # Errors
/// [`Error::Io`].
pub fn lies_in(path: &Path, dir: &Path) -> Result<bool> {
    Ok(resolve(path)?.starts_with(resolve(dir)?))
}

/// Where inputs may lie.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Inputs {
    Outside,
    Anywhere,
}

fn check(outputs: &[(&str, &Path)], inputs: &[(&str, &Path)], allowed: Inputs) -> Result<()> {
    let mut taken: Vec<(&str, PathBuf)> = Vec::new();
    for (option, path) in outputs {
        let resolved = resolve(path)?;
        if let Some((other, _)) = taken.iter().find(|(_, other)| *other == resolved) {
            let found = format!("{}, which is {other} as well", path.display());
            return Err(Error::input(*option, found, "outputs of different names"));
        }
        let own = identity(&resolved);
        let above: BTreeSet<Identity> = resolved.ancestors().filter_map(identity).collect();
        for (input, at) in inputs {
            let (Some(id), Ok(real)) = (identity(at), fs::canonicalize(at)) else { continue };
            let refuse = |how: &str| {
                let found = format!("{}, {how} {input} {}", path.display(), at.display());
                Err(Error::input(*option, found, "an output apart from every input"))
            };
            if Some(id) == own {
                return refuse("which is");
            }
            if above.contains(&id) {
                return refuse("which lies in");
            }
            let inside = |real: &Path| own.is_some() && real.ancestors().any(|above| identity(above) == own);
            if allowed == Inputs::Anywhere {
                continue;
            }
            if inside(&real) || links(&real).iter().any(|target| inside(target)) {
                return refuse("which holds");
            }
        }
        taken.push((option, resolved));
    }
    Ok(())
}

/// Device and number of a file or directory, links followed.
#[cfg(unix)]
type Identity = (u64, u64);
#[cfg(not(unix))]
type Identity = PathBuf;

#[cfg(unix)]
fn identity(path: &Path) -> Option<Identity> {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

#[cfg(not(unix))]
fn identity(path: &Path) -> Option<Identity> {
    fs::canonicalize(path).ok()
}

/// Where the links in a directory lead.
fn links(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let linked = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_symlink()));
    linked.filter_map(|entry| fs::canonicalize(entry.path()).ok()).collect()
}

/// The absolute path with links resolved as far as it exists.
pub(super) fn resolve(path: &Path) -> Result<PathBuf> {
    let absolute = std::path::absolute(path).map_err(Error::io(path, FileOp::Resolve))?;
    let mut resolved = PathBuf::new();
    for part in absolute.components() {
        match part {
            Component::ParentDir => {
                resolved.pop();
            }
            part => resolved.push(part),
        }
        if let Ok(real) = fs::canonicalize(&resolved) {
            resolved = real;
        }
    }
    Ok(resolved)
}
