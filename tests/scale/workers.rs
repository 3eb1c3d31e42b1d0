//! A study that several processes share, some of which are killed.

use super::{data, refused, succeeds, swat, text, tiny};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};
use swat::data::tiny::Counts;

const CONFIG: &str = r#"
model = "MODEL"
out = "OUT"
settings = SETTINGS

[data]
security = "data/security.jsonl"
train = ["data/train.jsonl"]
task = "data/task.jsonl"
overlap = "report"

[perturb]
members = 1
retrain = false

[search]
swap = false

[tune]
seeds = SEEDS

[tune.shared]
batch_size = 4
max_length = 96
save_every = 2

[tune.mods_phase]
lr = 1e-3
steps = 4

[tune.all_phase]
lr = 1e-3
steps = 6

[evaluate]
harmful = 4
benign = 4
tasks = 4
answer_tokens = 8
task_tokens = 8
"#;

/// A configuration whose results go to `out`.
pub fn study(dir: &Path, out: &str, settings: &str, seeds: &str) -> PathBuf {
    let config = CONFIG.replace("MODEL", text(&tiny())).replace("OUT", out);
    let path = dir.join(format!("{out}.toml"));
    fs::write(&path, config.replace("SETTINGS", settings).replace("SEEDS", seeds)).unwrap();
    path
}

pub fn options(config: &Path) -> [&str; 5] {
    ["run", "--json", "--quiet", "--device=cpu", text(config)]
}

fn worker(config: &Path) -> Child {
    let args = [&options(config)[..], &["--worker", "--takeover-after", "2"]].concat();
    // The workers of the test share its cores.
    let mut command = swat(&args);
    command.env("RAYON_NUM_THREADS", "1").stdout(Stdio::null()).spawn().unwrap()
}

/// Removes what differs from run to run.
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

/// Where two values differ: the path of each part, and both values.
fn differences(a: &Value, b: &Value, at: &str) -> Vec<String> {
    match (a, b) {
        (Value::Object(a), Value::Object(b)) if a.keys().eq(b.keys()) => {
            a.iter().flat_map(|(key, value)| differences(value, &b[key], &format!("{at}.{key}"))).collect()
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            let pairs = a.iter().zip(b).enumerate();
            pairs.flat_map(|(i, (a, b))| differences(a, b, &format!("{at}[{i}]"))).collect()
        }
        _ if a == b => Vec::new(),
        _ => vec![format!("{at}: {a} and {b}")],
    }
}

pub fn outcome(dir: &Path, out: &str) -> Value {
    let text = fs::read_to_string(dir.join(out).join("outcome.json")).unwrap();
    let mut value = serde_json::from_str(&text).unwrap();
    remove_varying(&mut value);
    value
}

/// Weights of all tuned models, by the name of their directory.
pub fn weights(dir: &Path, out: &str) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(dir.join(out).join("tuned")).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<(String, Vec<u8>)> = entries
        .filter(|path| path.is_dir())
        .map(|path| {
            let bytes = fs::read(path.join("model.safetensors")).expect("nothing unfinished is left");
            (path.file_name().unwrap().to_str().unwrap().to_owned(), bytes)
        })
        .collect();
    all.sort();
    all
}

/// Files below a directory whose names contain `part`; none where there is no such directory.
fn files(dir: &Path, part: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path, part));
        } else if path.to_str().unwrap().contains(part) {
            found.push(path);
        }
    }
    found
}

/// A study by one process and by `workers`, of which one is killed and replaced at each of the `kills`, so many finished
/// stages and so many milliseconds later: the same results.
fn shared_study(settings: &str, seeds: &str, workers: usize, kills: &[(usize, u64)]) {
    let dir = tempfile::tempdir().unwrap();
    data(dir.path(), Counts { pairs: 16, train: 24, tasks: 8 });
    let alone = study(dir.path(), "alone", settings, seeds);
    succeeds(swat(&options(&alone)));

    let config = study(dir.path(), "shared", settings, seeds);
    let mut children: Vec<Child> = (0..workers).map(|_| worker(&config)).collect();
    let mut killed = 0;
    let stages = dir.path().join("shared/stages");
    for (i, (finished, pause)) in kills.iter().enumerate() {
        // By the study's own progress, so that a fast machine is no different.
        while files(&stages, ".json").len() < *finished
            && children.iter_mut().any(|child| child.try_wait().unwrap().is_none())
        {
            std::thread::sleep(Duration::from_millis(2));
        }
        std::thread::sleep(Duration::from_millis(*pause));
        let victim = &mut children[i % 2];
        if victim.try_wait().unwrap().is_none() {
            victim.kill().unwrap();
            victim.wait().unwrap();
            killed += 1;
            children[i % 2] = worker(&config);
        }
    }
    assert!(killed >= kills.len().div_ceil(2), "{killed} of {} kills hit a worker", kills.len());
    for child in &mut children {
        let status = child.wait().unwrap();
        assert!(status.success(), "{status}");
    }
    let differences = differences(&outcome(dir.path(), "alone"), &outcome(dir.path(), "shared"), "");
    assert!(differences.is_empty(), "the outcomes differ: {differences:#?}");
    assert!(weights(dir.path(), "alone") == weights(dir.path(), "shared"), "the weights differ");
    assert!(dir.path().join("shared/report.html").is_file());
    assert_eq!(files(&dir.path().join("shared"), ".lease"), [""; 0].map(PathBuf::from), "no lease is left");
    assert!(!dir.path().join("shared/map.json.partial.jsonl").exists());
}

#[test]
fn workers_that_are_killed_change_nothing() {
    shared_study("['given', 'plain', 'swat', 'reversed']", "[0, 1]", 3, &[(0, 300), (4, 150), (8, 60)]);
}

/// The same at the size of a real sweep, of about 50 stages.
#[test]
fn a_study_of_24_runs_survives_20_kills() {
    let kills: Vec<(usize, u64)> = (0..20).map(|i| (2 * i, i as u64 * 137 % 150)).collect();
    let settings = "['plain', 'plain-equal', 'swat', 'reversed', 'mods-only', 'warmup:complement']";
    shared_study(settings, "[0, 1, 2, 3]", 4, &kills);
}

#[test]
fn jobs_are_listed_and_done_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    data(dir.path(), Counts { pairs: 16, train: 24, tasks: 8 });
    let config = study(dir.path(), "it's", "['given', 'plain']", "[0, 1]");
    let list = [&options(&config)[..], &["--list-jobs"]].concat();
    let listed: Vec<String> = serde_json::from_slice(&succeeds(swat(&list)).stdout).unwrap();
    let jobs = ["--worker --job given", "--worker --job plain", "--worker --job plain-seed1", "--worker"];
    assert_eq!(listed.len(), 4);
    assert!(listed.iter().zip(jobs).all(|(line, job)| line.ends_with(job) && !line.contains("--json")), "{listed:?}");
    let began = Instant::now();
    // As a shell runs them, two at a time.
    let mut children: Vec<Child> = Vec::new();
    for line in &listed {
        if children.len() == 2 {
            assert!(children.remove(0).wait().unwrap().success());
        }
        let shell = std::process::Command::new("sh").args(["-c", line]).stdout(Stdio::null()).spawn();
        children.push(shell.unwrap());
    }
    assert!(children.into_iter().all(|mut child| child.wait().unwrap().success()));
    // Nobody died, so nobody waited for a lease to run out.
    assert!(began.elapsed() < Duration::from_secs(59));
    let found = outcome(dir.path(), "it's");
    assert_eq!(found["settings"][1]["more_seeds"].as_array().unwrap().len(), 1);

    let message = refused(swat(&[&options(&config)[..], &["--worker", "--job", "plain-seed2"]].concat()));
    assert!(message.contains("`plain-seed2`; expected one of given, plain, plain-seed1"), "{message}");
    for args in [&["--job", "plain"][..], &["--takeover-after", "9"], &["--list-jobs", "--worker"]] {
        refused(swat(&[&options(&config)[..], args].concat()));
    }
    assert!(refused(swat(&[&options(&config)[..], &["--worker", "--takeover-after", "0"]].concat())).contains("86400"));
}

#[test]
#[cfg(target_os = "linux")]
fn a_study_alone_and_workers_exclude_each_other() {
    let dir = tempfile::tempdir().unwrap();
    data(dir.path(), Counts { pairs: 16, train: 24, tasks: 8 });
    let config = study(dir.path(), "out", "['plain']", "[0]");
    fs::create_dir(dir.path().join("out")).unwrap();
    let lock = fs::File::create_new(dir.path().join("out/.lock")).unwrap();
    lock.lock().unwrap();
    let shared = [&options(&config)[..], &["--worker"]].concat();
    assert!(refused(swat(&shared)).contains("another swat process"));
    lock.unlock().unwrap();
    lock.lock_shared().unwrap();
    assert!(refused(swat(&options(&config))).contains("another swat process"));
}
