//! Which ranks read and write the files of a run's checkpoints.

use super::checkpoint::UNFINISHED;
use crate::backend::Backend;
use crate::error::{Error, FileOp, Result};
use crate::group::{Group, from_each, from_first};
use std::fs;
use std::path::Path;
use tempfile::{Builder, NamedTempFile};

/// Random characters in the name of what rank 0 leaves for the others to find.
const RANDOM: usize = 16;

/// Who reads and writes the files of checkpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// Rank 0, which sends the others what is theirs, and gets from them what they have.
    First,
    /// Each rank reads what it needs and writes its own moments: all see rank 0's directory.
    Each,
}

/// Finds out whether all ranks see a directory of rank 0, which is created, and can write to it: each looks for a file with
/// a random name that rank 0 leaves there, and leaves one beside it, which rank 0 looks for. Returns what is in the way, the
/// same on all ranks; none where nothing is.
pub(super) fn obstacle<B: Backend>(dir: &Path, group: &dyn Group<B>) -> Result<Option<String>> {
    let rank = group.share().rank;
    let mut left = None;
    let name = from_first(group, || {
        fs::create_dir_all(dir).map_err(Error::io(dir, FileOp::Create))?;
        let file = Builder::new().prefix(UNFINISHED).rand_bytes(RANDOM).tempfile_in(dir);
        let file = left.insert(file.map_err(Error::io(dir, FileOp::Write))?);
        Ok(file.path().file_name().unwrap_or_default().to_string_lossy().into_owned())
    })?;
    let answer = |rank: usize| format!("{name}-{rank}");
    let own = find(dir, &name).and_then(|()| leave(dir, &answer(rank)));
    let told = from_each(group, &own.as_ref().map(|_| ()).map_err(Error::to_string))?;
    from_first(group, || {
        let mut ranks = told.into_iter().enumerate();
        Ok(ranks.find_map(|(rank, told)| match told {
            Ok(()) if dir.join(answer(rank)).exists() => None,
            Ok(()) => Some(format!("rank 0 does not see what rank {rank} writes to {}", dir.display())),
            Err(why) => Some(format!("rank {rank}: {why}")),
        }))
    })
}

fn find(dir: &Path, name: &str) -> Result<()> {
    fs::metadata(dir.join(name)).map(drop).map_err(Error::io(dir, FileOp::Read))
}

/// An empty file, removed when it is dropped.
fn leave(dir: &Path, name: &str) -> Result<NamedTempFile> {
    Builder::new().prefix(name).rand_bytes(0).tempfile_in(dir).map_err(Error::io(dir, FileOp::Write))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::group::Threads;
    use std::path::PathBuf;

    /// What each of several ranks finds, of directories that each has by its own name.
    fn each(dirs: &[PathBuf]) -> Vec<Option<String>> {
        let groups = Threads::groups(dirs.len());
        std::thread::scope(|scope| {
            let ranks = dirs.iter().zip(&groups);
            let ranks = ranks.map(|(dir, group)| scope.spawn(|| obstacle(dir, group as &dyn Group<Cpu>).unwrap()));
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    fn files(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn ranks_share_a_directory_or_not() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let shared = one.path().join("run/checkpoints");
        assert_eq!(each(&vec![shared.clone(); 3]), [None, None, None]);
        assert_eq!(files(&shared), 0, "nothing stays");

        // Elsewhere there is no such directory, or another one.
        let elsewhere = other.path().join("checkpoints");
        for missing in [true, false] {
            let found = each(&[shared.clone(), shared.clone(), elsewhere.clone()]);
            let why = found[0].as_deref().unwrap();
            assert!(why.starts_with("rank 2: ") && why.contains("checkpoints: cannot read"), "{why}");
            assert!(found.iter().all(|rank| *rank == found[0]));
            assert_eq!(files(&shared), 0);
            if missing {
                assert!(!elsewhere.exists(), "nothing is created where rank 0 writes nothing");
                fs::create_dir(&elsewhere).unwrap();
            }
        }
        assert_eq!(files(&elsewhere), 0);
    }

    /// By another path it is the same directory.
    #[test]
    #[cfg(unix)]
    fn a_directory_may_have_several_names() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        assert_eq!(each(&[real, link]), [None, None]);
    }
}
