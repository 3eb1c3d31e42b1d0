//! The files beside `tokenizer.json`: tokenizer_config.json, special_tokens_map.json and added_tokens.json.

use crate::error::{Error, Result};
use crate::io::input::file_in;
use crate::io::json;
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use tokenizers::AddedToken;
use tokenizers::tokenizer::AddedVocabulary;

const MAX_BYTES: u64 = 1 << 24;
/// Most tokens that the files beside the tokenizer may add.
const MAX_ADDED: usize = 1 << 20;
/// Roles of special tokens, in the order in which transformers adds them.
const ROLES: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// Lists of further special tokens, or objects of them by name; the first is the older name.
const LISTS: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// Special and added tokens by the files beside `tokenizer.json`, read as transformers reads them: the
/// `added_tokens_decoder` of tokenizer_config.json, or, where it has none, special_tokens_map.json and
/// added_tokens.json.
#[derive(Clone, Debug, Default)]
pub struct TokenizerConfig {
    /// tokenizer_config.json; null where there is none.
    pub json: Value,
    /// Special tokens by role, such as `eos_token`.
    pub special: BTreeMap<String, String>,
    /// Tokens with their flags, in order of their ids.
    added: Vec<AddedToken>,
    /// Whether `added` is an `added_tokens_decoder`, whose flags hold against those of tokenizer.json.
    decoder: bool,
    /// Special tokens by role, then those of the lists.
    named: Vec<AddedToken>,
}

impl TokenizerConfig {
    /// Reads the files of a model directory.
    ///
    /// # Errors
    /// [`Error::Input`] with the file and key at fault; [`Error::Io`].
    pub fn read(dir: &Path) -> Result<Self> {
        let read = |name: &str| match file_in(dir, name)? {
            Some(path) => json::read(&path, MAX_BYTES, "JSON"),
            None => Ok(Value::Null),
        };
        let file = |name: &str| dir.join(name).display().to_string();
        let config: Value = read("tokenizer_config.json")?;
        let mut settings = config.as_object().cloned().unwrap_or_default();
        let mut added = BTreeMap::new();
        let decoder = settings.remove("added_tokens_decoder").filter(|decoder| !decoder.is_null());
        if let Some(decoder) = &decoder {
            let place = format!("{}: added_tokens_decoder", file("tokenizer_config.json"));
            for (id, token) in entries(decoder, &place)? {
                let id = id.parse::<u32>().map_err(|_| wrong(&place, id, "a token id as key"))?;
                added.insert(id, token_of(token, None).ok_or_else(|| wrong(&place, id, "a token with `content`"))?);
            }
        } else {
            let map: Value = read("special_tokens_map.json")?;
            for (key, value) in map.as_object().into_iter().flatten() {
                settings.insert(key.clone(), value.clone());
            }
            let place = file("added_tokens.json");
            let named: HashSet<String> = named(&settings).into_iter().map(|token| token.content).collect();
            let tokens: Value = read("added_tokens.json")?;
            let tokens = if tokens.is_null() { Vec::new() } else { entries(&tokens, &place)? };
            for (text, id) in tokens {
                let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
                let id = id.ok_or_else(|| wrong(&place, text, "a token id as value"))?;
                added.insert(id, AddedToken::from(text, named.contains(text)));
            }
        }
        if added.len() > MAX_ADDED {
            return Err(wrong(
                &file("tokenizer_config.json"),
                added.len(),
                format!("at most {MAX_ADDED} added tokens"),
            ));
        }
        let special = ROLES.iter().filter_map(|role| Some(((*role).to_owned(), token_of(settings.get(*role)?, None)?)));
        let special = special.map(|(role, token)| (role, token.content)).collect();
        let added = added.into_values().collect();
        Ok(Self { json: config, special, added, decoder: decoder.is_some(), named: named(&settings) })
    }

    /// The tokens that a vocabulary lacks, or has with other flags.
    pub(super) fn missing(&self, vocabulary: &AddedVocabulary) -> Vec<AddedToken> {
        let known = vocabulary.get_added_tokens_decoder();
        let known: BTreeMap<&str, &AddedToken> = known.values().map(|token| (token.content.as_str(), token)).collect();
        let names: HashSet<&str> = self.named.iter().map(|token| token.content.as_str()).collect();
        let special = |token: &AddedToken| {
            let special = token.special || names.contains(token.content.as_str());
            token.clone().special(special)
        };
        let mut missing: Vec<AddedToken> = Vec::new();
        let differs = |token: &&AddedToken| match known.get(token.content.as_str()) {
            Some(known) => self.decoder && known != token,
            None => true,
        };
        missing.extend(self.added.iter().filter(differs).map(special));
        let mut met: HashSet<&str> = self.added.iter().map(|token| token.content.as_str()).collect();
        met.extend(known.keys());
        missing.extend(self.named.iter().filter(|token| met.insert(&token.content)).map(special));
        missing
    }
}

fn wrong(place: &str, found: impl std::fmt::Display, expected: impl Into<String>) -> Error {
    let found: String = found.to_string().chars().take(64).flat_map(char::escape_debug).collect();
    Error::input(place, format!("`{found}`"), expected)
}

fn entries<'a>(value: &'a Value, place: &str) -> Result<Vec<(&'a String, &'a Value)>> {
    let map = value.as_object().ok_or_else(|| Error::input(place, "something else", "an object of tokens"))?;
    Ok(map.iter().collect())
}

/// A token given as text, or as an object with `content`; `special` overrides the object's.
fn token_of(value: &Value, special: Option<bool>) -> Option<AddedToken> {
    if let Some(text) = value.as_str() {
        return Some(AddedToken::from(text, special.unwrap_or(true)));
    }
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let special = special.or(flag("special")).unwrap_or(false);
    let token = AddedToken::from(value.get("content")?.as_str()?, special);
    Some(
        token
            .single_word(flag("single_word").unwrap_or(false))
            .lstrip(flag("lstrip").unwrap_or(false))
            .rstrip(flag("rstrip").unwrap_or(false))
            .normalized(flag("normalized").unwrap_or(!special)),
    )
}

/// The special tokens by role and by list, each once.
fn named(settings: &serde_json::Map<String, Value>) -> Vec<AddedToken> {
    let roles = ROLES.iter().filter_map(|role| settings.get(*role));
    // Newer versions of transformers give the tokens of a list names of their own.
    let lists = LISTS.iter().filter_map(|list| settings.get(*list)).flat_map(|list| match list {
        Value::Array(list) => list.iter().collect(),
        Value::Object(named) => named.values().collect(),
        _ => Vec::new(),
    });
    let mut met = HashSet::new();
    let tokens = roles.chain(lists).filter_map(|value| token_of(value, Some(true)));
    tokens.filter(|token| !token.content.is_empty() && met.insert(token.content.clone())).collect()
}
