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
settings = ["given", "plain-equal", "swat", "warmup:complement", "plain-equal+refusals",
    "plain-equal+replay=.2,merge=path:.5"]

[data]
security = "data/security.jsonl"
train = ["data/train.jsonl"]
task = "data/task.jsonl"
refusals = "data/refusals.jsonl"
strict = "data/strict.jsonl"
overlap = "report"

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
    assert_eq!(settings.len(), 6);
    for setting in settings {
        let total = |what: &str| setting["evaluation"][what]["total"].as_u64();
        assert_eq!((total("asr"), total("over_refusal")), (Some(8), Some(8)), "{setting}");
        assert_eq!(setting["tuned"].is_null(), setting["setting"] == "given");
        // The same in brief.
        assert_eq!((&setting["name"], &setting["recipe"]), (&setting["setting"], &setting["setting"]));
        assert_eq!(setting["seeds"].as_array().unwrap().len(), usize::from(setting["setting"] != "given"));
        for (brief, whole) in [("asr", "asr"), ("over_refusal", "over_refusal"), ("j", "j"), ("auroc", "auroc")] {
            assert_eq!(setting[brief], setting["evaluation"][whole], "{brief}");
        }
        assert_eq!(setting["task"], setting["evaluation"]["task"]["overall"]);
    }
    assert!(dir.path().join("straight/report.html").is_file());
    // Replay is the study's own, of the train split, and a merge is a model of its own.
    let replayed = std::fs::read_to_string(dir.path().join("straight/replay.jsonl")).unwrap();
    assert!(
        replayed.lines().all(|line| line.starts_with("{\"replay\":")) && replayed.lines().count() > 24,
        "{replayed}"
    );
    let merged: Vec<f32> = values(&dir.path().join("straight/tuned"), "plain-equal_replay_.2_merge");
    let tuned: Vec<f32> = values(&dir.path().join("straight/tuned"), "plain-equal_replay_.2-");
    let given = tensor(&Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny"));
    for ((merged, tuned), given) in merged.iter().zip(&tuned).zip(&given) {
        let half = given + 0.5 * (tuned - given);
        // Stored in bf16: half a unit of the last of 8 bits.
        assert!((merged - half).abs() <= half.abs() / 256.0 + 1e-6, "{merged} is not {half}");
    }
    // A verdict, and the setting that it is about if there is one.
    let verdict = &expected["verdict"];
    assert!(verdict["held"].is_boolean() && verdict["gates"].is_array() && expected["reason"].is_string(), "{verdict}");
    let named = |setting: &Value| setting["name"] == expected["recommended"];
    assert!(expected["recommended"].is_null() || expected["settings"].as_array().unwrap().iter().any(named));
    assert!(expected["overlapping_rows"].is_u64());

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
    assert_eq!(straight.len(), 6);
    let names = |all: &[(String, Vec<u8>)]| all.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    assert_eq!(names(&straight), names(&killed));
    assert!(straight == killed, "the same weights");
}

/// Values of a tensor of a tuned model, by the beginning of its directory's name.
fn values(tuned: &Path, name: &str) -> Vec<f32> {
    let dirs = std::fs::read_dir(tuned).unwrap().flatten().map(|entry| entry.path());
    let mut dirs = dirs.filter(|path| path.is_dir() && path.file_name().unwrap().to_str().unwrap().starts_with(name));
    tensor(&dirs.next().unwrap_or_else(|| panic!("no {name}")))
}

/// Values of the embedding of a model directory.
fn tensor(dir: &Path) -> Vec<f32> {
    let bytes = std::fs::read(dir.join("model.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = file.tensor("model.embed_tokens.weight").unwrap();
    match tensor.dtype() {
        safetensors::Dtype::F32 => {
            tensor.data().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
        }
        _ => {
            let halves = tensor.data().chunks_exact(2);
            halves.map(|b| half::bf16::from_le_bytes(b.try_into().unwrap()).to_f32()).collect()
        }
    }
}

#[test]
fn prompts_of_the_evaluation_in_the_tuning_data_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let config = study(dir.path(), "out");
    let security = std::fs::read_to_string(dir.path().join("data/security.jsonl")).unwrap();
    let rows = security.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let asked = rows.into_iter().find(|row| row["split"] == "test" && row["label"] == "benign").unwrap();
    let prompt = asked["prompt"].as_str().unwrap().to_uppercase();
    let train = dir.path().join("data/seen.jsonl");
    let row = |prompt: &str| serde_json::json!({ "prompt": prompt, "completion": "yes ." }).to_string();
    std::fs::write(&train, [row("tell me a story"), row(&prompt)].join("\n")).unwrap();
    let set = |overlap: &str| {
        let mut command = run(&config);
        command.args(["--set", "data.train=[\"data/seen.jsonl\"]", "--set", "evaluate.benign=0"]);
        command.args(["--set", "settings=[\"given\", \"plain\"]", "--set", &format!("data.overlap={overlap}")]);
        command.output().unwrap()
    };
    let refused = set("refuse");
    let message = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{message}");
    assert!(
        message.contains("rows 2 of") && message.contains("seen.jsonl") && message.contains("the same words"),
        "{message}"
    );
    assert!(!message.to_uppercase().contains(&prompt) && !dir.path().join("out/stages/probe.json").exists());
    // A warm-up is held against the steps of every setting before anything is computed: 40 rows in batches of 4 are 10 steps,
    // 50 with a fifth of answers 13.
    let other = dir.path().join("warm-up.toml");
    let text = std::fs::read_to_string(&config).unwrap().replace("steps = 8", "epochs = 1\nlr_warmup_steps = 10");
    std::fs::write(&other, text).unwrap();
    let refused = run(&other).args(["--set", "settings=[\"plain+replay=.2\", \"plain\"]"]).output().unwrap();
    let message = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{message}");
    assert!(
        message.contains("recipe `plain`: lr_warmup_steps: found 10 steps of warm-up in a phase of 10"),
        "{message}"
    );
    #[cfg(unix)]
    {
        let mut piped = run(&config);
        piped.args(["--set", "data.train=[\"/dev/stdin\"]"]).stdin(Stdio::piped());
        let refused = piped.output().unwrap();
        let message = String::from_utf8_lossy(&refused.stderr);
        assert_eq!(refused.status.code(), Some(2), "{message}");
        assert!(message.contains("data.train: found /dev/stdin, a pipe, which can be read only once"), "{message}");
    }
    assert!(!dir.path().join("out/stages/probe.json").exists());
    let reported: Value = serde_json::from_slice(&set("report").stdout).unwrap();
    assert_eq!(reported["overlapping_rows"], 1);
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

    // In brief: means, and sums of counts.
    let asr = |run: &Value| run["evaluation"]["asr"]["value"].as_f64().unwrap();
    let mean = (asr(setting) + asr(&setting["more_seeds"][0])) / 2.0;
    assert_eq!((&setting["seeds"], &setting["asr"]["total"]), (&serde_json::json!([0, 1]), &16.into()));
    assert!((setting["asr"]["value"].as_f64().unwrap() - mean).abs() < 1e-12);
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
    for outcome in [&mut one, &mut two] {
        let setting = outcome["settings"][1].as_object_mut().unwrap();
        let rates = ["asr", "over_refusal", "j", "auroc", "task", "asr_coherent"];
        let kinds = ["harmful_answers", "benign_answers", "task_answers"];
        for of_all_seeds in ["more_seeds", "seeds"].into_iter().chain(rates).chain(kinds) {
            setting.remove(of_all_seeds);
        }
    }
    assert_same(&two, &one, "outcome");
}

#[test]
fn settings_may_have_maps_of_their_own() {
    let dir = tempfile::tempdir().unwrap();
    let config = study(dir.path(), "maps");
    let settings = "settings=[\"given\", \"swat\", \"swat+by=conflict\", \"plain+replay=.2,lisa=1:2,prox=.1\", \
                    \"rates+by=conflict\"]";
    let wide = ["search.tau=9.0", "search.floor=0.0", "perturb.members=1", "evaluate.tasks=2"];
    let found = outcome_with(&config, &[&[settings][..], &wide].concat());
    assert_eq!(found["map"]["kind"], "gaussian");
    assert!(found["map"]["by"].is_null(), "a noise map is as it was");
    let [more] = found["more_maps"].as_array().unwrap().as_slice() else { panic!("{found}") };
    assert_eq!((&more["map"]["by"], &more["search"]["by"]), (&"conflict".into(), &"conflict".into()));
    // The step of the first phase: rate times steps.
    let step = &more["map"]["step"]["options"];
    assert_eq!((&step["lr"], &step["steps"], &step["batch_size"]), (&1e-3.into(), &6.into(), &4.into()));
    let [_, noise, conflict, turns, rates] = found["settings"].as_array().unwrap().as_slice() else {
        panic!("{found}")
    };
    assert_eq!((&noise["mods"], &conflict["mods"]), (&found["mods"], &more["mods"]));
    assert_eq!(conflict["joint"], more["search"]["joint"]);
    assert_eq!((&conflict["recipe"], &turns["tuned"]["steps_per_epoch"]), (&"swat+by=conflict".into(), &15.into()));
    // Rates by the map take the place of a set; what the map does not have keeps its rate.
    let out = dir.path().join("maps");
    let tuned = Path::new(rates["tuned"]["dir"].as_str().unwrap());
    let tuned: Value =
        serde_json::from_slice(&std::fs::read(out.join("..").join(tuned).join("tune.json")).unwrap()).unwrap();
    let table = tuned["job"]["module_lr"].as_str().unwrap_or_else(|| panic!("no rates: {tuned}"));
    assert!(
        rates["mods"].is_null() && table.ends_with("=2") && table.split(',').next().unwrap().ends_with("=0"),
        "{table}"
    );
    for name in ["map.json", "map-conflict.json", "mods-conflict.json", "stages/robustness-conflict.json"] {
        assert!(out.join(name).is_file(), "{name}");
    }
    let page = std::fs::read_to_string(out.join("report.html")).unwrap();
    assert!(
        page.contains("from gradients") && page.contains("by conflict") && page.contains("rates by the map"),
        "a page that does not say how the map was made"
    );
}
