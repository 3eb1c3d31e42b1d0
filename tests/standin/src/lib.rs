//! A GPU for tests on machines without one: an implementation of the CUDA driver's calls that runs swat's kernel files
//! on the CPU, as g++ compiles them, or with `SWAT_TEST_CUDA=ptx` what nvcc made of them. With `SWAT_TEST_CUDA=gpu`
//! tests use the GPU of this machine instead, and the stand-in stays out. `README.md` says what is emulated, and what
//! is not.
//!
//! | device | compute capability | asynchronous operations happen | approximate instructions are |
//! |---|---|---|---|
//! | 0 | 9.0 | as late as CUDA allows | exact |
//! | 1 | 9.0 | at once | off by as much as they may be |
//! | 2 | 8.0 | as late as CUDA allows | off by as much as they may be |
//! | 3 | 8.0 | at once | exact |
//! | 4 | 7.0: too old for swat | | |
//! | 5 | 9.0, with 1 MiB of memory | as late as CUDA allows | exact |
//! | 6 | 9.0, loads no kernel image | | |

mod compiler;
pub mod cores;
pub mod cubin;
mod driver;
mod ptx;

pub use compiler::{Compiler, nvcc};
pub use driver::{
    Access, FaultScope, Kernel, accesses, allocations, bytes, calls, each_takes, faults, hook, kernels, launches, load,
    profiled, sparse, streams,
};

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Whether tests run on this machine's GPU.
pub fn real() -> bool {
    mode_is("gpu")
}

/// Whether the stand-in runs what nvcc made of the kernel files.
pub fn compiled() -> bool {
    mode_is("ptx")
}

fn mode_is(mode: &str) -> bool {
    std::env::var_os("SWAT_TEST_CUDA").is_some_and(|value| value == mode)
}

/// Loads the emulated driver, without kernels, on the first call; before anything else of the process uses the driver.
///
/// # Errors
/// Why there can be none on this machine.
///
/// # Panics
/// If it does not compile or load.
pub fn start(scratch: &Path) -> Result<&'static Compiler, &'static str> {
    static STARTED: OnceLock<Result<Compiler, String>> = OnceLock::new();
    let started = STARTED.get_or_init(|| {
        let compiler = Compiler::find(scratch)?;
        driver::open(&compiler.driver());
        if compiled() {
            driver::watch();
        }
        Ok(compiler)
    });
    started.as_ref().map_err(String::as_str)
}

/// Says once, on standard error, that tests are skipped. Returns false.
pub fn skip(reason: &str) -> bool {
    static SAID: OnceLock<()> = OnceLock::new();
    SAID.get_or_init(|| {
        let _ = writeln!(std::io::stderr(), "skipped: tests on CUDA devices ({reason})");
    });
    false
}

/// The kernels of a build of swat, on the stand-in.
#[derive(Clone, Copy, Debug)]
pub struct Build {
    /// Output folder of swat's build script: `STEM.fatbin`, `kept/STEM/*.cubin`. Empty if it was built without nvcc.
    pub images: &'static str,
    /// Where what is compiled for the stand-in is kept: `CARGO_TARGET_TMPDIR`.
    pub scratch: &'static str,
}

impl Build {
    /// Whether there are CUDA devices to test on. The first call compiles and loads the stand-in with every kernel of
    /// swat; it comes before anything else uses the driver. If there can be none, standard error says why, once.
    pub fn available(self) -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| self.load().map_or_else(|reason| skip(&reason), |()| true))
    }

    fn load(self) -> Result<(), String> {
        if self.images.is_empty() {
            return Err("swat was built without nvcc: scripts/install_nvcc.sh".into());
        }
        if real() {
            return Ok(());
        }
        let compiler = start(Path::new(self.scratch))?;
        for (library, source) in self.libraries(compiler) {
            load(&library, &self.image(&source), &compiler.resources(&source, &self.cubins(&source)));
        }
        Ok(())
    }

    /// The library of each kernel file, and the file.
    fn libraries(self, compiler: &Compiler) -> Vec<(PathBuf, PathBuf)> {
        let kernels = compiler::kernel_files();
        let sources = if compiled() { compiler.translate(&kernels) } else { kernels };
        compiler.libraries(&sources).into_iter().zip(sources).collect()
    }

    /// What swat embeds for a kernel file.
    fn image(self, source: &Path) -> Vec<u8> {
        let image = Path::new(self.images).join(compiler::stem(source)).with_extension("fatbin");
        fs::read(&image).unwrap_or_else(|e| panic!("{}: {e}", image.display()))
    }

    /// The cubins in the image of a kernel file.
    ///
    /// # Panics
    /// If swat embeds no such file.
    pub fn cubins(self, source: &Path) -> Vec<PathBuf> {
        compiler::files(&Path::new(self.images).join("kept").join(compiler::stem(source)), "cubin")
    }

    /// What a child process needs to find the stand-in as its driver; `None` if there is none, or tests use a real GPU.
    ///
    /// # Panics
    /// If the folder of the kept output cannot be written.
    pub fn for_children(self) -> Option<ChildDriver> {
        if real() || !self.available() {
            return None;
        }
        let compiler = start(Path::new(self.scratch)).expect("loaded above");
        let driver = compiler.driver();
        let folder = driver.parent().expect("a folder").join("process");
        let kernels = folder.join("kernels");
        fs::create_dir_all(&folder).expect("a folder");
        compiler::replace(&folder.join("libcuda.so"), &fs::read(&driver).expect("the driver's library"));
        let mut lines = String::new();
        for (library, source) in self.libraries(compiler) {
            let stem = compiler::stem(&source);
            let image = folder.join(stem).with_extension("fatbin");
            compiler::replace(&image, &self.image(&source));
            let resources = compiler.resources(&source, &self.cubins(&source));
            lines += &format!("{stem} {} {} {}\n", library.display(), image.display(), resources.display());
        }
        compiler::replace(&kernels, lines.as_bytes());
        Some(ChildDriver { folder, kernels })
    }

    /// Loads the emulated NCCL: whoever opens `libnccl.so.2` in this process has it. Whether there are devices for
    /// it; there are none where tests use a real GPU.
    ///
    /// # Panics
    /// If it does not compile or load.
    pub fn with_nccl(self) -> bool {
        if real() || !self.available() {
            return false;
        }
        driver::open_nccl(&start(Path::new(self.scratch)).expect("loaded above").nccl());
        true
    }

    /// A folder for `LD_LIBRARY_PATH` that holds `libnccl.so.2`, for a child process with the stand-in as its driver.
    ///
    /// # Panics
    /// As [`Build::for_children`].
    pub fn nccl_for_children(self) -> Option<PathBuf> {
        if real() || !self.available() {
            return None;
        }
        let nccl = start(Path::new(self.scratch)).expect("loaded above").nccl();
        let folder = nccl.parent().expect("a folder").join("nccl");
        fs::create_dir_all(&folder).expect("a folder");
        compiler::replace(&folder.join("libnccl.so.2"), &fs::read(&nccl).expect("the library"));
        Some(folder)
    }

    /// Runs tests of this executable, chosen by `arguments`, in a child process on the compiled kernels
    /// (`SWAT_TEST_CUDA=ptx`), three blocks interleaved. Does nothing without a stand-in.
    ///
    /// # Panics
    /// If a test fails.
    pub fn test_compiled(self, arguments: &[&str]) {
        if real() || !self.available() {
            return;
        }
        let mut child = Command::new(std::env::current_exe().expect("a path"));
        let environment = [("SWAT_TEST_CUDA", "ptx"), ("STANDIN_BLOCKS", "3")];
        let output = child.args(arguments).arg("--nocapture").envs(environment).output().expect("it starts");
        let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
        assert!(output.status.success(), "compiled kernels: {}\n{stdout}\n{stderr}", output.status);
    }
}

/// The stand-in for a child process.
#[derive(Debug)]
pub struct ChildDriver {
    /// Holds `libcuda.so`: for `LD_LIBRARY_PATH`.
    pub folder: PathBuf,
    /// List of kernel libraries: for `STANDIN_KERNELS`.
    pub kernels: PathBuf,
}
