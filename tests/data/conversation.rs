//! Training conversations in their four layouts.

use std::io::Cursor;
use swat::data::{Conversation, RowOptions, RowReader};
use swat::error::Result;
use swat::model::Training;

fn conversations(lines: &str) -> Result<Vec<Conversation>> {
    RowReader::default().read_from(Cursor::new(lines.to_owned()), "t.jsonl", Conversation::from_row)
}

fn read(line: &str) -> Result<Vec<(String, String)>> {
    let all = conversations(line)?;
    Ok(all.into_iter().flat_map(|c| c.messages).map(|m| (m.role, m.content)).collect())
}

/// Role, text and whether it is trained, of each message of one row.
fn trained(line: &str) -> Vec<(String, String, bool)> {
    let mut all = conversations(line).unwrap();
    let messages = all.remove(0).messages.into_iter();
    messages.map(|m| (m.role, m.content, m.training == Training::Trained)).collect()
}

/// Which of a row's answers are trained.
fn trained_answers(line: &str) -> Vec<bool> {
    trained(line).into_iter().filter(|(role, ..)| role == "assistant").map(|(_, _, trained)| trained).collect()
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
        r#"{"messages":"[{\"role\":\"user\",\"content\":\"Q\"},{\"role\":\"assistant\",\"content\":\"A\"}]"}"#,
        r#"{"conversations":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}]}"#,
        r#"{"messages":[{"from":"human","value":"Q"},{"from":"gpt","value":"A"}]}"#,
        r#"{"conversation":[{"role":"user","content":"Q"},{"role":"assistant","content":"A"}],"model":"x"}"#,
        r#"{"conversation":[{"input":"Q","output":"A"}],"source":"x"}"#,
        r#"{"conversation":[{"system":"","input":"Q","output":"A"}]}"#,
        r#"{"conversation":[{"human":"Q","assistant":"A"}],"conversation_id":1}"#,
        r#"{"prompt":"Q","completion":"A"}"#,
        r#"{"prompt":"Q","response":"A"}"#,
        r#"{"prompt":"Q","answer":"A","id":7,"source":"s","label":true}"#,
        r#"{"query":"Q","response":"A"}"#,
        r#"{"question":"Q","answer":"A"}"#,
        r#"{"instruction":"Q","context":"","response":"A"}"#,
        r#"{"input":"Q","output":"A"}"#,
        r#"{"mask":"User","system":"","conversations":[{"from":"User","value":"Q"},{"from":"Assistant","value":"A"}]}"#,
        r#"{"prompt":"Q","completion":"A","input":"","context":null}"#,
        r#"{"prompt":[{"role":"user","content":"Q"}],"completion":[{"role":"assistant","content":"A"}]}"#,
        r#"{"prompt":[{"role":"user","content":"Q"}],"answer":"A","data_source":"x"}"#,
        r#"{"messages":[{"role":"user","content":"Q","masked":false},{"role":"assistant","content":"A","prefix":false}]}"#,
    ] {
        assert_eq!(read(line).unwrap(), expected, "{line}");
    }
}

#[test]
fn an_alpaca_input_goes_below_the_instruction() {
    let read = read(r#"{"instruction":"Translate.","input":"chat","output":"cat"}"#).unwrap();
    assert_eq!(read, turns(&[("user", "Translate.\n\nchat"), ("assistant", "cat")]));
}

/// What the error says to do.
#[test]
fn text_beside_a_prompt_is_part_of_the_question_or_not() {
    let line = r#"{"prompt":"Translate.","context":"chat","completion":"cat"}"#;
    let with = |columns: &[&str]| {
        let columns = columns.iter().map(|column| column.parse().unwrap()).collect();
        let mut rows = RowReader::new(&RowOptions { columns, ..RowOptions::default() });
        rows.read_from(Cursor::new(line), "t.jsonl", Conversation::from_row)
            .map(|all| all[0].messages.iter().map(|m| (m.role.clone(), m.content.clone())).collect::<Vec<_>>())
    };
    assert!(with(&[]).is_err());
    let appended = with(&["instruction=prompt"]).unwrap();
    assert_eq!(appended, turns(&[("user", "Translate.\n\nchat"), ("assistant", "cat")]));
    assert_eq!(with(&["unused=context"]).unwrap(), turns(&[("user", "Translate."), ("assistant", "cat")]));
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
        (r#"{"prompts":"Q","answer":"A"}"#, "[`prompts`, `answer`]; expected the keys of alpaca"),
        (r#"{"prompt":"Q"}"#, "prompt-completion (`prompt`, `completion`)"),
        (r#"{"prompt":"Q","completion":"A","messages":[]}"#, "keys of more than one layout"),
        (r#"{"messages":"hello"}"#, "`messages` is a string"),
        (r#"{"messages":[]}"#, "no turns"),
        (r#"{"messages":[3]}"#, "`messages[0]` is a number"),
        (r#"{"messages":[{"role":"critic","content":"x"}]}"#, "`messages[0].role` is \"critic\""),
        (r#"{"messages":[{"role":"tool","content":"x"}]}"#, "turn 1 has the role tool, not user"),
        (r#"{"messages":[{"content":"x"}]}"#, "`messages[0].role` is missing"),
        (r#"{"messages":[{"role":"user","content":null}]}"#, "`messages[0].content` is null"),
        (r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#, "of type \"image_url\""),
        (r#"{"messages":[{"role":"user","content":"x"}]}"#, "the last turn is the user's"),
        (r#"{"messages":[{"role":"assistant","content":"x"}]}"#, "turn 1 has the role assistant, not user"),
        (r#"{"instruction":"Q","output":" "}"#, "an empty `output`"),
        (r#"{"instruction":"Q","output":7}"#, "`output` is a number"),
        (
            r#"{"prompt":"Q","input":"text","completion":"A"}"#,
            "`input` beside `prompt`; expected --columns instruction=prompt,",
        ),
        (
            r#"{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A","mask":true}]}"#,
            "`messages[1].mask`, which swat cannot honour",
        ),
        (
            r#"{"messages":[{"role":"user","content":"Q","masked":true},{"role":"assistant","content":"A"}]}"#,
            "`messages[0].masked`",
        ),
        (
            r#"{"messages":[{"role":"user","content":"Q"},{"role":"assistant","content":"A","prefix":true}]}"#,
            "whole answers",
        ),
        (
            r#"{"prompt":"Q","answer":"A","loss_mask":[0,1]}"#,
            "`loss_mask`, which swat cannot honour here; expected `weight` or `train`",
        ),
        (r#"{"prompt":"Q","answer":"A","enable_thinking":false}"#, "`enable_thinking`"),
        (r#"{"prompt":"Q","completion":"A","suffix":"Z"}"#, "`suffix`, which swat cannot honour here"),
        (r#"{"prompt":"Q","answer":"A","documents":[{"text":"x"}]}"#, "--columns unused=KEY leaves it out"),
        (r#"{"prompt":"Q","context":["text"],"response":"A"}"#, "--columns unused=context if it is no part"),
    ];
    for (line, expected) in cases {
        let message = error(line);
        assert!(message.starts_with("t.jsonl:1: found") && message.contains(expected), "{message}");
    }
    let late = r#"{"messages":[{"role":"user","content":"x"},{"role":"system","content":"y"}]}"#;
    assert!(error(late).contains("turn 2 has the role system"));
}

/// `weight` as in the fine-tuning files of OpenAI and Mistral, `train` as in axolotl.
#[test]
fn turns_say_whether_they_are_trained() {
    let chat = |first: &str, second: &str, row: &str| {
        format!(
            r#"{{"messages":[{{"role":"user","content":"a"}},{{"role":"assistant","content":"b"{first}}},
            {{"role":"user","content":"c"}},{{"role":"assistant","content":"d"{second}}}]{row}}}"#
        )
        .replace('\n', " ")
    };
    for (first, second, row, expected) in [
        ("", "", "", [true, true]),
        (r#","weight":0"#, "", "", [false, true]),
        (r#","weight":1"#, r#","weight":0.0"#, "", [true, false]),
        (r#","train":false"#, r#","train":true"#, "", [false, true]),
        (r#","training":false"#, r#","weight":null"#, "", [false, true]),
        (r#","loss":false"#, r#","loss":true"#, "", [false, true]),
        (r#","loss_weight":0.0"#, r#","loss_weight":1.0"#, "", [false, true]),
        ("", r#","trainable":false"#, "", [true, false]),
        ("", "", r#","loss_weight":0"#, [false, false]),
        (r#","weight":"0""#, r#","train":"True""#, "", [false, true]),
        ("", "", r#","weight":0"#, [false, false]),
        ("", "", r#","train":false"#, [false, false]),
        (r#","weight":0"#, "", r#","train":true"#, [false, true]),
    ] {
        assert_eq!(trained_answers(&chat(first, second, row)), expected, "{first} {second} {row}");
    }
    for (first, row, expected) in [
        (r#","weight":0.5"#, "", "`messages[1].weight` with another value"),
        (r#","weight":0,"train":true"#, "", "`messages[1].train` against another key"),
        (r#","train_detail":[{"begin_offset":0}]"#, "", "`messages[1].train_detail`"),
        ("", r#","weight":3"#, "`weight` with another value"),
    ] {
        let message = error(&chat(first, "", row));
        assert!(message.starts_with("t.jsonl:1: ") && message.contains(expected), "{message}");
    }
    let asked = r#"{"messages":[{"role":"user","content":"a","weight":1},{"role":"assistant","content":"b"}]}"#;
    assert!(error(asked).contains("`messages[0]`, a turn of the user, marked as trained"));
    assert_eq!(trained_answers(&asked.replace("\"weight\":1", "\"weight\":0")), [true]);
}

/// In TRL's prompt-completion data, the prompt's own answers are not trained (`completion_only_loss`).
#[test]
fn only_the_completion_is_learnt() {
    let line = r#"{"prompt":[{"role":"user","content":"a"},{"role":"assistant","content":"b"},{"role":"user","content":"c"}],"completion":[{"role":"assistant","content":"d"}]}"#;
    assert_eq!(trained_answers(line), [false, true]);
}

#[test]
fn system_messages_of_the_row_come_first() {
    let expected = turns(&[("system", "S"), ("user", "Q"), ("assistant", "A")]);
    for line in [
        r#"{"instruction":"Q","input":"","output":"A","system":"S"}"#,
        r#"{"system_prompt":"S","question":"Q","response":"A"}"#,
        r#"{"system_message":"S","system":"","query":"Q","response":"A"}"#,
        r#"{"conversations":[{"from":"human","value":"Q"},{"from":"gpt","value":"A"}],"system":"S"}"#,
        r#"{"conversations":[{"from":"system","value":"S"},{"from":"human","value":"Q"},{"from":"gpt","value":"A"}],"system":"S"}"#,
        r#"{"messages":[{"role":"developer","content":"S"},{"role":"user","content":"Q"},{"role":"assistant","content":"A"}]}"#,
        r#"{"prompt":"Q","completion":"A","system":"S"}"#,
    ] {
        assert_eq!(read(line).unwrap(), expected, "{line}");
    }
    let pairs = r#"{"conversation":[{"system":"S","input":"Q","output":"A"},{"input":"R","output":"B"}]}"#;
    assert_eq!(
        read(pairs).unwrap(),
        turns(&[("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "R"), ("assistant", "B")])
    );
    let late = r#"{"conversation":[{"input":"Q","output":"A"},{"system":"S","input":"R","output":"B"}]}"#;
    assert!(error(late).contains("turn 3 has the role system"), "{}", error(late));
    let two = r#"{"messages":[{"role":"system","content":"T"},{"role":"user","content":"Q"},{"role":"assistant","content":"A"}],"system":"S"}"#;
    assert!(error(two).contains("two system messages"));
    let both = r#"{"prompt":"Q","completion":"A","system":"S","system_message":"S"}"#;
    assert!(error(both).contains("both `system` and `system_message`"), "{}", error(both));
    assert!(error(r#"{"prompt":"Q","completion":"A","system":7}"#).contains("`system` is a number"));
}

#[test]
fn an_instruction_has_a_history_and_a_context() {
    let line = r#"{"instruction":"Q","input":"I","output":"A","history":[["q1","a1"],["q2","a2"]]}"#;
    let expected = [
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
        ("assistant", "a2"),
        ("user", "Q\n\nI"),
        ("assistant", "A"),
    ];
    assert_eq!(read(line).unwrap(), turns(&expected));
    assert_eq!(read(r#"{"instruction":"Q","context":"C","response":"A"}"#).unwrap()[0].1, "Q\n\nC");
    assert!(error(r#"{"question":"Q","context":"C","answer":"A"}"#).contains("`context`, which swat cannot honour"));
    assert!(error(r#"{"instruction":"Q","output":"A","history":[["q"]]}"#).contains("`history` without pairs"));
}

/// The calls of LLaMA-Factory's `function_call` turns are those that transformers' templates read.
#[test]
fn tools_are_declared_called_and_answered() {
    let sharegpt = r#"{"conversations":[{"from":"human","value":"2+2?"},{"from":"function_call","value":"{\"name\": \"add\", \"arguments\": {\"a\": 2}}"},{"from":"observation","value":"4"},{"from":"gpt","value":"4."}],"tools":"[{\"name\": \"add\"}]"}"#;
    let messages = r#"{"messages":[{"role":"user","content":"2+2?"},{"role":"assistant","content":null,"tool_calls":[{"type":"function","function":{"name":"add","arguments":{"a":2}}}]},{"role":"tool","name":null,"content":"4"},{"role":"assistant","content":"4."}],"tools":[{"name":"add"}]}"#;
    let [a, b] = [sharegpt, messages].map(|line| conversations(line).unwrap().remove(0));
    assert_eq!(a, b);
    // ms-swift's names of the same turns, OpenAI's older ones and Llama 3's.
    for (call, result) in [("tool_call", "tool_response"), ("function_call", "function"), ("tool_call", "ipython")] {
        let renamed = sharegpt.replace("\"function_call\"", &format!("\"{call}\""));
        let renamed = renamed.replace("\"observation\"", &format!("\"{result}\""));
        assert_eq!(conversations(&renamed).unwrap()[0], a, "{call}, {result}");
    }
    assert_eq!(a.tools, [serde_json::json!({"name": "add"})]);
    let call = serde_json::json!([{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]);
    assert_eq!((&a.messages[1].fields["tool_calls"], a.messages[1].content.as_str()), (&call, ""));
    assert_eq!(
        a.messages.iter().map(|m| m.role.as_str()).collect::<Vec<_>>(),
        ["user", "assistant", "tool", "assistant"]
    );

    let thinking = r#"{"messages":[{"role":"user","content":"Q"},{"role":"assistant","reasoning_content":"R","content":"A","id":"x"}]}"#;
    assert_eq!(conversations(thinking).unwrap()[0].messages[1].fields["reasoning_content"], "R");
    for (line, expected) in [
        (sharegpt.replace("observation", "gpt"), "turn 3 has the role assistant, not user"),
        (sharegpt.replace("{\\\"name\\\"", "x{"), "`conversations[1]`, a function_call without a call"),
        (messages.replace("[{\"name\":\"add\"}]", "[7]"), "`tools` is a list that holds a number"),
        (messages.replace("[{\"type\"", "[7,{\"type\""), "`messages[1].tool_calls` is a list"),
        (messages.replace("\"tool_calls\"", "\"function_call\""), "`messages[1].function_call`, which swat cannot"),
    ] {
        let message = error(&line);
        assert!(message.contains(expected), "{message}");
    }
}

#[test]
fn rows_of_other_kinds_are_refused_with_what_to_do() {
    for (line, expected) in [
        (r#"{"text":"Q A"}"#, "split it into `prompt` and `completion`"),
        (r#"{"prompt":"Q","chosen":"A","rejected":"B"}"#, "--columns completion=chosen"),
        (r#"{"prompt":"Q"}"#, "a prompt without an answer"),
        (r#"{"instruction":"Q","output":NaN}"#, "`output` is null or NaN"),
        (r#"{"messages":null}"#, "`messages` is null or NaN"),
        (r#"{"input_ids":[1],"labels":[1]}"#, "`messages` in place of `input_ids`"),
        (r#"{"segments":[{"label":true,"text":"x"}]}"#, "`messages` in place of `segments`"),
        (r#"{"data":[{"prompt":"Q","completion":"A"}]}"#, "--field data"),
        (r#"{"prompt":"Q","completion":"A","label":false}"#, "`label` false, an answer that is marked as bad"),
        (r#"{"prompt":"Q","completion":"A","label":"False"}"#, "`label` false, an answer that is marked as bad"),
        (r#"{"prompt":"Q","completion":"A","images":["x.png"]}"#, "`images`, which swat cannot honour"),
        (r#"{"prompt":"Q","completion":"A","chat_template_kwargs":{"x":1}}"#, "`chat_template_kwargs`"),
        (r#"{"prompt":"Q","question":"Q","answer":"A"}"#, "keys of more than one layout"),
        (r#"{"prompt":"Q","output":"A","response":"B"}"#, "keys of more than one layout"),
    ] {
        let message = error(line);
        assert!(message.starts_with("t.jsonl:1: found") && message.contains(expected), "{message}");
    }
    let metadata = r#"{"prompt":"Q","completion":"A","images":[],"tools":null,"label":true,"score":1,"text":"Q A"}"#;
    assert_eq!(read(metadata).unwrap().len(), 2);
}
