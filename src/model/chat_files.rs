//! What a written model directory says of its chat: the template, and the tokens that end an answer.

use super::ModelDir;
use crate::error::{Error, FileOp, Result};
use crate::io::json;
use crate::io::names::{TEMPLATES, TOOL_USE};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// Largest file that is read here.
const MAX_BYTES: u64 = 1 << 24;

/// Chat files of a written model, where they differ from those of the model that it was made from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChatFiles {
    /// Source of the chat template; none = that of the original.
    pub template: Option<String>,
    /// Tokens that end an answer; none if empty.
    pub stop: Vec<u32>,
}

impl ChatFiles {
    /// Brings the files in `out`, copied from `original`, in line: chat_template.jinja and a template in
    /// tokenizer_config.json, and `eos_token_id` in generation_config.json, so that transformers renders and stops as
    /// the model was trained. Files that say so already keep their bytes.
    ///
    /// # Errors
    /// [`Error::Input`] where a file is malformed; [`Error::Io`].
    pub fn write(&self, original: &ModelDir, out: &Path) -> Result<()> {
        if let Some(template) = &self.template {
            let path = out.join("chat_template.jinja");
            fs::write(&path, template).map_err(Error::io(&path, FileOp::Write))?;
            // The older place, which transformers reads where there is no chat_template.jinja.
            let path = out.join("tokenizer_config.json");
            if path.exists() {
                let mut config: Value = json::read(&path, MAX_BYTES, "JSON")?;
                if config.get("chat_template").is_some_and(|old| old.as_str() != Some(template)) {
                    config["chat_template"] = json!(template);
                    json::write(&path, &config)?;
                }
            }
            let folder = out.join(TEMPLATES);
            for other in [out.join("chat_template.json"), folder.join(TOOL_USE)] {
                if other.exists() {
                    fs::remove_file(&other).map_err(Error::io(&other, FileOp::Remove))?;
                }
            }
            if folder.exists() {
                fs::remove_dir(&folder).map_err(Error::io(&folder, FileOp::Remove))?;
            }
        }
        let stop: Vec<u32> = self.stop.iter().copied().filter(|id| (*id as usize) < original.config.vocab).collect();
        let path = out.join("generation_config.json");
        let exists = path.exists();
        let mut generation: Value = if exists { json::read(&path, MAX_BYTES, "JSON")? } else { json!({}) };
        // Without generation_config.json, transformers stops at the token of config.json.
        let said = if exists { ids(&generation) } else { ids(&original.config_json()?) };
        if stop.is_empty() || stop.iter().copied().collect::<BTreeSet<u32>>() == said.into_iter().collect() {
            return Ok(());
        }
        generation["eos_token_id"] = json!(stop);
        json::write(&path, &generation)
    }
}

/// `eos_token_id` as a list.
fn ids(config: &Value) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match &config["eos_token_id"] {
        Value::Array(list) => list.iter().filter_map(id).collect(),
        one => id(one).into_iter().collect(),
    }
}
