//! Where CUDA's libraries lie that the loader does not find by itself: CUDA's own folders, and those of Python's packages
//! (`pip install nvidia-cublas`, or PyTorch, which brings them).

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Major versions of CUDA, the one that the bindings were made for first. With one of these at its end the name of a
/// file is the library's own (SONAME), by which the loader finds what is open already.
const VERSIONS: [u32; 2] = [13, 12];

/// Opens `lib{stem}.so`, so that whoever opens it by its name gets it. Where it lies.
///
/// # Errors
/// Where it was looked for; why it cannot be opened.
pub fn open(stem: &str) -> Result<String, String> {
    open_in(stem, &folders())
}

/// The same, of these folders where the loader does not find it by itself.
///
/// # Errors
/// As [`open`].
pub fn open_in(stem: &str, folders: &[PathBuf]) -> Result<String, String> {
    // What the loader says lies below what the crate says.
    let told = |error: libloading::Error| error.source().map_or_else(|| error.to_string(), ToString::to_string);
    let load = |path: &Path| {
        // SAFETY: a library of CUDA, which does nothing of ours when it is loaded.
        let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.map_err(told)?;
        std::mem::forget(library);
        Ok::<_, String>(path.display().to_string())
    };
    let mut refused = String::new();
    for version in VERSIONS {
        let name = format!("lib{stem}.so.{version}");
        if let Ok(found) = load(Path::new(&name)) {
            return Ok(found);
        }
        for path in folders.iter().map(|folder| folder.join(&name)).filter(|path| path.is_file()) {
            match load(&path) {
                Ok(found) => return Ok(found),
                Err(why) => refused += &format!("; {}: {why}", path.display()),
            }
        }
    }
    let looked: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
    let looked = if looked.is_empty() { String::new() } else { format!(" and in {}", looked.join(", ")) };
    Err(format!("no lib{stem}.so.{} where the loader looks{looked}{refused}", VERSIONS[0]))
}

/// Folders that exist, in the order in which they are looked in.
fn folders() -> Vec<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).chain(["/usr/local/cuda".into()]);
    let of_cuda = homes.flat_map(|home| ["lib64", "lib", "targets/x86_64-linux/lib"].map(|part| home.join(part)));
    let mut packages = Vec::new();
    if let Some(environment) = variable("VIRTUAL_ENV") {
        packages.extend(inside(&environment.join("lib")).into_iter().map(|python| python.join("site-packages")));
    }
    let mut python = Command::new("python3");
    if let Ok(output) = python.args(["-c", "import sys; print('\\n'.join(sys.path))"]).output() {
        packages
            .extend(String::from_utf8_lossy(&output.stdout).lines().filter(|line| !line.is_empty()).map(PathBuf::from));
    }
    // Every part is a package of its own (nvidia/cublas/lib); since CUDA 13 all are in one (nvidia/cu13/lib).
    let of_python = packages.iter().flat_map(|folder| inside(&folder.join("nvidia"))).map(|part| part.join("lib"));
    let mut folders: Vec<PathBuf> = Vec::new();
    for folder in of_cuda.chain(of_python).filter(|folder| folder.is_dir()) {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    folders
}

/// What a folder holds, by name.
fn inside(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}
