//! Model directories: what is read, what is refused and with which words, what is written; and outputs that appear
//! whole.

mod fuzz;
mod links;
mod outputs;
mod stored;

use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use stored::*;
use swat::error::{Error, FileOp, Result};
use swat::model::{ChatFiles, Ending, ModelDir};
use swat::modules::{ModuleKind, ParamId};
use tempfile::TempDir;

#[test]
fn tensors_are_read() {
    let tensors = tensors();
    let dir = model(&config(), &tensors);
    let model = ModelDir::open(dir.path()).unwrap();
    for ((id, shape), stored) in model.config.params().into_iter().zip(&tensors) {
        assert_eq!(model.tensor(id, &shape).unwrap(), floats(stored));
    }
    let wrong = model.tensor(ParamId::FinalNorm, &[5]).unwrap_err().to_string();
    assert!(wrong.contains("tensor `model.norm.weight`: found shape [4]; expected shape [5]"), "{wrong}");
    assert!(model.tokenizer().err().unwrap().to_string().contains("no tokenizer.json"));
    assert!(model.chat_template(None).unwrap_err().to_string().contains("--chat-template FILE"));
}

#[test]
fn narrow_dtypes_are_widened() {
    let mut stored = tensors();
    let expected = floats(&stored[0]);
    stored[0].dtype = "BF16";
    stored[0].bytes = expected.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
    let norm = floats(&stored[1]);
    stored[1].dtype = "F16";
    stored[1].bytes = norm.iter().flat_map(|v| half::f16::from_f32(*v).to_le_bytes()).collect();
    let model_dir = model(&config(), &stored);
    let model = ModelDir::open(model_dir.path()).unwrap();
    assert_eq!(model.tensor(ParamId::Embedding, &[8, 4]).unwrap(), expected);
    assert_eq!(model.tensor(ParamId::InputNorm(0), &[4]).unwrap(), norm);
}

#[test]
fn values_that_are_not_finite_are_named() {
    for (bad, word) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        let mut stored = tensors();
        stored[0].bytes[4 * 13..4 * 14].copy_from_slice(&bad.to_le_bytes());
        let dir = model(&config(), &stored);
        let model = ModelDir::open(dir.path()).unwrap();
        let error = model.tensor(ParamId::Embedding, &[8, 4]).unwrap_err().to_string();
        let expected = format!("tensor `model.embed_tokens.weight`: found {word} at index [3, 1]");
        assert!(error.contains(&expected), "{error}");
    }
}

#[test]
fn directories_that_are_no_models() {
    let dir = TempDir::new().unwrap();
    assert!(error(&dir).contains("no config.json"));
    fs::write(dir.path().join("adapter_config.json"), "{}").unwrap();
    assert!(error(&dir).contains("found a LoRA adapter without the model"));
    fs::write(dir.path().join("adapter_config.json"), r#"{"base_model_name_or_path": "org/name"}"#).unwrap();
    assert!(error(&dir).contains("--model 'org/name' --adapter '"), "{}", error(&dir));
    fs::remove_file(dir.path().join("adapter_config.json")).unwrap();
    fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
    assert!(error(&dir).contains("found no weights"));
    fs::write(dir.path().join("model-00001-of-00002.safetensors"), "").unwrap();
    assert!(error(&dir).contains("without model.safetensors.index.json"));
    fs::write(dir.path().join("m.gguf"), "").unwrap();
    assert!(error(&dir).contains("the GGUF file `m.gguf` is not supported"));
    fs::write(dir.path().join("pytorch_model.bin"), "").unwrap();
    assert!(error(&dir).contains("pickled checkpoint `pytorch_model.bin`") && error(&dir).contains("save_pretrained"));

    let missing = ModelDir::open(&dir.path().join("nothing")).err().unwrap();
    assert!(missing.to_string().contains("nothing: found no such path") && missing.exit_code() == 2);
    let not_dir = ModelDir::open(&dir.path().join("config.json")).err().unwrap().to_string();
    assert!(not_dir.contains("not a directory"), "{not_dir}");
}

#[test]
fn configs_that_cannot_be_read() {
    let dir = model(&config(), &tensors());
    let path = dir.path().join("config.json");
    for (bytes, message) in [
        (&b"{\"vocab_size\": NaN}"[..], "malformed JSON"),
        (b"", "malformed JSON"),
        (b"\xff\xff", "not UTF-8 at offset 0"),
        (b"[]", "a JSON object"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "git lfs pull"),
    ] {
        fs::write(&path, bytes).unwrap();
        assert!(error(&dir).contains(message), "{}", error(&dir));
    }
    // A byte-order mark, as editors on Windows write it, is none of the text.
    fs::write(&path, format!("\u{feff}{}", config())).unwrap();
    ModelDir::open(dir.path()).unwrap();
    fs::write(&path, "[".repeat(100_000)).unwrap();
    assert!(error(&dir).contains("recursion limit"));
    fs::write(&path, " ".repeat((1 << 22) + 1)).unwrap();
    assert!(error(&dir).contains("more than 4194304 bytes"));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(error(&dir).contains("not a regular file"));
}

#[test]
fn headers_that_lie() {
    let entry = |dtype: &str, shape: &str, begin: u64, end: u64| {
        format!(r#"{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    };
    let one = |entry: String| file(&format!(r#"{{"norm":{entry}}}"#), &[0; 16]);
    let two = |a: String, b: String| file(&format!(r#"{{"a":{a},"b":{b}}}"#), &[0; 16]);
    let mut huge = file("{}", &[]);
    huge[..8].copy_from_slice(&(1u64 << 60).to_le_bytes());
    let mut truncated = safetensors(&tensors());
    truncated.truncate(truncated.len() - 3);
    let mut long = safetensors(&tensors());
    long.push(0);
    for (bytes, message) in [
        (vec![], "found 0 bytes"),
        (vec![1, 2, 3], "found 3 bytes"),
        (huge, "found a header of 1152921504606846976 bytes in a file of 10"),
        (vec![255; 64], "found a header of 18446744073709551615 bytes"),
        (truncated, "is it truncated?"),
        (long, "tensors that cover the file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n".to_vec(), "git lfs pull"),
        (file("{\"a\": 1", &[]), "malformed header"),
        (file("[]", &[]), "malformed header"),
        (file("\u{FEFF}{}", &[]), "malformed header"),
        ([&4u64.to_le_bytes()[..], b"\xff\xff\xff\xff"].concat(), "not UTF-8 at byte 0"),
        (one(entry("F32", "[5]", 0, 16)), "tensor `norm`: found bytes 0..16; expected 20 bytes for F32 of shape [5]"),
        (one(entry("F32", "[4]", 0, 32)), "tensor `norm`: found bytes 0..32; expected bytes inside the file"),
        (one(entry("F32", "[4]", 16, 0)), "tensor `norm`: found bytes 16..0"),
        (one(entry("F32", "[4]", u64::MAX - 15, u64::MAX)), "bytes inside the file"),
        (one(entry("F32", "[4294967296,4294967296,4294967296]", 0, 16)), "a shape that a file can hold"),
        (one(entry("F32", "[-1]", 0, 16)), "tensor `norm`: invalid value"),
        (one(entry("Q4", "[4]", 0, 16)), "tensor `norm`: unknown variant `Q4`"),
        (one(entry("F64", "[1]", 0, 8)), "tensors that cover the file"),
        (one(entry("F32", "[2]", 8, 16)), "leave a gap before them; expected bytes that begin at 0"),
        (two(entry("F32", "[3]", 0, 12), entry("F32", "[2]", 8, 16)), "`b`: found bytes 8..16, which overlap"),
        (two(entry("F32", "[1]", 0, 4), entry("F32", "[2]", 8, 16)), "`b`: found bytes 8..16, which leave a gap"),
        (file(&format!(r#"{{"a":{0},"a":{0}}}"#, entry("F32", "[4]", 0, 16)), &[0; 16]), "tensor `a` comes twice"),
        (file(r#"{"__metadata__":{"format":3}}"#, &[]), "malformed header"),
        (one(entry("F32", "[4]", 0, 16)), "no tensors `model.embed_tokens.weight`"),
    ] {
        let error = error_of(&bytes);
        assert!(error.contains(message), "{error}\nlacks {message}");
    }
}

#[test]
fn wrong_tensors_are_named() {
    let mut stored = tensors();
    stored[0].shape = vec![4, 8];
    let text = error(&model(&config(), &stored));
    assert!(text.contains("`model.embed_tokens.weight`: found shape [4, 8]; expected shape [8, 4]"), "{text}");

    let mut stored = tensors();
    stored[2].dtype = "I32";
    let text = error(&model(&config(), &stored));
    assert!(text.contains("`model.layers.0.self_attn.q_proj.weight`: the dtype I32 is not supported"), "{text}");

    let mut stored = tensors();
    stored.remove(2);
    let text = error(&model(&config(), &stored));
    assert!(text.contains("found no tensor `model.layers.0.self_attn.q_proj.weight`;"), "{text}");

    let mut stored = tensors();
    let mut extra = stored[1].clone();
    extra.name = "model.layers.0.self_attn.q_proj.bias\u{1b}[31m".to_owned();
    stored.push(extra);
    let text = error(&model(&config(), &stored));
    assert!(text.contains("unexpected tensor `model.layers.0.self_attn.q_proj.bias\\u{1b}[31m`"), "{text}");

    let mut stored = tensors();
    stored.push(Stored {
        name: "model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(),
        dtype: "F64",
        shape: vec![1],
        bytes: vec![0; 8],
    });
    ModelDir::open(model(&config(), &stored).path()).unwrap();
}

#[test]
fn tied_heads_follow_transformers() {
    let mut tied = config();
    tied["tie_word_embeddings"] = json!(true);
    let stored = tensors();
    let embedding = floats(&stored[0]);
    let head = stored.len() - 1;
    assert_eq!(stored[head].name, "lm_head.weight");

    let differs = model(&tied, &stored);
    let differs = ModelDir::open(differs.path()).unwrap();
    assert!(!differs.config.tied, "a head that differs is kept");
    assert_ne!(differs.tensor(ParamId::Head, &[8, 4]).unwrap(), embedding);
    let out = TempDir::new().unwrap();
    differs.write(out.path(), |id| differs.tensor(id, &shape_of(&differs, id)), u64::MAX).unwrap();
    let config: Value = serde_json::from_slice(&fs::read(out.path().join("config.json")).unwrap()).unwrap();
    assert_eq!(config["tie_word_embeddings"], false);

    let mut equal = stored.clone();
    equal[head].bytes = equal[0].bytes.clone();
    let dir = model(&tied, &equal);
    assert!(ModelDir::open(dir.path()).unwrap().config.tied);

    let alone = model(&tied, &equal[1..]);
    let alone = ModelDir::open(alone.path()).unwrap();
    assert_eq!(alone.tensor(ParamId::Embedding, &[8, 4]).unwrap(), embedding);

    let neither = error(&model(&tied, &equal[1..head]));
    assert!(neither.contains("no tensor `model.embed_tokens.weight`"), "{neither}");
    let untied = error(&model(&self::config(), &stored[..head]));
    assert!(untied.contains("no tensor `lm_head.weight`"), "{untied}");
}

fn shape_of(model: &ModelDir, id: ParamId) -> Vec<usize> {
    model.config.params().into_iter().find(|(other, _)| *other == id).unwrap().1
}

#[test]
fn shards() {
    let dir = sharded(|_| {});
    let model = ModelDir::open(dir.path()).unwrap();
    let last = tensors().pop().unwrap();
    assert_eq!(model.tensor(ParamId::Head, &[8, 4]).unwrap(), floats(&last));
    let single = self::model(&config(), &tensors());
    assert_eq!(model.hash().unwrap(), ModelDir::open(single.path()).unwrap().hash().unwrap());

    for name in ["../x.safetensors", "/etc/passwd", "..", "a/b.safetensors", "", "a\0b", "c:\\x"] {
        let text = error(&sharded(|index| index["weight_map"]["lm_head.weight"] = json!(name)));
        assert!(text.contains("expected the name of a file inside the model directory"), "{text}");
    }
    let text = error(&sharded(|index| index["weight_map"]["lm_head.weight"] = json!("c.safetensors")));
    assert!(text.contains("the shard `c.safetensors`, which does not exist"), "{text}");
    let text = error(&sharded(|index| index["weight_map"]["lm_head.weight"] = json!("a.safetensors")));
    assert!(text.contains("tensor `lm_head.weight` in \"a.safetensors\", which does not contain it"), "{text}");
    let text = error(&sharded(|index| index["weight_map"]["lm_head.weight"] = json!(7)));
    assert!(text.contains("weight_map.lm_head.weight: found a value that is not a string"), "{text}");
    let text = error(&sharded(|index| *index = json!([])));
    assert!(text.contains("weight_map: found no object"), "{text}");

    let dir = sharded(|_| {});
    fs::write(dir.path().join("b.safetensors"), safetensors(&tensors()[3..])).unwrap();
    assert!(error(&dir).contains("each tensor once"));
}

/// What frameworks make of the names, and what the state dict of a bare decoder lacks.
#[test]
fn wrapped_names_are_known() {
    let plain = model(&config(), &tensors());
    let plain = ModelDir::open(plain.path()).unwrap();
    let renamed = |rename: &dyn Fn(&str) -> String| {
        let mut stored = tensors();
        stored.iter_mut().for_each(|t| t.name = rename(&t.name));
        model(&config(), &stored)
    };
    let renamings: [&dyn Fn(&str) -> String; 7] = [
        &|name| format!("_orig_mod.{name}"),
        &|name| format!("module._orig_mod.{name}"),
        &|name| format!("base_model.model.{name}"),
        &|name| name.replace("model.layers", "model._orig_mod.layers").replace("self_attn", "self_attn._orig_mod"),
        &|name| name.replace("mlp", "_checkpoint_wrapped_module.mlp"),
        &|name| name.strip_prefix("model.").unwrap_or(name).to_owned(),
        &|name| format!("model.{name}"),
    ];
    for rename in renamings {
        let dir = renamed(rename);
        let found = ModelDir::open(dir.path()).unwrap();
        for (id, shape) in plain.config.params() {
            assert_eq!(found.tensor(id, &shape).unwrap(), plain.tensor(id, &shape).unwrap(), "{id}");
        }
        assert_eq!(found.hash().unwrap(), plain.hash().unwrap());
        // Outputs have the names that everything else reads.
        let out = TempDir::new().unwrap();
        found.write(out.path(), |id| found.tensor(id, &shape_of(&found, id)), u64::MAX).unwrap();
        let bytes = fs::read(out.path().join("model.safetensors")).unwrap();
        let names = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert!(names.tensor("model.layers.1.mlp.up_proj.weight").is_ok(), "{:?}", names.names());
    }

    let unknown = renamed(&|name| name.replace("model.layers", "transformer.h"));
    let error = error(&unknown);
    assert!(error.contains("no tensors `model.layers.0.input_layernorm.weight`"), "{error}");
    assert!(error.contains("there are tensors `transformer.h.0.input_layernorm.weight`"), "{error}");
    let mut twice = tensors();
    let mut again = twice[1].clone();
    again.name = format!("module.{}", again.name);
    twice.push(again);
    let dir = model(&config(), &twice);
    let message = ModelDir::open(dir.path()).err().unwrap().to_string();
    assert!(message.contains("as `model.layers.0.input_layernorm.weight`; expected each tensor once"), "{message}");
    let adapted = renamed(&|name| name.replace("q_proj.weight", "q_proj.lora_A.default.weight"));
    let message = ModelDir::open(adapted.path()).err().unwrap().to_string();
    assert!(message.contains("merge_and_unload"), "{message}");
}

#[test]
fn hash_sees_every_byte() {
    let hash = |config: &Value, stored: &[Stored]| {
        let dir = model(config, stored);
        ModelDir::open(dir.path()).unwrap().hash().unwrap().to_owned()
    };
    let original = hash(&config(), &tensors());
    assert_eq!(original, hash(&config(), &tensors()));
    assert_eq!(original.len(), 64);
    let mut stored = tensors();
    stored[5].bytes[3] ^= 1;
    assert_ne!(original, hash(&config(), &stored));
    let mut other = config();
    other["rms_norm_eps"] = json!(1e-6);
    assert_ne!(original, hash(&other, &tensors()));
}

/// As in transformers, a token that no text uses needs no row: `[PAD]` is often added to the tokenizer alone.
#[test]
fn tokens_without_a_row_are_refused_where_a_text_has_one() {
    let tokenizer = |last: u32| {
        json!({"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": null, "decoder": null,
            "model": {"type": "WordLevel", "vocab": {"a": 0, "b": last}, "unk_token": "a"}})
    };
    let dir = model(&config(), &tensors());
    let path = dir.path().join("tokenizer.json");
    fs::write(&path, tokenizer(7).to_string()).unwrap();
    let encode = |text: &str| ModelDir::open(dir.path()).unwrap().tokenizer().unwrap().encode(text);
    assert_eq!(encode("b a").unwrap(), [7, 0]);
    for beyond in [8, 400] {
        fs::write(&path, tokenizer(beyond).to_string()).unwrap();
        assert_eq!(encode("a a").unwrap(), [0, 0]);
        let error = encode("a b").unwrap_err();
        let expected = format!("tokenizer.json: found token {beyond}, `b`, in a text; expected tokens below 8");
        assert!(error.to_string().contains(&expected) && error.exit_code() == 2, "{error}");
    }
    fs::write(&path, "{}").unwrap();
    assert!(error(&dir).contains("malformed tokenizer"));
}

#[test]
fn chat_templates_are_found() {
    let dir = model(&config(), &tensors());
    let say =
        |model: &ModelDir, named: Option<&Path>| -> Result<String> { model.chat_template(named)?.render_prompt(&[]) };
    let opened = ModelDir::open(dir.path()).unwrap();
    let write = |value: Value| fs::write(dir.path().join("tokenizer_config.json"), value.to_string()).unwrap();
    write(
        json!({"bos_token": {"content": "<b>"}, "eos_token": "<e>", "pad_token": null, "chat_template": "{{ bos_token }}one"}),
    );
    assert_eq!(say(&opened, None).unwrap(), "<b>one");
    fs::write(dir.path().join("special_tokens_map.json"), r#"{"bos_token": "<x>", "eos_token": "<y>"}"#).unwrap();
    write(json!({"bos_token": "<b>", "eos_token": null, "chat_template": "{{ bos_token }}{{ eos_token }}"}));
    assert_eq!(
        say(&opened, None).unwrap(),
        "<x><y>",
        "special_tokens_map.json over tokenizer_config.json, as transformers"
    );
    write(json!({"bos_token": "<b>", "added_tokens_decoder": {}, "chat_template": "{{ bos_token }}{{ eos_token }}"}));
    assert_eq!(say(&opened, None).unwrap(), "<b>", "which it ignores beside an added_tokens_decoder");
    write(json!({"chat_template": [{"name": "tools", "template": "t"}, {"name": "default", "template": "two"}]}));
    assert_eq!(say(&opened, None).unwrap(), "two");
    write(json!({"chat_template": [{"name": "tools", "template": "t"}]}));
    assert!(say(&opened, None).unwrap_err().to_string().contains("none of them `default`"));
    // `tool_use` is for conversations with tools, as in transformers' `get_chat_template`.
    let with_tools = |model: &ModelDir, named: Option<&Path>| {
        let tools = [json!({ "name": "f" })];
        model.chat_template(named).unwrap().render_chat(&[], &tools, Ending::Conversation).unwrap().text
    };
    let list = json!([{"name": "default", "template": "two"}, {"name": "tool_use", "template": "{{ tools[0].name }}"}]);
    write(json!({ "chat_template": list }));
    assert_eq!((say(&opened, None).unwrap(), with_tools(&opened, None)), ("two".into(), "f".into()));
    write(json!({"chat_template": 7}));
    assert!(say(&opened, None).unwrap_err().to_string().contains("neither a string nor a list"));
    fs::write(dir.path().join("chat_template.jinja"), "three").unwrap();
    assert_eq!(say(&opened, None).unwrap(), "three");
    let named = dir.path().join("my.jinja");
    fs::write(&named, "four").unwrap();
    assert_eq!(say(&opened, Some(&named)).unwrap(), "four");
    assert_eq!(with_tools(&opened, None), "three");
    // The folder in which newer versions of transformers save further templates; it is copied along.
    let folder = dir.path().join("additional_chat_templates");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("tool_use.jinja"), "tools: {{ tools[0].name }}").unwrap();
    assert_eq!((say(&opened, None).unwrap(), with_tools(&opened, None)), ("three".into(), "tools: f".into()));
    assert_eq!(with_tools(&opened, Some(&named)), "four");
    let out = tempfile::tempdir().unwrap();
    opened.write_chat_files(out.path()).unwrap();
    let copied = out.path().join("additional_chat_templates/tool_use.jinja");
    assert_eq!(fs::read_to_string(&copied).unwrap(), "tools: {{ tools[0].name }}");
    ChatFiles { template: Some("five".into()), stop: Vec::new() }.write(&opened, out.path()).unwrap();
    assert!(!copied.exists() && !out.path().join("additional_chat_templates").exists());
    fs::write(&named, "{% if").unwrap();
    assert!(say(&opened, Some(&named)).unwrap_err().to_string().contains("my.jinja: found syntax error"));
}

#[test]
fn writes_what_it_reads() {
    let mut stored = tensors();
    let expected = floats(&stored[0]);
    stored[0].dtype = "BF16";
    stored[0].bytes = expected.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
    let dir = model(&config(), &stored);
    for (name, text) in [("tokenizer_config.json", "{}"), ("generation_config.json", "{}"), ("notes.txt", "mine")] {
        fs::write(dir.path().join(name), text).unwrap();
    }
    let model = ModelDir::open(dir.path()).unwrap();
    for (limit, files) in [(u64::MAX, 1), (400, 4), (0, 21)] {
        let out = TempDir::new().unwrap();
        model.write(out.path(), |id| model.tensor(id, &shape_of(&model, id)), limit).unwrap();
        let names: Vec<String> =
            fs::read_dir(out.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        let weights: Vec<&String> = names.iter().filter(|n| n.ends_with(".safetensors")).collect();
        assert_eq!(weights.len(), files, "{names:?}");
        assert!(!names.contains(&"notes.txt".to_owned()) && names.contains(&"tokenizer_config.json".to_owned()));
        let again = ModelDir::open(out.path()).unwrap();
        assert_eq!(again.config, model.config);
        assert_eq!(again.hash().unwrap(), model.hash().unwrap(), "same dtypes, same bytes");
        for name in weights {
            let bytes = fs::metadata(out.path().join(name)).unwrap().len();
            assert!(limit < 400 || bytes < limit.saturating_add(2048));
        }
    }
}

#[test]
fn values_round_to_nearest_even() {
    let mut stored = tensors();
    for (i, dtype) in [(1, "BF16"), (9, "F16")] {
        stored[i].dtype = dtype;
        stored[i].bytes = vec![0; 8];
    }
    let dir = model(&config(), &stored);
    let model = ModelDir::open(dir.path()).unwrap();
    let ids: Vec<ParamId> = model.config.params().into_iter().map(|(id, _)| id).collect();
    let write = |values: [f32; 4]| -> Result<(Vec<f32>, Vec<f32>)> {
        let out = TempDir::new().unwrap();
        let changed = |id| {
            let changes = id == ids[1] || id == ids[9];
            if changes { Ok(values.to_vec()) } else { model.tensor(id, &shape_of(&model, id)) }
        };
        model.write(out.path(), changed, u64::MAX)?;
        let again = ModelDir::open(out.path())?;
        Ok((again.tensor(ids[1], &[4])?, again.tensor(ids[9], &[4])?))
    };
    // Halfway between two bf16: 1 + 2⁻⁸ goes down to 1, 1 + 3·2⁻⁸ goes up to 1 + 2⁻⁶.
    let half = 2.0_f32.powi(-8);
    let (bf16, f16) = write([1.0 + half, 1.0 + 3.0 * half, -1.0 - half, 3.0]).unwrap();
    assert_eq!(bf16, [1.0, 1.0 + 4.0 * half, -1.0, 3.0]);
    assert_eq!(f16, [1.0 + half, 1.0 + 3.0 * half, -1.0 - half, 3.0]);
    let text = write([0.0, f32::NAN, 0.0, 0.0]).unwrap_err();
    assert!(text.to_string().contains(&format!("NaN at index [1] of tensor `{}`", ids[1])), "{text}");
    assert_eq!(text.exit_code(), 1);
    let text = write([0.0, 0.0, 1e5, 0.0]).unwrap_err().to_string();
    assert!(text.contains(&format!("100000 at index [2] of tensor `{}` (F16)", ids[9])), "{text}");
    let short = model.write(TempDir::new().unwrap().path(), |_| Ok(vec![0.0]), u64::MAX).unwrap_err().to_string();
    assert!(short.contains("1 values for tensor"), "{short}");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_with_the_path() {
    let dir = model(&config(), &tensors());
    let model = ModelDir::open(dir.path()).unwrap();
    let out = TempDir::new().unwrap();
    let path = out.path().join("model.safetensors");
    std::os::unix::fs::symlink("/dev/full", &path).unwrap();
    let error = model.write(out.path(), |id| model.tensor(id, &shape_of(&model, id)), u64::MAX).unwrap_err();
    assert!(matches!(&error, Error::Io { path: at, doing: FileOp::Write, .. } if *at == path), "{error}");
    assert_eq!(error.exit_code(), 1);
}

#[test]
fn biases_are_found() {
    let mut qwen = config();
    qwen["model_type"] = json!("qwen2");
    let text = error(&model(&qwen, &tensors()));
    let bias = ParamId::Bias(swat::modules::ModuleId { layer: 0, kind: ModuleKind::Q });
    assert!(text.contains(&format!("`{bias}`")) && text.contains("and 1 more"), "{text}");
}
