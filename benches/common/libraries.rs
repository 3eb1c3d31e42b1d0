//! Finds CUDA libraries that the loader does not find by itself: in the folders of the CUDA toolkit and of Python
//! packages (`pip install nvidia-cublas`, or PyTorch's dependencies).

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Major versions of CUDA, that of the bindings first. `libX.so.MAJOR` is the library's SONAME, by which the loader
/// finds it again once it is open.
const VERSIONS: [u32; 2] = [13, 12];

/// Opens `lib{stem}.so`, so that opening it by its SONAME succeeds from then on. Returns its path.
///
/// # Errors
/// If it is not found (the message says where it was looked for) or cannot be opened.
pub fn open(stem: &str) -> Result<String, String> {
    open_in(stem, &folders())
}

/// [`open`], with the folders to search after the loader's own.
///
/// # Errors
/// As [`open`].
pub fn open_in(stem: &str, folders: &[PathBuf]) -> Result<String, String> {
    // The loader's own message is the source of the crate's error.
    let told = |error: libloading::Error| error.source().map_or_else(|| error.to_string(), ToString::to_string);
    let load = |path: &Path| {
        // SAFETY: loading a CUDA library runs only its own initializers.
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

/// The folders that exist, in search order.
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
    // One package for each library (nvidia/cublas/lib); since CUDA 13 one for all (nvidia/cu13/lib).
    let of_python = packages.iter().flat_map(|folder| inside(&folder.join("nvidia"))).map(|part| part.join("lib"));
    let mut folders: Vec<PathBuf> = Vec::new();
    for folder in of_cuda.chain(of_python).filter(|folder| folder.is_dir()) {
        if !folders.contains(&folder) {
            folders.push(folder);
        }
    }
    folders
}

/// Entries of a folder, sorted by name.
fn inside(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}
