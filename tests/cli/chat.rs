//! Which tokens `swat tune` trains, and where answers end: from the command line to the files of the tuned model.

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// Ignores `add_generation_prompt`; line ends of Windows.
const IGNORES: &str =
    "{% for m in messages %}\r\n<|im_start|>{{ m.role + '\\n' + m.content }}<|im_end|>\r\n{% endfor %}\r\n";

/// The tiny model, laid out as Qwen2.5's base models: its eos is not the token that ends a turn.
fn model(dir: &Path) -> PathBuf {
    let (from, to) = (Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/tiny"), dir.join("model"));
    fs::create_dir(&to).unwrap();
    for name in
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
    for (name, key, value) in [
        ("config.json", "eos_token_id", json!(0)),
        ("generation_config.json", "eos_token_id", json!(0)),
        ("tokenizer_config.json", "eos_token", json!("<|endoftext|>")),
    ] {
        let mut file = read(&to.join(name));
        file[key] = value;
        fs::write(to.join(name), file.to_string()).unwrap();
    }
    to
}

fn read(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

fn swat(command: &str, model: &Path, more: &[&str]) -> Output {
    let mut swat = Command::new(env!("CARGO_BIN_EXE_swat"));
    swat.arg(command).arg("--model").arg(model).args(["--device", "cpu", "--dtype", "f32", "--quiet"]);
    swat.args(more).output().unwrap()
}

fn parsed(output: &Output) -> Value {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn a_run_trains_shows_and_stops_at_the_end_of_the_turn() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path());
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    fs::write(path("t.jinja"), IGNORES).unwrap();
    fs::write(path("train.jsonl"), "{\"prompt\": \"hi\", \"completion\": \"ok\"}\n".repeat(2)).unwrap();
    let (data, template, out) = (path("train.jsonl"), path("t.jinja"), path("out"));
    let tune = ["--data", &data, "--chat-template", &template];

    let shown = swat("tune", &model, &[&tune[..], &["--preview"]].concat());
    let shown = String::from_utf8(shown.stdout).unwrap();
    let text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n\u{27e6}ok<|im_end|>\u{27e7}";
    assert!(shown.contains(text) && shown.contains("answers end at <|endoftext|> or <|im_end|>"), "{shown}");
    let seen = parsed(&swat("tune", &model, &[&tune[..], &["--preview", "--json"]].concat()));
    assert_eq!(seen["stop_tokens"], json!([0, 2]));
    let share = seen["data"]["trained_share"].as_f64().unwrap();
    assert!(share > 0.0 && share < 0.5 && !Path::new(&out).exists());

    let steps = ["--out", &out, "--steps", "60", "--lr", "5e-3", "--batch-size", "2", "--json"];
    let tuned = parsed(&swat("tune", &model, &[&tune[..], &steps].concat()));
    assert_eq!(tuned["data"], seen["data"]);
    assert_eq!(read(&dir.path().join("out/tune.json"))["data"], seen["data"]);
    let out = Path::new(&out);
    assert_eq!(read(&out.join("generation_config.json"))["eos_token_id"], json!([0, 2]));
    assert_eq!(fs::read_to_string(out.join("chat_template.jinja")).unwrap(), IGNORES);
    assert_eq!(read(&out.join("tokenizer_config.json"))["chat_template"], json!(IGNORES));

    // What was trained is what is generated, by the template of the output.
    let answer = parsed(&swat("generate", out, &["--prompt", "hi", "--max-new-tokens", "40", "--json"]));
    assert_eq!((&answer["text"], &answer["finish"]), (&json!("ok"), &json!("stop")));
}

#[test]
fn generation_stops_where_the_template_ends_a_turn() {
    let dir = tempfile::tempdir().unwrap();
    let model = model(dir.path());
    let answer = parsed(&swat("generate", &model, &["--prompt", "hello", "--max-new-tokens", "60", "--json"]));
    assert_eq!(answer["finish"], json!("stop"));
}
