//! Training conversations in their four layouts.

use swat::data::{Conversation, JsonLines};
use swat::error::Result;

fn read(line: &str) -> Result<Vec<(String, String)>> {
    let all = JsonLines::new(line.as_bytes(), "t.jsonl").parse_all(Conversation::from_line)?;
    Ok(all.into_iter().flat_map(|c| c.messages).map(|m| (m.role, m.content)).collect())
}

fn turns(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(r, c)| (r.to_string(), c.to_string())).collect()
}

fn error(line: &str) -> String {
    read(line).unwrap_err().to_string()
}

#[test]
fn all_layouts_give_the_same_conversation() {
    let expected = turns(&[("user", "Q"), ("assistant", "A")]);
    for line in [
        r#"{"instruction":"Q","input":"","output":"A","text":"unused"}"#,
        r#"{"instruction":"Q","input":null,"output":"A"}"#,
        r#"{"conversations":[{"from":"system","value":""},{"from":"human","value":"Q"},{"from":"gpt","value":"A"}]}"#,
        r#"{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}],"prompt":"Q"}"#,
        r#"{"messages":[{"role":"user","content":[{"type":"text","text":"Q"}]},{"role":"assistant","content":"A"}]}"#,
        r#"{"prompt":"Q","completion":"A"}"#,
        r#"{"prompt":[{"role":"user","content":"Q"}],"completion":[{"role":"assistant","content":"A"}]}"#,
    ] {
        assert_eq!(read(line).unwrap(), expected, "{line}");
    }
}

#[test]
fn an_alpaca_input_goes_below_the_instruction() {
    let read = read(r#"{"instruction":"Translate.","input":"chat","output":"cat"}"#).unwrap();
    assert_eq!(read, turns(&[("user", "Translate.\n\nchat"), ("assistant", "cat")]));
}

#[test]
fn a_file_may_mix_layouts() {
    let read = read("{\"prompt\":\"a\",\"completion\":\"b\"}\n{\"instruction\":\"c\",\"output\":\"d\"}").unwrap();
    assert_eq!(read.len(), 4);
}

#[test]
fn text_parts_are_joined() {
    let line = r#"{"messages":[{"role":"user","content":[{"text":"a"},{"type":"text","text":"b"}]},
        {"role":"assistant","content":"c"}]}"#
        .replace('\n', " ");
    assert_eq!(read(&line).unwrap()[0].1, "ab");
}

#[test]
fn wrong_lines_say_what_is_wrong() {
    let cases = [
        (r#"{"question":"Q","answer":"A"}"#, "[`question`, `answer`]; expected the keys of alpaca"),
        (r#"{"prompt":"Q"}"#, "prompt-completion (`prompt`, `completion`)"),
        (r#"{"prompt":"Q","completion":"A","messages":[]}"#, "keys of more than one layout"),
        (r#"{"messages":"hello"}"#, "`messages` is a string"),
        (r#"{"messages":[]}"#, "no turns"),
        (r#"{"messages":[3]}"#, "`messages[0]` is a number"),
        (r#"{"messages":[{"role":"tool","content":"x"}]}"#, "`messages[0].role` is \"tool\""),
        (r#"{"messages":[{"content":"x"}]}"#, "`messages[0].role` is missing"),
        (r#"{"messages":[{"role":"user","content":null}]}"#, "`messages[0].content` is null"),
        (r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#, "of type \"image_url\""),
        (r#"{"messages":[{"role":"user","content":"x"}]}"#, "the last turn is the user's"),
        (r#"{"messages":[{"role":"assistant","content":"x"}]}"#, "turn 1 has the role assistant, not user"),
        (r#"{"instruction":"Q","output":" "}"#, "an empty `output`"),
        (r#"{"instruction":"Q","output":7}"#, "`output` is a number"),
    ];
    for (line, expected) in cases {
        let message = error(line);
        assert!(message.starts_with("t.jsonl:1: found") && message.contains(expected), "{message}");
    }
    let late = r#"{"messages":[{"role":"user","content":"x"},{"role":"system","content":"y"}]}"#;
    assert!(error(late).contains("turn 2 has the role system"));
}
