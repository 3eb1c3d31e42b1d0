//! The files of a model's repository that are needed. Pickled weights are never among them.

use super::HubName;
use crate::error::{Error, Result};
use crate::io::json;
use crate::io::names::{CONFIG, INDEX, SIDE_FILES, SINGLE, TEMPLATES, TOOL_USE};
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;

const ADAPTER: [&str; 2] = ["adapter_config.json", "adapter_model.safetensors"];
const MAX_INDEX_BYTES: u64 = 1 << 26;

/// `config.json` alone.
pub(super) fn configuration(name: &HubName, files: &[String]) -> Result<Vec<String>> {
    if files.iter().any(|file| file == CONFIG) {
        return Ok(vec![CONFIG.to_owned()]);
    }
    Err(Error::input(name.text(), "no config.json", "the repository of a model"))
}

/// The card, if there is one.
pub(super) fn card(files: &[String]) -> Vec<String> {
    files.iter().filter(|file| *file == "README.md").cloned().collect()
}

/// Chooses among the files of a model's or an adapter's repository; `fetch` gives the path of one.
pub(super) fn of_model(
    name: &HubName,
    files: &[String],
    fetch: &dyn Fn(&str) -> Result<PathBuf>,
) -> Result<Vec<String>> {
    let has = |file: &str| files.iter().any(|other| other == file);
    let mut chosen: Vec<String> =
        [CONFIG].into_iter().chain(SIDE_FILES).chain(ADAPTER).filter(|file| has(file)).map(str::to_owned).collect();
    let tool_use = format!("{TEMPLATES}/{TOOL_USE}");
    chosen.extend(Some(tool_use).filter(|file| has(file)));
    let adapter = ADAPTER.iter().all(|file| has(file));
    if !has(CONFIG) && !adapter {
        let expected = "a repository with config.json and safetensors, or with an adapter of peft";
        return Err(Error::input(name.text(), "no config.json", expected));
    }
    if has(SINGLE) {
        chosen.push(SINGLE.to_owned());
    } else if has(INDEX) {
        let index: Value = json::read(&fetch(INDEX)?, MAX_INDEX_BYTES, "JSON")?;
        let shards = index["weight_map"].as_object().into_iter().flatten().filter_map(|(_, file)| file.as_str());
        let shards: BTreeSet<&str> = shards.collect();
        if let Some(missing) = shards.iter().find(|shard| !has(shard)) {
            let found = format!("no file `{}`, which {INDEX} names", missing.escape_debug());
            return Err(Error::input(name.text(), found, "all shards of the model"));
        }
        chosen.push(INDEX.to_owned());
        chosen.extend(shards.into_iter().map(str::to_owned));
    } else if !adapter {
        let weights = |file: &&String| {
            [".bin", ".pt", ".pth", ".gguf", ".h5", ".safetensors"].iter().any(|end| file.ends_with(end))
        };
        let there: Vec<&str> = files.iter().filter(weights).take(3).map(String::as_str).collect();
        let found = match there.is_empty() {
            true => "no weights".to_owned(),
            false => format!("{}, and no {SINGLE}", there.join(", ").escape_debug()),
        };
        let expected =
            format!("{SINGLE} or {INDEX}: pickled weights can run code when they are read, and are not fetched");
        return Err(Error::input(name.text(), found, expected));
    }
    Ok(chosen)
}
