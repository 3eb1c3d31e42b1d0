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
}
