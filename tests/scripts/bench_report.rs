//! `scripts/bench_report.py` on made-up records: nothing in them was measured. Needs python3 and git; what is missing
//! is said on standard error.

use serde_json::{Value, json};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output};

fn script(arguments: &[&str]) -> Output {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/bench_report.py");
    Command::new("python3").arg(script).args(arguments).output().expect("python3 runs")
}

/// The commit of this tree; `None` if the tools are missing, which standard error says.
fn commit() -> Option<String> {
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
    };
    let commit = run("python3", &["--version"]).and_then(|_| run("git", &["rev-parse", "HEAD"]));
    if commit.is_none() {
        let _ = writeln!(std::io::stderr(), "skipped: tests of bench_report.py (no python3, or no git repository)");
    }
    commit
}

fn line(op: &str, shape: &str, variant: &str, peer: bool, [low, ns, high]: [f64; 3]) -> Value {
    json!({
        "id": format!("rmsnorm/{op}/{shape}/{variant}"), "family": "rmsnorm", "op": op, "shape": shape, "variant": variant,
        "peer": peer, "ns": ns, "low_ns": low, "high_ns": high, "samples": 21, "bytes": 1_000_000, "flops": 2_000_000,
        "device": "made-up GPU",
    })
}

/// A record of a made-up GPU with a roofline of 1000 GB/s and 100 TFLOP/s.
fn record(commit: &str, date: &str, lines: &[Value]) -> Value {
    let ceilings =
        json!({ "family": "rmsnorm", "ceilings": { "flops_per_s": 1e14, "bytes_per_s": 1e12 }, "product_by": "swat" });
    let results: Vec<_> = [ceilings].iter().chain(lines).cloned().collect();
    json!({
        "date": date, "commit": commit, "command": ["made up"], "device": { "name": "made-up GPU", "driver_version": "1.2" },
        "meanwhile": { "clocks.sm": { "least": 1.0, "median": 1700.0, "most": 1800.0 } },
        "bench": { "exit": [0], "results": results },
    })
}

fn write(path: &Path, value: &Value) -> String {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, value.to_string()).unwrap();
    path.to_str().unwrap().into()
}

const README: &str = "before\n<!-- results:kernels begin -->\nold\n<!-- results:kernels end -->\nafter\n";

#[test]
fn the_newest_record_is_rendered() {
    let Some(commit) = commit() else { return };
    let directory = tempfile::tempdir().unwrap();
    let readme = directory.path().join("README.md");
    std::fs::write(&readme, README).unwrap();
    let large = "qwen2.5-7b/8192x3584";
    let lines = [
        line("forward", "smollm2-135m/8192x576", "swat", false, [9.0, 10.0, 11.0]),
        line("forward", large, "swat", false, [1900.0, 2000.0, 2100.0]),
        line("forward", large, "copy", true, [1400.0, 1500.0, 1600.0]),
        json!({ "family": "gemm", "missing": "cublaslt", "reason": "not installed" }),
    ];
    let records = directory.path().join("records");
    write(&records.join("gpu/2026-01-01-a.json"), &record(&commit, "2026-01-01T00:00:00Z", &lines[..1]));
    write(&records.join("gpu/2026-02-01-b.json"), &record(&commit, "2026-02-01T00:00:00Z", &lines));
    let arguments = ["render", "--records", records.to_str().unwrap(), "--readme", readme.to_str().unwrap()];
    let output = script(&arguments);
    assert!(output.status.success(), "{output:?}");
    let text = std::fs::read_to_string(&readme).unwrap();
    let row = format!("| rmsnorm forward | {large} | 2.00 µs | 500 GB/s | 50 | 0.750 × copy |");
    assert!(text.contains(&row), "{text}");
    assert!(text.starts_with("before\n<!--") && text.ends_with("end -->\nafter\n") && !text.contains("old"), "{text}");
    let about = "made-up GPU; driver 1.2; 1700 MHz in the median; ceilings measured in the same processes: up to 100 TFLOP/s and 1000 GB/s; \
                 cublaslt is missing for gemm: not installed; 2026-02-01";
    assert!(text.contains(about), "{text}");
    assert!(script(&arguments).status.success());
    assert_eq!(std::fs::read_to_string(&readme).unwrap(), text, "rendered again, nothing changes");
}

#[test]
fn a_record_of_uncommitted_code_is_refused() {
    let Some(commit) = commit() else { return };
    let unknown = "0123456789012345678901234567890123456789";
    for (made_of, why) in [(unknown.to_string(), "does not know"), (format!("{commit}-dirty"), "without changes")] {
        let directory = tempfile::tempdir().unwrap();
        let readme = directory.path().join("README.md");
        std::fs::write(&readme, README).unwrap();
        let lines = [line("forward", "qwen2.5-7b/8192x3584", "swat", false, [1.0, 2.0, 3.0])];
        let records = directory.path().join("records");
        write(&records.join("gpu/a.json"), &record(&made_of, "2026-01-01T00:00:00Z", &lines));
        let output = script(&["render", "--records", records.to_str().unwrap(), "--readme", readme.to_str().unwrap()]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && said.contains(why), "{said}");
        assert_eq!(std::fs::read_to_string(&readme).unwrap(), README, "{why}");
    }
}

#[test]
fn slower_means_outside_the_spread() {
    if commit().is_none() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let kinds = ["same", "slower", "faster", "gone"];
    let lines = |times: [[f64; 3]; 4]| -> Vec<Value> {
        kinds.iter().zip(times).map(|(op, times)| line(op, "m/1x1", "swat", false, times)).collect()
    };
    let old = lines([[90.0, 100.0, 110.0]; 4]);
    // 10 % more inside the spread, 15 % more outside, 20 % less outside.
    let new = lines([[100.0, 110.0, 120.0], [112.0, 115.0, 118.0], [75.0, 80.0, 85.0], [0.0; 3]]);
    let at = |name: &str| directory.path().join(name);
    let old = write(&at("old.json"), &record("a", "2026-01-01", &old));
    let new = write(&at("new.json"), &record("b", "2026-01-02", &new[..3]));
    let output = script(&["compare", &old, &new]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(said.contains("slower × 1.150  rmsnorm/slower/m/1x1/swat"), "{said}");
    assert!(said.contains("faster × 0.800  rmsnorm/faster/m/1x1/swat"), "{said}");
    assert!(said.contains("1 slower, 1 faster, 1 not told apart; 1 only in the older record"), "{said}");
    assert_eq!(script(&["compare", &old, &old]).status.code(), Some(0));
    let mut other = record("a", "2026-01-01", &[]);
    other["device"]["name"] = json!("another");
    assert_eq!(script(&["compare", &old, &write(&at("other.json"), &other)]).status.code(), Some(2));
    assert_eq!(script(&["compare", &old, "nothing.json"]).status.code(), Some(2));
}

#[test]
fn both_records_are_in_one_table() {
    if commit().is_none() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let ours = [line("forward", "m/1x1", "swat", false, [1.0, 1000.0, 2000.0])];
    let record = write(&directory.path().join("ours.json"), &record("a", "2026-01-01", &ours));
    let theirs = directory.path().join("theirs.jsonl");
    let torch = line("forward", "m/1x1", "torch", true, [1.0, 4000.0, 5000.0]);
    std::fs::write(&theirs, format!("a warning of a library\n{torch}\n")).unwrap();
    let output = script(&["table", &record, theirs.to_str().unwrap()]);
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("| rmsnorm forward m/1x1 | swat | 1.00 µs | 1000 GB/s | 100 | 4.00 × torch |"), "{output:?}");
    assert!(said.contains("| rmsnorm forward m/1x1 | torch (peer) | 4.00 µs | 250 GB/s | 25 | – |"), "{said}");
    // Two that were sampled in turns, and a peer that was not there.
    let pair = json!({ "family": "rmsnorm", "op": "forward", "shape": "m/1x1", "pair": ["swat", "torch"], "ratio": 3.9, "low": 3.8,
        "high": 4.05, "pairs": 21 });
    let missing =
        json!({ "family": "gemm", "missing": "cublaslt", "reason": "no libcublasLt.so.13", "device": "made-up GPU" });
    std::fs::write(&theirs, format!("{torch}\n{pair}\n{missing}\n{missing}\n")).unwrap();
    let said = String::from_utf8(script(&["table", &record, theirs.to_str().unwrap()]).stdout).unwrap();
    assert!(said.contains("| 100 | 3.90 × torch (3.80 to 4.05) |"), "{said}");
    assert!(said.contains("**cublaslt is missing for gemm: no libcublasLt.so.13**"), "{said}");
    std::fs::write(&theirs, "nothing\n").unwrap();
    assert_eq!(script(&["table", theirs.to_str().unwrap()]).status.code(), Some(2));
}

/// The benches are replaced by a command that prints one line.
#[test]
fn a_record_tells_its_origin() {
    let Some(commit) = commit() else { return };
    let directory = tempfile::tempdir().unwrap();
    let printed = directory.path().join("lines");
    let torch = line("forward", "m/1x1", "torch", true, [1.0, 4000.0, 5000.0]);
    std::fs::write(&printed, format!("criterion says things\n{torch}\n")).unwrap();
    let out = directory.path().join("records");
    let command = format!("cat {}", printed.display());
    let output = script(&["record", "--run", &command, "--out", out.to_str().unwrap()]);
    assert!(output.status.success(), "{output:?}");
    let path = String::from_utf8_lossy(&output.stdout).trim().to_string();
    let record: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    assert!(record["commit"].as_str().unwrap().starts_with(&commit), "{record}");
    assert_eq!((&record["command"], &record["bench"]["results"]), (&json!([command]), &json!([torch])));
    assert!(record["device"]["name"].is_string() && path.contains(&commit[..12]), "{path}");
    let nothing = script(&["record", "--run", "true", "--out", out.to_str().unwrap()]);
    assert_eq!(nothing.status.code(), Some(2));
}
