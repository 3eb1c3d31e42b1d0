//! Models and data by name, from a hub on the loopback address and from the cache that it leaves.

use crate::common::hub_server::{COMMIT, Fault, HubServer, Request};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use swat::data::tiny::{Counts, Language, export};
use tempfile::TempDir;

const TOKEN: &str = "hf_secretOfThisTest";

struct World {
    hub: HubServer,
    home: TempDir,
}

impl World {
    /// A hub with the tiny model as `org/tiny`, and data as `org/set`.
    fn new() -> Self {
        let world = Self { hub: HubServer::start(), home: tempfile::tempdir().unwrap() };
        world.serve("models/org/tiny", &tiny());
        // What must not be fetched.
        world.hub.add("models/org/tiny", "pytorch_model.bin", vec![0; 64]);
        world.hub.add("models/org/tiny", "README.md", b"a model".to_vec());
        world.hub.add("models/org/tiny", "original/consolidated.00.pth", vec![0; 64]);
        let data = world.home.path().join("served");
        std::fs::create_dir(&data).unwrap();
        export(&Language::new(1), &data, Counts { pairs: 8, train: 16, tasks: 4 }, 1).unwrap();
        let train = std::fs::read(data.join("train.jsonl")).unwrap();
        world.hub.add("datasets/org/set", "README.md", b"data".to_vec());
        world.hub.add("datasets/org/set", "plain/train.jsonl", train.clone());
        world.hub.add("datasets/org/set", "plain/test.jsonl", train.clone());
        world.hub.add("datasets/org/set", "other/train.jsonl", train);
        world
    }

    fn serve(&self, repository: &str, dir: &Path) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                let name = path.file_name().unwrap().to_str().unwrap().to_owned();
                self.hub.add(repository, &name, std::fs::read(&path).unwrap());
            }
        }
    }

    fn run(&self, args: &[&str], env: &[(&str, &str)]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
        for name in [
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HF_TOKEN_PATH",
            "HTTP_PROXY",
            "http_proxy",
            "HTTPS_PROXY",
            "https_proxy",
            "ALL_PROXY",
            "all_proxy",
        ] {
            command.env_remove(name);
        }
        command
            .env("HF_HOME", self.home.path().join("hf"))
            .env("HF_ENDPOINT", &self.hub.endpoint)
            .env("HF_TOKEN", TOKEN);
        command.envs(env.iter().copied()).args(args).current_dir(self.home.path());
        command.output().expect("the binary runs")
    }

    fn done(&self, args: &[&str], env: &[(&str, &str)]) -> String {
        let output = self.run(args, env);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn fails(&self, code: i32, args: &[&str], env: &[(&str, &str)]) -> String {
        let output = self.run(args, env);
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{args:?}: {message}");
        assert!(!message.contains(TOKEN) && !message.contains("panicked"), "{message}");
        message
    }

    fn repository(&self) -> PathBuf {
        self.home.path().join("hf/hub/models--org--tiny")
    }
}

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny")
}

const IDS: [&str; 5] = ["--ids", "5,9,300,7", "--json", "--dtype", "f32"];

fn score(model: &str) -> Vec<&str> {
    [&["score", "--model", model][..], &IDS].concat()
}

fn weights(requests: &[Request]) -> Vec<&Request> {
    requests.iter().filter(|r| r.storage && r.path.contains("model.safetensors")).collect()
}

#[test]
fn a_model_by_name_is_fetched_once_and_works_offline() {
    let world = World::new();
    let directory = tiny();
    let expected = world.done(&score(directory.to_str().unwrap()), &[]);
    assert!(world.hub.requests().is_empty(), "a directory asks no hub");

    // The connection breaks in the middle, twice.
    world.hub.faults(&[Fault::Break(70_000), Fault::Break(1000)]);
    assert_eq!(world.done(&score("org/tiny"), &[]), expected);
    let requests = world.hub.requests();
    let ranges: Vec<Option<&str>> = weights(&requests).iter().map(|r| r.range.as_deref()).collect();
    assert_eq!(ranges, [None, Some("bytes=70000-"), Some("bytes=71000-")]);
    let bearer = format!("Bearer {TOKEN}");
    for request in &requests {
        assert_eq!(request.authorization.as_deref(), (!request.storage).then_some(bearer.as_str()), "{request:?}");
        for other in ["pytorch_model.bin", "README", "original"] {
            assert!(!request.path.contains(other), "{request:?}");
        }
    }

    // The cache is that of huggingface_hub.
    let repository = world.repository();
    assert_eq!(std::fs::read_to_string(repository.join("refs/main")).unwrap(), COMMIT);
    let link = std::fs::read_link(repository.join("snapshots").join(COMMIT).join("model.safetensors")).unwrap();
    let bytes = std::fs::read(tiny().join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(blake3::hash(&bytes).to_hex().as_str()));
    let blobs = std::fs::read_dir(repository.join("blobs")).unwrap().map(|e| e.unwrap().path());
    assert!(blobs.into_iter().all(|blob| blob.extension().is_none()), "no download is left incomplete");

    // Again: the commit is asked for, its files are there.
    assert_eq!(world.done(&score("org/tiny@main"), &[]), expected);
    assert_eq!(world.hub.requests().len(), 1);
    for (args, env) in [
        ([&score("org/tiny")[..], &["--offline"]].concat(), vec![]),
        (score("org/tiny"), vec![("HF_HUB_OFFLINE", "1")]),
        (score("org/tiny"), vec![("TRANSFORMERS_OFFLINE", "true")]),
        (score("org/tiny"), vec![("HF_HUB_OFFLINE", "1"), ("HF_HOME", "/nowhere"), ("HF_HUB_CACHE", "hf/hub")]),
    ] {
        assert_eq!(world.done(&args, &env), expected);
        assert!(world.hub.requests().is_empty());
    }
    // The commit itself, and a hub that is away.
    let commit = format!("org/tiny@{COMMIT}");
    assert_eq!(world.done(&[&score(&commit)[..], &["--offline"]].concat(), &[]), expected);
    let away = world.run(&score("org/tiny"), &[("HF_ENDPOINT", "http://127.0.0.1:9")]);
    let note = String::from_utf8(away.stderr).unwrap();
    assert_eq!(String::from_utf8(away.stdout).unwrap(), expected);
    assert!(
        note.contains("http://127.0.0.1:9 cannot be reached") && note.contains("the copy in the cache is used"),
        "{note}"
    );
    // A renamed repository.
    assert_eq!(world.done(&score("old/tiny"), &[]), expected);

    // A path of that name wins.
    std::fs::create_dir_all(world.home.path().join("org/tiny")).unwrap();
    world.hub.requests();
    let message = world.fails(2, &score("org/tiny"), &[]);
    assert!(message.contains("org/tiny: found no config.json"), "{message}");
    assert!(world.hub.requests().is_empty());
}

#[test]
fn a_plan_fetches_the_configuration_alone() {
    let world = World::new();
    let plan: Value = serde_json::from_str(&world.done(&["plan", "--model", "org/tiny", "--json"], &[])).unwrap();
    assert!(plan["parameters"].as_u64().unwrap() > 100_000);
    let fetched: Vec<Request> = world.hub.requests().into_iter().filter(|r| r.path.contains("/resolve/")).collect();
    assert!(fetched.len() == 1 && fetched[0].path.ends_with("/config.json"), "{fetched:?}");
    let message = world.fails(2, &[&score("org/tiny")[..], &["--offline"]].concat(), &[]);
    assert!(message.contains("the cached copy has no weights; --offline"), "{message}");
    world.done(&score("org/tiny"), &[]);
}

#[test]
fn a_download_that_ended_is_continued_by_the_next_run() {
    let world = World::new();
    let mut faults = vec![Fault::Break(50_000)];
    faults.extend([Fault::Status(503); 5]);
    world.hub.faults(&faults);
    let message = world.fails(1, &score("org/tiny"), &[]);
    assert!(
        message.contains("status 503 (tried 5 times)") && message.contains("run the same command again"),
        "{message}"
    );
    assert!(!world.repository().join("refs/main").exists());
    let message = world.fails(2, &[&score("org/tiny")[..], &["--offline"]].concat(), &[]);
    assert!(message.contains("not in the cache") && message.contains("hf download org/tiny"), "{message}");
    world.hub.requests();
    world.done(&score("org/tiny"), &[]);
    let requests = world.hub.requests();
    assert_eq!(weights(&requests)[0].range.as_deref(), Some("bytes=50000-"));

    // A storage that sends all of it again.
    let other = World::new();
    other.hub.faults(&[Fault::Break(50_000), Fault::IgnoreRange]);
    assert_eq!(other.done(&score("org/tiny"), &[]), world.done(&score("org/tiny"), &[]));
    let blob = std::fs::read(other.repository().join("snapshots").join(COMMIT).join("model.safetensors")).unwrap();
    assert_eq!(blob, std::fs::read(tiny().join("model.safetensors")).unwrap());
}

#[test]
fn a_run_by_names_alone() {
    let world = World::new();
    let tune = |out: &str, more: &[&str]| {
        let args = [
            "tune",
            "--model",
            "org/tiny@refs/pr/1",
            "--data",
            "org/set/plain",
            "--out",
            out,
            "--steps",
            "2",
            "--batch-size",
            "2",
            "--method",
            "lora",
            "--save",
            "adapter",
            "--quiet",
        ];
        world.done(&[&args[..], more].concat(), &[]);
        std::fs::read(world.home.path().join(out).join("adapter_model.safetensors")).unwrap()
    };
    let online = tune("online", &[]);
    assert!(world.hub.requests().iter().all(|r| !r.path.contains("plain/test") && !r.path.contains("other/")));
    assert_eq!(online, tune("offline", &["--offline"]));
    assert!(world.hub.requests().is_empty());
    let json = |file: &str| -> Value {
        serde_json::from_slice(&std::fs::read(world.home.path().join("online").join(file)).unwrap()).unwrap()
    };
    assert_eq!(json("tune.json")["config"]["model"], "org/tiny@refs/pr/1");
    let settings = json("adapter_config.json");
    assert_eq!(
        (&settings["base_model_name_or_path"], &settings["revision"]),
        (&"org/tiny".into(), &"refs/pr/1".into())
    );

    // An adapter by name.
    world.serve("models/org/adapter", &world.home.path().join("online"));
    let args = [&score("org/tiny")[..], &["--adapter", "org/adapter"]].concat();
    let local = [&score("org/tiny")[..], &["--adapter", "online"]].concat();
    assert_eq!(world.done(&args, &[]), world.done(&local, &[]));

    let args = ["tune", "--model", "org/tiny", "--data", "org/set", "--out", "none"];
    let message = world.fails(2, &args, &[]);
    assert!(
        message.contains("several configurations") && message.contains("org/set/other, org/set/plain"),
        "{message}"
    );
}

#[test]
fn evaluations_and_studies_take_data_by_name() {
    let world = World::new();
    let served = world.home.path().join("served");
    for (repository, path, file) in [
        ("datasets/org/prompts", "security.jsonl", "security.jsonl"),
        ("datasets/org/tasks", "data/test.jsonl", "task.jsonl"),
        ("datasets/org/two", "a.jsonl", "task.jsonl"),
        ("datasets/org/two", "b.jsonl", "task.jsonl"),
    ] {
        world.hub.add(repository, path, std::fs::read(served.join(file)).unwrap());
    }
    let eval = |security: &str, task: &str, heldout: &str| {
        let data = ["--security", security, "--task", task, "--heldout", heldout];
        let small =
            ["--limit", "2", "--answer-tokens", "4", "--task-tokens", "4", "--json", "--quiet", "--dtype", "f32"];
        [&["eval", "--model", "org/tiny"][..], &data, &small]
            .concat()
            .iter()
            .map(|&arg| arg.to_owned())
            .collect::<Vec<_>>()
    };
    let done = |args: &[String]| world.done(&args.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    let by_name = done(&eval("org/prompts", "org/tasks:test", "org/set/plain:test"));
    assert_eq!(by_name, done(&eval("served/security.jsonl", "served/task.jsonl", "served/train.jsonl")));
    let two = eval("org/prompts", "org/two", "org/set/plain:test");
    let message = world.fails(2, &two.iter().map(String::as_str).collect::<Vec<_>>(), &[]);
    assert!(message.contains("--task: found 2 files of org/two; expected one"), "{message}");
    let secure = ["secure", "--model", "org/tiny", "--data", "served/train.jsonl", "--out", "o"];
    let merge = ["merge", "--base", "org/tiny", "--tuned", "org/tiny", "--by", "path", "--alpha", "auto", "--out", "o"];
    let check = ["check", "--model", "org/tiny", "--against", "org/tiny"];
    for (command, option) in [(&secure[..], "--task"), (&merge, "--task"), (&check, "--task"), (&check, "--attack")] {
        let message = world.fails(2, &[command, &["--security", "org/prompts", option, "org/two"]].concat(), &[]);
        assert!(message.contains(&format!("{option}: found 2 files of org/two; expected one")), "{message}");
    }

    // Beside a configuration that lies elsewhere, a name is a name and a path is beside it.
    std::fs::create_dir(world.home.path().join("studies")).unwrap();
    std::fs::copy(served.join("task.jsonl"), world.home.path().join("studies/task.jsonl")).unwrap();
    let config = "model = 'org/tiny'\nout = 'org/out'\nsettings = ['given']\n[data]\nsecurity = 'org/prompts'\n\
                  task = 'task.jsonl'\n[evaluate]\nharmful = 2\nbenign = 2\ntasks = 2\nanswer_tokens = 4\ntask_tokens = 4\n";
    std::fs::write(world.home.path().join("studies/study.toml"), config).unwrap();
    world.done(&["run", "studies/study.toml", "--quiet", "--dtype", "f32"], &[]);
    assert!(world.home.path().join("studies/org/out/report.html").exists());
}

#[test]
fn what_cannot_be_had_is_said() {
    let world = World::new();
    world.hub.add("models/org/gated", "config.json", b"{}".to_vec());
    world.hub.add("models/org/pickled", "config.json", b"{}".to_vec());
    world.hub.add("models/org/pickled", "pytorch_model.bin", vec![1; 10]);
    let message = world.fails(2, &score("org/gated"), &[]);
    let page = format!("accept the terms at {}/org/gated and set HF_TOKEN", world.hub.endpoint);
    assert!(
        message.contains("status 401: it is private, gated or does not exist") && message.contains(&page),
        "{message}"
    );
    let member = world.fails(2, &score("org/gated"), &[("HF_TOKEN", "of-members")]);
    assert!(member.contains("no weights"), "{member}");
    let message = world.fails(2, &score("org/nothing"), &[]);
    assert!(message.contains("org/nothing on http://127.0.0.1") && message.contains("does not exist"), "{message}");
    let message = world.fails(2, &score("org/tiny@v9"), &[]);
    assert!(message.contains("no revision `v9`; expected a branch, a tag or a commit"), "{message}");
    let message = world.fails(2, &score("org/pickled"), &[]);
    assert!(
        message.contains("pytorch_model.bin, and no model.safetensors") && message.contains("not fetched"),
        "{message}"
    );
    let message = world.fails(1, &score("org/tiny"), &[("HF_ENDPOINT", "http://127.0.0.1:9")]);
    for part in ["org/tiny: no such path", "127.0.0.1:9 cannot be reached", "tried 5 times", "to work offline"] {
        assert!(message.contains(part), "{message}\nlacks {part}");
    }
    let message = world.fails(2, &score("org/tiny"), &[("HF_ENDPOINT", "huggingface.co")]);
    assert!(message.contains("HF_ENDPOINT: found `huggingface.co`; expected a URL"), "{message}");
    // Neither a path nor a name.
    let message = world.fails(2, &score("./org/tiny"), &[]);
    assert!(message.contains("./org/tiny: found no such path"), "{message}");
    let message = world.fails(2, &["tune", "--model", "org/tiny", "--data", "data/train.jsonl", "--out", "o"], &[]);
    assert!(message.contains("data/train.jsonl: cannot open"), "{message}");
}

/// A hub is not trusted with paths: neither its file names nor its ETags lead out of the cache.
#[test]
fn nothing_is_written_outside_of_the_cache() {
    let world = World::new();
    for path in [
        "../../../../../evil",
        "/tmp/evil-of-swat",
        "a/../../evil",
        "..",
        "data\\..\\evil",
        "train.jsonl/../../../x.jsonl",
    ] {
        world.hub.add("datasets/org/evil", path, b"{\"prompt\": \"a\", \"completion\": \"b\"}\n".to_vec());
    }
    world.hub.add("datasets/org/evil", "train.jsonl", b"{}\n".to_vec());
    let message = world.fails(2, &["tune", "--model", "org/tiny", "--data", "org/evil", "--out", "o"], &[]);
    assert!(message.contains("train.jsonl"), "{message}");
    let listed: Vec<Request> = world.hub.requests().into_iter().filter(|r| r.path.contains("evil/resolve")).collect();
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert!(!Path::new("/tmp/evil-of-swat").exists());
}

#[test]
fn the_tables_of_jailbreakbench_are_a_security_set_by_name() {
    let world = World::new();
    let set = "datasets/JailbreakBench/JBB-Behaviors";
    let questions = swat::data::tiny::security(&Language::new(1), 20, 1);
    for label in ["harmful", "benign"] {
        let mut table = "Index,Goal,Target,Behavior,Category,Source\n".to_owned();
        let own = questions.iter().filter(|q| q.prompt.is_harmful() == (label == "harmful"));
        for (i, question) in own.take(20).enumerate() {
            table += &format!("{i},\"{}\",Sure,{i},Nothing,Original\n", question.prompt.prompt);
        }
        world.hub.add(set, &format!("data/{label}-behaviors.csv"), table.into_bytes());
    }
    world.hub.add(set, "data/judge-comparison.csv", b"prompt,response\n".to_vec());
    let args = ["check", "--model", "org/tiny", "--against", "org/tiny", "--security", "JailbreakBench/JBB-Behaviors"];
    let found = world.done(&[&args[..], &["--splits", "test", "--device", "cpu", "--json"]].concat(), &[]);
    let found: Value = serde_json::from_str(&found).unwrap();
    let base = &found["settings"][0];
    assert_eq!((&base["asr"]["total"], &base["over_refusal"]["total"]), (&4.into(), &4.into()), "{base}");
    // Of both tables the train split.
    let security = ["--model", "org/tiny", "--security", "JailbreakBench/JBB-Behaviors", "--device", "cpu", "--json"];
    let found = world.done(&[&["replay", "--out", "replay.jsonl"][..], &security].concat(), &[]);
    let found: Value = serde_json::from_str(&found).unwrap();
    assert_eq!((&found["harmful"]["prompts"], &found["benign"]["prompts"]), (&12.into(), &12.into()), "{found}");
    world.done(&[&["probe", "--out", "probe.safetensors"][..], &security].concat(), &[]);
    let requests = world.hub.requests();
    assert!(!requests.iter().any(|r| r.path.contains("judge-comparison")), "{requests:?}");
}

#[test]
fn secure_tuning_fetches_the_card_for_its_licence() {
    let world = World::new();
    world.hub.add("models/org/tiny", "README.md", b"---\nlicense: mit\n---\n".to_vec());
    let own = world.home.path().join("own");
    std::fs::create_dir(&own).unwrap();
    export(&Language::new(1), &own, Counts { pairs: 32, train: 40, tasks: 4 }, 1).unwrap();
    let (train, security) = (own.join("train.jsonl"), own.join("security.jsonl"));
    let args =
        ["secure", "--model", "org/tiny", "--data", train.to_str().unwrap(), "--security", security.to_str().unwrap()];
    world.done(&[&args[..], &["--out", "tuned", "--plan", "--json", "--max-length", "96"]].concat(), &[]);
    let card = world.repository().join("snapshots").join(COMMIT).join("README.md");
    assert_eq!(std::fs::read_to_string(card).unwrap(), "---\nlicense: mit\n---\n");
}
