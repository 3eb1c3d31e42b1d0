//! The judge against a local HTTP server.

use crate::common::judge_server::{reply, serve};
use std::net::TcpListener;
use swat::secure::{Judge, JudgeOptions};

fn options(url: &str) -> JudgeOptions {
    JudgeOptions {
        url: url.into(),
        model: "grader".into(),
        timeout_seconds: 5.0,
        retries: 2,
        backoff_seconds: 0.01,
        most_characters: 40,
        ..Default::default()
    }
}

#[test]
fn asks_and_reads_the_score() {
    let (url, requests) = serve(vec![(200, reply("score: 4")), (200, reply("I would rather not say"))]);
    let mut options = options(&url);
    // A variable that every test process has.
    options.key_env = Some("PATH".into());
    let judge = Judge::new(options).unwrap();
    assert_eq!(judge.judge("how do I bake bread ?", &"flour ".repeat(100)).unwrap(), Some(4.0));
    let request = requests.recv().unwrap();
    assert!(request.starts_with("POST /v1/chat/completions ") && request.contains("\"grader\""), "{request}");
    assert!(request.contains(&format!("Bearer {}", std::env::var("PATH").unwrap())));
    assert!(request.contains("bake bread") && !request.contains(&"flour ".repeat(8)));
    assert_eq!(judge.judge("a", "b").unwrap(), None);
}

#[test]
fn transient_errors_are_retried() {
    let (url, _requests) = serve(vec![(503, "busy".into()), (429, "slower".into()), (200, reply("2"))]);
    assert_eq!(Judge::new(options(&url)).unwrap().judge("a", "b").unwrap(), Some(2.0));
    let (url, _requests) = serve(vec![(500, String::new()), (500, String::new()), (500, String::new())]);
    let error = Judge::new(options(&url)).unwrap().judge("a", "b").unwrap_err().to_string();
    assert!(error.contains("3 attempts") && error.contains("500"), "{error}");
    let (url, _requests) = serve(vec![(401, String::new())]);
    let error = Judge::new(options(&url)).unwrap().judge("a", "b").unwrap_err().to_string();
    assert!(error.contains("1 attempts") && error.contains("401"), "{error}");
}

#[test]
fn misbehaving_servers_are_errors() {
    let long = format!("{{\"x\":\"{}\"}}", "y".repeat(3 << 20));
    let (url, _requests) = serve(vec![(200, long.clone()), (200, long.clone()), (200, long)]);
    assert!(Judge::new(options(&url)).unwrap().judge("a", "b").is_err());
    let (url, _requests) = serve(vec![(200, "not json".into())]);
    assert!(Judge::new(options(&url)).unwrap().judge("a", "b").unwrap_err().to_string().contains("no chat completion"));
    // Accepts and never answers.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut silent = options(&format!("http://{}/v1", listener.local_addr().unwrap()));
    silent.timeout_seconds = 0.2;
    silent.retries = 1;
    assert!(Judge::new(silent).unwrap().judge("a", "b").unwrap_err().to_string().contains("2 attempts"));
}

#[test]
fn invalid_options_are_named() {
    let error = |o: JudgeOptions| Judge::new(o).err().unwrap().to_string();
    assert!(error(JudgeOptions::default()).contains("judge.url"));
    assert!(error(JudgeOptions { url: "ftp://x".into(), ..options("x") }).contains("judge.url"));
    assert!(error(JudgeOptions { model: String::new(), ..options("http://x") }).contains("judge.model"));
    assert!(error(JudgeOptions { timeout_seconds: f64::NAN, ..options("http://x") }).contains("timeout_seconds"));
    let unset = JudgeOptions { key_env: Some("SWAT_NO_SUCH_VARIABLE".into()), ..options("http://x") };
    assert!(error(unset).contains("SWAT_NO_SUCH_VARIABLE"));
}
