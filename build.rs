//! Compiles `kernels/*.cu` to fatbins that the library embeds; never needs a GPU.
//!
//! `SWAT_CUDA` = `auto` (default: compile where an nvcc is found, else embed nothing), `off`, or `require` (no nvcc is an
//! error). nvcc is looked for in `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `.cuda/` (scripts/install_nvcc.sh), `PATH` and
//! `/usr/local/cuda`. Files named `*_sm90.cu` hold Hopper code and are compiled for sm_90a alone.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, thread};

/// Virtual architecture and code of what goes into an image; of Hopper files.
const CODE: [(&str, &str); 3] = [("compute_80", "sm_80"), ("compute_80", "compute_80"), ("compute_90", "sm_90")];
const HOPPER_CODE: [(&str, &str); 1] = [("compute_90a", "sm_90a")];

const VARIABLES: [&str; 4] = ["SWAT_CUDA", "NVCC", "CUDA_HOME", "CUDA_PATH"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rustc-env=SWAT_COMMIT={}", commit());
    for variable in VARIABLES {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    let nvcc = match env::var("SWAT_CUDA").as_deref().unwrap_or("auto") {
        "off" => None,
        "auto" => find_nvcc(&root),
        "require" => Some(find_nvcc(&root).unwrap_or_else(|| {
            fail("SWAT_CUDA=require, but there is no nvcc: run scripts/install_nvcc.sh, or set NVCC or CUDA_HOME")
        })),
        other => fail(&format!("SWAT_CUDA={other}: expected auto, off or require")),
    };
    let sources = files(&root.join("kernels"), "cu");
    let headers: String = files(&root.join("kernels"), "cuh").iter().map(|path| read(path)).collect();
    if let Some(nvcc) = &nvcc {
        let (next, failed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for _ in 0..thread::available_parallelism().map_or(1, |n| n.get()) {
                scope.spawn(|| {
                    while let Some(source) = sources.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if let Err(message) = compile(nvcc, source, &headers, &out) {
                            failed.lock().expect("not poisoned").push(message);
                        }
                    }
                });
            }
        });
        let failed = failed.into_inner().expect("not poisoned");
        if !failed.is_empty() {
            fail(&failed.join("\n"));
        }
    }
    let compiled = nvcc.is_some();
    // For tests, which run what it makes; those of another package have it as DEP_SWAT_KERNELS_IMAGES.
    let folder = if compiled { out.display().to_string() } else { String::new() };
    println!("cargo:rustc-env=SWAT_IMAGES={folder}\ncargo:images={folder}");
    let names = |code: &[(&'static str, &'static str)]| code.iter().map(|(_, name)| *name).collect::<Vec<_>>();
    let mut table = format!(
        "/// What the images hold code for.\npub static CODE: &[&str] = &{:?};\n\
         /// What the images of `*_sm90` hold code for.\npub static HOPPER_CODE: &[&str] = &{:?};\n",
        names(&CODE),
        names(&HOPPER_CODE)
    );
    if compiled {
        table += "/// Fatbins hold 64-bit fields, which `include_bytes` alone does not align.\n";
        table += "#[repr(C, align(16))]\nstruct Aligned<T>(T);\n";
    }
    table += "/// File stem and fatbin; empty where the library was built without nvcc.\n";
    table += "pub static IMAGES: &[(&str, &[u8])] = &[\n";
    let mut constants = String::new();
    for source in &sources {
        let image =
            if compiled { format!("&Aligned(*include_bytes!({:?})).0", image(source, &out)) } else { "&[]".into() };
        table += &format!("    ({:?}, {image}),\n", stem(source));
        if compiled {
            constants += &exported(&files(&kept(source, &out), "ptx"));
        }
    }
    table += "];\n/// What kernel files export by CONSTANT: name and value.\n";
    table += &format!("pub static CONSTANTS: &[(&str, u32)] = &[\n{constants}];\n");
    fs::write(out.join("images.rs"), table).unwrap_or_else(|e| fail(&e.to_string()));
}

fn fail(message: &str) -> ! {
    eprintln!("{message}");
    std::process::exit(1)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|e| fail(&format!("{}: {e}", path.display())))
}

fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap_or_else(|e| fail(&format!("{}: {e}", directory.display())));
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == extension))
        .collect();
    files.sort();
    files
}

fn stem(source: &Path) -> &str {
    source.file_stem().and_then(|s| s.to_str()).unwrap_or_else(|| fail("a kernel file whose name is not UTF-8"))
}

fn image(source: &Path, out: &Path) -> PathBuf {
    out.join(stem(source)).with_extension("fatbin")
}

/// The folder of a file's PTX and cubins, which go into its image.
fn kept(source: &Path, out: &Path) -> PathBuf {
    out.join("kept").join(stem(source))
}

/// The rows of `CONSTANTS` for a kernel file: its PTX of every architecture has `.global .align 4 .u32 NAME = VALUE;`.
fn exported(ptx: &[PathBuf]) -> String {
    let constants = |path: &PathBuf| -> Vec<String> {
        let text = read(path);
        let lines = text.lines().filter(|line| line.contains(".global .align 4 .u32 ") && line.contains(" = "));
        lines
            .map(|line| {
                let (name, value) = line.split_once(" = ").unwrap_or_default();
                let name = name.rsplit(' ').next().unwrap_or_default();
                format!("    ({name:?}, {}),\n", value.trim_end_matches(';'))
            })
            .collect()
    };
    let all: Vec<Vec<String>> = ptx.iter().map(constants).collect();
    if all.is_empty() || all.iter().any(|constants| *constants != all[0]) {
        fail(&format!("constants that differ between architectures, or no PTX: {ptx:?}"));
    }
    all[0].concat()
}

fn find_nvcc(root: &Path) -> Option<PathBuf> {
    let variable = |name: &str| env::var_os(name).map(PathBuf::from);
    let mut candidates: Vec<PathBuf> = variable("NVCC").into_iter().collect();
    candidates.extend(["CUDA_HOME", "CUDA_PATH"].iter().filter_map(|v| variable(v)).map(|home| home.join("bin/nvcc")));
    for python in fs::read_dir(root.join(".cuda/lib")).into_iter().flatten().flatten() {
        candidates.push(python.path().join("site-packages/nvidia/cu13/bin/nvcc"));
    }
    candidates.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()).map(|path| path.join("nvcc")));
    candidates.push("/usr/local/cuda/bin/nvcc".into());
    // nvcc finds its parts beside itself, which a symbolic link hides.
    candidates.into_iter().find(|path| path.is_file()).and_then(|path| path.canonicalize().ok())
}

/// One file to its fatbin, unless that was made of the same text by the same command.
fn compile(nvcc: &Path, source: &Path, headers: &str, out: &Path) -> Result<(), String> {
    let image = image(source, out);
    let mut arguments =
        vec!["-O3", "-std=c++17", "-fatbin", "--compress-mode=size", "-lineinfo", "-Xptxas", "-warn-spills", "-keep"];
    let code: &[_] = if stem(source).ends_with("_sm90") { &HOPPER_CODE } else { &CODE };
    let code: Vec<String> = code.iter().map(|(arch, code)| format!("arch={arch},code={code}")).collect();
    arguments.extend(code.iter().flat_map(|code| ["-gencode", code]));
    let key = format!("{} {arguments:?}\n{}{headers}", nvcc.display(), read(source));
    let key_file = image.with_extension("key");
    if image.is_file() && fs::read_to_string(&key_file).is_ok_and(|made| made == key) {
        return Ok(());
    }
    let kept = kept(source, out);
    fs::create_dir_all(&kept).map_err(|e| format!("{}: {e}", kept.display()))?;
    let mut command = Command::new(nvcc);
    command.args(&arguments).arg("-keep-dir").arg(&kept);
    command.arg("-I").arg(source.parent().unwrap_or(out)).arg("-o").arg(&image).arg(source);
    let output = command.output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        return Err(format!("nvcc failed on {}:\n{text}", source.display()));
    }
    for path in fs::read_dir(&kept).into_iter().flatten().flatten().map(|entry| entry.path()) {
        if !path.extension().is_some_and(|e| e == "ptx" || e == "cubin") {
            let _ = fs::remove_file(path);
        }
    }
    fs::write(&key_file, key).map_err(|e| format!("{}: {e}", key_file.display()))
}

/// ` (COMMIT DATE)` of a release build from a git checkout, for `--version`; else nothing.
///
/// Debug builds have none, as they would be made again after every commit.
fn commit() -> String {
    if env::var("PROFILE").as_deref() != Ok("release") {
        return String::new();
    }
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok().filter(|output| output.status.success())?;
        Some(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(head) = git(&["rev-parse", "--path-format=absolute", "--git-path", "logs/HEAD"]) else {
        return String::new();
    };
    // Of this package's own checkout, not of one that it was unpacked into.
    if git(&["ls-files", "--error-unmatch", "Cargo.toml"]).is_none() {
        return String::new();
    }
    println!("cargo:rerun-if-changed={head}");
    let found = git(&["log", "-1", "--format=%h %cs"]).unwrap_or_default();
    let changed = git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|files| !files.is_empty());
    if found.is_empty() { found } else { format!(" ({found}{})", if changed { ", changed" } else { "" }) }
}
