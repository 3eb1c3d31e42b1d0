//! `config.json` of every family and spelling, what is refused, and the rope table against transformers.

use proptest::prelude::*;
use serde_json::{Value, json};
use swat::model::{ModelConfig, Rope, RopeScaling, rope_table};
use swat::modules::ModuleKind::{Down, Gate, K, O, Q, Up, V};

fn read(value: &Value) -> Result<ModelConfig, String> {
    ModelConfig::from_json(value, "config.json").map_err(|e| e.to_string())
}

fn llama() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 100, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "hidden_act": "silu", "bos_token_id": 1,
        "eos_token_id": 2, "torch_dtype": "bfloat16", "rope_theta": 10000.0, "tie_word_embeddings": false
    })
}

/// `base` with fields replaced; `null` removes one.
fn with(base: Value, changes: Value) -> Value {
    let mut base = base;
    for (key, value) in changes.as_object().unwrap() {
        if value.is_null() {
            base.as_object_mut().unwrap().remove(key);
        } else {
            base[key] = value.clone();
        }
    }
    base
}

fn of(family: &str, changes: Value) -> Value {
    with(with(llama(), json!({"model_type": family, "architectures": null})), changes)
}

#[test]
fn llama_of_transformers_4() {
    let config = read(&llama()).unwrap();
    assert_eq!((config.vocab, config.hidden, config.ffn, config.layers), (100, 64, 96, 3));
    assert_eq!((config.heads, config.kv_heads, config.head_dim, config.max_positions), (4, 2, 16, 128));
    assert_eq!(config.rope, Rope { theta: 10_000.0, scaling: RopeScaling::None });
    assert_eq!((config.bos, config.eos.as_slice()), (Some(1), &[2][..]));
    assert!(!config.tied && config.biases.is_empty() && !config.qk_norm);
    assert_eq!(config.windows, [None; 3]);
}

#[test]
fn both_spellings_mean_the_same() {
    let scaling = json!({"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64});
    let old =
        with(llama(), json!({"rope_theta": 5e5, "rope_scaling": with(scaling.clone(), json!({"type": "llama3"}))}));
    let new = with(
        llama(),
        json!({"rope_theta": null, "torch_dtype": null, "dtype": "bfloat16",
            "rope_parameters": with(scaling, json!({"rope_type": "llama3", "rope_theta": 5e5}))}),
    );
    assert_eq!(read(&old).unwrap(), read(&new).unwrap());
    assert_eq!(read(&old).unwrap().rope.theta, 5e5);
}

#[test]
fn llama_1_and_biases() {
    let config = read(&of("llama", json!({"num_key_value_heads": null, "rope_theta": null}))).unwrap();
    assert_eq!((config.kv_heads, config.rope.theta), (4, 10_000.0));
    let config = read(&of("llama", json!({"attention_bias": true, "mlp_bias": true, "head_dim": 32}))).unwrap();
    assert_eq!(config.biases, [Q, K, V, O, Gate, Up, Down]);
    assert_eq!((config.head_dim, config.q_width()), (32, 128));
}

#[test]
fn mistral_windows() {
    let window = |changes| read(&of("mistral", changes)).unwrap().windows;
    assert_eq!(window(json!({"sliding_window": 32})), [Some(32); 3]);
    assert_eq!(window(json!({})), [Some(4096); 3], "the default of transformers");
    let mut value = of("mistral", json!({}));
    value["sliding_window"] = Value::Null;
    assert_eq!(read(&value).unwrap().windows, [None; 3]);
    let mixed = of(
        "mistral",
        json!({"sliding_window": 32,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
    );
    assert!(read(&mixed).unwrap_err().contains("layer_types"));
}

#[test]
fn qwen_biases_norms_and_windows() {
    let config = read(&of("qwen2", json!({"sliding_window": 16, "max_window_layers": 1}))).unwrap();
    assert_eq!(config.biases, [Q, K, V]);
    assert_eq!(config.windows, [None; 3], "use_sliding_window is off");
    let on = json!({"sliding_window": 16, "max_window_layers": 1, "use_sliding_window": true});
    assert_eq!(read(&of("qwen2", on.clone())).unwrap().windows, [None, Some(16), Some(16)]);
    let types = json!(["sliding_attention", "full_attention", "full_attention"]);
    let config = read(&with(of("qwen3", on), json!({"layer_types": types}))).unwrap();
    assert_eq!(config.windows, [Some(16), None, None]);
    assert!(config.qk_norm && config.biases.is_empty());
    assert_eq!(config.head_dim, 128, "the default of Qwen3");
    assert_eq!(read(&of("qwen3", json!({"attention_bias": true}))).unwrap().biases, [Q, K, V, O]);
    let off = of("qwen2", json!({"layer_types": types}));
    assert!(read(&off).unwrap_err().contains("sliding_window is not in use"));
}

#[test]
fn ends_of_text() {
    let mut config = read(&with(llama(), json!({"eos_token_id": [2, 3]}))).unwrap();
    assert_eq!(config.eos, [2, 3]);
    config.add_generation_config(&json!({"eos_token_id": [3, 7]}), "generation_config.json").unwrap();
    assert_eq!(config.eos, [2, 3, 7]);
    // An id without a row in the vocabulary never ends an answer.
    config.add_generation_config(&json!({"eos_token_id": [5, 100]}), "generation_config.json").unwrap();
    assert_eq!(config.eos, [2, 3, 7, 5]);
    let error = config.add_generation_config(&json!({"eos_token_id": 100}), "generation_config.json").unwrap_err();
    assert!(
        error.to_string().starts_with("generation_config.json: eos_token_id: found 100; expected token ids from 0")
    );
    assert!(read(&with(llama(), json!({"eos_token_id": null}))).unwrap().eos.is_empty());
}

#[test]
fn yarn_defaults() {
    let yarn = |scaling: Value| match read(&with(llama(), json!({"rope_scaling": scaling}))).unwrap().rope.scaling {
        RopeScaling::Yarn { factor, beta_fast, beta_slow, attention_factor, original_max_positions, truncate } => {
            (factor, beta_fast, beta_slow, attention_factor, original_max_positions, truncate)
        }
        other => panic!("{other:?}"),
    };
    let inferred = 0.1 * 4.0_f64.ln() + 1.0;
    assert_eq!(yarn(json!({"type": "yarn", "factor": 4})), (4.0, 32.0, 1.0, inferred, 128, true));
    assert_eq!(
        yarn(json!({"rope_type": "yarn", "original_max_position_embeddings": 32, "attention_factor": 1.5})),
        (4.0, 32.0, 1.0, 1.5, 32, true)
    );
}

#[test]
fn wrong_fields_are_named() {
    for (changes, message) in [
        (json!({"vocab_size": null}), "config.json: vocab_size: found nothing; expected a whole number"),
        (json!({"vocab_size": 1u64 << 60}), "config.json: vocab_size: found 1152921504606846976"),
        (json!({"hidden_size": "64"}), "config.json: hidden_size: found \"64\""),
        (json!({"hidden_size": 64.5}), "hidden_size: found 64.5"),
        (json!({"intermediate_size": -1}), "intermediate_size: found -1"),
        (json!({"num_hidden_layers": 1001}), "num_hidden_layers: found 1001; expected a whole number from 1 to 1000"),
        (json!({"num_attention_heads": 0}), "num_attention_heads: found 0"),
        (
            json!({"num_attention_heads": 5, "num_key_value_heads": 5}),
            "num_attention_heads: found 5; expected a divisor",
        ),
        (
            json!({"num_key_value_heads": 3}),
            "num_key_value_heads: found 3; expected a divisor of num_attention_heads (4)",
        ),
        (json!({"num_key_value_heads": 8}), "num_key_value_heads: found 8"),
        (json!({"head_dim": 15}), "head_dim: found 15; expected an even number"),
        (json!({"head_dim": 4096}), "head_dim: found 4096"),
        (json!({"max_position_embeddings": null}), "max_position_embeddings"),
        (json!({"rms_norm_eps": 0.0}), "rms_norm_eps: found 0.0"),
        (json!({"rms_norm_eps": "1e-5"}), "rms_norm_eps"),
        (json!({"rope_theta": -1.0}), "rope_theta: found -1.0"),
        (json!({"tie_word_embeddings": "yes"}), "tie_word_embeddings: found \"yes\"; expected true or false"),
        (json!({"eos_token_id": -1}), "eos_token_id: found -1"),
        (json!({"eos_token_id": [1, "x"]}), "eos_token_id"),
        (json!({"bos_token_id": 100}), "bos_token_id: found 100"),
        (json!({"model_type": null}), "model_type: found nothing"),
        (json!({"architectures": 3}), "architectures: found 3"),
        (json!({"attention_bias": 1}), "attention_bias: found 1"),
        (json!({"rope_scaling": 3}), "rope_scaling: found 3"),
        (json!({"rope_scaling": {"type": 3}}), "rope_scaling.type: found 3"),
        (json!({"rope_scaling": {"type": "linear"}}), "rope_scaling.factor: found nothing; expected a number ≥ 1"),
        (json!({"rope_scaling": {"type": "linear", "factor": 0.5}}), "rope_scaling.factor: found 0.5"),
        (
            json!({"rope_scaling": {"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4}}),
            "rope_scaling.high_freq_factor: found 4",
        ),
        (
            json!({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 1, "beta_slow": 2}}),
            "rope_scaling.beta_fast",
        ),
        (json!({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2}}), "head_dim: found 2"),
    ] {
        let error = read(&with(llama(), changes)).unwrap_err();
        assert!(error.contains(message), "{error}\nlacks {message}");
    }
    let error = read(&of("qwen2", json!({"layer_types": ["full_attention"]}))).unwrap_err();
    assert!(error.contains("layer_types: found [\"full_attention\"]"), "{error}");
    assert!(read(&of("qwen2", json!({"num_key_value_heads": null}))).unwrap_err().contains("num_key_value_heads"));
    assert!(read(&json!([1])).unwrap_err().contains("config.json: found [1]; expected a JSON object"));
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    for (changes, message) in [
        (json!({"model_type": "mixtral"}), "config.json: model_type: the model type `mixtral` is not supported"),
        (json!({"model_type": "gpt2"}), "`gpt2`"),
        (json!({"architectures": ["LlamaForSequenceClassification"]}), "LlamaForSequenceClassification"),
        (json!({"quantization_config": {"quant_method": "awq"}}), "quantization_config: a quantised model"),
        (json!({"quantization": {"group_size": 64, "bits": 4}}), "quantization: a quantised model"),
        (json!({"num_local_experts": 8}), "num_local_experts: a mixture of experts"),
        (json!({"hidden_act": "gelu"}), "the activation `gelu`"),
        (json!({"rope_scaling": {"type": "longrope", "factor": 2}}), "rope_scaling.type: the rope type `longrope`"),
        (json!({"rope_parameters": {"rope_type": "su"}}), "rope_parameters.rope_type: the rope type `su`"),
        (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}}), "separate rope"),
    ] {
        let error = read(&with(llama(), changes)).unwrap_err();
        assert!(error.contains(message) && error.contains("not supported"), "{error}\nlacks {message}");
    }
    let types = json!(["full_attention", "chunked_attention", "full_attention"]);
    assert!(read(&of("qwen3", json!({"layer_types": types}))).unwrap_err().contains("chunked_attention"));
}

#[test]
fn rope_table_is_that_of_transformers() {
    let cases: Vec<Value> = serde_json::from_str(include_str!("rope.json")).unwrap();
    assert!(cases.len() >= 8);
    for case in &cases {
        let config = read(&case["config"]).unwrap();
        let table = rope_table(&config, case["length"].as_u64().unwrap() as usize);
        assert_eq!(table.len(), case["length"].as_u64().unwrap() as usize * config.head_dim);
        for (row, expected) in case["rows"].as_array().unwrap().iter().zip(case["table"].as_array().unwrap()) {
            let row = row.as_u64().unwrap() as usize;
            let found = &table[row * config.head_dim..][..config.head_dim];
            for (i, (found, expected)) in found.iter().zip(expected.as_array().unwrap()).enumerate() {
                let expected = expected.as_f64().unwrap();
                let error = (f64::from(*found) - expected).abs();
                assert!(error <= 1e-6, "{} row {row} entry {i}: {found} is not {expected}", case["name"]);
            }
        }
    }
}

#[test]
fn dynamic_rope_depends_on_the_length() {
    let scaling = json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}});
    let (plain, dynamic) = (read(&llama()).unwrap(), read(&with(llama(), scaling)).unwrap());
    assert_eq!(rope_table(&plain, 128), rope_table(&dynamic, 128));
    assert_ne!(rope_table(&plain, 129), rope_table(&dynamic, 129));
    assert_eq!(rope_table(&plain, 10)[..], rope_table(&plain, 20)[..160]);
}

/// JSON of any kind, shallow.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (-4i64..40).prop_map(Value::from),
        any::<f64>().prop_map(|x| json!(x)),
        "[a-z0-9_]{0,8}".prop_map(Value::from),
        prop_oneof![Just("llama3"), Just("yarn"), Just("dynamic"), Just("linear"), Just("qwen2"), Just("mistral")]
            .prop_map(Value::from),
    ];
    let keys = prop_oneof![
        Just("factor"),
        Just("type"),
        Just("rope_type"),
        Just("rope_theta"),
        Just("beta_fast"),
        Just("mscale"),
        Just("low_freq_factor"),
        Just("high_freq_factor"),
        Just("original_max_position_embeddings"),
        Just("x"),
    ];
    leaf.prop_recursive(2, 12, 6, move |inner| {
        prop_oneof![
            proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            proptest::collection::vec((keys.clone(), inner), 0..6)
                .prop_map(|pairs| pairs.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]
    #[test]
    fn mutated_configs_are_read_or_refused(changes in proptest::collection::vec((0usize..40, any_json()), 1..4)) {
        let keys = [
            "rope_scaling", "rope_parameters", "sliding_window", "use_sliding_window", "max_window_layers",
            "layer_types", "head_dim", "attention_bias", "mlp_bias", "partial_rotary_factor", "num_experts",
        ];
        let mut value = llama();
        let present: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
        for (at, change) in changes {
            let key = present.get(at).map_or_else(|| keys[at % keys.len()], String::as_str);
            value[key] = change;
        }
        if let Ok(config) = read(&value) {
            prop_assert!(config.heads % config.kv_heads == 0 && config.head_dim % 2 == 0);
            prop_assert_eq!(config.windows.len(), config.layers);
            prop_assert!(config.eos.iter().chain(&config.bos).all(|t| (*t as usize) < config.vocab));
            for (_, shape) in config.params() {
                prop_assert!(shape.iter().product::<usize>() < 1 << 48);
            }
            if config.head_dim <= 64 {
                prop_assert!(rope_table(&config, 3).len() == 3 * config.head_dim);
            }
        }
    }
}
