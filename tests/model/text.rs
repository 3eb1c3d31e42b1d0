//! Tokenizer and chat templates: against transformers, against hostile files, and streaming.

use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use swat::model::{ChatTemplate, Message, Tokenizer, TokenizerConfig};
use tempfile::TempDir;

fn template(source: &str) -> Result<ChatTemplate, String> {
    let special = [("bos_token", "<s>"), ("eos_token", "</s>")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    ChatTemplate::new(source, "t.jinja", BTreeMap::from(special)).map_err(|e| e.to_string())
}

fn messages(value: &Value) -> Vec<Message> {
    serde_json::from_value(value.clone()).unwrap()
}

fn render(source: &str) -> Result<String, String> {
    let messages = messages(&json!([{"role": "user", "content": "Hi"}]));
    template(source)?.render_prompt(&messages).map_err(|e| e.to_string())
}

#[test]
fn templates_render_as_in_transformers() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("templates.json")).unwrap();
    assert!(cases.len() >= 60);
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/model/templates");
    for case in &cases {
        let name = case["template"].as_str().unwrap();
        let template = template(&fs::read_to_string(dir.join(name)).unwrap()).unwrap();
        let prompt = case["generation_prompt"].as_bool().unwrap();
        let messages = messages(&case["messages"]);
        let rendered = if prompt { template.render_prompt(&messages) } else { template.render(&messages) };
        match (&case["text"], rendered) {
            (Value::String(expected), Ok(found)) => assert_eq!(&found, expected, "{name}"),
            (Value::Object(expected), Err(found)) => {
                let expected = expected["error"].as_str().unwrap();
                assert!(found.to_string().contains(expected), "{found}\nlacks {expected}");
            }
            (expected, found) => panic!("{name}: {found:?} instead of {expected}"),
        }
    }
}

#[test]
fn pieces_of_python_render_as_in_jinja() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("snippets.json")).unwrap();
    assert!(cases.len() >= 300);
    let messages = messages(&cases[0]["messages"]);
    let mut wrong = Vec::new();
    for case in &cases[1..] {
        let source = case["source"].as_str().unwrap();
        let found = template(source).and_then(|t| t.render_prompt(&messages).map_err(|e| e.to_string()));
        if found.as_deref() != Ok(case["text"].as_str().unwrap()) {
            wrong.push(format!("{source}\n  {found:?}\n  {}", case["text"]));
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn features_of_templates() {
    assert_eq!(render("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}").unwrap(), "<s>Hi</s>");
    assert_eq!(render("{{ strftime_now('%Y') | length }}").unwrap(), "4");
    assert_eq!(render("{%- generation -%} a {%+ endgeneration %} b").unwrap(), "a  b");
    assert_eq!(render("{{ tools is none }}{{ tools is defined }}{{ nothing is defined }}").unwrap(), "TrueTrueFalse");
    assert_eq!(render("{{ 'aaa'.count('') }}{{ 'a-a'.replace('-', '+') }}").unwrap(), "4a+a");
    assert_eq!(render("{{ messages[0]['content'] | join('.') }}").unwrap(), "H.i");
}

#[test]
fn deeply_nested_lists_are_rendered() {
    assert!(render(&format!("{{% set x = [] %}}{}{{{{ x }}}}", "{% set x = [x] %}".repeat(50_000))).is_ok());
}

#[test]
fn hostile_templates_are_errors() {
    let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = b %}{% endfor %}{% endfor %}";
    let writes = "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}";
    let recurses = "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}";
    let deep = format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
    let doubles = format!("{{% set x = 'ab' %}}{}", "{% set x = x ~ x %}".repeat(60));
    let captures = format!("{{% set x = 'ab' %}}{}", "{% set x %}{{ x }}{{ x }}{% endset %}".repeat(60));
    let shares = format!("{{% set x = ['ab'] %}}{}{{{{ x }}}}", "{% set x = [x, x] %}".repeat(60));
    let long = "x".repeat((1 << 20) + 1);
    for (source, message) in [
        (loops, "takes too much time or memory"),
        (writes, "writes more than"),
        (recurses, "recursion"),
        (deep.as_str(), "recursion"),
        ("{{ raise_exception('\u{1b}[31m\n') }}", "\\u{1b}[31m\\n"),
        ("{{ raise_exception('no system role') }}", "t.jinja: found invalid operation: no system role (line 1)"),
        ("a\n{% if %}", "syntax error"),
        ("a\n{% for x in messages %}", "(line 2)"),
        ("{{ messages.a.b.c }}", "undefined"),
        ("{{ nothing.more }}", "undefined"),
        ("{{ 'x' * 1000000000 }}", "memory"),
        ("{{ range(1000000000) }}", "too many"),
        ("{{ ('a' * 10000).replace('', 'b' * 100000) }}", "memory"),
        ("{{ ('a' * 10000) | replace('', 'b' * 100000) }}", "memory"),
        ("{{ range(90000) | join('b' * 100000) }}", "memory"),
        ("{{ ('b' * 100000).join(range(90000)) }}", "memory"),
        ("{{ '{:999999999}'.format(1) }}", "format()"),
        ("{{ '%999999999d' | format(1) }}", "memory"),
        ("{{ 'x' | indent(1000000000) }}", "memory"),
        ("{{ 'x' | indent(width=1000000000, first=true) }}", "memory"),
        ("{{ 'x' | pprint | batch(1000000000, 'x') | list }}", "memory"),
        ("{{ 'x' | slice(1000000000) | list }}", "memory"),
        ("{{ 'x' | tojson(indent=1000000000) }}", "indent"),
        ("{{ 'x' | center(1000000000) }}", "center"),
        ("{{ strftime_now('%') }}", "t.jinja"),
        ("{{ nothing | tojson }}", "undefined"),
        ("{% include 'other' %}", "t.jinja"),
        ("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}", "holds a namespace"),
        ("{% set ns = namespace() %}{% set ns.x = [{'a': ns}] | reverse %}{{ ns.x }}", "holds a namespace"),
        ("{% set ns = namespace() %}{% for i in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns }}", "32 deep"),
        ("{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "memory"),
        (
            "{% set ns = namespace(x='a') %}{% for i in range(99999) %}{% set ns.x = ns.x + 'b' * 999 %}{% endfor %}",
            "memory",
        ),
        (doubles.as_str(), "memory"),
        (captures.as_str(), "memory"),
        (shares.as_str(), "writes more than"),
        ("{% macro m(x) %}{{ m([x]) }}{% endmacro %}{{ m(1) }}", "recursion"),
        ("{% set __checked = 1 %}", "a reserved name"),
        (long.as_str(), "too long"),
        ("{{ none + 1 }}", "t.jinja"),
    ] {
        let error = render(source).unwrap_err();
        assert!(error.contains(message), "{:.60}: {error}\nlacks {message}", source);
        assert!(!error.contains('\n'), "one line: {error}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_text_is_a_template_or_refused(source in "\\PC{0,60}|[{}%#a-z0-9 ()\\[\\]'\".|~+*-]{0,60}") {
        let _ = render(&source);
    }

    #[test]
    fn mutated_templates_never_panic(at in 0usize..2000, bytes in proptest::collection::vec(any::<char>(), 0..4), cut in 0usize..9) {
        let source = include_str!("templates/features.jinja");
        let mut chars: Vec<char> = source.chars().collect();
        let at = at % chars.len();
        let end = (at + cut).min(chars.len());
        chars.splice(at..end, bytes);
        let _ = render(&chars.into_iter().collect::<String>());
    }
}

/// GPT-2's printable stand-ins for bytes.
fn byte_alphabet() -> Vec<char> {
    let plain = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 256;
    (0..=255u8)
        .map(|b| {
            if plain(b) {
                return char::from(b);
            }
            next += 1;
            char::from_u32(next - 1).unwrap()
        })
        .collect()
}

/// A byte-level BPE of 258 bytes, merges and two special tokens.
fn byte_level() -> Value {
    let mut vocab: serde_json::Map<String, Value> =
        byte_alphabet().iter().enumerate().map(|(i, c)| (c.to_string(), json!(i))).collect();
    vocab.insert("he".to_owned(), json!(256));
    vocab.insert("hel".to_owned(), json!(257));
    let special = |id: u32, text: &str| {
        json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": true})
    };
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "!"},
        "added_tokens": [special(258, "<|start|>"), special(259, "<|end|>")],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<|start|>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}},
            {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [258], "tokens": ["<|start|>"]}}},
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocab, "merges": [["h", "e"], ["he", "l"]]}
    })
}

/// A tokenizer like Llama 2's: words with `▁`, bytes where a character is unknown.
fn byte_fallback() -> Value {
    let mut vocab = serde_json::Map::new();
    for token in ["<unk>", "<s>", "</s>"] {
        vocab.insert(token.to_owned(), json!(vocab.len()));
    }
    for byte in 0..=255u8 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(vocab.len()));
    }
    for token in "▁abcdehlo".chars() {
        vocab.insert(token.to_string(), json!(vocab.len()));
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "pre_tokenizer": null,
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": []}
    })
}

fn open(bytes: &[u8]) -> Result<Tokenizer, String> {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("tokenizer.json");
    fs::write(&path, bytes).unwrap();
    Tokenizer::open(&path).map_err(|e| e.to_string())
}

fn tokenizer(value: &Value) -> Tokenizer {
    open(value.to_string().as_bytes()).unwrap()
}

#[test]
fn tokens_beside_the_tokenizer_are_those_of_transformers() {
    let all: Value = serde_json::from_str(include_str!("../data/masks.json")).unwrap();
    let cases = all["tokens"].as_array().unwrap();
    assert!(cases.len() >= 7);
    for case in cases {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("tokenizer.json");
        fs::copy(concat!(env!("CARGO_MANIFEST_DIR"), "/assets/tiny/tokenizer.json"), &path).unwrap();
        for (name, file) in case["files"].as_object().unwrap() {
            fs::write(dir.path().join(name), file.to_string()).unwrap();
        }
        let t = Tokenizer::open_with(&path, &TokenizerConfig::read(dir.path()).unwrap()).unwrap();
        let ids = t.encode(case["text"].as_str().unwrap()).unwrap();
        assert_eq!(
            (json!(ids), json!(t.decode(&ids).unwrap())),
            (case["ids"].clone(), case["plain"].clone()),
            "{case}"
        );
    }
    let bad = |name: &str, text: &str| {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join(name), text).unwrap();
        TokenizerConfig::read(dir.path()).unwrap_err().to_string()
    };
    let keyed = bad("tokenizer_config.json", r#"{"added_tokens_decoder": {"x": {"content": "a"}}}"#);
    assert!(keyed.contains("tokenizer_config.json: added_tokens_decoder: found `x`"), "{keyed}");
    assert!(bad("added_tokens.json", r#"{"<a>": -1}"#).contains("added_tokens.json: found `<a>`"));
}

#[test]
fn encodes_and_decodes() {
    let t = tokenizer(&byte_level());
    assert_eq!(t.vocab(), 260);
    let ids = t.encode("hello<|end|>").unwrap();
    assert_eq!(ids.first(), Some(&257), "merged");
    assert_eq!(ids.last(), Some(&259), "special tokens in text count, and neither truncation nor padding does");
    assert_eq!(ids.len(), 4);
    assert_eq!(t.encode_with_special_tokens("hello").unwrap()[0], 258);
    assert_eq!(t.decode(&ids).unwrap(), "hello");
    assert_eq!(t.decode(&[9999, u32::MAX]).unwrap(), "");
}

fn streamed(t: &Tokenizer, ids: &[u32]) -> String {
    let mut stream = t.stream();
    let mut text = String::new();
    for id in ids {
        text += &stream.step(*id).unwrap();
    }
    text + &stream.finish().unwrap()
}

#[test]
fn streams_give_whole_characters() {
    let t = tokenizer(&byte_level());
    let ids = t.encode("aé😀").unwrap();
    assert_eq!(ids.len(), 7);
    let mut stream = t.stream();
    let pieces: Vec<String> = ids.iter().map(|id| stream.step(*id).unwrap()).collect();
    assert_eq!(pieces, ["a", "", "é", "", "", "", "😀"]);
    assert_eq!(stream.finish().unwrap(), "");
    assert_eq!(streamed(&t, &ids[..5]), "aé\u{FFFD}", "an answer cut inside a character");
    // Half a character for ever: it must come out and must not slow down.
    let half = vec![ids[1]; 1000];
    assert_eq!(streamed(&t, &half), "\u{FFFD}".repeat(1000));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn streams_add_up(text in "[a-e lhoé世😀\n]{0,40}|\\PC{0,20}") {
        for t in [tokenizer(&byte_level()), tokenizer(&byte_fallback())] {
            let ids = t.encode(&text).unwrap();
            let decoded = t.decode(&ids).unwrap();
            prop_assert_eq!(streamed(&t, &ids), decoded);
        }
    }

    #[test]
    fn any_tokens_stream(ids in proptest::collection::vec(0u32..300, 0..200)) {
        for t in [tokenizer(&byte_level()), tokenizer(&byte_fallback())] {
            streamed(&t, &ids);
        }
    }

    #[test]
    fn mutated_tokenizers_never_panic(at in 0usize..1_000_000, byte: u8, cut in 0usize..5, base: bool) {
        let mut bytes = if base { byte_level() } else { byte_fallback() }.to_string().into_bytes();
        let at = at % bytes.len();
        let end = (at + cut).min(bytes.len());
        bytes.splice(at..end, [byte]);
        if let Ok(t) = open(&bytes) {
            let _ = t.encode_with_special_tokens("hello wörld <|end|>").and_then(|ids| t.decode(&ids));
        }
    }
}

#[test]
fn malformed_tokenizers_are_errors() {
    for bytes in [&b""[..], b"{", b"[]", b"\xff\xfe", b"{\"version\": \"1.0\"}"] {
        let error = open(bytes).err().unwrap();
        assert!(error.contains("tokenizer.json: found a malformed tokenizer"), "{error}");
    }
    let mut value = byte_level();
    value["model"]["vocab"] = json!({});
    value["model"]["merges"] = json!([]);
    value["added_tokens"] = json!([]);
    value["post_processor"] = Value::Null;
    assert!(open(value.to_string().as_bytes()).err().unwrap().contains("no tokens"));
    let error = open(&vec![b' '; (1 << 26) + 1]).err().unwrap();
    assert!(error.contains("more than 67108864 bytes"), "{error}");
}
