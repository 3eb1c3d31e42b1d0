//! Streaming reader of JSON Lines files with one object a line.

use crate::error::{Error, FileOp, Result};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// Maximum length of a line, in bytes.
pub const MAX_LINE_BYTES: usize = 16 << 20;

/// One line: a JSON object and its place in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// `train.jsonl:17`: file and line, counted from 1.
    pub place: String,
    /// The object's fields, in file order.
    pub fields: Map<String, Value>,
}

impl Line {
    /// An [`Error::Input`] at this line.
    pub fn error(&self, found: impl Into<String>, expected: impl Into<String>) -> Error {
        Error::input(&self.place, found, expected)
    }

    /// The value of a field; `None` where it is absent or null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.fields.get(key).filter(|v| !v.is_null())
    }

    /// A required string that is not blank.
    ///
    /// # Errors
    /// [`Error::Input`] where it is absent, not a string, or blank.
    pub fn text(&self, key: &str) -> Result<&str> {
        let expected = || format!("`{key}`: a string that is not empty");
        match self.get(key) {
            Some(Value::String(s)) if !s.trim().is_empty() => Ok(s),
            Some(Value::String(_)) => Err(self.error(format!("an empty `{key}`"), expected())),
            Some(other) => Err(self.error(format!("`{key}` is {}", kind(other)), expected())),
            None => Err(self.error(format!("no `{key}` among the keys {}", self.keys()), expected())),
        }
    }

    /// An optional string or whole number, as text.
    ///
    /// # Errors
    /// [`Error::Input`] where it has another type.
    pub fn optional_name(&self, key: &str) -> Result<Option<String>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s.clone())),
            Some(Value::Number(n)) if !n.is_f64() => Ok(Some(n.to_string())),
            Some(other) => Err(self.error(format!("`{key}` is {}", kind(other)), "a string or a whole number")),
        }
    }

    /// The first eight keys, shortened for an error message.
    pub(super) fn keys(&self) -> String {
        let mut shown: Vec<String> = self.fields.keys().take(8).map(|k| format!("`{}`", short(k))).collect();
        if self.fields.len() > shown.len() {
            shown.push("…".into());
        }
        format!("[{}]", shown.join(", "))
    }
}

/// The type of a JSON value; error messages do not quote values, which may be harmful text.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// Escapes a name and cuts it to 32 characters for an error message.
pub(super) fn short(text: &str) -> String {
    let mut chars = text.chars();
    let head: String = chars.by_ref().take(32).flat_map(char::escape_debug).collect();
    if chars.next().is_some() { head + "…" } else { head }
}

/// Iterator over the lines of a JSON Lines file. Skips blank lines and a byte-order mark, and ends after the first
/// error. A file without an object, and a key that occurs twice with different values, are errors.
pub struct JsonLines<R> {
    reader: R,
    name: String,
    number: u64,
    objects: u64,
    buffer: Vec<u8>,
    done: bool,
}

impl JsonLines<BufReader<File>> {
    /// Opens a file; errors show `path`.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path, FileOp::Open))?;
        Ok(Self::new(BufReader::new(file), path.display().to_string()))
    }
}

impl<R: BufRead> JsonLines<R> {
    /// Reads lines from any reader; errors show `name`.
    pub fn new(reader: R, name: impl Into<String>) -> Self {
        Self { reader, name: name.into(), number: 0, objects: 0, buffer: Vec::new(), done: false }
    }

    /// Parses every line.
    ///
    /// # Errors
    /// The first error of `parse`; [`Error::Input`] for a line that is not a JSON object; [`Error::Io`].
    pub fn parse_all<T>(self, mut parse: impl FnMut(&Line) -> Result<T>) -> Result<Vec<T>> {
        self.map(|line| line.and_then(|l| parse(&l))).collect()
    }

    fn next_line(&mut self) -> Result<Option<Line>> {
        loop {
            self.buffer.clear();
            // One byte above the limit tells a line that is too long from one that just fits.
            let limit = MAX_LINE_BYTES as u64 + 1;
            let read = self.reader.by_ref().take(limit).read_until(b'\n', &mut self.buffer);
            read.map_err(Error::io(Path::new(&self.name), FileOp::Read))?;
            if self.buffer.is_empty() {
                return match self.objects {
                    0 => Err(Error::input(&self.name, "no line with an object", "one JSON object a line")),
                    _ => Ok(None),
                };
            }
            self.number += 1;
            let place = format!("{}:{}", self.name, self.number);
            if self.buffer.last() == Some(&b'\n') {
                self.buffer.pop();
            } else if self.buffer.len() > MAX_LINE_BYTES {
                let found = format!("a line of more than {MAX_LINE_BYTES} bytes");
                return Err(Error::input(place, found, "one JSON object a line, each at most that long"));
            }
            let text = std::str::from_utf8(&self.buffer).map_err(|e| {
                let found = format!("bytes that are not UTF-8 (byte {} of the line)", e.valid_up_to() + 1);
                Error::input(&place, found, "a file saved as UTF-8")
            })?;
            let text = if self.number == 1 { text.trim_start_matches('\u{feff}') } else { text };
            if text.trim().is_empty() {
                continue;
            }
            self.objects += 1;
            return parse_object(text, place).map(Some);
        }
    }
}

impl<R: BufRead> Iterator for JsonLines<R> {
    type Item = Result<Line>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done {
            return None;
        }
        let line = self.next_line().transpose();
        self.done = !matches!(line, Some(Ok(_)));
        line
    }
}

fn parse_object(text: &str, place: String) -> Result<Line> {
    if text.trim_start().starts_with('[') {
        let expected = "one JSON object a line (`jq -c '.[]'` turns a list into lines)";
        return Err(Error::input(place, "the beginning of a list", expected));
    }
    // serde's messages about data would quote the line; those about syntax do not.
    let Pairs(pairs) = serde_json::from_str(text).map_err(|e| {
        let found = if e.is_data() {
            "a value that is not an object".to_string()
        } else {
            let reason = e.to_string();
            let reason = reason.split(" at line ").next().unwrap_or_default();
            format!("invalid JSON at column {} ({reason})", e.column())
        };
        Error::input(&place, found, "one JSON object a line")
    })?;
    let mut line = Line { place, fields: Map::new() };
    for (key, value) in pairs {
        match line.fields.get(&key) {
            Some(earlier) if *earlier != value => {
                let found = format!("the key `{}` twice, with different values", short(&key));
                return Err(line.error(found, "each key once"));
            }
            Some(_) => {}
            None => {
                line.fields.insert(key, value);
            }
        }
    }
    Ok(line)
}

/// An object as pairs, which keeps repeated keys.
struct Pairs(Vec<(String, Value)>);

impl<'de> serde::Deserialize<'de> for Pairs {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = Pairs;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Pairs, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Pairs(pairs))
            }
        }
        deserializer.deserialize_map(Fields)
    }
}
