//! Loss masks of real templates, with and without `{% generation %}` marks, against transformers (masks.py).

use serde_json::{Value, json};
use std::fs;
use swat::data::{Chat, Conversation, Example};
use swat::model::{ChatTemplate, Message, Tokenizer, TokenizerConfig};

#[test]
fn trained_tokens_are_those_of_transformers() {
    let all: Value = serde_json::from_str(include_str!("masks.json")).unwrap();
    let setting = &all["setting"];
    let dir = tempfile::tempdir().unwrap();
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny/tokenizer.json");
    fs::copy(tiny, dir.path().join("tokenizer.json")).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), setting["tokenizer_config"].to_string()).unwrap();
    let config = TokenizerConfig::read(dir.path()).unwrap();
    let tokenizer = Tokenizer::open_with(&dir.path().join("tokenizer.json"), &config).unwrap();
    let chat = |template: &Value| {
        let template = ChatTemplate::new(template.as_str().unwrap(), "t.jinja", config.special.clone()).unwrap();
        Chat::new(template, tokenizer.clone(), &[])
    };
    let cases = all["cases"].as_array().unwrap();
    assert!(cases.len() >= 60);
    let mut wrong = Vec::new();
    for case in cases {
        let name = case["template"].as_str().unwrap();
        for kind in ["marked", "plain"] {
            let chat = chat(&setting["templates"][name][kind]);
            let messages: Vec<Message> =
                serde_json::from_value(setting["chats"][case["chat"].as_str().unwrap()].clone()).unwrap();
            let found = Example::from_conversation(&Conversation::from(messages), &chat, 4096).map(Option::unwrap);
            let found =
                found.map(|e| (json!(e.tokens), json!(e.trained.iter().map(|t| u8::from(*t)).collect::<Vec<_>>())));
            match found {
                Ok((tokens, trained)) if tokens == case["ids"] && trained == case["trained"] => {}
                Ok((tokens, trained)) => wrong.push(format!(
                    "{kind} {name}, {}:\n{trained}\n{}\nsame tokens: {}",
                    case["chat"],
                    case["trained"],
                    tokens == case["ids"]
                )),
                Err(e) => wrong.push(format!("{kind} {name}, {}: {e}", case["chat"])),
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));

    // Arguments of calls as JSON text, as OpenAI's files have them. Templates that write them by `tojson` would quote them
    // once more; they are rendered as what they hold, of which transformers says the tokens.
    let text_of = |conversation: &Value| {
        let mut conversation = conversation.clone();
        for call in conversation.as_array_mut().unwrap().iter_mut().filter_map(|m| m.get_mut("tool_calls")) {
            let arguments = &mut call[0]["function"]["arguments"];
            *arguments = json!(arguments.to_string());
        }
        conversation
    };
    let mut calls = 0;
    for case in
        cases.iter().filter(|case| ["tools", "a call at the end", "a number"].map(Value::from).contains(&case["chat"]))
    {
        let messages = text_of(&setting["chats"][case["chat"].as_str().unwrap()]);
        assert!(messages[1]["tool_calls"][0]["function"]["arguments"].is_string());
        let messages: Vec<Message> = serde_json::from_value(messages).unwrap();
        let chat = chat(&setting["templates"][case["template"].as_str().unwrap()]["plain"]);
        let found = Example::from_conversation(&Conversation::from(messages), &chat, 4096).unwrap().unwrap();
        let trained: Vec<u8> = found.trained.iter().map(|t| u8::from(*t)).collect();
        assert_eq!((json!(found.tokens), json!(trained)), (case["ids"].clone(), case["trained"].clone()), "{case}");
        calls += 1;
    }
    assert!(calls >= 10, "{calls}");
    // A template that takes text as it is gets it as it is.
    let both = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{% set a = c.function.arguments %}\
                {{ a if a is string else a | tojson }}{% endfor %}<|im_end|>{% endfor %}";
    let answer = json!([{"role": "user", "content": "?"}, {"role": "assistant", "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": "{\"a\":2}"}}]}]);
    let answer: Vec<Message> = serde_json::from_value(answer).unwrap();
    assert_eq!(chat(&json!(both)).template().render(&answer).unwrap(), "?<|im_end|>{\"a\":2}<|im_end|>");
}
