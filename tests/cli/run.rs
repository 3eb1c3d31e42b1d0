//! `swat run`: a whole study of the tiny model, one that is killed again and again, and one with several training
//! seeds.

use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use swat::data::tiny::{Counts, Language, export};

const CONFIG: &str = r#"
model = "MODEL"
out = "OUT"
settings = ["given", "plain-equal", "swat", "warmup:complement", "plain-equal+refusals"]

[data]
security = "data/security.jsonl"
train = ["data/train.jsonl"]
task = "data/task.jsonl"
refusals = "data/refusals.jsonl"
strict = "data/strict.jsonl"

[perturb]
members = 2
retrain = false

[search]
swap = false

[tune.shared]
batch_size = 4
max_length = 96
save_every = 2

[tune.mods_phase]
lr = 1e-3
steps = 6

[tune.all_phase]
lr = 1e-3
steps = 8

[evaluate]
harmful = 8
benign = 8
tasks = 6
answer_tokens = 12
task_tokens = 12
"#;

/// Data and a configuration whose results go to `out`.
fn study(dir: &Path, out: &str) -> PathBuf {
    let data = dir.join("data");
    if !data.exists() {
        std::fs::create_dir(&data).unwrap();
        export(&Language::new(1), &data, Counts { pairs: 24, train: 40, tasks: 10 }, 1).unwrap();
    }
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny");
    let config = dir.join(format!("{out}.toml"));
    std::fs::write(&config, CONFIG.replace("MODEL", model.to_str().unwrap()).replace("OUT", out)).unwrap();
    config
}

fn run(config: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
    command.args(["run", "--json", "--device", "cpu", "--quiet"]).arg(config);
    command
}

fn outcome(config: &Path) -> Value {
    outcome_with(config, &[])
}

/// The outcome with keys of the configuration overridden.
fn outcome_with(config: &Path, overrides: &[&str]) -> Value {
    let overrides = overrides.iter().flat_map(|set| ["--set", set]);
    let output = run(config).args(overrides).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("one JSON object on stdout and nothing else")
}

/// Removes what differs from run to run: times, memory, and the directory.
fn remove_varying(value: &mut Value) {
    match value {
        Value::Object(map) => {
            for key in ["seconds", "peak_bytes", "planned_bytes", "dir"] {
                map.remove(key);
            }
            map.values_mut().for_each(remove_varying);
        }
        Value::Array(values) => values.iter_mut().for_each(remove_varying),
        _ => {}
    }
}

/// Panics naming the first difference; a whole outcome would be too long to read.
fn assert_same(found: &Value, expected: &Value, place: &str) {
    match (found, expected) {
        (Value::Object(f), Value::Object(e)) if f.keys().eq(e.keys()) => {
            f.iter().for_each(|(key, value)| assert_same(value, &e[key], &format!("{place}.{key}")));
        }
        (Value::Array(f), Value::Array(e)) if f.len() == e.len() => {
            f.iter().zip(e).enumerate().for_each(|(i, (f, e))| assert_same(f, e, &format!("{place}[{i}]")));
        }
        _ => assert!(found == expected, "{place}"),
    }
}

/// Weights of all tuned models, by directory name.
fn weights(out: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(out.join("tuned")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            let bytes = std::fs::read(path.join("model.safetensors")).expect("nothing unfinished is left");
            all.push((path.file_name().unwrap().to_str().unwrap().to_owned(), bytes));
        }
    }
    all.sort();
    all
}

fn lines(path: &Path) -> usize {
    std::fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// Lines of the longest log among the settings that are being tuned.
fn steps(out: &Path) -> usize {
    let unfinished = std::fs::read_dir(out.join("tuned")).into_iter().flatten().flatten().map(|e| e.path());
    let unfinished = unfinished.filter(|p| p.extension().is_some_and(|e| e == "unfinished"));
    unfinished.map(|p| lines(&p.join("metrics.jsonl"))).max().unwrap_or(0)
}

#[test]
fn a_killed_study_resumes_to_the_same_results() {
    let dir = tempfile::tempdir().unwrap();
    let straight = study(dir.path(), "straight");
    let mut expected = outcome(&straight);
    let settings = expected["settings"].as_array().unwrap();
    assert_eq!(settings.len(), 5);
    for setting in settings {
        let total = |what: &str| setting["evaluation"][what]["total"].as_u64();
        assert_eq!((total("asr"), total("over_refusal")), (Some(8), Some(8)), "{setting}");
        assert_eq!(setting["tuned"].is_null(), setting["setting"] == "given");
    }
    assert!(dir.path().join("straight/report.html").is_file());

    let out = dir.path().join("killed");
    let killed = study(dir.path(), "killed");
    type Reached<'a> = (&'a str, Box<dyn Fn() -> bool + 'a>);
    let moments: [Reached<'_>; 4] = [
        ("the probe", Box::new(|| out.join("stages/probe.json").exists())),
        ("half of the map", Box::new(|| lines(&out.join("map.json.partial.jsonl")) > 1)),
        ("a tuning run", Box::new(|| steps(&out) > 4)),
        ("an evaluation", Box::new(|| out.join("stages/evaluate/swat.json").exists())),
    ];
    for (moment, reached) in moments {
        let mut child = run(&killed).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while !reached() {
            assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed at {moment}");
            std::thread::sleep(Duration::from_millis(2));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let mut found = outcome(&killed);
    remove_varying(&mut expected);
    remove_varying(&mut found);
    assert_same(&found, &expected, "outcome");
    let [straight, killed] = ["straight", "killed"].map(|out| weights(&dir.path().join(out)));
    assert_eq!(straight.len(), 4);
    let names = |all: &[(String, Vec<u8>)]| all.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&straight), names(&killed));
    assert!(straight == killed, "the same weights");
}

#[test]
fn a_study_is_extended_by_more_training_seeds() {
    let dir = tempfile::tempdir().unwrap();
    let config = study(dir.path(), "out");
    let out = dir.path().join("out");
    // Nothing that needs a map.
    let short = ["settings=['given', 'plain+refusals']", "data.heldout=data/heldout.jsonl", "tune.all_phase.steps=4"];
    let seeds = |seeds: &'static str| outcome_with(&config, &[short.as_slice(), &[seeds]].concat());
    let mut one = outcome_with(&config, &short);
    let stage = |name: &str| out.join("stages").join(name);
    let kept = std::fs::read(stage("tune/plain_refusals.json")).unwrap();

    let mut two = seeds("tune.seeds=[0, 1]");
    assert_eq!(
        std::fs::read(stage("tune/plain_refusals.json")).unwrap(),
        kept,
        "the first seed's run is not made again"
    );
    let setting = &two["settings"][1];
    assert_eq!((&setting["tuned"]["seed"], &setting["more_seeds"][0]["tuned"]["seed"]), (&0.into(), &1.into()));
    assert_eq!((setting["more_seeds"].as_array().unwrap().len(), two["settings"][0].get("more_seeds")), (1, None));
    let tuned = weights(&out);
    let names: Vec<&str> = tuned.iter().map(|(name, _)| name.rsplit_once('-').unwrap().0).collect();
    assert_eq!(names, ["plain_refusals", "plain_refusals-seed1"]);
    assert!(tuned[0].1 != tuned[1].1, "other weights");

    // The table's value is the mean of the runs'.
    let perplexity = |run: &Value| run["evaluation"]["perplexity"]["perplexity"].as_f64().unwrap();
    let (a, b) = (perplexity(setting), perplexity(&setting["more_seeds"][0]));
    let row = format!("| {:.2} ({:.2}–{:.2}) |", (a + b) / 2.0, a.min(b), a.max(b));
    let results = std::fs::read_to_string(out.join("results.md")).unwrap();
    let found = results.lines().find(|line| line.starts_with("| plain + 10 % refusals |")).unwrap();
    assert!(found.contains(&row) && found.ends_with("| 0, 1 |"), "{row} in {found}");

    // A run that is made again comes out the same.
    std::fs::remove_file(stage("tune/plain_refusals-seed1.json")).unwrap();
    std::fs::remove_file(stage("evaluate/plain_refusals-seed1.json")).unwrap();
    let mut again = seeds("tune.seeds=[0, 1]");
    assert!(weights(&out) == tuned, "the same weights");
    [&mut one, &mut two, &mut again].into_iter().for_each(remove_varying);
    assert_same(&again, &two, "outcome");
    // Without the second seed, what there was before.
    two["settings"][1].as_object_mut().unwrap().remove("more_seeds");
    assert_same(&two, &one, "outcome");
}
