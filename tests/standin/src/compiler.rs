//! What is compiled for the stand-in, by g++ and nvcc, and kept: files are named by a hash of what they are made of.

use crate::{cubin, ptx};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// `-fno-strict-aliasing`: kernels read bf16 by the 16 bytes. The sanitizers trap on a misaligned access and on an
/// index past the end of an array of known size.
const FLAGS: &str = "-std=c++17 -O3 -fPIC -shared -fvisibility=hidden -fno-strict-aliasing -fno-stack-protector \
    -ffp-contract=fast -fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error -Wno-psabi";
/// Of translated PTX: every instruction rounds by itself; the code is long, and little of it is hot.
const PTX_FLAGS: &str = "-O1 -fwrapv -ffp-contract=off -fno-sanitize=all";
/// Of the driver and of NCCL: bounds checks would keep the loops of products from being vectorized.
const LIBRARY_FLAGS: &str = "-fno-sanitize=all -pthread";
/// Under which name swat asks for the library of a source.
const SONAMES: [(&str, &str); 2] = [("driver", "libcuda.so"), ("nccl", "libnccl.so.2")];

/// This repository.
fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// The kernel files of swat.
pub(crate) fn kernel_files() -> Vec<PathBuf> {
    files(&root().join("kernels"), "cu")
}

/// nvcc, where swat's `build.rs` finds it: `NVCC`, `CUDA_HOME`, `CUDA_PATH`, `.cuda/`, `PATH`, `/usr/local/cuda`.
pub fn nvcc() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
    let homes = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(variable).map(|home| home.join("bin/nvcc"));
    let installed = fs::read_dir(root().join(".cuda/lib")).into_iter().flatten().flatten();
    let installed = installed.map(|python| python.path().join("site-packages/nvidia/cu13/bin/nvcc"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path: Vec<PathBuf> = std::env::split_paths(&path).map(|folder| folder.join("nvcc")).collect();
    let mut found = variable("NVCC").into_iter().chain(homes).chain(installed).chain(on_path);
    // nvcc finds its parts beside itself, which a symbolic link hides.
    let found = found.find(|path| path.is_file()).or_else(|| Some("/usr/local/cuda/bin/nvcc".into()));
    found.filter(|path| path.is_file())?.canonicalize().ok()
}

/// The compilers of this machine, and where their output is kept.
pub struct Compiler {
    cxx: String,
    /// What `cxx --version` prints.
    cxx_version: Vec<u8>,
    nvcc: PathBuf,
    folder: PathBuf,
}

impl Compiler {
    /// Finds the compilers; output is kept in `scratch/standin`, for other processes and later runs.
    ///
    /// # Errors
    /// If there is no g++ or no nvcc, or the machine is not x86-64 Linux.
    pub fn find(scratch: &Path) -> Result<Self, String> {
        if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
            return Err("the stand-in GPU needs x86-64 Linux".into());
        }
        let cxx = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
        let version = Command::new(&cxx).arg("--version").output();
        let cxx_version = version.map_err(|e| format!("no C++ compiler: {cxx}: {e}"))?.stdout;
        let nvcc = nvcc().ok_or("no nvcc: scripts/install_nvcc.sh")?;
        Ok(Self { cxx, cxx_version, nvcc, folder: scratch.join("standin") })
    }

    /// A folder of the kept output, and the lock that keeps other test processes out of it.
    fn locked(&self, folder: PathBuf) -> (PathBuf, File) {
        fs::create_dir_all(&folder).expect("a folder for the stand-in");
        let lock = File::create(folder.join("lock")).expect("a lock file");
        lock.lock().expect("a lock between the test processes");
        (folder, lock)
    }

    /// The library of the emulated driver.
    ///
    /// # Panics
    /// If it does not compile.
    pub fn driver(&self) -> PathBuf {
        self.libraries(&[Path::new(env!("CARGO_MANIFEST_DIR")).join("cpp/driver.cpp")]).remove(0)
    }

    /// The library of the emulated NCCL, for a process with the driver's.
    ///
    /// # Panics
    /// If it does not compile.
    pub fn nccl(&self) -> PathBuf {
        self.libraries(&[Path::new(env!("CARGO_MANIFEST_DIR")).join("nccl/nccl.cpp")]).remove(0)
    }

    /// A library of each kernel file, or of each file of [`Compiler::translate`].
    ///
    /// # Panics
    /// If a source does not compile.
    pub fn libraries(&self, sources: &[PathBuf]) -> Vec<PathBuf> {
        let (emulation, kernels) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("cpp"), root().join("kernels"));
        let mut arguments = words(FLAGS);
        arguments.push(format!("-march={}", if avx2() { "x86-64-v3" } else { "x86-64" }));
        arguments.extend([&emulation, &kernels].map(|folder| format!("-I{}", folder.display())));
        let mut common = blake3::Hasher::new();
        common.update(&self.cxx_version).update(format!("{arguments:?}").as_bytes());
        for header in files(&emulation, "h").iter().chain(&files(&kernels, "cuh")).chain(&files(&emulation, "cpp")) {
            common.update(&read(header));
        }
        let (folder, _lock) = self.locked(self.folder.clone());
        each(sources, |source| {
            let mut key = common.clone();
            key.update(&read(source));
            if !is_kernel(source) {
                let folder = source.parent().expect("a folder");
                for part in files(folder, "h").iter().chain(&files(folder, "cpp")) {
                    key.update(&read(part));
                }
            }
            let key = key.finalize();
            let translated = source.starts_with(&folder);
            let place = if translated { source.parent().expect("a folder") } else { &folder };
            let library = place.join(format!("{}-{}.so", stem(source), &key.to_hex()[..16]));
            if !library.is_file() {
                let more = if translated { PTX_FLAGS } else { "" };
                self.compile(&[&arguments[..], &words(more)].concat(), source, &library);
            }
            library
        })
    }

    fn compile(&self, arguments: &[String], source: &Path, library: &Path) {
        for stale in files(library.parent().expect("a folder"), "so") {
            if stem(&stale).rsplit_once('-').is_some_and(|(of, _)| of == stem(source)) {
                let _ = fs::remove_file(stale);
            }
        }
        let partial = library.with_extension("partial");
        let mut command = Command::new(&self.cxx);
        command.args(arguments).arg("-o").arg(&partial);
        if is_kernel(source) {
            command.args(["-x", "c++"]).arg(source);
        } else {
            let soname = SONAMES.iter().find(|(of, _)| *of == stem(source)).map_or(stem(source), |(_, name)| *name);
            command.args(words(LIBRARY_FLAGS)).arg(format!("-Wl,-soname,{soname}"));
            command.args(files(source.parent().expect("a folder"), "cpp"));
        }
        let output = command.output().unwrap_or_else(|e| panic!("{}: {e}", self.cxx));
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{} does not compile for the stand-in GPU:\n{text}", source.display());
        fs::rename(&partial, library).expect("a writable folder");
    }

    /// C++ of the PTX that nvcc makes of kernel files, for the virtual architecture whose PTX swat embeds.
    ///
    /// # Panics
    /// If nvcc fails, or its PTX has a statement that is not understood.
    pub fn translate(&self, kernels: &[PathBuf]) -> Vec<PathBuf> {
        let (folder, _lock) = self.locked(self.folder.join("ptx"));
        let headers: Vec<u8> = files(&root().join("kernels"), "cuh").iter().flat_map(|path| read(path)).collect();
        each(kernels, |kernel| {
            let architecture = if is_hopper(kernel) { "compute_90a" } else { "compute_80" };
            let of = |extension: &str| folder.join(stem(kernel)).with_extension(extension);
            let (output, key, ptx) = (of("cu"), of("key"), of("ptx"));
            let mut made_of =
                format!("{} {architecture}\n{}", self.nvcc.display(), include_str!("ptx.rs")).into_bytes();
            made_of.extend(read(kernel).into_iter().chain(headers.iter().copied()));
            if output.is_file() && fs::read(&key).is_ok_and(|made| made == made_of) {
                return output;
            }
            self.nvcc(&["-O3", "-std=c++17", "-lineinfo", "-ptx", "-arch", architecture], kernel, &ptx);
            let cpp = ptx::to_cpp(&fs::read_to_string(&ptx).expect("PTX"));
            fs::write(&output, cpp.unwrap_or_else(|e| panic!("{}: {e}", ptx.display()))).expect("a writable folder");
            fs::write(&key, made_of).expect("a writable folder");
            output
        })
    }

    /// Cubins of a kernel file that swat does not embed, for the architectures of the stand-in's devices.
    ///
    /// # Panics
    /// If nvcc fails.
    pub fn cubins(&self, source: &Path) -> Vec<PathBuf> {
        let architectures: &[&str] = if is_hopper(source) { &["90a"] } else { &["80", "90"] };
        let (folder, _lock) = self.locked(self.folder.join("cubin"));
        let mut hash = blake3::Hasher::new();
        for path in files(&root().join("kernels"), "cuh").iter().map(PathBuf::as_path).chain([source]) {
            hash.update(&read(path));
        }
        let key = &hash.update(self.nvcc.to_string_lossy().as_bytes()).finalize().to_hex()[..16];
        let compiled = architectures.iter().map(|architecture| {
            let cubin = folder.join(format!("{}-{architecture}-{key}.cubin", stem(source)));
            if !cubin.is_file() {
                let code = format!("arch=compute_{architecture},code=sm_{architecture}");
                self.nvcc(&["-O3", "-std=c++17", "-cubin", "-gencode", &code], source, &cubin);
            }
            cubin
        });
        compiled.collect()
    }

    /// Runs nvcc, with swat's kernel headers.
    ///
    /// # Panics
    /// If it fails.
    pub fn nvcc(&self, arguments: &[&str], source: &Path, output: &Path) {
        let mut nvcc = Command::new(&self.nvcc);
        nvcc.args(arguments).arg("-I").arg(root().join("kernels")).arg("-o").arg(output).arg(source);
        let run = nvcc.output().unwrap_or_else(|e| panic!("{}: {e}", self.nvcc.display()));
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    }

    /// A file from which the driver reads what the kernels of these cubins take of a multiprocessor.
    ///
    /// # Panics
    /// If the folder of the kept output cannot be written.
    pub fn resources(&self, source: &Path, cubins: &[PathBuf]) -> PathBuf {
        let (folder, text) = (self.folder.join("resources"), cubin::resources(cubins));
        fs::create_dir_all(&folder).expect("a folder");
        let path = folder.join(format!("{}-{}", stem(source), &blake3::hash(text.as_bytes()).to_hex()[..16]));
        replace(&path, text.as_bytes());
        path
    }
}

/// Writes a file that other processes may have open.
pub(crate) fn replace(path: &Path, bytes: &[u8]) {
    let partial = path.with_extension(format!("{}-{:?}", std::process::id(), std::thread::current().id()));
    fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, path)).expect("a writable folder");
}

/// `work` of each path, by as many threads as there are cores.
fn each(paths: &[PathBuf], work: impl Fn(&Path) -> PathBuf + Sync) -> Vec<PathBuf> {
    let results: Vec<OnceLock<PathBuf>> = paths.iter().map(|_| OnceLock::new()).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    let Some(path) = paths.get(at) else { break };
                    results[at].set(work(path)).expect("set once");
                }
            });
        }
    });
    results.into_iter().map(|result| result.into_inner().expect("every path has its result")).collect()
}

/// The files of a folder with this extension, sorted.
pub(crate) fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let paths = entries.flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|e| e == extension)).collect();
    files.sort();
    files
}

pub(crate) fn stem(path: &Path) -> &str {
    path.file_stem().and_then(|stem| stem.to_str()).expect("a UTF-8 file name")
}

/// Whether it is a kernel file, or made of one.
fn is_kernel(source: &Path) -> bool {
    source.extension().is_some_and(|extension| extension == "cu")
}

fn is_hopper(source: &Path) -> bool {
    stem(source).ends_with("_sm90")
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(String::from).collect()
}

#[cfg(target_arch = "x86_64")]
fn avx2() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
}

#[cfg(not(target_arch = "x86_64"))]
fn avx2() -> bool {
    false
}
