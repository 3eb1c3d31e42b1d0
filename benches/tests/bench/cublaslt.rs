//! The cuBLASLt peer: where its library is found, which algorithm is chosen, and that its products agree with ours. A
//! fake library of a few loops (`cublaslt.cpp`) replaces it.

use super::{median, standin};
use half::bf16;
use std::path::{Path, PathBuf};
use std::process::Command;
use swat::backend::cuda::{Cuda, F32State, GemmLayout, GemmShape};
use swat::backend::{Backend, Buffer, Epilogue, FloatElement};
use swat_bench::common::{cublaslt::CublasLt, libraries, random};

/// Builds the fake library in `folder`, under the SONAME of cuBLASLt; `None` without a C++ compiler.
fn fake(folder: &Path) -> Option<PathBuf> {
    std::fs::create_dir_all(folder).unwrap();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bench/cublaslt.cpp");
    let library = folder.join("libcublasLt.so.13");
    let mut compiler = Command::new(std::env::var("CXX").unwrap_or_else(|_| "g++".into()));
    compiler.args(["-std=c++17", "-O2", "-shared", "-fPIC", "-Wl,-soname,libcublasLt.so.13", "-o"]);
    let output = compiler.arg(&library).arg(source).output().ok()?;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(library)
}

/// Runs one of the `child_…` tests in a child process in which `settings` are the only places to find a library.
fn child(test: &str, settings: &[(&str, &Path)]) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env("SWAT_TEST_LIBRARIES", "1");
    for variable in ["CUDA_HOME", "CUDA_PATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH"] {
        command.env_remove(variable);
    }
    let output = command.envs(settings.iter().copied()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}");
    text.into_owned()
}

fn is_child() -> bool {
    std::env::var_os("SWAT_TEST_LIBRARIES").is_some()
}

#[test]
fn child_looks_for_the_library() {
    if is_child() {
        println!("looked: {:?}", libraries::open("cublasLt"));
    }
}

#[test]
fn is_found_in_package_folders() {
    let directory = tempfile::tempdir().unwrap();
    let environment = directory.path().join("venv");
    let nowhere = directory.path().join("nowhere");
    let missing = child("cublaslt::child_looks_for_the_library", &[("PATH", &nowhere)]);
    if missing.contains("looked: Ok") {
        return;
    }
    assert!(missing.contains("no libcublasLt.so.13 where the loader looks"), "{missing}");
    let site = environment.join("lib/python3.12/site-packages");
    let [cublas, cuda_home] = [site.join("nvidia/cublas/lib"), directory.path().join("cuda")];
    let lib64 = cuda_home.join("lib64");
    let (Some(packaged), Some(_)) = (fake(&cublas), fake(&lib64)) else { return };
    // A python3 that shows the packages of its own; no other is on the path.
    let bin = directory.path().join("bin");
    std::fs::create_dir_all(&bin).unwrap();
    let script = bin.join("python3");
    std::fs::write(&script, format!("#!/bin/sh\necho\necho {}\n", site.display())).unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&script, executable).unwrap();
    for (settings, place) in [
        (vec![("VIRTUAL_ENV", environment.as_path()), ("PATH", &nowhere)], packaged.clone()),
        (vec![("PATH", bin.as_path())], packaged.clone()),
        (vec![("CUDA_HOME", cuda_home.as_path()), ("PATH", &nowhere)], lib64.join("libcublasLt.so.13")),
    ] {
        let said = child("cublaslt::child_looks_for_the_library", &settings);
        assert!(said.contains(&format!("looked: Ok({:?})", place.display().to_string())), "{settings:?}: {said}");
    }
    // One that cannot be opened is told.
    std::fs::write(&packaged, "no library").unwrap();
    let said = child("cublaslt::child_looks_for_the_library", &[("PATH", &bin)]);
    assert!(said.contains("looked: Err") && said.contains("too short"), "{said}");
}

#[test]
fn agrees_with_ours() {
    if standin::real() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let lib = directory.path().join("lib/python3.12/site-packages/nvidia/cu13/lib");
    if !standin::available() || fake(&lib).is_none() {
        return;
    }
    let said = child("cublaslt::child_compares_products", &[("VIRTUAL_ENV", directory.path())]);
    assert!(said.contains("compared 3 products") || said.contains("another library"), "{said}");
}

#[test]
fn child_compares_products() {
    if !is_child() {
        return;
    }
    let Some(cuda) = standin::open(0) else { return };
    if !libraries::open("cublasLt").unwrap().contains("site-packages") {
        println!("another library than the one of this test is installed");
        return;
    }
    let library = CublasLt::open(&cuda).unwrap();
    let shape = |layout| GemmShape { layout, m: 24, n: 40, k: 56 };
    compare::<bf16>(&cuda, &library, shape(GemmLayout::Tn));
    compare::<bf16>(&cuda, &library, shape(GemmLayout::Nn));
    compare::<f32>(&cuda, &library, shape(GemmLayout::Nt));
    println!("compared 3 products");
}

fn compare<T: FloatElement>(cuda: &Cuda<F32State>, library: &std::rc::Rc<CublasLt<F32State>>, shape: GemmShape) {
    let GemmShape { m, n, k, .. } = shape;
    let [a, b] = [m * k, n * k].map(|len| random::<_, bf16>(cuda, len));
    let (mut theirs, mut ours) = (cuda.zeros::<T>(m * n).unwrap(), cuda.zeros::<T>(m * n).unwrap());
    let product = library.product(shape, &a, &b, &mut theirs);
    let before = runs();
    product.run(&a, &b, &mut theirs);
    let [slow, refused, failing, good] = runs();
    assert_eq!([slow, refused, failing], [before[0], 0, before[2]]);
    assert_eq!(good, before[3] + 1, "the fastest algorithm is the one that runs");
    assert!(before[0] > 0 && before[2] > 0, "all that are offered as supported were tried: {before:?}");
    cuda.gemm(a.view(), b.view(), ours.view_mut(), shape, Epilogue::default()).unwrap();
    let read = |tensor: &Buffer<Cuda<F32State>, T>| {
        let mut values = vec![T::from_f32(0.0); tensor.len()];
        cuda.read(tensor.view(), &mut values).unwrap();
        values.iter().map(|x| f64::from(x.to_f32())).collect::<Vec<_>>()
    };
    let (theirs, ours) = (read(&theirs), read(&ours));
    let sizes: Vec<f64> = ours.iter().map(|x| x.abs()).collect();
    assert!(median(&sizes) > 1.0, "{sizes:?}");
    let tolerance = if T::NAME == "f32" { 1e-4 } else { 0.02 };
    for (theirs, ours) in theirs.iter().zip(&ours) {
        assert!((theirs - ours).abs() <= tolerance * ours.abs().max(1.0), "{shape:?}: {theirs} and {ours}");
    }
}

/// Number of runs of each algorithm of the fake library.
fn runs() -> [i32; 4] {
    // SAFETY: the library is open, under this name; the function has this type.
    unsafe {
        let library = libloading::os::unix::Library::new("libcublasLt.so.13").unwrap();
        let runs = library.get::<unsafe extern "C" fn(i32) -> i32>("fake_runs").unwrap();
        [0, 1, 2, 3].map(|algorithm| runs(algorithm))
    }
}
