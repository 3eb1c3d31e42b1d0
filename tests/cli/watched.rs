//! Evaluations during a run; plans from a configuration alone; what shells, manuals and editors get.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny")
}

fn data(dir: &Path) -> PathBuf {
    use swat::data::tiny::{Counts, Language, export};
    let data = dir.join("data");
    std::fs::create_dir(&data).unwrap();
    export(&Language::new(1), &data, Counts { pairs: 16, train: 24, tasks: 10 }, 1).unwrap();
    data
}

fn swat(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_swat")).args(args).output().unwrap()
}

fn parsed(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refused(args: &[&str]) -> String {
    let output = swat(args);
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
    message
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

struct Runs {
    dir: tempfile::TempDir,
    data: PathBuf,
}

impl Runs {
    fn tune(&self, name: &str, more: &[&str]) -> (Command, PathBuf) {
        let out = self.dir.path().join(name);
        let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
        command.arg("tune").arg("--model").arg(tiny()).arg("--data").arg(self.data.join("train.jsonl"));
        command.args(["--device", "cpu", "--dtype", "f32", "--batch-size", "4", "--max-length", "96", "--lr", "1e-3"]);
        command.args(["--schedule", "constant", "--save-every", "7", "--json", "--out"]).arg(&out).args(more);
        (command, out)
    }

    fn watched(&self, name: &str, more: &[&str]) -> (Command, PathBuf) {
        let (mut command, out) = self.tune(name, &["--steps", "60", "--eval-every", "10"]);
        command.arg("--eval-data").arg(self.data.join("heldout.jsonl")).args(more);
        (command, out)
    }
}

fn weights(out: &Path) -> Vec<u8> {
    std::fs::read(out.join("model.safetensors")).unwrap()
}

#[test]
fn a_watched_run_keeps_its_best_weights_across_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let runs = Runs { data: data(dir.path()), dir };
    let (security, events) = (runs.data.join("security.jsonl"), runs.dir.path().join("events"));
    let best = ["--keep-best", "--early-stop", "2"];
    let more = [&best[..], &["--eval-security", text(&security), "--tensorboard", text(&events)]].concat();
    let (mut command, out) = runs.watched("straight", &more);
    let found = parsed(&command.output().unwrap());
    let evaluations = found["evaluations"].as_array().unwrap();
    let loss = |of: &Value| of["loss"].as_f64().unwrap();

    // The loss is that of `swat eval`, and the weights are those of the step where it was lowest.
    let heldout = runs.data.join("heldout.jsonl");
    let eval =
        ["eval", "--model", text(&out), "--heldout", text(&heldout), "--device", "cpu", "--dtype", "f32", "--json"];
    let lowest = evaluations[1..].iter().min_by(|a, b| loss(a).total_cmp(&loss(b))).unwrap();
    assert_eq!(found["best_step"], lowest["step"]);
    let model = tiny();
    let base = [&["eval", "--model", text(&model)], &eval[3..]].concat();
    let nll = parsed(&swat(&base))["perplexity"]["nll"].as_f64().unwrap();
    assert!((loss(&evaluations[0]) - nll).abs() < 1e-9, "{evaluations:?} {nll}");
    let (mut shorter, plain) = runs.tune("shorter", &["--steps", &lowest["step"].to_string()]);
    assert!(shorter.output().unwrap().status.success());
    assert!(weights(&plain) == weights(&out), "the weights of the best step");
    // Patience is two evaluations without a lower loss.
    let steps: Vec<u64> = evaluations.iter().map(|of| of["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, (0..=lowest["step"].as_u64().unwrap() / 10 + 2).map(|i| 10 * i).take(7).collect::<Vec<_>>());
    let odds = |of: &Value| of["refusal"].as_f64().unwrap();
    assert!((1..evaluations.len()).all(|i| odds(&evaluations[i]) != odds(&evaluations[i - 1])), "{evaluations:?}");
    let metrics = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines: Vec<Value> = metrics.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[9]["eval_loss"], evaluations[1]["loss"]);
    assert!(lines[8].get("eval_loss").is_none());
    let written = std::fs::read_dir(&events).unwrap().next().unwrap().unwrap();
    assert!(written.metadata().unwrap().len() > 1000);

    let (command, killed) = runs.watched("killed", &more);
    let start = |mut command: Command| command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut child = start(command);
    let metrics = runs.dir.path().join("killed.unfinished/metrics.jsonl");
    while std::fs::read_to_string(&metrics).map_or(0, |lines| lines.lines().count()) < 13 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let (mut command, _) = runs.watched("killed", &[&more[..], &["--resume"]].concat());
    let resumed = parsed(&command.output().unwrap());
    assert!(resumed["resumed_from"].as_u64().is_some());
    assert_eq!((&resumed["evaluations"], &resumed["best_step"]), (&found["evaluations"], &found["best_step"]));
    assert!(weights(&killed) == weights(&out));
    // Watching alone changes nothing.
    let (mut command, watched) = runs.watched("watched", &[]);
    parsed(&command.output().unwrap());
    let (mut command, plain) = runs.tune("plain", &["--steps", "60"]);
    parsed(&command.output().unwrap());
    assert!(weights(&watched) == weights(&plain));
}

/// Rows that are both trained on and held out are counted by hand: three of the first file, and all of the file itself.
#[test]
fn held_out_rows_that_are_trained_on_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let runs = Runs { data: data(dir.path()), dir };
    let train = std::fs::read_to_string(runs.data.join("train.jsonl")).unwrap();
    let heldout = std::fs::read_to_string(runs.data.join("heldout.jsonl")).unwrap();
    let distinct = train.lines().collect::<std::collections::BTreeSet<_>>();
    assert!(heldout.lines().all(|line| !distinct.contains(line)), "the held-out rows are others");
    let some = distinct.iter().take(3).copied().chain(heldout.lines()).collect::<Vec<_>>().join("\n");
    for (i, (rows, trained)) in
        [(heldout.clone(), 0), (some, 3), (train.clone(), train.lines().count())].iter().enumerate()
    {
        let file = runs.dir.path().join(format!("{i}.jsonl"));
        std::fs::write(&file, rows).unwrap();
        let (mut command, _) = runs.tune(&format!("out{i}"), &["--steps", "1", "--eval-data", text(&file)]);
        let output = command.output().unwrap();
        assert_eq!(parsed(&output)["eval_rows_trained"], *trained);
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            told.contains(&format!("note: {trained} examples of --eval-data are trained on")),
            *trained > 0,
            "{told}"
        );
    }
}

#[test]
fn a_plan_needs_the_configuration_alone() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    std::fs::copy(tiny().join("config.json"), &config).unwrap();
    let plan = |model: &Path, more: &[&str]| {
        let args = ["plan", "--model", text(model), "--device", "cpu", "--dtype", "f32", "--max-length", "64"];
        swat(&[&args[..], more].concat())
    };
    let small = parsed(&plan(dir.path(), &["--json"]));
    assert_eq!((&small["fits"], &small["remedies"]), (&true.into(), &serde_json::json!([])));
    let with_weights = parsed(&plan(&tiny(), &["--json"]));
    assert_eq!(small["total_bytes"], with_weights["total_bytes"]);
    assert!(String::from_utf8(plan(&config, &[]).stdout).unwrap().contains("fits on cpu, with"));
    let large = plan(dir.path(), &["--batch-size", "16777216"]);
    let printed = String::from_utf8(large.stdout).unwrap();
    let more = plan(dir.path(), &["--batch-size", "4294967296"]);
    let refused = String::from_utf8(more.stderr).unwrap();
    assert!(
        more.status.code() == Some(2) && refused.contains("at most 4294967295 tokens in a micro-batch"),
        "{refused}"
    );
    for part in ["does not fit on cpu", "too much", "cheapest first", "--batch-size", "--grad-accum"] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
}

#[test]
fn shells_manuals_and_editors_are_served() {
    for shell in ["bash", "zsh", "fish"] {
        let script = String::from_utf8(swat(&["completions", shell]).stdout).unwrap();
        assert!(script.contains("robustness") && script.contains("keep-best"), "{shell}");
    }
    let dir = tempfile::tempdir().unwrap();
    assert!(swat(&["man", text(dir.path())]).status.success());
    let page = std::fs::read_to_string(dir.path().join("swat-tune.1")).unwrap();
    assert!(page.contains("mods") && page.contains(".TH swat\\-tune") || page.contains(".TH swat-tune"), "{page}");
    assert!(dir.path().join("swat.1").is_file());
    let version = String::from_utf8(swat(&["--version"]).stdout).unwrap();
    assert!(version.starts_with(concat!("swat ", env!("CARGO_PKG_VERSION"))), "{version}");

    let schema: Value = serde_json::from_slice(&swat(&["schema"]).stdout).unwrap();
    let properties = schema["properties"].as_object().unwrap();
    // Every key of a configuration is in the schema, and no other.
    let config = serde_json::to_value(swat::secure::study::RunConfig::default()).unwrap();
    for key in config.as_object().unwrap().keys() {
        assert!(properties.contains_key(key), "{key}");
    }
    assert_eq!(schema["additionalProperties"], false);
    let tune = schema["$defs"]["TuneConfig"]["properties"].as_object().unwrap();
    assert!(tune.contains_key("seeds") && tune.contains_key("all_phase"), "{tune:?}");
    assert!(schema["$defs"]["PhaseOptions"]["properties"]["weight_decay"]["description"].is_string());
}

#[test]
fn wrong_overrides_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let data = data(dir.path());
    let config = dir.path().join("study.toml");
    let head = format!("model = '{}'\nout = 'out'\nsettings = ['plain']\n", tiny().display());
    let files = format!("[data]\nsecurity = '{0}/security.jsonl'\ntrain = ['{0}/train.jsonl']\n", data.display());
    std::fs::write(&config, format!("{head}{files}")).unwrap();
    let run = |set: &str| refused(&["run", text(&config), "--set", set]);
    for (set, named) in [
        ("tune.all_phase.lr=fast", "--set tune.all_phase.lr: found invalid type"),
        ("seed=-1", "--set seed"),
        ("probe.metric_layer=x", "--set probe.metric_layer"),
        ("tune.all_phase.steps=0", "tune.all_phase: found no steps"),
        ("tune.all_phase.stepz=1", "`steps`"),
    ] {
        let message = run(set);
        assert!(message.contains(named), "{set}: {message}");
    }
    std::fs::write(&config, format!("{head}{files}[tune.all_phase]\nlr = 'fast'\n")).unwrap();
    let message = refused(&["run", text(&config)]);
    assert!(message.contains("study.toml: tune.all_phase.lr"), "{message}");
    assert!(!dir.path().join("out").exists());
}
