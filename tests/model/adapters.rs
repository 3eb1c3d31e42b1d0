//! Adapter directories: which modules the settings select, what is refused and with which words.

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use swat::model::ModelDir;
use swat::modules::ModuleId;
use tempfile::TempDir;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

/// The golden adapter on all linear layers of a Qwen3 of two layers, with changed settings.
fn adapter(change: impl FnOnce(&mut Value)) -> TempDir {
    let dir = TempDir::new().unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(golden("adapters/all-linear").join(name), dir.path().join(name)).unwrap();
    }
    let path = dir.path().join("adapter_config.json");
    let mut settings: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut settings);
    fs::write(&path, settings.to_string()).unwrap();
    dir
}

fn open(dir: &TempDir) -> swat::error::Result<ModelDir> {
    ModelDir::open_with_adapter(&golden("qwen3"), dir.path())
}

fn refused(change: impl FnOnce(&mut Value)) -> String {
    let dir = adapter(change);
    let error = open(&dir).err().expect("refused");
    assert_eq!(error.exit_code(), 2);
    error.to_string()
}

#[test]
fn variants_are_refused_by_name() {
    for (key, value, words) in [
        ("peft_type", json!("IA3"), "the adapter type IA3 is not supported"),
        ("peft_type", json!("PREFIX_TUNING"), "PREFIX_TUNING"),
        ("peft_type", json!(null), "peft_type: found nothing"),
        ("task_type", json!("SEQ_CLS"), "an adapter for SEQ_CLS"),
        ("use_dora", json!(true), "use_dora: DoRA is not supported; merge it into its model"),
        ("use_qalora", json!(true), "QALoRA"),
        ("use_bdlora", json!({"nblocks": 2}), "use_bdlora: this variant"),
        ("use_of_next_year", json!(true), "use_of_next_year: this variant of LoRA is not supported"),
        ("lora_bias", json!(true), "lora_bias"),
        ("layer_replication", json!([[0, 1], [0, 1]]), "replicated layers"),
        ("trainable_token_indices", json!([3]), "single tokens"),
        ("target_parameters", json!(["experts.up"]), "target_parameters"),
        ("alora_invocation_tokens", json!([5]), "aLoRA"),
        (
            "init_lora_weights",
            json!("pissa_niter_16"),
            "the initialisation `pissa_niter_16`, which may change the base",
        ),
        ("init_lora_weights", json!("loftq"), "`loftq`"),
        ("init_lora_weights", json!("olora"), "path_initial_model_for_weight_conversion"),
        ("r", json!(0), "r: found 0; expected a whole number from 1"),
        ("r", json!("8"), "r: found \"8\""),
        ("lora_alpha", json!(-1), "lora_alpha: found -1"),
        ("target_modules", json!(null), "target_modules: found nothing; expected a list of names"),
        ("target_modules", json!("(q_proj"), "target_modules: `(q_proj`: found no regular expression"),
        ("target_modules", json!("q)|(?:v"), "no regular expression"),
        ("target_modules", json!("(.*)*(.*)*\\1\\2x"), "an expression that takes too long"),
        ("target_modules", json!(["q_proj", 7]), "target_modules: found [\"q_proj\",7]; expected a list of strings"),
        ("rank_pattern", json!({"q_proj": 0}), "rank_pattern.q_proj: found 0"),
        ("alpha_pattern", json!({"(": 3}), "alpha_pattern: `(`: found no regular expression"),
        ("layers_to_transform", json!("last"), "layers_to_transform: found \"last\""),
        ("bias", json!("some"), "bias: found \"some\"; expected none, lora_only or all"),
        (
            "modules_to_save",
            json!(["lm_head"]),
            "no tensor for `lm_head.weight`; expected it: adapter_config.json says",
        ),
    ] {
        let text = refused(|settings| settings[key] = value.clone());
        assert!(text.contains(words), "{key} = {value}: {text}\nlacks {words}");
    }
}

/// peft would leave out what its settings do not select, with a warning; the model would not be the one that was trained.
#[test]
fn settings_and_tensors_must_agree() {
    let text = refused(|settings| settings["target_modules"] = json!(["q_proj"]));
    assert!(text.contains("an adapter of layers.0.k_proj; expected none: target_modules"), "{text}");
    let text = refused(|settings| {
        settings["target_modules"] = json!(["q_proj"]);
        settings["layers_to_transform"] = json!([0]);
    });
    assert!(text.contains("an adapter of layers.0.k_proj; expected none"), "{text}");
    let text = refused(|settings| settings["r"] = json!(3));
    assert!(text.contains("found shape [2, 24]; expected shape [3, 24]: rank 3 by adapter_config.json"), "{text}");
    let other = adapter(|_| {});
    let error = ModelDir::open_with_adapter(&golden("qwen2"), other.path()).err().unwrap().to_string();
    assert!(error.contains("shape"), "{error}");
    let text = ModelDir::open_with_adapter(&golden("llama-rope-yarn"), other.path()).err().unwrap().to_string();
    assert!(text.contains("tensor `base_model.model.model.layers.0."), "{text}");
}

/// Values: peft 0.21, `LoraConfig(...)` on this model and the names of its `LoraLayer`s.
#[test]
fn settings_select_what_peft_selects() {
    let selects = |settings: Value, expected: &[(usize, &str)]| {
        // Which adapters are missing or left over tells which were selected.
        let dir = adapter(|all| {
            for (key, value) in settings.as_object().unwrap() {
                all[key] = value.clone();
            }
        });
        let expected: Vec<String> = expected.iter().map(|(layer, kind)| format!("layers.{layer}.{kind}")).collect();
        let path = dir.path().join("adapter_model.safetensors");
        let bytes = fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        let kept = file.tensors().into_iter().filter(|(name, _)| {
            let module = name.split(".lora_").next().unwrap().replace("self_attn.", "").replace("mlp.", "");
            expected.contains(&module.replace("base_model.model.model.", ""))
        });
        let kept: Vec<_> = kept.collect();
        let written = safetensors::serialize(kept, None).unwrap();
        fs::write(&path, written).unwrap();
        let files = open(&dir).unwrap_or_else(|e| panic!("{settings}: {e}"));
        let found: Vec<String> = files.adapter().unwrap().modules.keys().map(ModuleId::to_string).collect();
        assert_eq!(found, expected, "{settings}");
    };
    let list = json!({"target_modules": ["q_proj", "mlp.down_proj"]});
    selects(list, &[(0, "q_proj"), (0, "down_proj"), (1, "q_proj"), (1, "down_proj")]);
    selects(json!({"target_modules": ["q_proj"], "layers_to_transform": 1}), &[(1, "q_proj")]);
    let layers = json!({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]});
    selects(layers, &[(0, "q_proj")]);
    selects(json!({"target_modules": ["model.layers.1.self_attn.v_proj"]}), &[(1, "v_proj")]);
    selects(
        json!({"target_modules": ".*\\.1\\..*_proj", "exclude_modules": ".*self_attn.*"}),
        &[(1, "gate_proj"), (1, "up_proj"), (1, "down_proj")],
    );
    selects(json!({"target_modules": "(?P<all>.*)\\.(?!k|v|o)[a-z]_proj"}), &[(0, "q_proj"), (1, "q_proj")]);
    selects(
        json!({"target_modules": ["k_proj", "o_proj"], "exclude_modules": ["0.self_attn.k_proj", "o_proj"]}),
        &[(1, "k_proj")],
    );
}

#[test]
fn directories_that_hold_no_adapter_of_this_model() {
    let empty = TempDir::new().unwrap();
    assert!(open(&empty).err().unwrap().to_string().contains("found no adapter_config.json"));
    let missing = ModelDir::open_with_adapter(&golden("qwen3"), &empty.path().join("none")).err().unwrap();
    assert!(missing.to_string().contains("cannot open") && missing.exit_code() == 2, "{missing}");
    let dir = adapter(|_| {});
    fs::rename(dir.path().join("adapter_model.safetensors"), dir.path().join("adapter_model.bin")).unwrap();
    assert!(open(&dir).err().unwrap().to_string().contains("pickled adapter"));
    fs::remove_file(dir.path().join("adapter_model.bin")).unwrap();
    assert!(open(&dir).err().unwrap().to_string().contains("found no adapter_model.safetensors"));

    let bytes = fs::read(golden("adapters/all-linear/adapter_model.safetensors")).unwrap();
    for (from, to, words) in [
        ("mlp.up_proj.lora_B.weight", "mlp.up_proj.lora_C.weight", "tensors `"),
        ("q_proj.lora_A.weight", "q_proj.lora_B.weight", "comes twice"),
        ("self_attn.q_proj.lora_A", "other_atn.q_proj.lora_A", "was it trained on another one?"),
    ] {
        let text = String::from_utf8_lossy(&bytes[8..]).into_owned();
        let end = text.find("}}").unwrap() + 2;
        assert!(text[..end].contains(from), "{from}");
        let mut changed = bytes[..8].to_vec();
        changed.extend(text[..end].replace(from, to).as_bytes());
        changed.extend(&bytes[8 + end..]);
        fs::write(dir.path().join("adapter_model.safetensors"), changed).unwrap();
        let error = open(&dir).err().unwrap().to_string();
        assert!(error.contains(words), "{error}");
    }
}

/// transformers attaches it, other readers take the weights alone: one of them is wrong.
#[test]
fn weights_and_an_adapter_in_one_directory() {
    let dir = adapter(|_| {});
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden("qwen3").join(name), dir.path().join(name)).unwrap();
    }
    let error = ModelDir::open(dir.path()).err().unwrap();
    assert_eq!(error.exit_code(), 2);
    let text = error.to_string();
    assert!(text.contains("found weights and a LoRA adapter (adapter_config.json); expected one of them"), "{text}");
    assert!(text.contains("--adapter '"), "{text}");
    let attached = ModelDir::open_with_adapter(dir.path(), dir.path()).unwrap();
    assert_eq!(attached.adapter().unwrap().modules.len(), 14);
    fs::remove_file(dir.path().join("adapter_config.json")).unwrap();
    assert!(ModelDir::open(dir.path()).err().unwrap().to_string().contains("LoRA adapter (adapter_model.safetensors)"));
    fs::remove_file(dir.path().join("adapter_model.safetensors")).unwrap();
    assert!(ModelDir::open(dir.path()).unwrap().adapter().is_none());
}
