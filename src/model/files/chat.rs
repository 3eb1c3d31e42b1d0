//! The chat template of a model directory.

use super::ModelDir;
use crate::error::{Error, Result};
use crate::io::input::{file_in, read_text};
use crate::io::names::{TEMPLATES, TOOL_USE};
use crate::model::ChatTemplate;
use crate::model::tokenizer::TokenizerConfig;
use serde_json::Value;
use std::path::{Path, PathBuf};

const MAX_TEMPLATE_BYTES: u64 = 1 << 20;
const HELP: &str = "a chat template; name one with --chat-template FILE";

impl ModelDir {
    /// The chat template: the file `named`, else `chat_template.jinja`, else the one in `tokenizer_config.json` (of
    /// several, `default`). Conversations with tools have the one named `tool_use`, if there is one, as in transformers;
    /// not beside a `named` one.
    ///
    /// # Errors
    /// [`Error::Input`] where there is none, or it does not compile; [`Error::Io`].
    pub fn chat_template(&self, named: Option<&Path>) -> Result<ChatTemplate> {
        let dir = &self.text_dir;
        let TokenizerConfig { json: config, special, .. } = TokenizerConfig::read(dir)?;
        if let Some(named) = named {
            if !named.exists() {
                let place = format!("--chat-template {}", named.display());
                return Err(Error::input(place, "no such file", "a file with the template's Jinja source"));
            }
            return ChatTemplate::new(&read_source(named)?, &named.display().to_string(), special);
        }
        let place = format!("{}: chat_template", dir.join("tokenizer_config.json").display());
        let of_list = |name: &str| {
            let entry = config["chat_template"].as_array()?.iter().find(|entry| entry["name"] == name)?;
            entry["template"].as_str()
        };
        if let Some(path) = file_in(dir, "chat_template.jinja")? {
            let template = ChatTemplate::new(&read_source(&path)?, &path.display().to_string(), special)?;
            return match self.tool_use_file()? {
                Some(path) => template.with_tool_use(&read_source(&path)?, &path.display().to_string()),
                None => Ok(template),
            };
        }
        let source = match &config["chat_template"] {
            Value::String(source) if source.trim().is_empty() => {
                return Err(Error::input(place, "an empty chat template", HELP));
            }
            Value::Null => return Err(Error::input(dir.display().to_string(), "no chat template", HELP)),
            Value::String(source) => source,
            Value::Array(_) => of_list("default")
                .ok_or_else(|| Error::input(&place, "named templates, none of them `default`", HELP))?,
            _ => return Err(Error::input(place, "neither a string nor a list", HELP)),
        };
        let template = ChatTemplate::new(source, &place, special)?;
        match of_list("tool_use") {
            Some(source) => template.with_tool_use(source, &place),
            None => Ok(template),
        }
    }

    /// A template of this source, with the special tokens of the directory; `place` names it in errors.
    ///
    /// # Errors
    /// As [`ChatTemplate::new`]; [`Error::Input`] for a malformed `tokenizer_config.json`.
    pub fn template_of(&self, source: &str, place: &str) -> Result<ChatTemplate> {
        ChatTemplate::new(source, place, TokenizerConfig::read(&self.text_dir)?.special)
    }

    /// The file of the template for conversations with tools, as newer versions of transformers save it.
    pub(super) fn tool_use_file(&self) -> Result<Option<PathBuf>> {
        let folder = self.text_dir.join(TEMPLATES);
        if folder.is_dir() { file_in(&folder, TOOL_USE) } else { Ok(None) }
    }
}

fn read_source(path: &Path) -> Result<String> {
    let source = read_text(path, MAX_TEMPLATE_BYTES)?;
    if source.starts_with('\u{feff}') {
        let found = "a byte-order mark, which would begin every prompt";
        return Err(Error::input(path.display().to_string(), found, "a file saved as UTF-8 without one"));
    }
    // It would be rendered as text, with a prompt somewhere in it.
    if serde_json::from_str::<serde_json::Map<String, Value>>(&source).is_ok() {
        let expected =
            "the Jinja source alone: `jq -r .chat_template tokenizer_config.json` prints that of a tokenizer";
        return Err(Error::input(path.display().to_string(), "a JSON object", expected));
    }
    Ok(source)
}
