//! JSON Lines: places, limits and errors.

use swat::data::{JsonLines, Line, MAX_LINE_BYTES};
use swat::error::Result;

fn lines(bytes: &[u8]) -> Result<Vec<Line>> {
    JsonLines::new(bytes, "train.jsonl").collect()
}

fn error(bytes: &[u8]) -> String {
    lines(bytes).unwrap_err().to_string()
}

#[test]
fn lines_are_numbered_as_in_the_file_and_blank_ones_skipped() {
    let read = lines(b"\xef\xbb\xbf\n{\"a\":1}\r\n  \n\n{\"b\":\"\xc3\xa9\"}").unwrap();
    let places: Vec<&str> = read.iter().map(|l| l.place.as_str()).collect();
    assert_eq!(places, ["train.jsonl:2", "train.jsonl:5"]);
    assert_eq!(read[1].text("b").unwrap(), "é");
}

#[test]
fn errors_name_line_and_reason() {
    assert!(error(b"").starts_with("train.jsonl: found no line with an object"));
    assert!(error(b"\n \n").starts_with("train.jsonl: found no line with an object"));
    assert!(error(b"{}\n{\"a\": }").starts_with("train.jsonl:2: found invalid JSON at column 7 (expected value)"));
    assert!(error(b"{}\n\n{\"a\":\"\xff\"}").starts_with("train.jsonl:3: found bytes that are not UTF-8 (byte 7"));
    assert!(error(b"[{\"a\":1}]").contains("jq -c"));
    assert!(error(b"{\"a\":1}{\"a\":1}").contains("trailing characters"));
}

#[test]
fn an_error_about_a_value_does_not_quote_it() {
    let message = error(b"\"secret words\"");
    assert!(message.contains("not an object") && !message.contains("secret"), "{message}");
}

#[test]
fn a_key_may_be_repeated_only_with_the_same_value() {
    assert_eq!(lines(b"{\"a\":[1],\"a\":[1]}").unwrap()[0].fields.len(), 1);
    assert!(error(b"{\"a\":1,\"a\":2}").contains("the key `a` twice"));
}

#[test]
fn a_line_may_be_as_long_as_the_limit_and_no_longer() {
    let line = |bytes: usize| format!("{{\"a\":\"{}\"}}\n", "x".repeat(bytes - 8)).into_bytes();
    assert_eq!(lines(&line(MAX_LINE_BYTES)).unwrap().len(), 1);
    assert!(error(&line(MAX_LINE_BYTES + 1)).contains("a line of more than"));
}

#[test]
fn deep_nesting_is_an_error() {
    let deep = format!("{{\"a\":{}", "[".repeat(1 << 20));
    assert!(error(deep.as_bytes()).contains("recursion limit"));
}

#[test]
fn nothing_comes_after_an_error() {
    let mut lines = JsonLines::new(&b"{}\nx\n{}"[..], "f");
    assert!(lines.next().unwrap().is_ok() && lines.next().unwrap().is_err());
    assert!(lines.next().is_none());
}
