//! CUDA devices for tests: the stand-in of `tests/standin`, which runs the kernel files on the CPU below the real driver
//! calls; with `SWAT_TEST_CUDA=ptx` not those, but what nvcc made of them; with `SWAT_TEST_CUDA=gpu` the GPU of this machine.
//!
//! The stand-in's devices: 0 and 1 have compute capability 9.0, 2 and 3 have 8.0; on 0 and 2 asynchronous operations happen
//! as late as CUDA allows, on 1 and 3 at once; on 1 and 2 approximate instructions are off by as much as they may be, on 0 and 3
//! they are exact. 4 is too old, 5 has 1 MiB of memory, 6 loads no kernel.
#![allow(dead_code)]

#[path = "cubin.rs"]
pub mod cubin;
#[path = "ptx.rs"]
mod ptx;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_LOCAL, RTLD_NOW};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use swat::backend::cuda::{Cuda, Precision};

include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The compiler of the images; empty where there was none.
pub const NVCC: &str = include_str!(concat!(env!("OUT_DIR"), "/nvcc"));

/// Whether there are CUDA devices to test on. The first call builds and loads the stand-in; it comes before any other use of
/// the driver. Where there can be none, it says so once, on standard error.
pub fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| match start() {
        Ok(()) => true,
        Err(reason) => {
            let _ = writeln!(std::io::stderr(), "skipped: tests of the CUDA backend ({reason})");
            false
        }
    })
}

/// Device `ordinal`, where there is one. On a real GPU's machine its first stands for all of the stand-in's.
pub fn open<P: Precision>(ordinal: u32) -> Option<Cuda<P>> {
    if !available() {
        return None;
    }
    let ordinal = if real() { 0 } else { ordinal };
    Some(Cuda::open(ordinal).unwrap_or_else(|e| panic!("cuda:{ordinal}: {e}")))
}

/// Whether tests run on a GPU.
pub fn real() -> bool {
    asked_for("gpu")
}

/// Whether the stand-in runs what nvcc made of the kernel files.
pub fn compiled() -> bool {
    asked_for("ptx")
}

/// Runs tests of this executable, chosen by arguments, in a process of its own on what nvcc made of the kernel files, three
/// blocks by turns. Nothing where there is no stand-in.
///
/// # Panics
/// Where a test fails.
pub fn compiled_too(arguments: &[&str]) {
    if real() || !available() {
        return;
    }
    let mut child = Command::new(std::env::current_exe().expect("a path"));
    let output = child
        .args(arguments)
        .arg("--nocapture")
        .envs([("SWAT_TEST_CUDA", "ptx"), ("STANDIN_BLOCKS", "3")])
        .output()
        .expect("it runs");
    let [stdout, stderr] = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned());
    assert!(output.status.success(), "of compiled kernels: {}\n{stdout}\n{stderr}", output.status);
}

fn asked_for(what: &str) -> bool {
    std::env::var_os("SWAT_TEST_CUDA").is_some_and(|value| value == what)
}

/// Kernels that device `ordinal` of the stand-in has run.
pub fn launches(ordinal: i32) -> u64 {
    counter("standin_launches", ordinal)
}

/// Allocations that device `ordinal` of the stand-in has made.
pub fn allocations(ordinal: i32) -> u64 {
    counter("standin_allocations", ordinal)
}

/// Bytes allocated now on device `ordinal` of the stand-in.
pub fn bytes(ordinal: i32) -> u64 {
    counter("standin_bytes", ordinal)
}

/// By the events of device `ordinal` of the stand-in, each kernel and each copy within it takes so long from now on; 0: as
/// long as it does.
pub fn each_takes(ordinal: i32, ns: u64) {
    // SAFETY: exported with this type.
    unsafe { hook::<unsafe extern "C" fn(i32, u64)>("standin_each_takes")(ordinal, ns) }
}

/// The `n`-th kernel from now on of device `ordinal` of the stand-in faults: from then on every call that needs the device says
/// so, where `binding` also that which makes a context current.
pub fn faults(ordinal: i32, n: u64, binding: bool) {
    // SAFETY: exported with this type.
    unsafe { hook::<unsafe extern "C" fn(i32, u64, bool)>("standin_faults")(ordinal, n, binding) }
}

/// From now on device `ordinal` of the stand-in has 64 TiB of memory, zeros until it is written, as many multiprocessors as a grid
/// has blocks, and runs of each launch the first and the last `ends` blocks.
pub fn sparse(ordinal: i32, ends: u64) {
    // SAFETY: exported with this type.
    unsafe { hook::<unsafe extern "C" fn(i32, u64)>("standin_sparse")(ordinal, ends) }
}

/// Kernels that device `ordinal` of the stand-in has run while a profiler was told to look.
pub fn profiled(ordinal: i32) -> u64 {
    counter("standin_profiled", ordinal)
}

/// Calls of the driver's function `name` for device `ordinal` of the stand-in; those of launches, copies, memory and waiting are
/// counted.
pub fn calls(ordinal: i32, name: &str) -> u64 {
    let name = CString::new(name).expect("no NUL");
    type Calls = unsafe extern "C" fn(i32, *const std::ffi::c_char) -> u64;
    // SAFETY: exported with this type; it reads the name.
    unsafe { hook::<Calls>("standin_calls")(ordinal, name.as_ptr()) }
}

/// A kernel that EXPORT has registered.
#[derive(Debug)]
pub struct Kernel {
    pub name: String,
    /// Of its file.
    pub stem: String,
    /// Offset and bytes of each parameter.
    pub parameters: Vec<(u32, u32)>,
}

/// Every kernel of the stand-in.
pub fn kernels() -> Vec<Kernel> {
    use std::ffi::{CStr, c_char, c_void};
    unsafe extern "C" fn visit(to: *mut c_void, name: *const c_char, stem: *const c_char, at: *const [u32; 2], n: i32) {
        // SAFETY: the stand-in hands back `to` with two C strings and n pairs.
        unsafe {
            let text = |p| CStr::from_ptr(p).to_str().expect("ASCII").to_owned();
            let parameters = (0..n as usize).map(|i| (*at.add(i)).into()).collect();
            (*to.cast::<Vec<Kernel>>()).push(Kernel { name: text(name), stem: text(stem), parameters });
        }
    }
    type Visit = unsafe extern "C" fn(*mut c_void, *const c_char, *const c_char, *const [u32; 2], i32);
    let mut all: Vec<Kernel> = Vec::new();
    // SAFETY: exported with this type; `all` outlives the call.
    unsafe { hook::<unsafe extern "C" fn(*mut c_void, Visit)>("standin_kernels")((&raw mut all).cast(), visit) };
    all
}

/// What an instruction of a compiled kernel has touched in memory, as a GPU counts it: requests of a warp; sectors of 32
/// bytes of global memory or cycles of shared memory that they took, and that they needed.
#[derive(Debug, Clone)]
pub struct Access {
    pub kernel: String,
    /// File and line of the source.
    pub place: String,
    pub shared: bool,
    pub requests: u64,
    pub moved: u64,
    pub needed: u64,
}

/// What was seen; compiled kernels alone are looked at.
pub fn accesses() -> Vec<Access> {
    use std::ffi::{CStr, c_char, c_int, c_void};
    #[repr(C)]
    struct Site {
        kernel: *const c_char,
        file: *const c_char,
        line: c_int,
        bytes: c_int,
        shared: bool,
        writes: bool,
        joined: bool,
    }
    unsafe extern "C" fn visit(to: *mut c_void, site: *const Site, counts: *const [u64; 3]) {
        // SAFETY: the stand-in hands back `to` with a site whose texts are C strings, and three numbers.
        unsafe {
            let (site, [requests, moved, needed]) = (&*site, *counts);
            let text = |p| CStr::from_ptr(p).to_str().expect("ASCII").to_owned();
            let place = format!("{}:{}", text(site.file), site.line);
            let access = Access { kernel: text(site.kernel), place, shared: site.shared, requests, moved, needed };
            (*to.cast::<Vec<Access>>()).push(access);
        }
    }
    type Visit = unsafe extern "C" fn(*mut c_void, *const Site, *const [u64; 3]);
    let mut all: Vec<Access> = Vec::new();
    // SAFETY: exported with this type; `all` outlives the call.
    unsafe { hook::<unsafe extern "C" fn(*mut c_void, Visit)>("standin_accesses")((&raw mut all).cast(), visit) };
    all
}

fn counter(name: &str, ordinal: i32) -> u64 {
    // SAFETY: the driver's stand-in exports these names with this type.
    unsafe { hook::<unsafe extern "C" fn(i32) -> u64>(name)(ordinal) }
}

/// An exported function of the driver's stand-in.
///
/// # Safety
/// `F` is the type of that function.
pub unsafe fn hook<F: Copy>(name: &str) -> F {
    let driver = DRIVER.get().expect("the stand-in is loaded");
    // SAFETY: the caller's promise.
    *unsafe { driver.get::<F>(name) }.unwrap_or_else(|e| panic!("{e}"))
}

static DRIVER: OnceLock<Library> = OnceLock::new();

fn start() -> Result<(), String> {
    if IMAGES.iter().all(|(_, image)| image.is_empty()) {
        return Err("the library was built without nvcc: scripts/install_nvcc.sh".into());
    }
    if real() {
        let devices = swat::backend::cuda::survey().devices;
        assert!(matches!(devices, Ok(1..)), "SWAT_TEST_CUDA=gpu, but: {devices:?}");
        return Ok(());
    }
    let sources = sources()?;
    let libraries = build(&sources)?;
    // SAFETY: what the libraries run when loaded is the registration of kernels.
    let driver = unsafe { Library::open(Some(&libraries[0]), RTLD_NOW | RTLD_GLOBAL) };
    DRIVER.set(driver.unwrap_or_else(|e| panic!("{e}"))).expect("loaded once");
    for (library, source) in libraries.iter().zip(&sources).skip(1) {
        load(library, image_of(source), &resources(source, &cubins(source)));
    }
    if compiled() {
        // SAFETY: exported with this type.
        unsafe { hook::<unsafe extern "C" fn()>("standin_watch")() };
    }
    Ok(())
}

/// A folder with the driver's stand-in under the name by which a process finds it (`LD_LIBRARY_PATH`), and a list of its kernels
/// (`STANDIN_KERNELS`); `None` where there can be none. What that process finds is told by `STANDIN_VERSION`, `STANDIN_FIRST` and
/// `STANDIN_DEVICES`; `STANDIN_FAULT` = n: the first device's n-th kernel faults.
pub fn folder() -> Option<(PathBuf, PathBuf)> {
    if !available() || real() {
        return None;
    }
    let sources = sources().expect("as when it was built");
    let libraries = build(&sources).expect("it was built");
    let folder = libraries[0].parent().expect("a folder").join("process");
    let list = folder.join("kernels");
    fs::create_dir_all(&folder).expect("a folder");
    // Renamed into their place: other processes may have the files open.
    let put = |path: &Path, bytes: &[u8]| {
        let partial = path.with_extension(format!("{}-{:?}", std::process::id(), std::thread::current().id()));
        fs::write(&partial, bytes).and_then(|()| fs::rename(&partial, path)).expect("a writable folder");
    };
    put(&folder.join("libcuda.so"), &fs::read(&libraries[0]).expect("the driver's stand-in"));
    let mut lines = String::new();
    for (source, library) in sources.iter().zip(&libraries).skip(1) {
        let stem = source.file_stem().and_then(|s| s.to_str()).expect("a name of ours");
        let image = folder.join(stem).with_extension("fatbin");
        put(&image, image_of(source));
        let resources = resources(source, &cubins(source));
        lines += &format!("{stem} {} {} {}\n", library.display(), image.display(), resources.display());
    }
    put(&list, lines.as_bytes());
    Some((folder, list))
}

/// The driver's stand-in and the kernel files, or what nvcc made of these.
fn sources() -> Result<Vec<PathBuf>, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let kernels = files(&root.join("kernels"), "cu");
    let mut sources = if compiled() { translate(&kernels)? } else { kernels };
    sources.insert(0, root.join("tests/standin/driver.cpp"));
    Ok(sources)
}

/// The C++ of the PTX of kernel files, of the virtual architecture whose PTX is in the images.
///
/// # Errors
/// Where there is no folder for it.
pub fn translate(kernels: &[PathBuf]) -> Result<Vec<PathBuf>, String> {
    let directory = directory().join("ptx");
    fs::create_dir_all(&directory).map_err(|e| e.to_string())?;
    let lock = File::create(directory.join("lock")).map_err(|e| e.to_string())?;
    lock.lock().map_err(|e| e.to_string())?;
    let includes = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let headers: String =
        files(&includes, "cuh").iter().map(|path| fs::read_to_string(path).expect("a readable header")).collect();
    Ok(each(kernels, |kernel| {
        let stem = kernel.file_stem().expect("a name").to_string_lossy();
        let architecture = if stem.ends_with("_sm90") { "compute_90a" } else { "compute_80" };
        let text = fs::read_to_string(kernel).expect("a readable source");
        let (output, key) = (directory.join(format!("{stem}.cu")), directory.join(format!("{stem}.key")));
        let made_of = format!("{NVCC} {architecture}\n{}{text}{headers}", include_str!("ptx.rs"));
        if output.is_file() && fs::read_to_string(&key).is_ok_and(|made| made == made_of) {
            return output;
        }
        let ptx = directory.join(format!("{stem}.ptx"));
        let mut nvcc = Command::new(NVCC);
        nvcc.args(["-O3", "-std=c++17", "-lineinfo", "-ptx", "-arch", architecture, "-o"])
            .arg(&ptx)
            .arg("-I")
            .arg(&includes)
            .arg(kernel);
        let run = nvcc.output().unwrap_or_else(|e| panic!("{NVCC}: {e}"));
        assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        let cpp = ptx::to_cpp(&fs::read_to_string(&ptx).expect("PTX"));
        fs::write(&output, cpp.unwrap_or_else(|e| panic!("{}: {e}", ptx.display()))).expect("a writable folder");
        fs::write(&key, made_of).expect("a writable folder");
        output
    }))
}

/// Where what is built for tests lies.
fn directory() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("standin")
}

/// `work` of each path, by as many threads as there are cores.
fn each(paths: &[PathBuf], work: impl Fn(&Path) -> PathBuf + Sync) -> Vec<PathBuf> {
    let results: Vec<OnceLock<PathBuf>> = paths.iter().map(|_| OnceLock::new()).collect();
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, |n| n.get()) {
            scope.spawn(|| {
                while let Some(path) = paths.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let at = paths.iter().position(|p| p == path).expect("one of them");
                    results[at].set(work(path)).expect("set once");
                }
            });
        }
    });
    results.into_iter().map(|result| result.into_inner().expect("all were worked at")).collect()
}

/// What is embedded for a kernel file.
fn image_of(source: &Path) -> &'static [u8] {
    let image = IMAGES.iter().find(|(stem, _)| Some(*stem) == source.file_stem().and_then(|s| s.to_str()));
    image.unwrap_or_else(|| panic!("{} is not built in", source.display())).1
}

/// The cubins of a kernel file, which are in its image.
pub fn cubins(source: &Path) -> Vec<PathBuf> {
    let kept = Path::new(env!("OUT_DIR")).join("kept");
    cubin::files(&kept.join(source.file_stem().expect("a name of ours")))
}

/// Cubins of a kernel file that is in no image, for the architectures of the stand-in's devices.
pub fn compile_cubins(source: &Path) -> Vec<PathBuf> {
    let (root, stem) = (Path::new(env!("CARGO_MANIFEST_DIR")), source.file_stem().expect("a name").to_string_lossy());
    let architectures: &[&str] = if stem.ends_with("_sm90") { &["90a"] } else { &["80", "90"] };
    let folder = directory().join("cubin");
    fs::create_dir_all(&folder).expect("a folder");
    let lock = File::create(folder.join("lock")).expect("a lock file");
    lock.lock().expect("a lock between the test processes");
    let includes = root.join("kernels");
    let mut hash = blake3::Hasher::new();
    for path in files(&includes, "cuh").iter().map(PathBuf::as_path).chain([source]) {
        hash.update(&fs::read(path).expect("a readable source"));
    }
    let key = &hash.update(NVCC.as_bytes()).finalize().to_hex()[..16];
    let compiled = architectures.iter().map(|architecture| {
        let cubin = folder.join(format!("{stem}-{architecture}-{key}.cubin"));
        if !cubin.is_file() {
            let code = format!("arch=compute_{architecture},code=sm_{architecture}");
            let mut nvcc = Command::new(NVCC);
            nvcc.args(["-O3", "-std=c++17", "-cubin", "-gencode", &code, "-I"]).arg(&includes);
            let run = nvcc.arg("-o").arg(&cubin).arg(source).output().unwrap_or_else(|e| panic!("{NVCC}: {e}"));
            assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
        }
        cubin
    });
    compiled.collect()
}

/// A file in which the driver's stand-in reads what the kernels of these cubins take of a multiprocessor.
pub fn resources(source: &Path, cubins: &[PathBuf]) -> PathBuf {
    let (folder, text) = (directory().join("resources"), cubin::resources(cubins));
    fs::create_dir_all(&folder).expect("a folder");
    let stem = source.file_stem().expect("a name of ours").to_string_lossy();
    let path = folder.join(format!("{stem}-{}", &blake3::hash(text.as_bytes()).to_hex()[..16]));
    // Renamed into its place: other processes may read it.
    let partial = path.with_extension(format!("{}-{:?}", std::process::id(), std::thread::current().id()));
    fs::write(&partial, text).and_then(|()| fs::rename(&partial, &path)).expect("a writable folder");
    path
}

/// Loads the library of a kernel file; `image` is what stands for it in the driver's calls, `resources` what its kernels take.
pub fn load(library: &Path, image: &[u8], resources: &Path) {
    // SAFETY: as above.
    let loaded = unsafe { Library::open(Some(library), RTLD_NOW | RTLD_LOCAL) }.unwrap_or_else(|e| panic!("{e}"));
    std::mem::forget(loaded);
    let name = library.file_stem().and_then(|s| s.to_str()).expect("a name of ours");
    let stem = name.rsplit_once('-').expect("a name of ours").0;
    let stem = CString::new(stem).expect("no NUL");
    let resources = CString::new(resources.to_str().expect("UTF-8")).expect("no NUL");
    type Image = unsafe extern "C" fn(*const std::ffi::c_char, *const u8, usize, *const std::ffi::c_char);
    // SAFETY: exported with this type; it copies the bytes and reads the file.
    unsafe { hook::<Image>("standin_image")(stem.as_ptr(), image.as_ptr(), image.len(), resources.as_ptr()) }
}

/// Compiles each source to a library of its own, unless one was made of the same text by the same command; `driver.cpp` is
/// the driver's stand-in.
///
/// # Errors
/// Where there is no C++ compiler, or the machine is not x86-64 Linux.
///
/// # Panics
/// Where a source does not compile.
pub fn build(sources: &[PathBuf]) -> Result<Vec<PathBuf>, String> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Err("the stand-in GPU needs x86-64 Linux".into());
    }
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    let version = Command::new(&compiler).arg("--version").output();
    let version = version.map_err(|e| format!("no C++ compiler: {compiler}: {e}"))?.stdout;

    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (standin, kernels) = (root.join("tests/standin"), root.join("kernels"));
    let mut arguments: Vec<String> = words(FLAGS);
    arguments.push(format!("-march={}", if avx2() { "x86-64-v3" } else { "x86-64" }));
    arguments.extend([&standin, &kernels].map(|directory| format!("-I{}", directory.display())));
    let mut common = blake3::Hasher::new();
    common.update(&version).update(format!("{arguments:?}").as_bytes());
    for header in files(&standin, "h").iter().chain(&files(&kernels, "cuh")).chain(&files(&standin, "cpp")) {
        common.update(&fs::read(header).expect("a readable header"));
    }

    let directory = directory();
    fs::create_dir_all(&directory).expect("a directory for the stand-in");
    let lock = File::create(directory.join("lock")).expect("a lock file");
    lock.lock().expect("a lock between the test processes");
    Ok(each(sources, |source| {
        let key = common.clone().update(&fs::read(source).expect("a readable source")).finalize();
        let translated = source.starts_with(&directory);
        let place = if translated { source.parent().expect("a directory") } else { &directory };
        let stem = source.file_stem().expect("a file name").to_string_lossy();
        let library = place.join(format!("{stem}-{}.so", &key.to_hex()[..16]));
        if !library.is_file() {
            let more = if translated { PTX_FLAGS } else { "" };
            compile(&compiler, &[&arguments[..], &words(more)].concat(), source, &library);
        }
        library
    }))
}

/// -fno-strict-aliasing: kernels read bf16 by the 16 bytes. The sanitizers trap where an access is not aligned, or an index
/// is past the end of an array of known size.
const FLAGS: &str = "-std=c++17 -O3 -fPIC -shared -fvisibility=hidden -fno-strict-aliasing -fno-stack-protector \
    -ffp-contract=fast -fsanitize=alignment,bounds -fsanitize-undefined-trap-on-error -Wno-psabi";

/// Of C++ that was PTX: every instruction rounds by itself. Much of it is long, and little of it slow.
const PTX_FLAGS: &str = "-O1 -fwrapv -ffp-contract=off -fno-sanitize=all";

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(String::from).collect()
}

fn compile(compiler: &str, arguments: &[String], source: &Path, library: &Path) {
    let stem = source.file_stem().expect("a file name").to_string_lossy();
    let directory = library.parent().expect("a directory");
    for stale in files(directory, "so") {
        let name = stale.file_stem().expect("a file name").to_string_lossy();
        if name.rsplit_once('-').is_some_and(|(of, _)| of == stem) {
            let _ = fs::remove_file(stale);
        }
    }
    let partial = library.with_extension("partial");
    let mut command = Command::new(compiler);
    command.args(arguments).arg("-o").arg(&partial);
    if source.extension().is_some_and(|e| e == "cu") {
        command.args(["-x", "c++"]).arg(source);
    } else {
        let parts = files(source.parent().expect("a directory"), "cpp");
        // Checks of bounds would keep loops over products from being vectorised.
        command.args(["-fno-sanitize=all", "-Wl,-soname,libcuda.so"]).args(parts);
    }
    let output = command.output().unwrap_or_else(|e| panic!("{compiler}: {e}"));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} does not compile for the stand-in GPU:\n{text}", source.display());
    fs::rename(&partial, library).expect("a library in its place");
}

#[cfg(target_arch = "x86_64")]
fn avx2() -> bool {
    std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma")
}

#[cfg(not(target_arch = "x86_64"))]
fn avx2() -> bool {
    false
}

fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    let paths = entries.flatten().map(|entry| entry.path());
    let mut files: Vec<PathBuf> = paths.filter(|path| path.extension().is_some_and(|e| e == extension)).collect();
    files.sort();
    files
}
