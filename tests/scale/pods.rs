//! `docs/scale/kubernetes.yaml`: the command of its container, as many times as it has pods, with the environment that an
//! indexed Job gives each.

use super::ranks::{World, ends, port};
use super::{stderr, succeeds, swat, text, tiny};
use std::fs;
use std::path::Path;
use std::process::Stdio;

/// What a pod's variable is.
enum Variable {
    Literal(String),
    /// The index of the pod.
    Index,
}

/// The variables of the container, in the order of the file.
fn variables(file: &str) -> Vec<(String, Variable)> {
    let lines: Vec<&str> = file.lines().map(str::trim).collect();
    let variable = |pair: &[&str]| {
        let name = pair[0].strip_prefix("- name: ")?.to_owned();
        match pair[1].strip_prefix("value: ") {
            Some(value) => Some((name, Variable::Literal(value.trim_matches('"').to_owned()))),
            None => (pair[1] == "valueFrom:").then_some((name, Variable::Index)),
        }
    };
    lines.windows(2).filter_map(variable).collect()
}

#[test]
fn the_pods_of_a_job_train_together() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/scale/kubernetes.yaml");
    let file = fs::read_to_string(path).unwrap();
    let value = |key: &str| file.lines().find_map(|line| line.trim().strip_prefix(key)).expect(key).trim();
    assert_eq!(value("completionMode:"), "Indexed");
    assert_eq!(value("fieldPath:"), "metadata.annotations['batch.kubernetes.io/job-completion-index']");
    let pods: usize = value("completions:").parse().unwrap();
    assert_eq!(value("parallelism:"), pods.to_string(), "all at once");

    let world = World::new();
    let (model, train, out) = (tiny(), world.at("data/train.jsonl"), world.at("pods"));
    let mounted = [("/models/m", text(&model)), ("/data/train.jsonl", text(&train)), ("/out/tuned", text(&out))];
    let command: Vec<String> = serde_json::from_str(value("command:")).unwrap();
    let place = |word: &String| {
        mounted.iter().find(|(there, _)| there == word).map_or(word.clone(), |(_, here)| (*here).to_owned())
    };
    let arguments: Vec<String> = command[1..].iter().map(place).collect();
    assert_eq!((command[0].as_str(), arguments[0].as_str()), ("swat", "tune"));
    let small = ["--device=cpu", "--dtype=f32", "--batch-size=8", "--max-length=64", "--steps=2", "--quiet"];
    let at = port().to_string();
    let pod = |index: usize| {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(small).collect();
        let mut command = swat(&arguments);
        for (name, variable) in variables(&file) {
            let value = match variable {
                Variable::Index => index.to_string(),
                // The name of the first pod, which the service resolves: `JOB-INDEX.SERVICE`.
                Variable::Literal(host) if host == "swat-0.swat" => "127.0.0.1".to_owned(),
                Variable::Literal(_) if name == "MASTER_PORT" => at.clone(),
                Variable::Literal(text) => text,
            };
            command.env(name, value);
        }
        command.env("RAYON_NUM_THREADS", "1").stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    };
    assert_eq!(variables(&file).len(), 4, "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT");
    for output in ends((0..pods).map(pod).collect()) {
        assert!(output.status.success(), "{}", stderr(&output));
    }

    let (size, own) = (format!("--gpus={pods}"), world.at("own"));
    let mut launched = swat(&["tune", "--model", text(&model), "--data", text(&train), "--out", text(&own), &size]);
    launched.args(small).env("RAYON_NUM_THREADS", "1");
    succeeds(launched);
    assert!(world.weights("pods") == world.weights("own"));
}
