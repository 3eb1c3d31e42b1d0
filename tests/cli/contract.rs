//! The command line: the contract for scripts, and wrong inputs, which get a clear message, exit code 2, no panic, and
//! no partial output. The model is the one that the demo embeds.

use crate::common;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn swat(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_swat")).args(args).output().expect("the binary runs")
}

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny")
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// The message of a command that must be refused.
fn refused(args: &[&str]) -> String {
    let output = swat(args);
    let message = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
    assert!(!message.contains("panicked"), "{message}");
    message
}

fn json(args: &[&str]) -> Value {
    let output = swat(args);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON object on stdout and nothing else")
}

/// A copy of the tiny model that a test may damage.
fn copy(to: &Path) -> PathBuf {
    let dir = to.join("model");
    std::fs::create_dir(&dir).unwrap();
    for entry in std::fs::read_dir(tiny()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.join(path.file_name().unwrap())).unwrap();
    }
    dir
}

/// A few examples of the tiny model's language.
fn data(dir: &Path) -> PathBuf {
    use swat::data::tiny::{Counts, Language, export};
    let data = dir.join("data");
    std::fs::create_dir(&data).unwrap();
    export(&Language::new(1), &data, Counts { pairs: 16, train: 24, tasks: 10 }, 1).unwrap();
    data
}

#[test]
fn every_command_has_help() {
    let help = swat(&["--help"]);
    assert!(help.status.success());
    let help = String::from_utf8(help.stdout).unwrap();
    for command in [
        "demo",
        "probe",
        "drift",
        "robustness",
        "search",
        "tune",
        "replay",
        "merge",
        "eval",
        "run",
        "generate",
        "score",
        "plan",
        "profile",
        "doctor",
    ] {
        assert!(help.contains(command), "{command} is not in --help");
        let own = swat(&[command, "--help"]);
        assert!(own.status.success() && own.stdout.len() > 300, "{command} --help");
    }
    assert!(json(&["doctor", "--json"])["cores"].as_u64().unwrap() >= 1);
}

#[test]
fn score_follows_its_contract() {
    let dir = tempfile::tempdir().unwrap();
    let (logits, hidden) = (dir.path().join("l.safetensors"), dir.path().join("h.safetensors"));
    let model = tiny();
    let args = ["score", "--model", text(&model), "--ids", "5,9,300,7", "--json"];
    let outputs = ["--logits-out", text(&logits), "--hidden-out", text(&hidden)];
    let found = json(&[&args[..], &outputs[..]].concat());
    let logprobs = found["logprobs"].as_array().unwrap();
    assert_eq!(found["tokens"], serde_json::json!([5, 9, 300, 7]));
    assert!(logprobs[0].is_null() && logprobs.len() == 4);
    let mean = logprobs[1..].iter().map(|p| -p.as_f64().unwrap()).sum::<f64>() / 3.0;
    assert!((mean - found["nll"].as_f64().unwrap()).abs() < 1e-6);
    // A byte-order mark is none of the text.
    let scored = |content: &str| {
        let file = dir.path().join("t.txt");
        std::fs::write(&file, content).unwrap();
        json(&["score", "--model", text(&model), "--text-file", text(&file), "--json"])["tokens"].clone()
    };
    assert_eq!(scored("\u{feff}which is big ?"), scored("which is big ?"));
    let one = json(&["score", "--model", text(&model), "--ids", "5", "--json"]);
    assert!(one["nll"].is_null() && one["perplexity"].is_null(), "nothing is predicted: {one}");
    assert!((mean.exp() / found["perplexity"].as_f64().unwrap() - 1.0).abs() < 1e-6);
    let bytes = std::fs::read(&logits).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let shape = file.tensor("logits").unwrap().shape().to_vec();
    assert_eq!(shape[0], 4);
    // Row 0 of the logits gives the log-probability of token 1.
    let view = file.tensor("logits").unwrap();
    let row: Vec<f32> =
        view.data()[..4 * shape[1]].chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let most = row.iter().fold(f32::MIN, |m, x| m.max(*x));
    let total: f64 = row.iter().map(|x| f64::from(x - most).exp()).sum();
    let expected = f64::from(row[9] - most) - total.ln();
    assert!((logprobs[1].as_f64().unwrap() - expected).abs() < 1e-4);
    let bytes = std::fs::read(&hidden).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("hidden").unwrap().shape()[..2], [7, 4]);
}

#[test]
fn generate_prints_a_line_for_each_conversation() {
    let dir = tempfile::tempdir().unwrap();
    let chat = dir.path().join("chat.jsonl");
    std::fs::write(&chat, "{\"prompt\": \"what is 2 plus 3 ?\"}\n\n{\"messages\": [{\"role\": \"user\", \"content\": \"what is 4 plus 4 ?\"}]}\n").unwrap();
    let model = tiny();
    let output =
        swat(&["generate", "--model", text(&model), "--chat", text(&chat), "--max-new-tokens", "12", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let lines: Vec<Value> = output
        .stdout
        .split(|b| *b == b'\n')
        .filter(|l| !l.is_empty())
        .map(|l| serde_json::from_slice(l).unwrap())
        .collect();
    assert_eq!(lines.len(), 2);
    for line in lines {
        assert!(line["text"].is_string() && line["tok_per_s"].as_f64().unwrap() > 0.0);
        assert!(["stop", "length"].contains(&line["finish"].as_str().unwrap()));
        assert!(!line["tokens"].as_array().unwrap().is_empty());
    }
    std::fs::write(&chat, "{\"prompt\": \"a\"}\n{\"prompts\": \"b\"}\n").unwrap();
    let message = refused(&["generate", "--model", text(&model), "--chat", text(&chat)]);
    assert!(message.contains("chat.jsonl:2"), "{message}");
}

#[test]
fn the_whole_method_runs_command_by_command() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (tiny(), data(dir.path()));
    let at = |name: &str| dir.path().join(name);
    let (security, probe, map, mods) =
        (data.join("security.jsonl"), at("p.safetensors"), at("map.json"), at("mods.json"));
    let model = text(&model);
    let inputs = ["--model", model, "--security", text(&security)];
    let found = json(&[&["probe", "--out", text(&probe), "--json"], &inputs[..]].concat());
    assert_eq!(found["format"], "swat.probe/1");
    assert!(refused(&[&["probe", "--out", text(&probe)], &inputs[..]].concat()).contains("--force"));
    let sweep = ["robustness", "--probe", text(&probe), "--out", text(&map), "--members", "1", "--no-retrain"];
    let more = ["--cells", "modules", "--epsilon", "1.2", "--json"];
    let found = json(&[&sweep[..], &more[..], &inputs[..]].concat());
    assert_eq!(found["cells"].as_array().unwrap().len(), 42);
    assert!(map.with_extension("svg").is_file());
    let search = ["search", "--map", text(&map), "--out", text(&mods), "--tau", "0.3", "--no-swap", "--json"];
    let found = json(&search);
    assert!(found["share"].as_f64().unwrap() > 0.1);
    let (train, out) = (data.join("train.jsonl"), at("tuned"));
    // The same by the planned training step: from gradients, and by moved copies.
    for by in ["conflict", "update"] {
        let (map, mods) = (at(&format!("map-{by}.json")), at(&format!("mods-{by}.json")));
        let made = ["robustness", "--probe", text(&probe), "--out", text(&map), "--by", by, "--data", text(&train)];
        let more = ["--cells", "modules", "--batches", "2", "--lr", "1e-3", "--steps", "10", "--json"];
        let found = json(&[&made[..], &more[..], &inputs[..]].concat());
        assert_eq!((&found["by"], &found["kind"]), (&by.into(), &"step".into()));
        let cells = found["cells"].as_array().unwrap();
        assert_eq!(cells.len(), 42);
        assert!(cells.iter().all(|cell| cell["task_gain"].as_f64().unwrap() > 0.0), "{by}: a step that gains nothing");
        assert!(cells.iter().all(|cell| cell["drop"]["refusal"]["mean"].is_number()));
        let found = json(&["search", "--map", text(&map), "--out", text(&mods), "--tau", "9", "--no-swap", "--json"]);
        assert_eq!(found["by"], by);
        assert!(found["share"].as_f64().unwrap() > 0.1);
    }
    let (by_gradients, again) = (at("map-conflict.json"), at("again.json"));
    let again = ["search", "--map", text(&by_gradients), "--out", text(&again), "--data", text(&train)];
    assert!(refused(&again).contains("--data: found an option that has no effect on"), "{}", refused(&again));
    let third = at("m3.json");
    let made = [&["robustness", "--probe", text(&probe), "--out", text(&third)], &inputs[..]].concat();
    let unmade = |more: &[&str]| refused(&[&made[..], more].concat());
    assert!(unmade(&["--by", "conflict"]).contains("--by conflict: found no --data"));
    assert!(unmade(&["--data", text(&train)]).contains("--by noise does not use"));
    let conflict = ["--by", "conflict", "--data", text(&train)];
    assert!(
        unmade(&[&conflict[..], &["--kind", "scale"]].concat()).contains("--kind: found scale beside --by conflict")
    );
    assert!(unmade(&[&conflict[..], &["--shard", "0/2"]].concat()).contains("a share of a conflict map"));
    assert!(unmade(&["--kind", "step"]).contains("--by update"));
    let tune = ["tune", "--model", model, "--data", text(&train), "--out", text(&out), "--mods", text(&mods)];
    let steps = ["--mods-steps", "2", "--steps", "2", "--batch-size", "4", "--max-length", "96", "--json"];
    let found = json(&[&tune[..], &steps[..]].concat());
    assert_eq!(found["phases"].as_array().unwrap().len(), 2);
    let planned = |phase: &str| found["plans"][phase]["total_bytes"].as_u64().unwrap();
    assert!(planned("mods") < planned("all") && found["planned_bytes"] == planned("all"), "{found}");
    assert!(found["peak_bytes"].as_u64().unwrap() > 1 << 20);
    for name in ["config.json", "tokenizer.json", "model.safetensors", "metrics.jsonl", "updates.json"] {
        assert!(out.join(name).is_file(), "{name}");
    }
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let first: Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
    for key in ["step", "phase", "loss", "lr", "grad_norm", "trained_tokens", "tok_per_s", "peak_bytes", "step_ms"] {
        assert!(!first[key].is_null(), "{key}");
    }
    assert!(first["speed_of_light"].as_f64().is_some_and(|share| share > 0.0 && share < 1.5), "{first}");
    assert!(refused(&[&tune[..], &steps[..]].concat()).contains("--force"));
    let drift = ["drift", "--tuned", text(&out), "--probe", text(&probe), "--json"];
    assert!(json(&[&drift[..], &inputs[..]].concat())["splits"]["test"].is_object());
    let task = data.join("task.jsonl");
    let eval = ["eval", "--model", text(&out), "--task", text(&task), "--limit", "4", "--json"];
    let found = json(&[&eval[..], &["--security", text(&security)]].concat());
    assert_eq!(found["asr"]["total"], 4);
    assert!(found["task"]["overall"]["value"].is_number());
    // What belongs to another model is refused.
    let other = text(&out);
    let message = refused(&[
        "robustness",
        "--model",
        other,
        "--probe",
        text(&probe),
        "--security",
        text(&security),
        "--out",
        text(&at("m2.json")),
    ]);
    assert!(message.contains("hash"), "{message}");
    let message = refused(&["search", "--map", text(&map), "--model", other, "--out", text(&at("mods2.json"))]);
    assert!(message.contains("hash") || message.contains("model"), "{message}");
    let message =
        refused(&["tune", "--model", other, "--data", text(&train), "--out", text(&at("t2")), "--mods", text(&mods)]);
    assert!(message.contains("model"), "{message}");
}

#[test]
fn damaged_models_are_refused_naming_file_and_field() {
    let dir = tempfile::tempdir().unwrap();
    let model = copy(dir.path());
    let weights = model.join("model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let score = |expected: &[&str]| {
        let message = refused(&["score", "--model", text(&model), "--ids", "1,2"]);
        assert!(expected.iter().all(|e| message.contains(e)), "{expected:?} not in: {message}");
    };
    std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    score(&["model.safetensors"]);
    let mut lying = whole.clone();
    lying[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
    std::fs::write(&weights, &lying).unwrap();
    score(&["model.safetensors"]);
    let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut poisoned = whole.clone();
    poisoned[8 + header..][..2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    std::fs::write(&weights, &poisoned).unwrap();
    score(&["NaN"]);
    std::fs::remove_file(&weights).unwrap();
    score(&["model.safetensors"]);
    std::fs::write(&weights, &whole).unwrap();

    let config = std::fs::read_to_string(model.join("config.json")).unwrap();
    let change = |key: &str, value: Value, expected: &[&str]| {
        let mut changed: Value = serde_json::from_str(&config).unwrap();
        changed[key] = value;
        std::fs::write(model.join("config.json"), changed.to_string()).unwrap();
        score(expected);
        std::fs::write(model.join("config.json"), &config).unwrap();
    };
    change("model_type", "gpt2".into(), &["config.json", "gpt2"]);
    change("quantization_config", serde_json::json!({"bits": 4}), &["quantization"]);
    change("num_attention_heads", 0.into(), &["num_attention_heads"]);
    change("vocab_size", 100.into(), &["config.json"]);
    std::fs::write(model.join("config.json"), "{").unwrap();
    score(&["config.json"]);
    std::fs::write(model.join("config.json"), &config).unwrap();

    let index = "{\"weight_map\": {\"model.embed_tokens.weight\": \"../../etc/passwd\"}}";
    std::fs::rename(&weights, dir.path().join("aside")).unwrap();
    std::fs::write(model.join("model.safetensors.index.json"), index).unwrap();
    score(&["model.safetensors.index.json", "inside the model directory"]);
    assert!(refused(&["score", "--model", "no/such/dir", "--ids", "1"]).contains("no/such/dir"));
}

#[test]
fn wrong_data_and_options_are_refused_naming_line_and_option() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (tiny(), dir.path().join("out"));
    let file = dir.path().join("bad.jsonl");
    let tune = |lines: &str, more: &[&str], expected: &str| {
        std::fs::write(&file, lines).unwrap();
        let args = ["tune", "--model", text(&model), "--data", text(&file), "--out", text(&out), "--steps", "1"];
        let message = refused(&[&args[..], more].concat());
        assert!(message.contains(expected), "`{expected}` not in: {message}");
        assert!(!out.exists(), "a partial output was left");
    };
    let good = "{\"prompt\": \"what is 2 plus 3 ?\", \"completion\": \"the answer is 5 .\"}\n";
    tune(&format!("{good}not json\n"), &[], "bad.jsonl:2");
    tune(&format!("{good}{good}{{\"question\": \"x\"}}\n"), &[], "bad.jsonl:3");
    tune("", &[], "bad.jsonl");
    tune(good, &["--max-length", "4"], "max-length");
    tune(good, &["--mods", "layers.99.q_proj", "--mods-steps", "1"], "99");
    tune(good, &["--mods", "layers.0.qq_proj", "--mods-steps", "1"], "qq_proj");
    tune(good, &["--mods-steps", "1"], "--mods");
    tune(good, &["--lr=-1"], "lr");
    tune(good, &["--device", "cuda"], "cuda");
    let score = |ids: &str| refused(&["score", "--model", text(&model), "--ids", ids]);
    assert!(score("999999").contains("999999"));
    assert!(score("").contains("ids") || score("").contains("invalid"));
    let probe = |lines: &str| {
        std::fs::write(&file, lines).unwrap();
        refused(&["probe", "--model", text(&model), "--security", text(&file), "--out", text(&out)])
    };
    assert!(probe("{\"prompt\": \"a\", \"label\": \"evil\"}\n").contains("bad.jsonl:1"));
    assert!(probe("{\"prompt\": \"a\", \"label\": \"harmful\"}\n").contains("benign"));
    let config = dir.path().join("run.toml");
    std::fs::write(&config, "modle = 'x'\n").unwrap();
    assert!(refused(&["run", text(&config)]).contains("`model`"));
    std::fs::write(&config, "out = 'x'\nmodel: 'x'\n").unwrap();
    assert!(refused(&["run", text(&config)]).contains("run.toml:2: found"));
    // Of every command, not an unknown option.
    assert!(refused(&["plan", "--model", text(&model), "--seed", "-1"]).contains("invalid value '-1' for '--seed"));
}

/// Templates know roles in lower case alone.
/// Rows of a chat file mean what they mean in training data.
#[test]
fn chats_are_read_as_training_rows() {
    let dir = tempfile::tempdir().unwrap();
    let (model, file) = (tiny(), dir.path().join("chat.jsonl"));
    let generate = ["generate", "--model", text(&model), "--chat", text(&file), "--max-new-tokens", "1", "--json"];
    let write = |row: Value| std::fs::write(&file, row.to_string()).unwrap();
    let tokens = |row: Value| {
        write(row);
        json(&generate)["prompt_tokens"].clone()
    };
    let asked = |role: &str| serde_json::json!({ "messages": [{ "role": role, "content": "which is big ?" }] });
    let expected = tokens(asked("user"));
    for role in ["User", "human"] {
        assert_eq!(tokens(asked(role)), expected, "{role}");
    }
    let question = serde_json::json!({ "role": "user", "content": "which is big ?" });
    let brief = serde_json::json!({ "role": "system", "content": "be brief ." });
    let with = tokens(serde_json::json!({ "messages": [brief, question] }));
    assert!(with.as_u64() > expected.as_u64());
    assert_eq!(tokens(serde_json::json!({ "messages": [brief, question], "system": "be brief ." })), with);
    let refused = |row: Value, more: &[&str]| {
        write(row);
        refused(&[&generate[..], more].concat())
    };
    let unknown = refused(asked("critic"), &[]);
    assert!(unknown.contains("chat.jsonl:1: found `messages[0].role` is \"critic\""), "{unknown}");
    let two = refused(serde_json::json!({ "messages": [brief, question], "system": "no" }), &[]);
    assert!(two.contains("chat.jsonl:1: found two system messages"), "{two}");
    let beside = refused(serde_json::json!({ "messages": [brief, question] }), &["--system", "no"]);
    assert!(beside.contains("chat.jsonl:1: found a system message beside --system"), "{beside}");
}

#[test]
fn a_killed_run_resumes_to_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (model, data) = (tiny(), data(dir.path()));
    let train = data.join("train.jsonl");
    let tune = |out: &Path, resume: bool| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
        command.args(["tune", "--model", text(&model), "--data", text(&train), "--out", text(out), "--quiet"]);
        command.args([
            "--mods",
            "layers.3-5.{o_proj,v_proj}",
            "--mods-steps",
            "20",
            "--steps",
            "30",
            "--save-every",
            "3",
        ]);
        command.args(["--batch-size", "4", "--max-length", "96", "--lr", "1e-3"]);
        if resume {
            command.arg("--resume");
        }
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    };
    let straight = dir.path().join("straight");
    assert!(tune(&straight, false).status().unwrap().success());
    let killed = dir.path().join("killed");
    let mut child = tune(&killed, false).spawn().unwrap();
    let metrics = dir.path().join("killed.unfinished/metrics.jsonl");
    // Killed after some checkpoints, wherever it happens to be.
    while std::fs::read_to_string(&metrics).map_or(0, |t| t.lines().count()) < 10 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!killed.exists());
    assert!(tune(&killed, true).status().unwrap().success());
    let bytes = |dir: &Path| std::fs::read(dir.join("model.safetensors")).unwrap();
    assert!(bytes(&straight) == bytes(&killed));
    let steps = |dir: &Path| -> Vec<(u64, Value)> {
        let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|l| serde_json::from_str::<Value>(l).unwrap());
        lines.map(|l| (l["step"].as_u64().unwrap(), l["loss"].clone())).collect()
    };
    assert_eq!(steps(&straight), steps(&killed));
    assert!(!dir.path().join("killed.unfinished").exists());
}

#[test]
fn profile_prints_tables_and_writes_a_trace() {
    let dir = tempfile::tempdir().unwrap();
    let (model, trace) = (tiny(), dir.path().join("trace.json"));
    let sizes = ["--batch-size", "2", "--length", "16", "--steps", "2", "--device", "cpu"];
    let profile = [&["profile", "--model", text(&model)], &sizes[..]].concat();
    let output = swat(&[&profile[..], &["--trace", text(&trace)]].concat());
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for what in
        ["By operation", "adamw_masked", "By layer", "backward, layer 0", "between the operations", "speed of light"]
    {
        assert!(printed.contains(what), "{what} is not in {printed}");
    }
    let events: Value = serde_json::from_slice(&std::fs::read(&trace).unwrap()).unwrap();
    common::trace::check(events["traceEvents"].as_array().unwrap());
    for work in ["train", "forward", "generate", "sweep"] {
        let found = json(&[&profile[..], &["--work", work, "--mods", "layers.1.{q_proj,o_proj}", "--json"]].concat());
        assert!(
            found["explained"].as_f64().unwrap() > 0.3 && found["speed_of_light"].as_f64().unwrap() > 0.0,
            "{found}"
        );
        assert!(found["rows"].as_array().unwrap().iter().any(|row| row["name"] == "linear"), "{found}");
    }
    assert!(refused(&[&profile[..], &["--range", "2:3"]].concat()).contains("--range"));
}

/// A fake NVTX library that logs its calls to a file.
const NVTX: &str = r#"
#include <stdio.h>
#include <stdlib.h>
static void note(const char* what) {
    FILE* file = fopen(getenv("NVTX_CALLS"), "a");
    fprintf(file, "%s\n", what);
    fclose(file);
}
int nvtxRangePushA(const char* name) { return note(name), 0; }
int nvtxRangePop(void) { return note("pop"), 0; }
"#;

#[test]
#[cfg(target_os = "linux")]
fn phases_and_layers_are_nvtx_ranges() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    std::fs::write(at("nvtx.c"), NVTX).unwrap();
    let library = at("libnvtx3interop.so.1");
    let compiled = Command::new("cc").args(["-shared", "-fPIC", "-o", text(&library), text(&at("nvtx.c"))]).status();
    if !compiled.is_ok_and(|status| status.success()) {
        eprintln!("skipped: there is no C compiler");
        return;
    }
    let model = tiny();
    let args = ["score", "--model", text(&model), "--ids", "5,9,300,7", "--json", "--nvtx", "--device", "cpu"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
    let output = command.args(args).env("LD_LIBRARY_PATH", dir.path()).env("NVTX_CALLS", at("calls")).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let calls = std::fs::read_to_string(at("calls")).unwrap();
    let calls: Vec<&str> = calls.lines().collect();
    assert!(
        calls.starts_with(&["forward", "layer 0", "pop", "layer 1", "pop"]) && calls.ends_with(&["pop"]),
        "{calls:?}"
    );
    assert_eq!(2 * calls.iter().filter(|call| **call == "pop").count(), calls.len(), "{calls:?}");

    let output = Command::new(env!("CARGO_BIN_EXE_swat")).args(args).output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    let named = output.status.code() == Some(2) && message.contains("--nvtx") && message.contains("libnvtx3interop");
    assert!(named || output.status.success(), "a machine without the library is told so: {message}");
}
