//! The judge against a local HTTP server.

use crate::common::judge_server::{reply, serve, serve_together};
use std::net::TcpListener;
use swat::secure::{Judge, JudgeOptions, Rubric};

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

#[test]
fn several_requests_are_open_at_one_time_and_scores_keep_their_order() {
    // Each pair of requests is answered only when both are there: one at a time would end in timeouts.
    let score = |request: &str| {
        let grade = (1..=5).find(|grade| request.contains(&format!("answer {grade}"))).unwrap();
        reply(&format!("score: {grade}"))
    };
    let url = serve_together(2, 2, score);
    let judge = Judge::new(JudgeOptions { parallel: 2, retries: 0, ..options(&url) }).unwrap();
    let answers: Vec<String> = [4, 1, 5, 2].iter().map(|grade| format!("answer {grade}")).collect();
    let mut reported = Vec::new();
    let grades = judge.grade(answers.iter().map(|answer| ("?", answer.as_str())), |done| reported.push(done));
    assert_eq!(grades.scores, [4.0, 1.0, 5.0, 2.0].map(Some));
    assert_eq!((grades.failed, grades.failure, reported), (0, None, vec![1, 2, 3, 4]));
    let many = Judge::new(JudgeOptions { parallel: 65, ..options(&url) }).err().unwrap().to_string();
    assert!(many.contains("judge.parallel"), "{many}");
}

#[test]
fn a_judge_that_fails_again_and_again_is_not_asked_any_more() {
    let (url, requests) = serve(vec![(400, String::new()); 20]);
    let judge = Judge::new(JudgeOptions { parallel: 1, ..options(&url) }).unwrap();
    let grades = judge.grade([("a", "b"); 20], |_| {});
    assert_eq!((grades.failed, grades.scores.len(), requests.try_iter().count()), (20, 20, 5));
    assert!(grades.failure.unwrap().contains("400"));
}

#[test]
fn strong_reject_is_asked_for_and_its_scores_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Some(dir.path().join("judged.jsonl"));
    let (url, requests) = serve(vec![
        (200, reply("refusal: 0\nconvincing: 5\nspecific: 4")),
        (200, reply("refusal: 1\nconvincing: 3\nspecific: 3")),
        (200, reply("I would rather not say")),
    ]);
    let strong = JudgeOptions { rubric: Rubric::StrongReject, parallel: 1, cache, ..options(&url) };
    let pairs = [("a", "b"), ("a", "c"), ("a", "d")];
    let first = Judge::new(strong.clone()).unwrap().grade(pairs, |_| {});
    assert_eq!(first.scores, [Some(0.875), Some(0.0), None]);
    let asked: Vec<String> = requests.iter().collect();
    assert!(
        asked.iter().all(|request| request.contains("convincing") && request.contains("\"max_tokens\": 48")),
        "{asked:?}"
    );
    // The server is gone: what has a score is not asked again.
    let again = Judge::new(JudgeOptions { retries: 0, ..strong.clone() }).unwrap().grade(pairs, |_| {});
    assert_eq!((&again.scores[..2], again.failed), (&[Some(0.875), Some(0.0)][..], 1));
    // By the other rubric the same answers have no score yet.
    let other = JudgeOptions { rubric: Rubric::Harmfulness, retries: 0, ..strong };
    assert_eq!(Judge::new(other).unwrap().grade(pairs, |_| {}).failed, 3);
    let kept = std::fs::read_to_string(dir.path().join("judged.jsonl")).unwrap();
    assert_eq!(kept.lines().count(), 2);
}
