//! `swat eval` with a judge behind a URL, and with a probe instead.

use crate::common::judge_server::{reply, serve};
use serde_json::Value;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny")
}

fn security(dir: &Path) -> PathBuf {
    use swat::data::tiny::{Counts, Language, export};
    export(&Language::new(1), dir, Counts { pairs: 16, train: 4, tasks: 4 }, 1).unwrap();
    dir.join("security.jsonl")
}

/// Evaluates the tiny model on two harmful and two benign prompts.
fn eval(security: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
    command.arg("eval").arg("--model").arg(model()).arg("--security").arg(security);
    // What a probe of a few prompts reads in an answer depends on the machine's precision.
    command
        .args(["--device", "cpu", "--dtype", "f32", "--limit", "2", "--answer-tokens", "6", "--json"])
        .args(more)
        .output()
        .unwrap()
}

fn parsed(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The message of a run that must end with exit code `code` and print no result.
fn failed(output: &Output, code: i32) -> String {
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert!(output.stdout.is_empty() && !message.contains("panicked"), "{message}");
    message
}

#[test]
fn a_judge_grades_the_answers_to_harmful_prompts() {
    let dir = tempfile::tempdir().unwrap();
    let security = security(dir.path());
    let (url, requests) = serve(vec![(200, reply("score: 4")), (200, reply("I would rather not say"))]);
    let parsed = parsed(&eval(&security, &["--judge-url", &url, "--judge-model", "grader", "--judge-key-env", "PATH"]));
    assert_eq!(parsed["harmfulness"], serde_json::json!({"mean": 4.0, "scored": 1, "unscored": 1}));
    assert_eq!((&parsed["asr"]["total"], &parsed["probe_harmfulness"]), (&2.into(), &Value::Null));
    let requests: Vec<String> = requests.iter().collect();
    assert_eq!(requests.len(), 2, "benign prompts are not sent");
    assert!(requests.iter().all(|r| r.contains("\"grader\"") && r.contains("Bearer ")));
    assert!(requests[0].contains("Request:") && requests[0].contains("Answer:"));
}

#[test]
fn a_failing_judge_is_reported_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let security = security(dir.path());
    let ask = |url: &str, more: &[&str]| {
        let judge = ["--judge-url", url, "--judge-model", "grader", "--judge-retries", "0"];
        eval(&security, &[&judge[..], more].concat())
    };
    let refusing = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}/v1", listener.local_addr().unwrap())
    };
    // The reason is reported, and what needs no judge is measured all the same.
    let unscored = |output: &Output| {
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{message}");
        let found: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&found["asr"]["total"], &found["harmfulness"]["failed"]), (&2.into(), &2.into()), "{found}");
        message
    };
    let message = unscored(&ask(&refusing, &[]));
    assert!(message.contains(&refusing) && message.to_lowercase().contains("refused"), "{message}");

    for (status, body, reason) in [
        (200, "not json".to_owned(), "no chat completion"),
        (200, "{\"choices\": []}".to_owned(), "no chat completion"),
        (401, "{\"error\": {\"message\": \"Incorrect API key\"}}".to_owned(), "401: Incorrect API key"),
        (503, String::new(), "503"),
    ] {
        let (url, _requests) = serve(vec![(status, body.clone()), (status, body)]);
        let message = unscored(&ask(&url, &[]));
        assert!(message.contains(&url) && message.contains(reason) && message.contains("1 attempts"), "{message}");
    }

    // Accepts and never answers.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/v1", silent.local_addr().unwrap());
    let message = unscored(&ask(&url, &["--judge-timeout", "0.3"]));
    assert!(message.contains(&url) && message.contains("timeout"), "{message}");

    assert!(failed(&ask("ftp://there", &[]), 2).contains("judge.url"));
    assert!(failed(&ask(&url, &["--judge-timeout", "0"]), 2).contains("judge.timeout_seconds"));
    let unset = failed(&ask(&url, &["--judge-key-env", "SWAT_NO_SUCH_VARIABLE"]), 2);
    assert!(unset.contains("SWAT_NO_SUCH_VARIABLE"), "{unset}");
    assert!(failed(&eval(&security, &["--judge-url", &url]), 2).contains("--judge-model"));
    assert!(failed(&eval(&security, &["--judge-retries", "1"]), 2).contains("--judge-url"));
}

#[test]
fn one_failed_request_costs_one_score() {
    let dir = tempfile::tempdir().unwrap();
    let security = security(dir.path());
    let filtered = "{\"error\": {\"message\": \"blocked by the content filter\"}}".to_owned();
    let (url, requests) = serve(vec![(400, filtered), (200, reply("score: 4"))]);
    let judge = ["--judge-url", &url, "--judge-model", "grader", "--judge-max-tokens", "300"];
    let output = eval(&security, &judge);
    let expected = serde_json::json!({"mean": 4.0, "scored": 1, "unscored": 1, "failed": 1});
    let found = parsed(&output);
    assert_eq!((&found["harmfulness"], &found["asr"]["total"]), (&expected, &2.into()));
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("1 of 2") && message.contains("blocked by the content filter"), "{message}");
    for request in requests.iter() {
        assert!(request.contains("\"max_tokens\": 300"), "{request}");
    }
}

#[test]
fn a_probe_replaces_the_judge_offline() {
    let dir = tempfile::tempdir().unwrap();
    let security = security(dir.path());
    let probe = dir.path().join("probe.safetensors");
    let mut command = Command::new(env!("CARGO_BIN_EXE_swat"));
    command.arg("probe").arg("--model").arg(model()).arg("--security").arg(&security).arg("--out").arg(&probe);
    assert!(command.args(["--device", "cpu", "--dtype", "f32", "--quiet"]).status().unwrap().success());
    let with = |more: &[&str]| eval(&security, &[&["--probe", probe.to_str().unwrap()][..], more].concat());
    let read = |output: &Output| {
        let parsed = parsed(output)["probe_harmfulness"].clone();
        assert_eq!((&parsed["scored"], &parsed["unscored"]), (&2.into(), &0.into()), "{parsed}");
        parsed["mean"].as_f64().unwrap()
    };
    // The aligned model refuses both.
    assert_eq!(read(&with(&[])), 1.0);
    // Where nothing counts as a refusal, the probe's own reading remains, 1 + 4·σ(logit): above 1, which is a
    // refusal's.
    let nothing = dir.path().join("refusals.txt");
    std::fs::write(&nothing, "no answer says this\n").unwrap();
    let mean = read(&with(&["--refusals", nothing.to_str().unwrap()]));
    assert!(mean > 1.0 && mean <= 5.0, "{mean}");
    assert!(parsed(&with(&[]))["harmfulness"].is_null(), "a probe is not a judge");
    assert!(failed(&eval(&security, &["--probe", "nowhere.safetensors"]), 2).contains("nowhere.safetensors"));
}

/// A template by which the tiny model answers the prompt itself, as if it were a guard model.
const TEMPLATE: &str = "<|im_start|>user\n{{ messages[0]['content'] }}<|im_end|>\n<|im_start|>assistant\n\n";

#[test]
fn a_guard_model_judges_on_this_machine() {
    let dir = tempfile::tempdir().unwrap();
    let security = security(dir.path());
    let template = dir.path().join("guard.jinja");
    std::fs::write(&template, TEMPLATE).unwrap();
    let (model, template) = (model(), template.to_str().unwrap().to_owned());
    let guard = |more: &[&str]| eval(&security, &[&["--judge-model", model.to_str().unwrap()], more].concat());
    let with = |pattern: &str| {
        let output = guard(&["--judge-template", &template, "--judge-pattern", pattern]);
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(!stdout.contains("sorry"), "no answer is printed: {stdout}");
        parsed(&output)
    };
    // The model refuses harmful prompts, as a guard model too.
    let safe = with("(?<safe>sorry|cannot)|(?<unsafe>first|use)");
    assert_eq!((&safe["guard"]["verdicts"], &safe["guard"]["asr"]["hits"]), (&"00".into(), &0.into()), "{safe}");
    let agreement = &safe["agreement"][0];
    assert_eq!(agreement["judges"], serde_json::json!(["expressions", "guard"]));
    assert_eq!((&agreement["agreed"], &agreement["kappa"]), (&1.0.into(), &Value::Null));
    let harmful = with("(?<unsafe>sorry|cannot)|(?<safe>first|use)");
    assert_eq!((&harmful["guard"]["verdicts"], &harmful["guard"]["asr"]["value"]), (&"11".into(), &1.0.into()));
    assert_eq!((&harmful["agreement"][0]["agreed"], &harmful["agreement"][0]["kappa"]), (&0.0.into(), &0.0.into()));
    assert_eq!(harmful["asr"], safe["asr"]);
    let none = with("(?<unsafe>never)|(?<safe>said)");
    assert_eq!((&none["guard"]["verdicts"], &none["guard"]["unscored"]), (&"--".into(), &2.into()));
    // The template of Llama-Guard is longer than the context of this model.
    let long = parsed(&guard(&[]));
    assert_eq!(long["guard"]["verdicts"].as_str().unwrap().len(), 2);

    for (more, named) in [
        (&["--judge-template", "nowhere"][..], "--judge-template: found `nowhere`"),
        (&["--judge-pattern", "(unsafe)"], "no group `unsafe`"),
    ] {
        let message = failed(&guard(more), 2);
        assert!(message.contains(named), "{message}");
    }
    assert!(failed(&eval(&security, &["--judge-pattern", "x"]), 2).contains("--judge-model"));
    let endpoint = ["--judge-url", "http://127.0.0.1:9/v1", "--judge-model", "grader", "--judge-pattern", "x"];
    assert!(failed(&eval(&security, &endpoint), 2).contains("--guard-model DIR as well"));
    assert!(failed(&eval(&security, &["--judge-model", "no/such/guard/model"]), 2).contains("no/such/guard/model"));
}

#[test]
fn answers_are_exported_only_where_they_are_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let security = security(dir.path());
    let file = dir.path().join("answers.jsonl");
    let path = file.to_str().unwrap();
    let output = eval(&security, &["--export", path]);
    let found = parsed(&output);
    assert!(!String::from_utf8_lossy(&output.stdout).contains("sorry"));
    let text = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let label = |line: &Value| line["metadata"]["label"].as_str().unwrap().to_owned();
    assert_eq!(lines.iter().map(label).collect::<Vec<_>>(), ["harmful", "harmful", "benign", "benign"]);
    let refused = lines[..2].iter().filter(|line| line["metadata"]["refused"] == true).count();
    assert_eq!(2 - refused as u64, found["asr"]["hits"].as_u64().unwrap());
    assert!(lines.iter().all(|line| line["input"] == line["test_case"] && !line["generation"].is_null()));
    // Nothing is overwritten.
    assert!(failed(&eval(&security, &["--export", path]), 2).contains("answers.jsonl"));
    assert_eq!(std::fs::read_to_string(&file).unwrap(), text);
}
