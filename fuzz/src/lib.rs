//! What is fuzzed: functions that take the bytes of a file of somebody else. None may panic, take a second, or take a
//! gigabyte of memory. `cargo test --test fuzz` runs them on mutations of `fuzz/corpus`, `scripts/fuzz.sh` under
//! libFuzzer.

use serde_json::{Value, json};
use std::cell::{Cell, OnceCell};
use std::collections::BTreeMap;
use std::fs;
use std::io::Cursor;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use swat::data::{Chat, Conversation, Example, RowOptions, RowReader, SecurityPrompt, Task};
use swat::io::safetensors::{Dtype, Safetensors, TensorSpec, write_weights};
use swat::model::{ChatTemplate, ModelConfig, ModelDir, Tokenizer, TokenizerConfig};
use swat::secure::{ModsRob, Probe, RobustnessMap};
use tempfile::TempDir;

/// A target: its name, which is that of its corpus, and what it does with the bytes; returns whether they are accepted.
pub type Target = (&'static str, fn(&[u8]) -> bool);

/// All targets.
pub const TARGETS: [Target; 12] = [
    ("safetensors", safetensors),
    ("index", index),
    ("config", config),
    ("side_files", side_files),
    ("tokenizer", tokenizer),
    ("template", template),
    ("rows", rows),
    ("parquet", parquet),
    ("probe", probe),
    ("map", map),
    ("adapter_config", adapter_config),
    ("adapter_weights", adapter_weights),
];

/// The target `name`. Found when a binary is compiled, it leaves the others, and the counters of their branches that
/// libFuzzer looks through after each input, out of it.
///
/// # Panics
/// Where there is no such target.
pub const fn target(name: &str) -> fn(&[u8]) -> bool {
    let mut i = 0;
    while i < TARGETS.len() {
        if same(TARGETS[i].0.as_bytes(), name.as_bytes()) {
            return TARGETS[i].1;
        }
        i += 1;
    }
    panic!("no such target")
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

thread_local! {
    /// Where the last panic was.
    static PANIC: Cell<Option<String>> = const { Cell::new(None) };
}

/// Makes panics silent: libFuzzer takes those for crashes that swat turns into errors.
pub fn keep_panics() {
    std::panic::set_hook(Box::new(|panic| PANIC.set(panic.location().map(ToString::to_string))));
}

/// Runs a target, and ends the process where it panics.
pub fn run(target: fn(&[u8]) -> bool, bytes: &[u8]) {
    if let Err(cause) = catch_unwind(AssertUnwindSafe(|| target(bytes))) {
        let text = cause.downcast_ref::<String>().cloned();
        let text = text.or_else(|| cause.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        eprintln!("a panic at {}: {}", PANIC.take().unwrap_or_default(), text.unwrap_or_default());
        std::process::abort();
    }
}

/// Folders of a thread, in memory where there is a file system for it.
struct Files {
    root: TempDir,
    chat: (Tokenizer, Conversation),
    /// The small model.
    model: ModelConfig,
    /// The file beside the tokenizer that was written last.
    beside: Cell<Option<&'static str>>,
}

thread_local! {
    static FILES: OnceCell<Files> = const { OnceCell::new() };
}

/// Calls `run` with the folders of this thread.
fn with<T>(run: impl FnOnce(&Files) -> T) -> T {
    FILES.with(|files| run(files.get_or_init(Files::new)))
}

impl Files {
    fn new() -> Self {
        let memory = Path::new("/dev/shm");
        let place = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let root = tempfile::Builder::new().prefix("swat-fuzz").tempdir_in(place).expect("a temporary folder");
        for name in ["model", "index", "side", "adapter", "weights", "file"] {
            fs::create_dir(root.path().join(name)).expect("a folder");
        }
        for name in ["model", "index", "side"] {
            let dir = root.path().join(name);
            fs::write(dir.join("config.json"), small_config().to_string()).expect("config.json");
            let weights = |name: &str, specs: &[TensorSpec]| {
                write_weights(&dir.join(name), specs, |i| Ok(vec![0.5; specs[i].shape.iter().product()])).expect(name)
            };
            let specs = small_weights();
            match name {
                "index" => {
                    weights("a.safetensors", &specs[..3]);
                    weights("b.safetensors", &specs[3..]);
                }
                _ => weights("model.safetensors", &specs),
            }
        }
        fs::write(root.path().join("side/tokenizer.json"), small_tokenizer().to_string()).expect("tokenizer.json");
        let settings = json!({ "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"],
            "modules_to_save": ["model.norm"] });
        fs::write(root.path().join("weights/adapter_config.json"), settings.to_string()).expect("adapter_config.json");
        write_adapter(&root.path().join("adapter/adapter_model.safetensors"));
        let path = root.path().join("tokenizer.json");
        fs::write(&path, include_bytes!("../../assets/tiny/tokenizer.json")).expect("tokenizer.json");
        let tokenizer = Tokenizer::open(&path).expect("the tiny model's tokenizer");
        let conversation = RowReader::default().read_from(Cursor::new(CONVERSATION), "x.json", Conversation::from_row);
        let conversation = conversation.expect("a conversation").remove(0);
        let model = ModelConfig::from_json(&small_config(), "config.json").expect("the small model");
        Self { root, chat: (tokenizer, conversation), model, beside: Cell::new(None) }
    }

    /// Writes a file and returns its path.
    fn write(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.root.path().join(name);
        fs::write(&path, bytes).expect(name);
        path
    }

    fn dir(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }
}

/// A model of one layer, in which every tensor has a few values.
fn small_config() -> Value {
    json!({ "model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": true })
}

fn small_weights() -> Vec<TensorSpec> {
    let config = ModelConfig::from_json(&small_config(), "config.json").expect("the small model");
    let spec = |(id, shape): (swat::modules::ParamId, Vec<usize>)| TensorSpec {
        name: id.to_string(),
        dtype: Dtype::F32,
        shape,
    };
    config.params().into_iter().map(spec).collect()
}

/// An adapter of rank 2 on q_proj and v_proj of the small model.
fn write_adapter(path: &Path) {
    let (rank, hidden) = (2, 4);
    let spec = |(name, shape): (&str, [usize; 2])| TensorSpec {
        name: format!("base_model.model.model.layers.0.self_attn.{name}.weight"),
        dtype: Dtype::F32,
        shape: shape.to_vec(),
    };
    let specs = [
        ("q_proj.lora_A", [rank, hidden]),
        ("q_proj.lora_B", [hidden, rank]),
        ("v_proj.lora_A", [rank, hidden]),
        ("v_proj.lora_B", [hidden / 2, rank]),
    ];
    let specs = specs.map(spec);
    write_weights(path, &specs, |i| Ok(vec![0.5; specs[i].shape.iter().product()])).expect("an adapter");
}

fn small_tokenizer() -> Value {
    json!({ "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "pre_tokenizer": { "type": "Whitespace" }, "decoder": null,
        "added_tokens": [{ "id": 1, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true }],
        "model": { "type": "WordLevel", "vocab": { "a": 0, "<s>": 1, "b": 2, "c": 3 }, "unk_token": "a" } })
}

/// Every kind of message.
const CONVERSATION: &str = r#"[{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
 {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]},
 {"role": "tool", "content": "7"}, {"role": "assistant", "content": "It is 7.", "reasoning_content": "f says 7"},
 {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]}]"#;

/// A safetensors file.
fn safetensors(bytes: &[u8]) -> bool {
    with(|files| {
        let Ok(file) = Safetensors::open(&files.write("file/x.safetensors", bytes)) else { return false };
        for (name, ..) in file.tensors() {
            let _ = file.values(name);
        }
        true
    })
}

/// `model.safetensors.index.json`.
fn index(bytes: &[u8]) -> bool {
    with(|files| {
        files.write("index/model.safetensors.index.json", bytes);
        read_all(ModelDir::open(&files.dir("index")))
    })
}

/// Reads every tensor of a model that opens.
fn read_all(model: swat::error::Result<ModelDir>) -> bool {
    let Ok(model) = model else { return false };
    let adapters: Vec<_> = model.adapter_params().flat_map(|(_, _, tensors)| tensors).collect();
    for (id, shape) in model.config.params().into_iter().chain(adapters) {
        let _ = model.tensor(id, &shape);
    }
    model.hash().is_ok()
}

/// `config.json`.
fn config(bytes: &[u8]) -> bool {
    with(|files| {
        let Ok(config) = ModelDir::read_config(&files.write("file/config.json", bytes)) else { return false };
        let _ = (config.params(), config.cells());
        true
    })
}

/// One of the files beside the tokenizer, which the first byte chooses.
fn side_files(bytes: &[u8]) -> bool {
    const NAMES: [&str; 4] =
        ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "generation_config.json"];
    let Some((chosen, bytes)) = bytes.split_first() else { return false };
    with(|files| {
        let dir = files.dir("side");
        let name = NAMES[*chosen as usize % NAMES.len()];
        if let Some(other) = files.beside.replace(Some(name)).filter(|other| *other != name) {
            fs::remove_file(dir.join(other)).expect(other);
        }
        files.write(&format!("side/{name}"), bytes);
        let Ok(model) = ModelDir::open(&dir) else { return false };
        let _ = (TokenizerConfig::read(&dir), model.chat_template(None));
        let Ok(tokenizer) = model.tokenizer() else { return false };
        let tokens = tokenizer.encode_with_spans("a <s> b </s> c").unwrap_or_default();
        let ids: Vec<u32> = tokens.into_iter().map(|(id, _)| id).collect();
        let _ = (tokenizer.decode(&ids), tokenizer.decode_all(&ids));
        true
    })
}

/// `tokenizer.json`.
fn tokenizer(bytes: &[u8]) -> bool {
    with(|files| {
        let Ok(tokenizer) = Tokenizer::open(&files.write("file/tokenizer.json", bytes)) else { return false };
        let tokens = tokenizer.encode("a b\n  <s>c 12 Ünï");
        let _ = tokenizer.encode_with_spans("a b\n  <s>c 12 Ünï");
        let _ = tokenizer.decode(&tokens.unwrap_or_default());
        true
    })
}

/// A chat template: a conversation, its prompt and its mask.
fn template(bytes: &[u8]) -> bool {
    let source = String::from_utf8_lossy(bytes);
    let special = BTreeMap::from([("eos_token".to_owned(), "<|im_end|>".to_owned())]);
    let Ok(template) = ChatTemplate::new(&source, "chat_template.jinja", special) else { return false };
    with(|files| {
        let (tokenizer, conversation) = &files.chat;
        let chat = Chat::new(template, tokenizer.clone(), &[2]);
        let _ = Example::from_conversation(conversation, &chat, 256);
        chat.prompt(&conversation.messages[..2], &[]).is_ok()
    })
}

/// Rows of a data file, whose name the first byte chooses; read as training data, prompts and tasks.
fn rows(bytes: &[u8]) -> bool {
    let Some((chosen, bytes)) = bytes.split_first() else { return false };
    let name = ["file/x.jsonl", "file/x.json", "file/x.csv", "file/x.tsv"][*chosen as usize % 4];
    with(|files| read_rows(&files.write(name, bytes), chosen / 4))
}

/// A Parquet file, read likewise.
fn parquet(bytes: &[u8]) -> bool {
    with(|files| read_rows(&files.write("file/x.parquet", bytes), 4))
}

/// Reads a data file as every kind of data.
fn read_rows(path: &Path, options: u8) -> bool {
    let options = RowOptions {
        columns: if options & 1 == 1 { vec!["prompt=question".parse().expect("a column")] } else { Vec::new() },
        field: (options & 2 == 2).then(|| "data".to_owned()),
        skip_bad_rows: options & 4 == 4,
    };
    let mut reader = RowReader::new(&options);
    let conversations = Conversation::read(path, &mut reader).is_ok();
    let prompts = SecurityPrompt::read(path, 1, &mut reader).is_ok();
    let tasks = Task::read(path, &mut reader).is_ok();
    let _ = reader.check_used();
    conversations || prompts || tasks
}

/// The file of `swat probe`.
fn probe(bytes: &[u8]) -> bool {
    with(|files| {
        let path = files.write("file/probe.safetensors", bytes);
        let _ = Probe::is_file(&path);
        Probe::load(&path).is_ok_and(|probe| probe.hash().is_ok())
    })
}

/// The files of `swat robustness` and `swat search`.
fn map(bytes: &[u8]) -> bool {
    with(|files| {
        let path = files.write("file/map.json", bytes);
        let _ = (RobustnessMap::is_file(&path), ModsRob::is_file(&path));
        if let Ok(map) = RobustnessMap::load(&path) {
            return map.hash().is_ok();
        }
        ModsRob::load(&path).is_ok_and(|found| found.modules(&files.model.cells()).is_ok())
    })
}

/// `adapter_config.json`, beside weights of an adapter on q_proj and v_proj.
fn adapter_config(bytes: &[u8]) -> bool {
    with(|files| {
        files.write("adapter/adapter_config.json", bytes);
        read_all(ModelDir::open_with_adapter(&files.dir("model"), &files.dir("adapter")))
    })
}

/// `adapter_model.safetensors`, beside a configuration.
fn adapter_weights(bytes: &[u8]) -> bool {
    with(|files| {
        files.write("weights/adapter_model.safetensors", bytes);
        read_all(ModelDir::open_with_adapter(&files.dir("model"), &files.dir("weights")))
    })
}
