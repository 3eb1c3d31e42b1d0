//! The binary on machines with and without a usable GPU: with `--device cuda` an unusable one is an error with the
//! reason; with `auto` the CPU is used, and the reason is said.
//!
//! Child processes load the stand-in as their driver; environment variables set what it shows.

use crate::common::standin::{self, ChildDriver};
use std::path::Path;
use std::process::{Command, Output};

/// `swat score` of a few tokens on `device`; `None` = a machine without a driver.
fn score(device: &str, driver: Option<&Path>, environment: Machine) -> (Option<i32>, String, String) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny");
    let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
    command.args(["score", "--ids", "1,2,3,4", "--json", "--device", device, "--model"]).arg(model);
    run(command, driver, environment)
}

fn run(mut command: Command, driver: Option<&Path>, environment: Machine) -> (Option<i32>, String, String) {
    command.env_remove("LD_LIBRARY_PATH").envs(environment.iter().copied());
    if let Some(folder) = driver {
        command.env("LD_LIBRARY_PATH", folder);
    }
    let Output { status, stdout, stderr } = command.output().expect("the binary runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    let (stdout, stderr) = (text(stdout), text(stderr));
    assert!(!stderr.contains("panicked"), "{stderr}");
    (status.code(), stdout, stderr)
}

fn number(json: &str, key: &str) -> f64 {
    let value: serde_json::Value = serde_json::from_str(json).expect("JSON");
    value[key].as_f64().unwrap_or_else(|| panic!("no number {key} in {json}"))
}

/// Environment variables that describe a machine.
type Machine<'a> = &'a [(&'a str, &'a str)];

/// Machines with a driver but no usable GPU; the exit code, and words of the reason.
const MACHINES: [(Machine, i32, &str); 5] = [
    (&[("STANDIN_DEVICES", "0")], 2, "no CUDA-capable device is detected"),
    (&[("STANDIN_VERSION", "12080")], 2, "a driver for CUDA 12.8; the kernels need 13.0"),
    (&[("STANDIN_FIRST", "4")], 2, "compute capability 7.0"),
    (&[("STANDIN_FIRST", "6")], 1, "no kernel image is available for execution on the device"),
    (&[("STANDIN_KERNELS", "/dev/null")], 1, "device kernel image is invalid"),
];

#[test]
fn an_unusable_gpu() {
    let Some(ChildDriver { folder, kernels }) = standin::for_children() else { return };
    let kernels = kernels.to_str().expect("UTF-8");
    for (machine, code, why) in MACHINES {
        let environment = [&[("STANDIN_KERNELS", kernels)], machine].concat();
        let (found, _, message) = score("cuda", Some(&folder), &environment);
        assert!(found == Some(code) && message.contains(why), "{machine:?}: exit code {found:?}, {message}");
        let (found, result, message) = score("auto", Some(&folder), &environment);
        assert!(found == Some(0) && message.contains(why), "{machine:?}, auto: exit code {found:?}, {message}");
        assert!(message.starts_with("on the CPU: ") && result.contains("perplexity"), "{message}{result}");
    }
    let environment = [("STANDIN_KERNELS", kernels), ("STANDIN_DEVICES", "2")];
    let (code, _, message) = score("cuda:2", Some(&folder), &environment);
    assert!(code == Some(2) && message.contains("cuda:2") && message.contains("2 device(s)"), "{message}");
}

#[test]
fn no_driver() {
    if standin::real() {
        return;
    }
    let (code, _, message) = score("cuda", None, &[]);
    assert!(
        code == Some(2) && (message.contains("no NVIDIA driver") || message.contains("without CUDA kernels")),
        "{message}"
    );
    let (code, result, message) = score("auto", None, &[]);
    // No word of a GPU; which dtype `auto` takes is this machine's.
    let silent = message.lines().all(|line| line.starts_with("on the CPU in "));
    assert!(code == Some(0) && silent && result.contains("perplexity"), "{message}");
}

/// A failing kernel ends the command with its error, even while work is still queued.
#[test]
fn a_kernel_fails() {
    let Some(ChildDriver { folder, kernels }) = standin::for_children() else { return };
    for nth in ["1", "9", "20"] {
        let environment = [("STANDIN_KERNELS", kernels.to_str().expect("UTF-8")), ("STANDIN_FAULT", nth)];
        let (code, said, message) = score("cuda", Some(&folder), &environment);
        assert!(code == Some(1) && said.is_empty(), "kernel {nth}: exit code {code:?}, {said}{message}");
        for part in ["cuda:0", "an illegal memory access was encountered", "start again"] {
            assert!(message.contains(part), "`{part}` not in: {message}");
        }
    }
}

/// 1 MiB holds the kernels but not the model.
#[test]
fn too_little_memory() {
    let Some(ChildDriver { folder, kernels }) = standin::for_children() else { return };
    let environment = [("STANDIN_KERNELS", kernels.to_str().expect("UTF-8")), ("STANDIN_FIRST", "5")];
    let (code, _, message) = score("auto", Some(&folder), &environment);
    assert_eq!(code, Some(1), "{message}");
    for part in ["on cuda:0", "a buffer of", "bytes and", "are free", "swat plan"] {
        assert!(message.contains(part), "`{part}` not in: {message}");
    }
}

#[test]
fn a_usable_gpu() {
    let Some(ChildDriver { folder, kernels }) = standin::for_children() else { return };
    let environment = [("STANDIN_KERNELS", kernels.to_str().expect("UTF-8"))];
    let (code, on_gpu, message) = score("auto", Some(&folder), &environment);
    assert!(code == Some(0) && message.contains("on cuda:0, stand-in GPU 9.0, late"), "{message}");
    let (_, on_cpu, _) = score("cpu", Some(&folder), &environment);
    let (on_gpu, on_cpu) = (number(&on_gpu, "nll"), number(&on_cpu, "nll"));
    assert!((on_gpu - on_cpu).abs() < 0.02 * on_cpu, "{on_gpu} on the GPU, {on_cpu} on the CPU");

    let mut doctor = Command::new(env!("CARGO_BIN_EXE_swat"));
    doctor.args(["doctor"]);
    let (code, said, _) = run(doctor, Some(&folder), &environment);
    assert_eq!(code, Some(0));
    for part in [
        "7 device(s)",
        "stand-in GPU 8.0, late, compute capability 8.0",
        "cuda:4       cannot be used",
        "sm_90a: attention_backward_sm90, attention_sm90, gemm_sm90",
    ] {
        assert!(said.contains(part), "`{part}` not in: {said}");
    }
}

#[test]
fn a_plan_for_a_gpu_needs_none() {
    let plan = |device: &str, state: &str, driver: Option<&Path>| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
        let dtype = if device == "cpu" { "f32" } else { "auto" };
        command.args(["plan", "--json", "--device", device, "--dtype", dtype, "--state", state, "--model"]);
        command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny"));
        let kernels = driver.map(|folder| folder.join("kernels").to_str().expect("UTF-8").to_owned());
        let environment: Vec<_> = kernels.iter().map(|list| ("STANDIN_KERNELS", list.as_str())).collect();
        let (code, json, message) = run(command, driver, &environment);
        assert_eq!(code, Some(0), "{message}");
        json
    };
    let [cpu, f32_state, bf16_state] =
        [("cpu", "f32"), ("cuda", "f32"), ("cuda", "bf16")].map(|(device, state)| plan(device, state, None));
    for (key, of_f32, of_bf16) in
        [("weights_bytes", 2.0, 2.0), ("gradients_bytes", 1.0, 2.0), ("moments_bytes", 1.0, 2.0)]
    {
        assert_eq!(number(&cpu, key), of_f32 * number(&f32_state, key), "{key}");
        assert_eq!(number(&cpu, key), of_bf16 * number(&bf16_state, key), "{key}");
    }
    if standin::real() {
        return;
    }
    assert!(f32_state.contains("\"free_bytes\":null"), "{f32_state}");
    let Some(ChildDriver { folder, .. }) = standin::for_children() else { return };
    let with_gpu = plan("cuda", "f32", Some(&folder));
    assert!(
        (1.0..=f64::from(64 << 10)).contains(&(number(&with_gpu, "free_bytes") / f64::from(1 << 20))),
        "{with_gpu}"
    );
}
