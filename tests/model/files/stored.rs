//! A small model directory that tests may damage.

use serde_json::{Value, json};
use std::fs;
use swat::model::ModelDir;
use swat::modules::ParamId;
use tempfile::TempDir;

pub fn config() -> Value {
    json!({
        "model_type": "llama", "vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16, "rms_norm_eps": 1e-5
    })
}

/// A tensor as a file holds it.
#[derive(Clone)]
pub struct Stored {
    pub name: String,
    pub dtype: &'static str,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// Every tensor of [`config`] as f32, values counting up in eighths (exact in every dtype).
pub fn tensors() -> Vec<Stored> {
    let config = swat::model::ModelConfig::from_json(&config(), "config.json").unwrap();
    let mut next = 0;
    let mut values = |n: usize| {
        next += n;
        (next - n..next).flat_map(|i| (i as f32 % 61.0 / 8.0).to_le_bytes()).collect()
    };
    let stored = |(id, shape): (ParamId, Vec<usize>)| Stored {
        name: id.to_string(),
        dtype: "F32",
        bytes: values(shape.iter().product()),
        shape,
    };
    config.params().into_iter().map(stored).collect()
}

pub fn floats(tensor: &Stored) -> Vec<f32> {
    tensor.bytes.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// The bytes of a safetensors file with this header.
pub fn file(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(data);
    bytes
}

pub fn safetensors(tensors: &[Stored]) -> Vec<u8> {
    let mut header = json!({"__metadata__": {"format": "pt"}});
    let mut data = Vec::new();
    for t in tensors {
        let begin = data.len();
        data.extend(&t.bytes);
        header[&t.name] = json!({"dtype": t.dtype, "shape": t.shape, "data_offsets": [begin, data.len()]});
    }
    file(&header.to_string(), &data)
}

pub fn model(config: &Value, tensors: &[Stored]) -> TempDir {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    fs::write(dir.path().join("model.safetensors"), safetensors(tensors)).unwrap();
    dir
}

pub fn error(dir: &TempDir) -> String {
    let error = ModelDir::open(dir.path()).err().expect("an error");
    assert_eq!(error.exit_code(), 2, "{error}");
    let text = error.to_string();
    assert!(text.contains(dir.path().to_str().unwrap()), "no path in: {text}");
    text
}

/// The error of a directory whose one weight file has these bytes.
pub fn error_of(bytes: &[u8]) -> String {
    let dir = model(&config(), &[]);
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    error(&dir)
}

/// The model in two shards with an index.
pub fn sharded(change: impl FnOnce(&mut Value)) -> TempDir {
    let stored = tensors();
    let dir = model(&config(), &[]);
    fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    let mut index = json!({"metadata": {"total_size": 1}, "weight_map": {}});
    for (half, name) in stored.chunks(stored.len() / 2 + 1).zip(["a.safetensors", "b.safetensors"]) {
        fs::write(dir.path().join(name), safetensors(half)).unwrap();
        for tensor in half {
            index["weight_map"][&tensor.name] = json!(name);
        }
    }
    change(&mut index);
    fs::write(dir.path().join("model.safetensors.index.json"), index.to_string()).unwrap();
    dir
}
