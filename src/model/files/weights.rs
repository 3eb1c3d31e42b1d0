//! Weights of a model directory: shards, and which stored tensor is which parameter.

use super::super::ModelConfig;
use super::{INDEX, SINGLE};
use crate::error::{Error, Result};
use crate::io::input::file_in;
use crate::io::json;
use crate::io::safetensors::{Safetensors, float_bytes};
use crate::modules::ParamId;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

const MAX_INDEX_BYTES: u64 = 1 << 26;
/// Maximum number of names in an error message.
const MAX_NAMES: usize = 5;
/// Parts of names that come from torch.compile, DataParallel, Lightning, FSDP, activation checkpointing and peft.
const WRAPPERS: [&str; 6] =
    ["_orig_mod", "module", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_model"];

/// Opens `model.safetensors`, or the shards of the index.
pub(super) fn open_shards(dir: &Path) -> Result<Vec<Safetensors>> {
    if let Some(path) = file_in(dir, SINGLE)? {
        return Ok(vec![Safetensors::open(&path)?]);
    }
    let Some(index_path) = file_in(dir, INDEX)? else {
        return Err(no_weights(dir));
    };
    let place = index_path.display().to_string();
    let index: Value = json::read(&index_path, MAX_INDEX_BYTES, "JSON")?;
    let Some(weight_map) = index["weight_map"].as_object() else {
        return Err(Error::input(format!("{place}: weight_map"), "no object", "an object of tensor and file names"));
    };
    let mut names = BTreeSet::new();
    for (tensor, file) in weight_map {
        let Some(file) = file.as_str() else {
            let place = format!("{place}: weight_map.{}", tensor.escape_debug());
            return Err(Error::input(place, "a value that is not a string", "the name of a file"));
        };
        names.insert(file);
    }
    let mut shards: BTreeMap<&str, Safetensors> = BTreeMap::new();
    for name in names {
        let at_index = |e| match e {
            Error::Input { found, expected, .. } => Error::input(index_path.display().to_string(), found, expected),
            other => other,
        };
        let Some(path) = file_in(dir, name).map_err(at_index)? else {
            let found = format!("the shard `{}`, which does not exist", name.escape_debug());
            return Err(Error::input(place, found, "all shards of the model"));
        };
        shards.insert(name, Safetensors::open(&path)?);
    }
    for (tensor, file) in weight_map {
        let shard = file.as_str().and_then(|file| shards.get(file));
        if shard.is_none_or(|shard| shard.info(tensor).is_err()) {
            let found = format!("tensor `{}` in {file}, which does not contain it", tensor.escape_debug());
            return Err(Error::input(place, found, "an index that agrees with its shards"));
        }
    }
    Ok(shards.into_values().collect())
}

/// The error for a directory without readable weights.
fn no_weights(dir: &Path) -> Error {
    let mut names: Vec<String> = fs::read_dir(dir)
        .map(|entries| entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    names.sort();
    let place = dir.display().to_string();
    let pickled = names.iter().find(|n| [".bin", ".pt", ".pth", ".ckpt"].iter().any(|end| n.ends_with(end)));
    if let Some(pickled) = pickled.filter(|n| !n.starts_with("training_args")) {
        let what = format!("the pickled checkpoint `{}`, which can run code when it is read,", pickled.escape_debug());
        let help = "convert it: transformers' save_pretrained writes model.safetensors";
        return Error::unsupported(place, what, help);
    }
    if let Some(gguf) = names.iter().find(|n| n.ends_with(".gguf")) {
        let what = format!("the GGUF file `{}`", gguf.escape_debug());
        return Error::unsupported(place, what, "use the model's safetensors");
    }
    if let Some(shard) = names.iter().find(|n| n.ends_with(".safetensors")) {
        let found = format!("`{}` without {INDEX}", shard.escape_debug());
        return Error::input(place, found, format!("{SINGLE}, or shards with {INDEX}"));
    }
    Error::input(place, "no weights", format!("{SINGLE}, or {INDEX} and its shards"))
}

/// Finds the stored tensor of each parameter; settles whether the head is tied.
pub(super) fn find_tensors(
    config: &mut ModelConfig,
    shards: &[Safetensors],
    place: &str,
) -> Result<BTreeMap<ParamId, (usize, String)>> {
    let mut stored = stored_tensors(shards)?;
    let all: Vec<String> = stored.values().map(|(_, name)| name.clone()).collect();
    let (embedding, head) = (ParamId::Embedding.to_string(), ParamId::Head.to_string());
    let (embedding, head) = (plain_name(&embedding), plain_name(&head));
    if config.tied {
        match (stored.get(&embedding), stored.get(&head)) {
            (Some((e, e_name)), Some((h, h_name))) if equal(&shards[*e], e_name, &shards[*h], h_name)? => {
                stored.remove(&head);
            }
            (Some(_), Some(_)) => config.tied = false,
            _ => {}
        }
    }
    let mut sources = BTreeMap::new();
    let mut missing = Vec::new();
    for (id, shape) in config.params() {
        let mut plain = plain_name(&id.to_string());
        if id == ParamId::Embedding && config.tied && !stored.contains_key(&plain) && stored.contains_key(&head) {
            plain.clone_from(&head);
        }
        let Some((shard, name)) = stored.remove(&plain) else {
            missing.push(id.to_string());
            continue;
        };
        check_tensor(&shards[shard], &name, &shape)?;
        sources.insert(id, (shard, name));
    }
    let unexpected: Vec<String> = stored.into_values().map(|(_, name)| name).filter(|name| !harmless(name)).collect();
    if let Some(name) = unexpected.iter().find(|name| name.contains(".lora_")) {
        let found = format!("the tensor `{}` of an adapter among the weights", name.escape_debug());
        let expected = "merged weights (peft's merge_and_unload), or the adapter in a directory of its own";
        return Err(Error::input(place, found, expected));
    }
    if !missing.is_empty() {
        let names = if unexpected.is_empty() { &all } else { &unexpected };
        let expected = match names.is_empty() {
            true => "all tensors that config.json implies; there is none".to_owned(),
            false => format!("all tensors that config.json implies; there are {}", list(names)),
        };
        return Err(Error::input(place, format!("no {}", list(&missing)), expected));
    }
    if !unexpected.is_empty() {
        let expected = "only tensors that config.json implies; does config.json belong to this model?";
        return Err(Error::input(place, format!("unexpected {}", list(&unexpected)), expected));
    }
    Ok(sources)
}

/// Checks that a stored tensor has this shape and a dtype that weights may have.
pub(in crate::model) fn check_tensor(file: &Safetensors, name: &str, shape: &[usize]) -> Result<()> {
    let (dtype, found) = file.info(name)?;
    if found != shape {
        let place = format!("{}: tensor `{name}`", file.path().display());
        let expected = format!("shape {shape:?}, as config.json says");
        return Err(Error::input(place, format!("shape {found:?}"), expected));
    }
    float_bytes(dtype).map(|_| ()).ok_or_else(|| file.not_float(name, dtype))
}

/// Shard and name of every tensor, by its [`plain_name`].
fn stored_tensors(shards: &[Safetensors]) -> Result<BTreeMap<String, (usize, String)>> {
    let mut stored: BTreeMap<String, (usize, String)> = BTreeMap::new();
    for (shard, file) in shards.iter().enumerate() {
        for (name, ..) in file.tensors() {
            if let Some((other, same)) = stored.insert(plain_name(name), (shard, name.to_owned())) {
                let found = format!("tensor `{name}`, which is also in {}", shards[other].path().display());
                let found = if same == name { found } else { format!("{found}, as `{same}`") };
                return Err(Error::input(file.path().display().to_string(), found, "each tensor once"));
            }
        }
    }
    Ok(stored)
}

/// A tensor's name without what wrappers add to it, and without the leading `model.` that a bare decoder lacks:
/// `layers.0.mlp.up_proj.weight` for `module.model.layers.0.mlp.up_proj.weight`.
pub(in crate::model) fn plain_name(name: &str) -> String {
    let parts = name.split('.').filter(|part| !WRAPPERS.contains(part));
    parts.skip_while(|part| ["model", "language_model"].contains(part)).collect::<Vec<_>>().join(".")
}

/// Whether this is a buffer that old versions of transformers stored.
fn harmless(name: &str) -> bool {
    ["rotary_emb.inv_freq", "self_attn.masked_bias", "self_attn.bias"].iter().any(|end| name.ends_with(end))
}

pub(in crate::model) fn list(names: &[String]) -> String {
    let mut text: Vec<String> = names.iter().take(MAX_NAMES).map(|n| format!("`{}`", n.escape_debug())).collect();
    if names.len() > MAX_NAMES {
        text.push(format!("and {} more", names.len() - MAX_NAMES));
    }
    format!("tensor{} {}", if names.len() == 1 { "" } else { "s" }, text.join(", "))
}

/// Whether two tensors hold the same values.
fn equal(a: &Safetensors, a_name: &str, b: &Safetensors, b_name: &str) -> Result<bool> {
    let ((a_dtype, a_shape), (b_dtype, b_shape)) = (a.info(a_name)?, b.info(b_name)?);
    if a_shape != b_shape {
        return Ok(false);
    }
    if a_dtype == b_dtype {
        return Ok(a.bytes(a_name)? == b.bytes(b_name)?);
    }
    Ok(a.values(a_name)? == b.values(b_name)?)
}
