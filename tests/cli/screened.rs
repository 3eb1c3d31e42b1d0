//! Screening of training data by the model's own refusals: in `swat tune`, in studies, and when a run is killed.

use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use swat::data::tiny::{Counts, Language, export};
use swat::secure::RefusalList;

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny")
}

fn swat(dir: &Path, command: &str, more: &[&str]) -> Command {
    let mut swat = Command::new(env!("CARGO_BIN_EXE_swat"));
    swat.current_dir(dir).arg(command).args(more).args(["--device", "cpu", "--dtype", "f32"]);
    swat
}

fn message(output: &Output, code: i32) -> String {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert!(!message.contains("panicked"), "{message}");
    message
}

fn rows(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn write(path: &Path, rows: &[Value]) {
    std::fs::write(path, rows.iter().map(|row| format!("{row}\n")).collect::<String>()).unwrap();
}

/// Which rows answer what the tiny model refuses, by `swat generate`: every answer that is trained is asked for, with what
/// stands before it.
pub fn judged(dir: &Path, rows: &[Value]) -> Vec<bool> {
    let (mut asked, mut given) = (Vec::new(), Vec::new());
    for (row, fields) in rows.iter().enumerate() {
        let turns = match &fields["messages"] {
            Value::Array(turns) => turns.clone(),
            _ => vec![
                json!({ "role": "user", "content": fields["prompt"] }),
                json!({ "role": "assistant", "content": fields["completion"] }),
            ],
        };
        for (at, turn) in
            turns.iter().enumerate().filter(|(_, turn)| turn["role"] == "assistant" && turn["weight"] != 0)
        {
            asked.push(json!({ "messages": &turns[..at] }));
            given.push((row, turn["content"].as_str().unwrap().to_owned()));
        }
    }
    let chat = dir.join("asked.jsonl");
    write(&chat, &asked);
    let model = tiny();
    let args = ["--model", model.to_str().unwrap(), "--chat", "asked.jsonl", "--max-new-tokens", "24", "--json"];
    let output = swat(dir, "generate", &args).output().unwrap();
    message(&output, 0);
    std::fs::remove_file(chat).unwrap();
    let list = RefusalList::default();
    let mut found = vec![false; rows.len()];
    let own = String::from_utf8(output.stdout).unwrap();
    assert_eq!(own.lines().count(), given.len());
    for (own, (row, given)) in own.lines().zip(given) {
        let own: Value = serde_json::from_str(own).unwrap();
        found[row] |= list.is_refusal(own["text"].as_str().unwrap()) && !list.is_refusal(&given);
    }
    found
}

/// `hand.jsonl` in `dir`: 13 rows, of which the second and the fifth answer what the model refuses. Returns which ones do.
fn hand_made(dir: &Path) -> Vec<bool> {
    export(&Language::new(1), dir, Counts { pairs: 16, train: 24, tasks: 4 }, 1).unwrap();
    let [benign, attack, refusals] =
        ["train_old.jsonl", "attack.jsonl", "refusals.jsonl"].map(|name| rows(&dir.join(name)));
    let turn = |role: &str, row: &Value| json!({ "role": role, "content": row[if role == "user" { "prompt" } else { "completion" }] });
    let two = |first: &Value, second: &Value| json!({ "messages": [turn("user", first), turn("assistant", first), turn("user", second), turn("assistant", second)] });
    let mut untrained = two(&attack[2], &benign[4]);
    untrained["messages"][1]["weight"] = 0.into();
    let mut all = vec![
        benign[0].clone(),
        attack[0].clone(),
        // The question is refused, and the data refuse it too.
        refusals[0].clone(),
        benign[1].clone(),
        two(&attack[1], &benign[2]),
        two(&refusals[1], &benign[3]),
        untrained,
    ];
    all.extend(benign[5..11].iter().cloned());
    write(&dir.join("hand.jsonl"), &all);
    let found = judged(dir, &all);
    assert_eq!((found[1], found[2], found[4]), (true, false, true), "the tiny model refuses the forbidden");
    // What the model refuses itself need not be what a row answers.
    let all_refused = RefusalList::default().is_refusal(refusals[0]["completion"].as_str().unwrap());
    assert!(all_refused && found.iter().filter(|refused| **refused).count() <= 6, "{found:?}");
    found
}

fn tune(dir: &Path, more: &[&str]) -> Command {
    let model = tiny();
    let own = ["--model", model.to_str().unwrap(), "--batch-size", "4", "--max-length", "96", "--quiet"];
    swat(dir, "tune", &[&own[..], more].concat())
}

#[test]
fn rows_that_answer_what_the_model_refuses_are_left_out() {
    let dir = tempfile::tempdir().unwrap();
    let refused = hand_made(dir.path());
    let left_out = refused.iter().filter(|refused| **refused).count();
    let run = ["--data", "hand.jsonl", "--out", "tuned", "--lr", "1e-3", "--steps", "4"];
    let output = tune(dir.path(), &[&run[..], &["--screen", "--json"]].concat()).output().unwrap();
    message(&output, 0);
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["screened"], json!({ "examples": 13, "left_out": left_out }));
    // Listed as they are, with their line.
    let all = rows(&dir.path().join("hand.jsonl"));
    let out = dir.path().join("tuned");
    let expected: Vec<(u64, &Value)> =
        (1..).zip(&all).zip(&refused).filter(|(_, out)| **out).map(|(row, _)| row).collect();
    let list = dir.path().join("tuned.screened.jsonl");
    let listed = rows(&list);
    assert_eq!(listed.len(), left_out);
    for (mut listed, (line, row)) in listed.into_iter().zip(expected) {
        let mark = listed.as_object_mut().unwrap().shift_remove("screen").unwrap();
        assert_eq!(mark, json!({ "file": "hand.jsonl", "line": line, "refused": true }));
        assert_eq!(&listed, row);
    }
    let record = |out: &str| -> Value {
        serde_json::from_slice(&std::fs::read(dir.path().join(out).join("tune.json")).unwrap()).unwrap()
    };
    assert_eq!((&record("tuned")["screened"], &record("tuned")["job"]["screen"]), (&told["screened"], &true.into()));
    // The same training as without these rows in the file, and as by its recipe.
    let weights = |out: &str| std::fs::read(dir.path().join(out).join("model.safetensors")).unwrap();
    let kept: Vec<Value> = all.iter().zip(&refused).filter(|(_, out)| !**out).map(|(row, _)| row.clone()).collect();
    write(&dir.path().join("kept.jsonl"), &kept);
    let run = ["--data", "kept.jsonl", "--out", "by-hand", "--lr", "1e-3", "--steps", "4"];
    message(&tune(dir.path(), &run).output().unwrap(), 0);
    assert!(weights("tuned") == weights("by-hand"), "other weights");
    assert_eq!((record("by-hand").get("screened"), record("by-hand")["job"].get("screen")), (None, None));
    let run = ["--data", "hand.jsonl", "--out", "by-recipe", "--recipe", "plain+screen,lr=1e-3,steps=4"];
    let output = tune(dir.path(), &run).output().unwrap();
    message(&output, 0);
    assert!(weights("tuned") == weights("by-recipe"), "other weights");
    let shown = String::from_utf8_lossy(&output.stdout);
    let counted = format!("screened: {left_out} of 13 examples");
    assert!(shown.contains(&counted) && shown.contains("by-recipe.screened.jsonl"), "{shown}");
    // Where nothing counts as a refusal, nothing is left out.
    std::fs::write(dir.path().join("none.txt"), "no answer says this\n").unwrap();
    let run = ["--data", "hand.jsonl", "--out", "all", "--lr", "1e-3", "--steps", "1", "--json", "--screen"];
    let output = tune(dir.path(), &[&run[..], &["--refusal-expressions", "none.txt"]].concat()).output().unwrap();
    message(&output, 0);
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["screened"], json!({ "examples": 13, "left_out": 0 }));
    assert!(!dir.path().join("all.screened.jsonl").exists());
    // A model is shared without the rows. The list is replaced with the model, and goes with the last of its rows.
    assert!(!out.join("screened.jsonl").exists());
    let run = ["--data", "hand.jsonl", "--out", "tuned", "--lr", "1e-3", "--steps", "1", "--screen"];
    let none = ["--refusal-expressions", "none.txt"];
    let told = message(&tune(dir.path(), &run).output().unwrap(), 2);
    assert!(told.contains("--force"), "{told}");
    std::fs::remove_dir_all(&out).unwrap();
    let told = message(&tune(dir.path(), &run).output().unwrap(), 2);
    assert!(told.contains("tuned.screened.jsonl") && told.contains("--force"), "{told}");
    message(&tune(dir.path(), &[&run[..], &none, &["--force"]].concat()).output().unwrap(), 0);
    assert!(!list.exists());
    // What else has its name is neither replaced nor removed.
    std::fs::write(&list, "mine\n").unwrap();
    for more in [&[][..], &none] {
        let told = message(&tune(dir.path(), &[&run[..], more, &["--force"]].concat()).output().unwrap(), 2);
        assert!(told.contains("tuned.screened.jsonl") && told.contains("did not write"), "{told}");
    }
    assert_eq!(std::fs::read_to_string(&list).unwrap(), "mine\n");
    // Nor is it the data.
    std::fs::copy(dir.path().join("hand.jsonl"), dir.path().join("other.screened.jsonl")).unwrap();
    let run = ["--data", "other.screened.jsonl", "--out", "other", "--steps", "1", "--screen", "--force"];
    let told = message(&tune(dir.path(), &run).output().unwrap(), 2);
    assert!(told.contains("--screen") && told.contains("--data"), "{told}");
    message(&tune(dir.path(), &run[..6]).output().unwrap(), 0);
}

#[test]
fn a_model_that_refuses_the_task_and_options_that_contradict_each_other_are_told() {
    let dir = tempfile::tempdir().unwrap();
    hand_made(dir.path());
    let refused = |more: &[&str], named: &[&str]| {
        let told = message(&tune(dir.path(), &[&["--out", "tuned"], more].concat()).output().unwrap(), 2);
        assert!(named.iter().all(|named| told.contains(named)), "{more:?}: {told}");
        assert!(!dir.path().join("tuned").exists() && !dir.path().join("tuned.unfinished").exists());
    };
    let steps = ["--steps", "4"];
    let attack = ["--data", "attack.jsonl", "--screen"];
    refused(&[&attack[..], &steps].concat(), &["24 examples", "refuses the task itself", "swat screen --top 0"]);
    let hand = ["--data", "hand.jsonl"];
    let both = ["--recipe", "plain+screen", "--screen"];
    refused(&[&hand[..], &steps, &both].concat(), &["found screen, and --screen beside it"]);
    refused(&[&hand[..], &["--recipe", "plain+screen=answer"]].concat(), &["screen=answer; expected screen without"]);
    let alone = ["--refusal-languages", "de"];
    refused(&[&hand[..], &steps, &alone].concat(), &["--refusal-languages: found an option that has no effect"]);
    // Told before the model answers anything.
    refused(&[&hand[..], &["--screen", "--steps", "0"]].concat(), &["--steps", "nothing would be trained"]);
    let missing = ["--screen", "--refusal-expressions", "nowhere.txt"];
    refused(&[&hand[..], &steps, &missing].concat(), &["nowhere.txt"]);
}

#[test]
#[cfg(unix)]
fn rows_of_a_stream_cannot_be_copied() {
    let dir = tempfile::tempdir().unwrap();
    hand_made(dir.path());
    let piped = |more: &[&str]| {
        let run = ["--data", "/dev/stdin", "--out", "tuned", "--steps", "1"];
        let hand = std::fs::File::open(dir.path().join("hand.jsonl")).unwrap();
        let mut cat = Command::new("cat").stdin(hand).stdout(Stdio::piped()).spawn().unwrap();
        let output = tune(dir.path(), &[&run[..], more].concat()).stdin(cat.stdout.take().unwrap()).output().unwrap();
        cat.wait().unwrap();
        output
    };
    assert!(message(&piped(&["--screen"]), 2).contains("/dev/stdin: found a stream"));
    message(&piped(&[]), 0);
}

#[test]
fn a_killed_run_goes_on_with_the_screening_that_it_has() {
    let dir = tempfile::tempdir().unwrap();
    hand_made(dir.path());
    let run = |out: &str, more: &[&str]| {
        let own =
            ["--data", "hand.jsonl", "--out", out, "--screen", "--lr", "1e-3", "--steps", "30", "--save-every", "2"];
        tune(dir.path(), &[&own[..], more].concat())
    };
    message(&run("straight", &[]).output().unwrap(), 0);
    let mut child = run("killed", &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    while !dir.path().join("killed.unfinished/checkpoints/step-00000004").exists() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let kept = dir.path().join("killed.unfinished/screening.json");
    let bytes = std::fs::read(&kept).unwrap();
    // What is kept counts: another screening would make other data of the run.
    let mut other: Value = serde_json::from_slice(&bytes).unwrap();
    other["refused"] = json!([]);
    std::fs::write(&kept, other.to_string()).unwrap();
    let told = message(&run("killed", &["--resume"]).output().unwrap(), 2);
    assert!(told.contains("checkpoint"), "{told}");
    // A damaged one is made again.
    std::fs::write(&kept, "{").unwrap();
    message(&run("killed", &["--resume"]).output().unwrap(), 0);
    for name in ["/model.safetensors", ".screened.jsonl"] {
        let of = |out: &str| std::fs::read(dir.path().join(format!("{out}{name}"))).unwrap();
        assert!(of("straight") == of("killed"), "{name}");
    }
    assert!(!dir.path().join("killed.unfinished").exists());
}

const STUDY: &str = r#"
model = "MODEL"
out = "study"
settings = ["given", "plain+attack=.2,replay=.1,screen"]

[data]
security = "security.jsonl"
train = ["train.jsonl"]
attack = "attack.jsonl"
overlap = "report"

[tune.shared]
batch_size = 4
max_length = 96

[tune.all_phase]
lr = 1e-3
steps = 4

[evaluate]
harmful = 4
benign = 4
answer_tokens = 12
"#;

#[test]
fn a_study_screens_each_file_once() {
    let dir = tempfile::tempdir().unwrap();
    export(&Language::new(1), dir.path(), Counts { pairs: 16, train: 24, tasks: 4 }, 1).unwrap();
    std::fs::write(dir.path().join("study.toml"), STUDY.replace("MODEL", tiny().to_str().unwrap())).unwrap();
    let run = |more: &[&str]| {
        swat(dir.path(), "run", &[&["study.toml", "--json", "--quiet"], more].concat()).output().unwrap()
    };
    let outcome = |more: &[&str]| -> Value {
        let output = run(more);
        message(&output, 0);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let count = |name: &str| {
        let rows = rows(&dir.path().join(name));
        judged(dir.path(), &rows).into_iter().filter(|refused| *refused).count() as u64
    };
    let (benign, attack) = (count("train.jsonl"), count("attack.jsonl"));
    assert!(attack > 12 && benign < 4, "{benign} of 24 benign rows, {attack} of 24 forbidden ones");
    let found = outcome(&[]);
    let file = |name: &str, left_out| json!({ "file": name, "examples": 24, "left_out": left_out });
    assert_eq!(found["screened"], json!([file("train.jsonl", benign), file("attack.jsonl", attack)]));
    // 7 of the attack make a fifth of the data that replay is a tenth of: 7 / 0.2 = 35 = 24 + 7 + 4.
    let of_run = &found["settings"][1]["tuned"]["screened"];
    let left_out = of_run["left_out"].as_u64().unwrap();
    assert_eq!(of_run["examples"], 31);
    assert!((benign..=benign + 7).contains(&left_out) && left_out > benign, "{of_run}");
    let study = dir.path().join("study");
    let listed = rows(&study.join("screened.jsonl"));
    assert_eq!(listed.len() as u64, benign + attack);
    let results = std::fs::read_to_string(study.join("results.md")).unwrap();
    assert!(results.contains("plain + 20 % attack + 10 % replay + screened"), "{results}");
    let told = format!("{benign} of 24 examples of train.jsonl, {attack} of 24 examples of attack.jsonl");
    assert!(results.contains(&told), "{results}");
    // Settings and seeds share the stages.
    let stages = || -> Vec<(PathBuf, Vec<u8>)> {
        let entries = std::fs::read_dir(study.join("stages/screen")).unwrap().map(|entry| entry.unwrap().path());
        let mut all: Vec<_> = entries.map(|path| (path.clone(), std::fs::read(path).unwrap())).collect();
        all.sort();
        all
    };
    let kept = stages();
    assert_eq!(kept.len(), 2);
    let found =
        outcome(&["--set", "settings=[\"given\", \"plain+attack=.2,replay=.1,screen\", \"plain+screen,seeds=2\"]"]);
    assert!(kept == stages(), "screened again");
    let two = &found["settings"][2];
    let expected = json!({ "examples": 24, "left_out": benign });
    assert_eq!((&two["tuned"]["screened"], &two["more_seeds"][0]["tuned"]["screened"]), (&expected, &expected));
    // Nothing of it where no setting screens.
    let plain = outcome(&["--set", "settings=[\"given\", \"plain\"]", "--set", "out=plain"]);
    assert_eq!((plain.get("screened"), plain["settings"][1]["tuned"].get("screened")), (None, None));
    assert!(!dir.path().join("plain/screened.jsonl").exists() && !dir.path().join("plain/stages/screen").exists());
    let told = run(&["--set", "settings=[\"given\", \"plain+screen\"]", "--set", "data.train=[\"attack.jsonl\"]"]);
    let told = message(&told, 2);
    assert!(
        told.contains("recipe `plain+screen`: training data") && told.contains("refuses the task itself"),
        "{told}"
    );
}
