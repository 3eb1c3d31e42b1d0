//! `--dtype`: what it chooses, says and refuses. The model that the demo embeds is stored in bf16.

use serde_json::Value;
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use swat::backend::cpu::Cpu;
use swat::model::ModelDir;

fn swat(args: &[&str]) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } =
        Command::new(env!("CARGO_BIN_EXE_swat")).args(args).output().expect("the binary runs");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    (status.code(), text(stdout), text(stderr))
}

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny");

fn score(dtype: &str) -> (f64, String) {
    let (code, out, err) =
        swat(&["score", "--device", "cpu", "--dtype", dtype, "--model", TINY, "--ids", "1,2,3,4,5", "--json"]);
    assert_eq!(code, Some(0), "{err}");
    let value: Value = serde_json::from_str(&out).expect("JSON");
    (value["perplexity"].as_f64().expect("a number"), err)
}

#[test]
fn auto_goes_by_the_stored_dtype_and_says_so() {
    let [(exact, quiet), (rounded, also_quiet), (chosen, said)] = ["f32", "bf16", "auto"].map(score);
    assert!(quiet.is_empty() && also_quiet.is_empty(), "{quiet}{also_quiet}");
    assert!(exact != rounded && (rounded / exact - 1.0).abs() < 0.05, "{exact} in f32, {rounded} in bf16");
    let (expected, words) = if Cpu::bf16_products() { (rounded, "in bf16") } else { (exact, "in f32") };
    assert_eq!(chosen, expected);
    assert!(said.contains(words), "{said}");
}

#[test]
fn a_gpu_has_no_f32() {
    let (code, _, message) = swat(&["score", "--device", "cuda", "--dtype", "f32", "--model", TINY, "--ids", "1,2"]);
    assert!(code == Some(2) && message.contains("--dtype") && message.contains("f32"), "{message}");
}

/// An interrupted run is resumed in its own precision alone, and ends in the dtype in which the model was stored.
#[test]
fn a_run_has_one_precision() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data.jsonl");
    let line = r#"{"prompt": "bolu", "completion": "a b c d e f g"}"#;
    std::fs::write(&data, format!("{line}\n").repeat(8)).unwrap();
    let out = dir.path().join("out");
    let [data, to] = [&data, &out].map(|path| path.to_str().expect("UTF-8"));
    let arguments = |dtype, steps| {
        let run =
            ["tune", "--device", "cpu", "--dtype", dtype, "--model", TINY, "--data", data, "--out", to, "--quiet"];
        // Beside weights in f32 it would have no effect.
        let state: &[&str] = if dtype == "bf16" { &["--state", "bf16"] } else { &[] };
        [&run[..], &["--steps", steps, "--batch-size", "2", "--save-every", "1"], state].concat()
    };
    let mut child = Command::new(env!("CARGO_BIN_EXE_swat"))
        .args(arguments("bf16", "40"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let metrics = dir.path().join("out.unfinished/metrics.jsonl");
    while std::fs::read_to_string(&metrics).map_or(0, |text| text.lines().count()) < 3 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let resume = |dtype| swat(&[arguments(dtype, "40"), vec!["--resume"]].concat());
    let (code, _, message) = resume("f32");
    assert!(code == Some(2) && message.contains(r#"precision.0 is "bf16" in the checkpoint"#), "{message}");
    let (code, _, message) = resume("bf16");
    assert_eq!(code, Some(0), "{message}");
    assert!(ModelDir::stores_bf16(&out).unwrap());
}
