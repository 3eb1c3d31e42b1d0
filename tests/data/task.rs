//! Answers that are right and wrong, in each way of comparing.

use swat::data::{Match, RowReader, Task};
use swat::error::Result;

fn read(line: &str) -> Result<Vec<Task>> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("task.jsonl");
    std::fs::write(&path, line).unwrap();
    Task::read(&path, &mut RowReader::default())
}

fn task(prompt: &str, answer: &str, matching: Match) -> Task {
    Task { prompt: prompt.into(), answer: answer.into(), matching, category: None, place: String::new() }
}

#[test]
fn exact_answers_may_be_announced_or_stand_last() {
    let task = task("?", "New York", Match::Exact);
    for text in [
        "new york",
        " **New  York**.\n",
        "The answer is New York.",
        "The answer is \"New York\". I hope this helps!",
        "I looked it up.\n\nAnswer: New York",
        "Final answer:\n\nNew York\n\nGood luck!",
        "The answer is Paris? No, the answer is New York!",
        "Let me think.\nNew York\n",
    ] {
        assert!(task.matches(text), "{text}");
    }
    for text in ["", "York", "New York City", "The answer is not New York.", "New York or Paris", "newyork"] {
        assert!(!task.matches(text), "{text}");
    }
    assert!(Task { answer: "a. b".into(), ..task }.matches("The answer is a. b."));
}

#[test]
fn numbers_are_compared_relative_to_the_expected_one() {
    let million = task("?", "1,000,000", Match::Number);
    assert!(million.matches("It is 1000000.9") && !million.matches("It is 1000001.1") && !million.matches("many"));
    let zero = task("?", "0", Match::Number);
    assert!(zero.matches("0.00") && !zero.matches("1e-9"));
    assert!(
        task("?", "-61", Match::Number).matches("The answer is −61.") && !task("?", "-61", Match::Number).matches("61")
    );
    assert!(task("?", "3/4", Match::Number).matches("0.75"));
}

#[test]
fn choices_are_given_by_letter_or_text() {
    let prompt = "Which is a colour?\nA) cat\nB) blue\nC) dog";
    for answer in ["B", "(b)", "Blue"] {
        let task = task(prompt, answer, Match::Choice);
        assert!(task.matches("The answer is B.") && task.matches("It is blue.") && task.matches("(b)"), "{answer}");
        assert!(!task.matches("C") && !task.matches("A cat") && !task.matches("no idea"), "{answer}");
    }
    assert!(task("Pick (A) or (B).", "B", Match::Choice).matches("B"));
}

#[test]
fn lines_are_checked() {
    let tasks = read(r#"{"prompt":"1+1","answer":2,"match":"number","category":"sums"}"#).unwrap();
    assert_eq!((tasks[0].answer.as_str(), tasks[0].category.as_deref()), ("2", Some("sums")));
    let cases = [
        (r#"{"prompt":"?","answer":"x"}"#, "no `match`"),
        (r#"{"prompt":"?","answer":"x","match":"regex"}"#, "`match` is \"regex\"; expected exact, number or choice"),
        (r#"{"prompt":"?","answer":"x","match":"number"}"#, "`answer` is \"x\"; expected a number"),
        (r#"{"prompt":"?","answer":"tea","match":"choice"}"#, "`answer` is \"tea\"; expected a letter"),
        (r#"{"prompt":"?\nA) x\nB) y","answer":"C","match":"choice"}"#, "`answer` is \"C\"; expected a letter"),
        // No answer chooses a letter behind J where the question lists no options.
        (r#"{"prompt":"?","answer":"K","match":"choice"}"#, "`answer` is \"K\"; expected a letter"),
        (r#"{"prompt":"?","answer":" ","match":"exact"}"#, "an empty `answer`"),
        (r#"{"prompt":"?","answer":"A","match":"choice","choices":["x","y"]}"#, "`choices`, which swat cannot honour"),
        (r#"{"prompt":7,"answer":"x","match":"exact"}"#, "`prompt` is a number"),
    ];
    for (line, expected) in cases {
        let error = read(line).unwrap_err().to_string();
        assert!(error.contains("task.jsonl:1: found") && error.contains(expected), "{error}");
    }
}
