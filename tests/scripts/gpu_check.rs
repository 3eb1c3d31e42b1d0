//! `scripts/gpu_check.py` on hosts with problems: shell scripts replace everything that it runs, so that hanging and
//! faulting kernels and missing tools are cheap to test. Nothing in these records was measured. Needs python3 and a
//! shell.
#![cfg(unix)]

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

/// Tests by the words in their names: they end as these say, and a hanging one leaves the process id of a child.
const TESTS: &str = r#"
for test in "$@"; do
  case "$test" in
    --*|[0-9]*) ;;
    *hangs*) sleep 61 & echo $! >>PACK/children; wait;;
    *faults*) kill -SEGV $$;;
    *fails*) echo "test $test ... FAILED"; bad=1;;
    *) echo "test $test ... ok";;
  esac
done
exit ${bad:-0}"#;

/// A bench that measures what it is asked for, on a device that has cuBLASLt if CUBLASLT is 1.
const BENCHES: &str = r#"
family() {
  printf '{"family": "%s", "ceilings": {"flops_per_s": 1e14, "bytes_per_s": 1e12}, "device": "made up"}\n' $1
  [ "$1" = gemm ] && [ CUBLASLT = 0 ] && echo "{\"family\": \"gemm\", \"missing\": \"cublaslt\", \"reason\": \"not installed\"}"
}
line() {
  printf '{"id": "%s/%s/%s/%s", "family": "%s", "op": "%s", "shape": "%s", ' $1 $2 $3 $4 $1 $2 $3
  printf '"variant": "%s", "peer": %s, "ns": 10.0, "low_ns": 9.0, "high_ns": 11.0, ' $4 $5
  echo '"samples": 7, "bytes": 1000, "flops": 2000, "device": "made up"}'
}
case "$*" in
  *--list*)
    for variant in swat wgmma baseline; do echo gemm/forward/qwen2.5-7b/1x2x3/$variant; done
    for family in swiglu rope embedding sampling; do echo $family/forward/qwen2.5-7b/1x2/swat; done
    exit;;
  *--once*) exit;;
  *HANGING*) line gemm forward qwen2.5-7b/1x2x3 swat false; sleep 61 & echo $! >>PACK/children; wait;;
  *FAULTING*) line gemm forward qwen2.5-7b/1x2x3 swat false; kill -ABRT $$;;
esac
for part in "$@"; do
  case "$part" in
    */*) IFS=/; set -- $part; family $1; line $1 $2 $3 swat false; line $1 $2 $3 copy true;;
  esac
done"#;

const NCU: &str = r#"
case "$*" in
  *--import*) printf '"ID","Kernel Name","gpu__time_duration.sum"\n"","","us"\n"0","gemm_wgmma","12.5"\n';;
esac"#;

const SWAT: &str = r#"
case "$1" in
  doctor) echo '{"cuda_devices": [{"device": "cuda:0", "name": "made up", "total_bytes": MEMORY}]}';;
  profile) layers=$(sed 's/.*"num_hidden_layers": \([0-9]*\).*/\1/' "$3/config.json")
    echo "{\"step_ms\": $((100 + 10 * layers)), \"tok_per_s\": 7.0}";;
esac"#;

const PYTHON: &str = r#"
case "$1" in
  -c) echo '{"torch": "1.2", "gpu": true, "cudnn": 91000}';;
  *train_against_torch.py) echo '{"training": []}';;
  *) printf '{"id": "a/b/c/torch", "family": "a", "op": "b", "shape": "c", "variant": "torch", "peer": true, '
    echo '"ns": 5.0, "bytes": 1, "flops": 1, "device": "made up"}';;
esac"#;

/// The problems of a host.
#[derive(Default)]
struct Host<'a> {
    /// Tests of `ops` beside those that pass.
    tests: &'a [&'a str],
    hanging_bench: &'a str,
    faulting_bench: &'a str,
    /// Missing tools, of `cublaslt`, `torch`, `ncu`, `compute-sanitizer`.
    missing: &'a [&'a str],
    /// Missing executables of the pack.
    lost: &'a [&'a str],
    /// Whether NVIDIA's tools say that they cannot work on this machine.
    refusing: bool,
}

/// A folder as scripts/gpu_pack.sh makes it, and tools beside it.
struct Pack {
    directory: tempfile::TempDir,
}

impl Pack {
    fn new(host: &Host) -> Self {
        let pack = Self { directory: tempfile::tempdir().unwrap() };
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for folder in ["pack/peers", "bin"] {
            fs::create_dir_all(pack.path(folder)).unwrap();
        }
        for name in ["gpu_check.py", "gpu_runs.py", "bench_report.py"] {
            fs::copy(root.join("scripts").join(name), pack.path("pack").join(name)).unwrap();
        }
        let model = json!({ "name": "qwen2.5-7b", "hidden": 64, "ffn": 192, "heads": 2, "kv_heads": 1, "head_dim": 64,
            "vocab": 256, "layers": 28, "tied": false });
        fs::write(pack.path("pack/shapes.json"), json!({ "models": [model] }).to_string()).unwrap();
        fs::write(pack.path("pack/commit"), "0123\n").unwrap();
        let ops = [
            "gemm::gpu_0::a",
            "gemm::gpu_0::b",
            "attention::cuda_0::a",
            "gemm::cpu::a",
            "gemm::cpu_bf16::a",
            "gemm::gpu_2::a",
        ];
        let test_names = |names: &[&str]| names.iter().map(|name| format!("{name}: test\\n")).collect::<String>();
        let tests =
            |names: &[&str]| format!("case \"$1\" in --list) printf '{}'; exit;; esac{TESTS}", test_names(names));
        let cublaslt = if host.missing.contains(&"cublaslt") { "0" } else { "1" };
        let benches = BENCHES.replace("CUBLASLT", cublaslt);
        let benches =
            benches.replace("HANGING", or_none(host.hanging_bench)).replace("FAULTING", or_none(host.faulting_bench));
        // Enough for six layers of that model, and not for 28.
        let swat = SWAT.replace("MEMORY", &((16u64 << 30) + (8 << 20)).to_string());
        let executables = [
            ("ops", tests(&[&ops[..], host.tests].concat())),
            ("standin", tests(&["known::mma", "known::nvcc_compiles_them", "planted::a"])),
            ("cuda", tests(&["logits"])),
            ("cuda_graphs", tests(&["graphs"])),
            ("kernels", benches),
            ("swat", swat),
        ];
        for (name, text) in executables.iter().filter(|(name, _)| !host.lost.contains(name)) {
            pack.script(&format!("pack/{name}"), text);
        }
        let refuses = |text: &'static str, said: &str| match host.refusing {
            true => format!("echo '{said}'; exit 1"),
            false => text.to_owned(),
        };
        let sanitizer = "while [ \"${1#--}\" != \"$1\" ]; do shift 2; done; exec \"$@\"";
        let sanitizer = refuses(sanitizer, "========= Error: Target application failed: Device not supported");
        let ncu = refuses(NCU, "==ERROR== ERR_NVGPUCTRPERM - no permission to read the counters of this GPU");
        for (name, text) in [("ncu", ncu.as_str()), ("compute-sanitizer", &sanitizer), ("torch", PYTHON)] {
            if !host.missing.contains(&name) {
                pack.script(&format!("bin/{name}"), text);
            }
        }
        if host.missing.contains(&"torch") {
            pack.script("bin/torch", "echo \"ModuleNotFoundError: No module named 'torch'\"; exit 1");
        }
        pack
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn script(&self, name: &str, text: &str) {
        let text = text.replace("PACK", self.path("pack").to_str().unwrap());
        fs::write(self.path(name), format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(self.path(name), PermissionsExt::from_mode(0o755)).unwrap();
    }

    fn command(&self, options: &[&str]) -> Command {
        let mut command = Command::new("python3");
        command.arg(self.path("pack/gpu_check.py")).args(["--python".as_ref(), self.path("bin/torch").as_os_str()]);
        let path = format!("{}:{}", self.path("bin").display(), std::env::var("PATH").unwrap());
        command.args(options).arg("--out").arg(self.path("out/")).env("PATH", path).env_remove("CUDA_HOME");
        command
    }

    fn record(&self) -> Value {
        serde_json::from_str(&fs::read_to_string(self.path("out/record.json")).unwrap()).unwrap()
    }

    /// Runs the check: what it printed, its record, and status and reason of each item. Every item that it lists is in
    /// the record, no child is left, and bench_report.py reads it.
    fn check(&self, options: &[&str]) -> (Output, Value, BTreeMap<String, [String; 2]>) {
        let output = self.command(options).output().unwrap();
        let record = self.record();
        let text = |item: &Value, key: &str| item[key].as_str().unwrap_or_default().to_string();
        let items: BTreeMap<String, [String; 2]> = record["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|item| (text(item, "name"), ["status", "reason"].map(|key| text(item, key))))
            .collect();
        let listed = self.command(&[options, &["--list"]].concat()).output().unwrap();
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let listed: Vec<&str> =
            listed.lines().filter_map(|line| line.split_once(" s  ").map(|(_, name)| name)).collect();
        assert!(listed.len() > 20 && listed.len() == items.len(), "{listed:?}\n{items:?}");
        for name in listed {
            let [status, reason] = items.get(name).unwrap_or_else(|| panic!("{name} is not in {items:?}"));
            assert!(["passed", "failed", "hung", "left out"].contains(&status.as_str()), "{name}: {status}");
            assert!(status == "passed" || !reason.is_empty(), "{name} has {status} without a reason");
        }
        self.nothing_is_left();
        if record["bench"]["results"].as_array().unwrap().iter().any(|line| line.get("ns").is_some()) {
            let mut report = Command::new("python3");
            report.arg(self.path("pack/bench_report.py")).arg("table").arg(self.path("out/record.json"));
            let output = report.output().unwrap();
            assert!(output.status.success(), "{output:?}");
        }
        (output, record, items)
    }

    /// Asserts that no child of a hanging process is alive.
    fn nothing_is_left(&self) {
        let children = fs::read_to_string(self.path("pack/children")).unwrap_or_default();
        for child in children.lines() {
            let status = fs::read_to_string(format!("/proc/{child}/status")).unwrap_or_default();
            assert!(status.is_empty() || status.contains("State:\tZ"), "{child} is alive");
        }
    }
}

fn or_none(part: &str) -> &str {
    if part.is_empty() { "no-such-part" } else { part }
}

/// Whether this machine has CUDA tools in a folder that the check searches.
fn installed() -> bool {
    ["/usr/local/cuda", "/opt/nvidia"].iter().any(|folder| Path::new(folder).exists())
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn a_host_without_problems() {
    let pack = Pack::new(&Host::default());
    let (output, record, items) = pack.check(&["--budget", "120"]);
    let said = stdout(&output);
    assert_eq!(output.status.code(), Some(0), "{said}{}", String::from_utf8_lossy(&output.stderr));
    for (name, [status, reason]) in &items {
        let expected = if name == "step/28 layers" { "left out" } else { "passed" };
        assert!(status == expected, "{name}: {status}, {reason}");
    }
    for name in
        ["known/known::mma", "ops/gemm::gpu_0", "products/gemm forward", "ncu/gemm forward", "versions/gemm wgmma"]
    {
        assert!(items.contains_key(name), "{name} is not in {items:?}");
    }
    // Neither the CPU's tests, nor those of a device that the GPU stands for already, nor the build's.
    for name in ["ops/gemm::cpu", "ops/gemm::cpu_bf16", "ops/gemm::gpu_2", "known/known::nvcc_compiles_them"] {
        assert!(!items.contains_key(name), "{name} is in {items:?}");
    }
    assert_eq!(record["device"]["name"], "made up");
    let step = &record["step"]["extrapolated"];
    assert_eq!((&step["from"], &step["step_ms"]), (&json!([2, 6]), &json!(380.0)), "{step}");
    assert!(said.contains("ncu/gemm forward: gemm_wgmma: time 12.5 us"), "{said}");
    assert!(!said.contains("MISSING ncu") && said.contains("| gemm forward qwen2.5-7b | swat | 10.0 ns"), "{said}");
}

#[test]
fn hanging_items_are_killed_and_the_rest_runs() {
    let pack = Pack::new(&Host {
        tests: &["gemm::gpu_0::hangs", "gemm::gpu_1::hangs"],
        hanging_bench: "gemm/backward-input",
        ..Host::default()
    });
    let (output, record, items) =
        pack.check(&["--budget", "120", "--patience", "0.7", "--only", "ops", "products", "memory/"]);
    assert_eq!(output.status.code(), Some(1));
    for name in ["ops/gemm::gpu_0", "ops/gemm::gpu_1", "products/gemm backward-input"] {
        assert!(items[name][0] == "hung" && items[name][1].starts_with("killed after"), "{name}: {:?}", items[name]);
    }
    let items = record["items"].as_array().unwrap();
    let gemm = items.iter().find(|item| item["name"] == "ops/gemm::gpu_0").unwrap();
    // Those that were told before it hung count; the one that hung is told by running it alone.
    assert_eq!(gemm["tests"]["gemm::gpu_0::a"], "passed", "{gemm}");
    assert_eq!(gemm["tests"]["gemm::gpu_0::hangs"], "hung alone", "{gemm}");
    let bench = items.iter().find(|item| item["name"] == "products/gemm backward-input").unwrap();
    assert_eq!(bench["measured"], 1, "what was measured before it hung is kept: {bench}");
    for name in ["products/gemm backward-weight", "ops/attention::cuda_0", "memory/rmsnorm"] {
        assert!(items.iter().any(|item| item["name"] == name && item["status"] == "passed"), "{name}");
    }
}

#[test]
fn after_a_fault_each_test_has_a_process_of_its_own() {
    let tests = ["adamw::cuda_0::faults", "adamw::cuda_0::later", "rope::cuda_0::fails"];
    let pack = Pack::new(&Host { tests: &tests, faulting_bench: "adamw/", ..Host::default() });
    let (output, record, items) = pack.check(&["--budget", "120"]);
    assert_eq!(output.status.code(), Some(1));
    let signal = &items["ops/adamw::cuda_0"];
    assert!(signal[0] == "failed" && signal[1] == "ended by signal 11", "{signal:?}");
    let all = record["items"].as_array().unwrap();
    let adamw = &all.iter().find(|item| item["name"] == "ops/adamw::cuda_0").unwrap()["tests"];
    assert_eq!((&adamw[tests[0]], &adamw[tests[1]]), (&json!("failed alone"), &json!("passed alone")), "{adamw}");
    assert_eq!(items["ops/rope::cuda_0"], ["failed", "exit code 1"]);
    assert_eq!(items["memory/adamw"], ["failed", "ended by signal 6"]);
    assert_eq!(items["memory/rmsnorm"][0], "passed");
    let said = stdout(&output);
    assert!(said.contains("FAILED ops/adamw::cuda_0: ended by signal 11"), "{said}");
}

#[test]
fn missing_tools_are_reported() {
    let pack = Pack::new(&Host { missing: &["cublaslt", "torch", "ncu", "compute-sanitizer"], ..Host::default() });
    let (output, record, items) = pack.check(&["--budget", "120"]);
    let said = stdout(&output);
    // Nothing of ours is wrong.
    assert_eq!(output.status.code(), Some(0), "{said}");
    let mut missing =
        vec![("cublaslt", "not installed"), ("torch", "No module named 'torch'"), ("cudnn", "no PyTorch")];
    if !installed() {
        missing.extend([("ncu", "not on the path"), ("compute-sanitizer", "not on the path")]);
        for name in ["ncu/attention backward", "memcheck/gemm::gpu_0"] {
            assert!(items[name][0] == "left out" && items[name][1].starts_with("no "), "{:?}", items[name]);
        }
    }
    for (name, why) in missing {
        let told = record["peers"][name].as_str().unwrap();
        assert!(told.contains(why), "{name}: {told}");
        assert!(said.contains(&format!("MISSING {name}: {told}")), "{name}: {said}");
    }
    assert!(said.contains("**cublaslt is missing for gemm: not installed**"), "{said}");
    assert!(items["products/torch attention"][1].contains("no PyTorch in"), "{items:?}");
    assert_eq!(items["products/gemm forward"][0], "passed");
}

#[test]
fn tools_that_a_machine_refuses_are_left_out() {
    let pack = Pack::new(&Host { refusing: true, ..Host::default() });
    let (output, _, items) = pack.check(&["--budget", "120"]);
    assert_eq!(output.status.code(), Some(0), "{}", stdout(&output));
    for (name, why) in [("ncu/gemm forward", "ERR_NVGPUCTRPERM"), ("memcheck/gemm::gpu_0", "Device not supported")] {
        let [status, reason] = &items[name];
        assert!(status == "left out" && reason.contains(why), "{name}: {items:?}");
    }
    assert!(items.values().all(|[status, _]| status != "failed"), "{items:?}");
}

#[test]
fn missing_executables_are_reported() {
    let pack = Pack::new(&Host { lost: &["standin", "cuda", "kernels"], ..Host::default() });
    let (output, record, items) = pack.check(&["--budget", "120"]);
    assert_eq!(output.status.code(), Some(1));
    for name in ["standin", "cuda", "kernels"] {
        assert!(record["broken"][name].is_string(), "{}", record["broken"]);
        assert!(stdout(&output).contains(&format!("BROKEN {name}")));
    }
    assert_eq!(items["products/gemm forward"][0], "failed");
    assert_eq!(items["ops/gemm::gpu_0"][0], "passed");
    assert_eq!(items["families/rope"], ["left out", "the benches list nothing of it"]);
}

#[test]
fn the_time_budget_is_kept() {
    let hanging: Vec<String> = (0..30).map(|i| format!("family{i}::cuda_0::hangs")).collect();
    let hanging: Vec<&str> = hanging.iter().map(String::as_str).collect();
    let pack = Pack::new(&Host { tests: &hanging, ..Host::default() });
    let began = Instant::now();
    let (_, record, items) = pack.check(&["--budget", "8", "--patience", "1.5"]);
    assert!(
        record["seconds"].as_f64().unwrap() < 9.0 && began.elapsed() < Duration::from_secs(60),
        "{}",
        record["seconds"]
    );
    let states = |status: &str| items.values().filter(|[s, _]| s == status).count();
    assert!(states("hung") >= 2 && states("left out") > 40, "{items:?}");
    let late =
        items.values().filter(|[status, reason]| status == "left out" && reason.starts_with("no time: it needs"));
    assert!(late.count() > 40, "{items:?}");
}

/// As when a machine is reclaimed: the record holds the finished items, and names the others.
#[test]
fn a_terminated_check_leaves_a_record() {
    let pack = Pack::new(&Host { tests: &["gemm::gpu_0::hangs"], ..Host::default() });
    let mut running = pack.command(&["--budget", "120"]).stdout(std::process::Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    while !pack.path("pack/children").exists() && began.elapsed() < Duration::from_secs(60) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let ended = Command::new("kill").arg(running.id().to_string()).status().unwrap();
    assert!(ended.success() && running.wait().unwrap().code() == Some(1));
    pack.nothing_is_left();
    let record = pack.record();
    let status = |name: &str| {
        let items = record["items"].as_array().unwrap();
        items.iter().find(|item| item["name"] == name).unwrap_or_else(|| panic!("{name}"))["status"].clone()
    };
    assert_eq!(
        [status("known/doctor"), status("ops/gemm::gpu_0"), status("ncu/gemm forward")],
        ["passed", "left out", "left out"]
    );
}

#[test]
fn a_part_of_the_items() {
    let pack = Pack::new(&Host::default());
    let (_, _, items) = pack.check(&["--budget", "60", "--only", "known", "ncu/gemm"]);
    for (name, [status, reason]) in &items {
        let asked = name.starts_with("known/") || name.starts_with("ncu/gemm");
        assert!(
            asked == (status == "passed") && asked == (reason != "not asked for (--only)"),
            "{name}: {status}, {reason}"
        );
    }
}
