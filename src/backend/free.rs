//! Memory that this process can still allocate: of the machine, of its control groups, of its own limits.

use std::fs;
use std::path::{Path, PathBuf};

/// What bounds a process's memory, and how much of it is left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreeMemory {
    /// Bytes that can still be allocated.
    pub bytes: u64,
    /// The bound that is reached first: `the machine`, `the control group /docker/x` or `ulimit -v`.
    pub bound: String,
}

impl FreeMemory {
    /// Of this process now; `None` where the system does not say.
    pub fn now() -> Option<Self> {
        Self::under(Path::new("/"))
    }

    /// As the files below `root` say, which is `/` but in tests.
    fn under(root: &Path) -> Option<Self> {
        let machine = available(&read(&root.join("proc/meminfo"))?)?;
        let mut least = Self { bytes: machine, bound: "the machine".into() };
        let groups = groups(root).into_iter().map(|(bytes, name)| (bytes, format!("the control group {name}")));
        for (bytes, bound) in groups.chain(limits(root)) {
            if bytes < least.bytes {
                least = Self { bytes, bound };
            }
        }
        Some(least)
    }
}

fn read(path: &Path) -> Option<String> {
    fs::read_to_string(path).ok()
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    kibibytes(meminfo, "MemAvailable:")
}

/// The value of a line such as `VmSize:    1234 kB`, in bytes.
fn kibibytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// What is left of the limits on the address space and on data (`ulimit -v`, `ulimit -d`).
fn limits(root: &Path) -> Vec<(u64, String)> {
    let (Some(limits), Some(status)) = (read(&root.join("proc/self/limits")), read(&root.join("proc/self/status")))
    else {
        return Vec::new();
    };
    let left = |(limit, used, name): (&str, &str, &str)| {
        let line = limits.lines().find_map(|line| line.strip_prefix(limit))?;
        // `unlimited` is no number.
        let most: u64 = line.split_whitespace().next()?.parse().ok()?;
        Some((most.saturating_sub(kibibytes(&status, used)?), name.to_owned()))
    };
    [("Max address space", "VmSize:", "ulimit -v"), ("Max data size", "VmData:", "ulimit -d")]
        .into_iter()
        .filter_map(left)
        .collect()
}

/// What is left in each control group above this process that has a limit, with its name; of version 1 and 2.
fn groups(root: &Path) -> Vec<(u64, String)> {
    let (Some(own), Some(mounts)) = (read(&root.join("proc/self/cgroup")), read(&root.join("proc/self/mountinfo")))
    else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let version_2 = controllers.is_empty();
        if !version_2 && !controllers.split(',').any(|name| name == "memory") {
            continue;
        }
        let kind = if version_2 { "cgroup2" } else { "cgroup" };
        let Some((mounted, at)) = mounts.lines().find_map(|line| mount(line, kind)) else { continue };
        // A container may see its own group as the mount's root.
        let below = path.strip_prefix(&mounted).unwrap_or(path).trim_start_matches('/');
        let top = root.join(at.trim_start_matches('/'));
        let mut here: PathBuf = top.join(below);
        while here.starts_with(&top) {
            if let Some(left) = left(&here, version_2) {
                let name = here.strip_prefix(&top).map_or_else(|_| path.to_owned(), |p| format!("/{}", p.display()));
                found.push((left, name));
            }
            if !here.pop() {
                break;
            }
        }
    }
    found
}

/// Root and mount point of a line of `mountinfo` about control groups with the memory controller.
fn mount(line: &str, kind: &str) -> Option<(String, String)> {
    let (before, after) = line.split_once(" - ")?;
    let mut after = after.split(' ');
    if after.next() != Some(kind) {
        return None;
    }
    let options = after.nth(1).unwrap_or_default();
    if kind == "cgroup" && !options.split(',').any(|option| option == "memory") {
        return None;
    }
    let mut fields = before.split(' ').skip(3);
    let (mounted, at) = (fields.next()?, fields.next()?);
    Some((mounted.trim_end_matches('/').to_owned(), at.to_owned()))
}

/// What is left of a group's limit; the page cache, which the kernel can drop, counts as free. `None` without a limit.
fn left(group: &Path, version_2: bool) -> Option<u64> {
    let number = |name: &str| read(&group.join(name))?.trim().parse::<u64>().ok();
    let (most, used, cache) = match version_2 {
        true => (number("memory.max")?, number("memory.current")?, ["inactive_file ", "active_file "]),
        false => (
            number("memory.limit_in_bytes")?,
            number("memory.usage_in_bytes")?,
            ["total_inactive_file ", "total_active_file "],
        ),
    };
    let stat = read(&group.join("memory.stat")).unwrap_or_default();
    let value = |name: &str| stat.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<u64>().ok());
    let cache: u64 = cache.into_iter().filter_map(value).sum();
    Some(most.saturating_sub(used.saturating_sub(cache)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory tree of these files.
    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal: 32000000 kB\nMemAvailable: 24000000 kB\n");

    #[test]
    fn the_machine_alone() {
        let found = FreeMemory::under(tree(&[MEMINFO]).path()).unwrap();
        assert_eq!(found, FreeMemory { bytes: 24_000_000 * 1024, bound: "the machine".into() });
        assert_eq!(FreeMemory::under(tree(&[]).path()), None);
    }

    #[test]
    fn version_2_with_the_lowest_limit_above() {
        let group = "sys/fs/cgroup/user.slice/job";
        let dir = tree(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/user.slice/job\n"),
            ("proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n"),
            (&format!("{group}/memory.max"), "max\n"),
            ("sys/fs/cgroup/user.slice/memory.max", "314572800\n"),
            ("sys/fs/cgroup/user.slice/memory.current", "104857600\n"),
            ("sys/fs/cgroup/user.slice/memory.stat", "anon 1\nfile 9\ninactive_file 20000000\nactive_file 857600\n"),
        ]);
        let found = FreeMemory::under(dir.path()).unwrap();
        // 300 MiB less 100 MiB, of which 20 857 600 bytes are cache.
        let expected = FreeMemory { bytes: 314_572_800 - 84_000_000, bound: "the control group /user.slice".into() };
        assert_eq!(found, expected);
    }

    #[test]
    fn version_1_in_a_container() {
        let dir = tree(&[
            MEMINFO,
            ("proc/self/cgroup", "9:cpu,cpuacct:/docker/abc\n5:memory:/docker/abc\n"),
            (
                "proc/self/mountinfo",
                "41 32 0:36 /docker/abc /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu,cpuacct\n\
                 42 32 0:37 /docker/abc /sys/fs/cgroup/memory ro master:5 - cgroup cgroup rw,memory\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "1000000000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "400000000\n"),
            ("sys/fs/cgroup/memory/memory.stat", "inactive_file 5\ntotal_inactive_file 100000000\n"),
        ]);
        assert_eq!(FreeMemory::under(dir.path()).unwrap().bytes, 700_000_000);
    }

    #[test]
    fn limits_of_the_process() {
        let dir = tree(&[
            MEMINFO,
            (
                "proc/self/limits",
                "Max data size   unlimited unlimited bytes\nMax address space 2000000 2000000 bytes\n",
            ),
            ("proc/self/status", "VmSize:\t1000 kB\nVmData:\t 10 kB\n"),
        ]);
        let expected = FreeMemory { bytes: 2_000_000 - 1_024_000, bound: "ulimit -v".into() };
        assert_eq!(FreeMemory::under(dir.path()), Some(expected));
    }
}
