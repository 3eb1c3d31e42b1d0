//! The kernel files and the code that nvcc made of them: names and parameters against the source, no register spills,
//! tensor-core instructions, code size, and the rules for kernel files. Needs no GPU, but nvcc at build time, its
//! cuobjdump and nvdisasm (scripts/install_nvcc.sh), and a C++ compiler; what is missing is said on standard error.

mod common;

use common::standin::{self, BUILD};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use swat_standin::cubin::{self, Cubin};

include!(concat!(env!("OUT_DIR"), "/images.rs"));

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Kernel files and their headers: name and text.
fn sources(extensions: &[&str]) -> Vec<(String, String)> {
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(root().join("kernels")).unwrap().map(|e| e.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|e| extensions.iter().any(|extension| e == *extension)));
    files.sort();
    files.iter().map(|path| (name(path), std::fs::read_to_string(path).unwrap())).collect()
}

/// The cubins in a folder, sorted.
fn cubins_in(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "cubin"));
    paths.sort();
    paths
}

fn name(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().into()
}

/// The embedded images; `None` if the library was built without nvcc, which standard error says.
fn images() -> Option<Vec<(&'static str, &'static [u8])>> {
    let images: Vec<_> = IMAGES.iter().copied().filter(|(_, image)| !image.is_empty()).collect();
    if images.is_empty() {
        let _ = writeln!(std::io::stderr(), "skipped: tests of compiled kernels (the library was built without nvcc)");
        return None;
    }
    Some(images)
}

/// The directory of cuobjdump and nvdisasm, beside nvcc; `None` if there is none, which standard error says.
fn tools() -> Option<PathBuf> {
    let beside = standin::nvcc().and_then(|nvcc| nvcc.parent().map(Path::to_path_buf));
    let found = beside.filter(|d| d.join("cuobjdump").is_file() && d.join("nvdisasm").is_file());
    if found.is_none() {
        let _ = writeln!(std::io::stderr(), "skipped: tests of machine code (no cuobjdump: scripts/install_nvcc.sh)");
    }
    found
}

/// Output of cuobjdump for an image, run in `directory` on a copy of it.
fn cuobjdump(tools: &Path, directory: &Path, image: &[u8], arguments: &[&str]) -> String {
    let path = directory.join("image.fatbin");
    std::fs::write(&path, image).unwrap();
    let mut paths = vec![tools.to_path_buf()];
    paths.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let output = Command::new(tools.join("cuobjdump"))
        .args(arguments)
        .arg(&path)
        .current_dir(directory)
        .env("PATH", std::env::join_paths(paths).unwrap())
        .output()
        .unwrap();
    assert!(output.status.success(), "cuobjdump: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn every_kernel_is_compiled_as_it_is_exported() {
    let (Some(images), Some(tools)) = (images(), tools()) else { return };
    let mut exported: BTreeMap<String, BTreeMap<String, Vec<(u32, u32)>>> = BTreeMap::new();
    if !standin::available() || standin::real() {
        return;
    }
    for kernel in standin::kernels() {
        exported.entry(kernel.stem).or_default().insert(kernel.name, kernel.parameters);
    }
    let stems: BTreeSet<&str> = images.iter().map(|(stem, _)| *stem).collect();
    assert_eq!(stems, exported.keys().map(String::as_str).collect(), "files that export nothing, or are not built in");
    let mut seen = BTreeSet::new();
    for (stem, image) in images {
        let directory = tempfile::tempdir().unwrap();
        cuobjdump(&tools, directory.path(), image, &["-xelf", "all"]);
        let cubins = cubins_in(directory.path());
        let architectures = if stem.ends_with("_sm90") { 1 } else { 2 };
        assert_eq!(cubins.len(), architectures, "{stem}: code for each architecture");
        for cubin in &cubins {
            let place = format!("{stem}, {}", name(cubin));
            let Cubin { kernels: compiled, constants, .. } = cubin::read(&std::fs::read(cubin).unwrap());
            let names: Vec<&String> = compiled.keys().collect();
            assert_eq!(names, exported[stem].keys().collect::<Vec<_>>(), "{place}: each kernel is in one EXPORT");
            for (kernel, compiled) in &compiled {
                // ptxas may put them all further back, so that tensor maps are aligned.
                let first = compiled.parameters.values().next().map_or(0, |(offset, _)| *offset);
                let parameters: Vec<(u32, u32)> =
                    compiled.parameters.values().map(|(offset, size)| (offset - first, *size)).collect();
                assert_eq!(parameters, exported[stem][kernel], "{place}: {kernel}");
            }
            for (name, value) in constants {
                assert!(CONSTANTS.contains(&(&name, value)), "{place}: {name} = {value}, elsewhere on the host");
                let kernel = name.strip_suffix("_shared_bytes");
                assert!(kernel.is_none_or(|kernel| compiled.contains_key(kernel)), "{place}: {name} of no kernel");
                seen.insert(name);
            }
        }
        let kept = BUILD.cubins(Path::new(stem));
        let sorted = |cubins: &[PathBuf]| cubin::resources(cubins).lines().map(String::from).collect::<BTreeSet<_>>();
        assert_eq!(sorted(&kept), sorted(&cubins), "{stem}: the stand-in's resources are those of the image");
    }
    let numbers: BTreeSet<String> = CONSTANTS.iter().map(|(name, _)| name.to_string()).collect();
    assert_eq!(seen, numbers, "the host's numbers are those of the images");
}

/// Registers are allocated by 256 a warp, warps by four.
#[test]
fn every_block_fits_a_multiprocessor() {
    let Some(images) = images() else { return };
    for path in images.iter().flat_map(|(stem, _)| BUILD.cubins(Path::new(stem))) {
        let Cubin { architecture, kernels, .. } = cubin::read(&std::fs::read(&path).unwrap());
        let most = if architecture < 90 { 163 << 10 } else { 227 << 10 };
        for (name, kernel) in kernels {
            let warps = kernel.threads().div_ceil(32).next_multiple_of(4);
            let registers = warps * (32 * kernel.registers).next_multiple_of(256);
            assert!((1..=65536).contains(&registers), "{}: {name}: {registers} registers", path.display());
            let exported = CONSTANTS.iter().find(|(constant, _)| *constant == format!("{name}_shared_bytes"));
            let shared = kernel.static_bytes + exported.map_or(0, |(_, bytes)| *bytes as usize);
            assert!(shared <= most, "{}: {name}: {shared} bytes of shared memory", path.display());
        }
    }
}

#[test]
fn no_kernel_spills_registers() {
    let (Some(images), Some(tools)) = (images(), tools()) else { return };
    let mut spills = Vec::new();
    for (stem, image) in images {
        let directory = tempfile::tempdir().unwrap();
        let usage = cuobjdump(&tools, directory.path(), image, &["-res-usage"]);
        let (mut architecture, mut kernel, mut seen) = ("", "", 0);
        for line in usage.lines().map(str::trim) {
            if let Some(found) = line.strip_prefix("arch = ") {
                architecture = found;
            } else if let Some(found) = line.strip_prefix("Function ") {
                kernel = found.trim_end_matches(':');
            } else if line.starts_with("REG:") {
                seen += 1;
                let bytes = |what| line.split(' ').find_map(|field| field.strip_prefix(what)).expect("a number");
                if (bytes("STACK:"), bytes("LOCAL:")) != ("0", "0") {
                    spills.push(format!("{stem}, {architecture}: {kernel}: {line}"));
                }
            }
        }
        assert!(seen > 0, "{stem}: {usage}");
    }
    assert!(spills.is_empty(), "stack or local memory:\n{}", spills.join("\n"));
}

/// Whether `call` occurs in the text at the start of a word.
fn calls(text: &str, call: &str) -> bool {
    let mut before = text.match_indices(call).map(|(at, _)| text[..at].chars().next_back());
    before.any(|c| !c.is_some_and(|c| c.is_alphanumeric() || c == '_'))
}

#[test]
fn products_use_tensor_cores() {
    let (Some(images), Some(tools)) = (images(), tools()) else { return };
    let texts: BTreeMap<String, String> = sources(&["cu"]).into_iter().collect();
    for (stem, image) in images {
        let text = &texts[&format!("{stem}.cu")];
        // What the source calls, and the instruction that must come of it.
        let expected: Vec<&str> = [("mma_bf16(", "HMMA"), ("cp_async16(", "LDGSTS"), ("ldmatrix_", "LDSM")]
            .into_iter()
            .chain([("wgmma_bf16<", "HGMMA"), ("tma_load_", "UTMALDG"), ("tma_store_", "UTMASTG")])
            .filter(|(call, _)| calls(text, call))
            .map(|(_, instruction)| instruction)
            // Those of attention are in its headers.
            .chain(stem.contains("flash").then_some("HMMA"))
            .chain(stem.ends_with("_sm90").then_some(["HGMMA", "UTMALDG"]).into_iter().flatten())
            .collect();
        if expected.is_empty() {
            continue;
        }
        let directory = tempfile::tempdir().unwrap();
        let code = cuobjdump(&tools, directory.path(), image, &["-sass"]);
        let parts: Vec<&str> = code.split("code for ").skip(1).collect();
        assert!(!parts.is_empty(), "{stem}: no machine code");
        for part in parts {
            let architecture = part.lines().next().unwrap_or_default();
            for instruction in &expected {
                let found =
                    part.lines().any(|line| line.split_whitespace().any(|w| w.split('.').next() == Some(*instruction)));
                assert!(found, "{stem}: no {instruction} in the code for {architecture}");
            }
        }
    }
    let texts = sources(&["cu", "cuh"]);
    for family in ["gemm", "attention"] {
        let mut files = texts.iter().filter(|(name, _)| name.starts_with(family));
        assert!(files.any(|(_, text)| calls(text, "mma_bf16(")), "{family} has no version on tensor cores");
    }
}

/// Maximum number of machine instructions of tensor-core kernels; the first entry whose parts are all in the kernel's
/// name applies.
const INSTRUCTIONS: [(&[&str], usize); 23] = [
    (&["gemm", "wgmma128_bf16"], 1000),
    (&["gemm", "wgmma256_bf16"], 1150),
    (&["gemm", "wgmma128_f32"], 1150),
    (&["gemm", "wgmma256_f32"], 1400),
    (&["gemm", "wgmma128_add"], 1600),
    (&["gemm", "wgmma256_add"], 2200),
    (&["gemm", "wgmma128_any"], 1350),
    (&["gemm", "wgmma256_any"], 2100),
    (&["gemm", "wgmma128_swiglu"], 1600),
    (&["gemm", "wgmma256_swiglu"], 2450),
    (&["gemm", "swiglu_mma64"], 1750),
    (&["gemm", "swiglu_mma128"], 3700),
    (&["gemm", "mma64"], 2800),
    (&["gemm", "mma128"], 4750),
    (&["gemm", "scalar64"], 3950),
    (&["attention_forward_wgmma_hd64"], 2300),
    (&["attention_forward_wgmma_hd128"], 2700),
    (&["attention_backward", "wgmma_hd64"], 1600),
    (&["attention_backward", "wgmma_hd128"], 2150),
    (&["attention_forward_flash", "hd64"], 2000),
    (&["attention_forward_flash", "hd128"], 2700),
    (&["attention_backward", "flash_hd"], 2250),
    (&["attention_decode_flash"], 1550),
];

/// Code size is bounded; and in a Hopper gemm the compiler inserts no waits of its own: of the four products of a k
/// block only the last ends a group.
#[test]
fn tensor_core_kernels_are_small() {
    let (Some(images), Some(tools)) = (images(), tools()) else { return };
    let (mut seen, mut wrong) = (BTreeSet::new(), String::new());
    for (stem, image) in images {
        let directory = tempfile::tempdir().unwrap();
        let code = cuobjdump(&tools, directory.path(), image, &["-sass"]);
        for function in code.split("Function : ").skip(1) {
            let (kernel, text) = function.split_once('\n').unwrap();
            // `/*0010*/  @P0 MOV R1, c[0x0][0x28] ;`
            let instructions: Vec<&str> = text
                .lines()
                .filter_map(|line| line.trim().strip_prefix("/*")?.split_once("*/"))
                .filter(|(_, instruction)| instruction.contains(';') && !instruction.contains("NOP"))
                .map(|(_, instruction)| instruction)
                .collect();
            let count = |what: &str| instructions.iter().filter(|instruction| instruction.contains(what)).count();
            if count("HMMA") + count("HGMMA") == 0 {
                continue;
            }
            let entry = INSTRUCTIONS.iter().position(|(parts, _)| parts.iter().all(|part| kernel.contains(part)));
            let entry = entry.unwrap_or_else(|| panic!("{kernel}: an entry for it"));
            seen.insert(entry);
            if instructions.len() > INSTRUCTIONS[entry].1 {
                wrong += &format!("{kernel}: {} instructions, {} allowed\n", instructions.len(), INSTRUCTIONS[entry].1);
            }
            if stem == "gemm_sm90" && (count("HGMMA"), count("gsb0")) != (4, 3) {
                wrong += &format!("{kernel}: {} products, {} groups and waits\n", count("HGMMA"), count("gsb0"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong}");
    assert_eq!(seen.len(), INSTRUCTIONS.len(), "an entry without a kernel: {seen:?}");
}

/// The text without comments.
fn code(text: &str) -> String {
    text.lines().map(|line| line.split("//").next().unwrap_or_default()).collect::<Vec<_>>().join("\n")
}

#[test]
fn kernel_files_follow_the_rules() {
    let words = |text: &str| -> BTreeSet<String> {
        text.split(|c: char| !c.is_alphanumeric() && c != '_').map(String::from).collect()
    };
    for (name, text) in sources(&["cu", "cuh"]) {
        let code = code(&text);
        let words = words(&code);
        let prelude = name.starts_with("prelude");
        assert!(text.starts_with("//"), "{name} begins by saying what it is");
        let wide = text.lines().position(|line| line.chars().count() > 120);
        assert_eq!(wide.map(|line| line + 1), None, "{name}: a line of more than 120 columns");
        for word in ["printf", "cooperative_groups", "cub", "thrust", "goto"] {
            assert!(!words.contains(word), "{name}: {word}");
        }
        assert!(!code.contains("<<<"), "{name}: kernels are launched by name");
        assert!(prelude || !words.contains("asm"), "{name}: PTX belongs into the prelude");
        assert!(prelude || !code.contains("extern __shared__"), "{name}: dynamic shared memory is `dynamic_shared`");
        assert!(prelude || !words.contains("__CUDACC__"), "{name}: one text for both compilers");
        assert!(prelude || !code.contains("#include <"), "{name}: everything comes through the prelude");
        if name.ends_with(".cuh") {
            assert!(code.contains("#pragma once"), "{name}");
            assert!(!code.contains("EXPORT(") || prelude, "{name}: kernels are in .cu files");
            continue;
        }
        let hopper = name.ends_with("_sm90.cu");
        assert_eq!(words.contains("prelude_sm90"), hopper, "{name}: Hopper code is in *_sm90.cu");
        let (kernels, exports) = (code.matches("extern \"C\"").count(), code.matches("EXPORT(").count());
        assert!(kernels > 0 && kernels == exports, "{name}: {kernels} kernels, {exports} EXPORTs");
        let bounds = ["__launch_bounds__", "__maxnreg__"].map(|bound| code.matches(bound).count());
        assert_eq!(bounds.iter().sum::<usize>(), kernels, "{name}: launch bounds {bounds:?}");
        let exports = code.contains("SHARED_BYTES(") || code.contains("CONSTANT(");
        assert!(exports || !words.contains("dynamic_shared"), "{name}: how much dynamic shared memory it needs");
    }
}

/// A kernel family has a file of its name in src (CPU and CUDA), kernels, tests and benches.
#[test]
fn every_family_has_its_files() {
    let stems = |directory: &str| -> BTreeSet<String> {
        let files = std::fs::read_dir(root().join(directory)).unwrap().map(|e| e.unwrap().path());
        files.map(|path| path.file_stem().unwrap().to_str().unwrap().to_string()).collect()
    };
    let (cuda, cpu, ops) = (stems("src/backend/cuda"), stems("src/backend/cpu"), stems("tests/ops"));
    let kernels: BTreeSet<String> = sources(&["cu"]).iter().map(|(name, _)| name.replace(".cu", "")).collect();
    let families: BTreeSet<&String> = cuda.iter().filter(|stem| cpu.contains(*stem) && *stem != "mod").collect();
    assert!(families.len() >= 10, "{families:?}");
    let (benches, main) = (stems("benches"), std::fs::read_to_string(root().join("benches/lib.rs")).unwrap());
    for family in &families {
        assert!(ops.contains(*family), "tests/ops/{family}.rs");
        assert!(kernels.contains(*family), "kernels/{family}.cu");
        assert!(benches.contains(*family), "benches/{family}.rs");
        assert!(main.contains(&format!("{family},")), "benches/lib.rs: families! {{ … {family} }}");
    }
    for kernel in kernels {
        let known = families.iter().any(|f| kernel == **f || kernel.starts_with(&format!("{f}_")));
        assert!(known, "kernels/{kernel}.cu: src/backend/cuda, src/backend/cpu and tests/ops have no such stem");
    }
}
