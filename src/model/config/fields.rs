//! Typed access to the fields of a JSON object.

use crate::error::{Error, Result};
use serde_json::{Map, Value};

/// A JSON object of an untrusted file; errors name file, field, what was found and what was expected. A `null` field
/// counts as absent.
pub(in crate::model) struct Fields<'a> {
    map: &'a Map<String, Value>,
    place: String,
}

impl<'a> Fields<'a> {
    /// Wraps an object; `place` is the file shown in errors.
    pub fn new(value: &'a Value, place: &str) -> Result<Self> {
        let Some(map) = value.as_object() else {
            return Err(Error::input(place, describe(value), "a JSON object"));
        };
        Ok(Self { map, place: format!("{place}: ") })
    }

    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    /// Whether the field is present, even as `null`.
    pub fn mentions(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// `config.json: rope_scaling.factor`
    pub fn place(&self, key: &str) -> String {
        format!("{}{key}", self.place)
    }

    pub fn wrong(&self, key: &str, expected: impl Into<String>) -> Error {
        let found = self.get(key).map_or("nothing".to_owned(), describe);
        Error::input(self.place(key), found, expected)
    }

    pub fn unsupported(&self, key: &str, what: impl Into<String>, help: &str) -> Error {
        Error::unsupported(self.place(key), what, help)
    }

    /// A nested object; an empty one counts as absent.
    pub fn object(&self, key: &str) -> Result<Option<Self>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) if map.is_empty() => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { map, place: format!("{}{key}.", self.place) })),
            Some(_) => Err(self.wrong(key, "an object")),
        }
    }

    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "a string")),
        }
    }

    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(_) => Err(self.wrong(key, "true or false")),
        }
    }

    /// A whole number from 1 to `most`.
    pub fn size(&self, key: &str, most: usize) -> Result<Option<usize>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
            Some(n) if (1..=most).contains(&n) => Ok(Some(n)),
            _ => Err(self.wrong(key, format!("a whole number from 1 to {most}"))),
        }
    }

    pub fn required_size(&self, key: &str, most: usize) -> Result<usize> {
        self.size(key, most)?.ok_or_else(|| self.wrong(key, format!("a whole number from 1 to {most}")))
    }

    /// A finite number that satisfies `valid`, which `expected` describes.
    pub fn number(&self, key: &str, valid: impl Fn(f64) -> bool, expected: &str) -> Result<Option<f64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(x) if x.is_finite() && valid(x) => Ok(Some(x)),
            _ => Err(self.wrong(key, expected)),
        }
    }

    pub fn required_number(&self, key: &str, valid: impl Fn(f64) -> bool, expected: &str) -> Result<f64> {
        self.number(key, valid, expected)?.ok_or_else(|| self.wrong(key, expected))
    }

    /// A token id or a list of them. Ids of no row of the vocabulary cannot occur and are left out, unless none is left.
    pub fn tokens(&self, key: &str, vocab: usize) -> Result<Vec<u32>> {
        let list = match self.get(key) {
            None => return Ok(Vec::new()),
            Some(Value::Array(list)) => list.as_slice(),
            Some(one) => std::slice::from_ref(one),
        };
        let wrong = || self.wrong(key, format!("token ids from 0 to {}", vocab - 1));
        let ids: Vec<u64> = list.iter().map(|value| value.as_u64().ok_or_else(wrong)).collect::<Result<_>>()?;
        let known: Vec<u32> =
            ids.iter().filter(|id| **id < vocab as u64).filter_map(|id| u32::try_from(*id).ok()).collect();
        if known.is_empty() && !ids.is_empty() { Err(wrong()) } else { Ok(known) }
    }
}

/// A JSON value, shortened for an error message.
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Array(list) if list.len() > 8 => format!("a list of {}", list.len()),
        Value::Object(map) if map.len() > 4 => format!("an object of {} fields", map.len()),
        _ => {
            let text = value.to_string();
            match text.char_indices().nth(80) {
                Some((end, _)) => format!("{}…", &text[..end]),
                None => text,
            }
        }
    }
}
