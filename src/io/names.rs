//! Names of the files of a Hugging Face model directory.

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const GENERATION: &str = "generation_config.json";
pub(crate) const TOKENIZER: &str = "tokenizer.json";
/// Weights in one file.
pub(crate) const SINGLE: &str = "model.safetensors";
/// Index of weights in several files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// Folder of further chat templates.
pub(crate) const TEMPLATES: &str = "additional_chat_templates";
/// The one of them for conversations with tools.
pub(crate) const TOOL_USE: &str = "tool_use.jinja";
/// Files beside configuration and weights, which are copied along with them.
pub(crate) const SIDE_FILES: [&str; 10] = [
    GENERATION,
    TOKENIZER,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
];
