//! JSON Lines, one object a line, read as a stream.

use crate::error::{Error, Result};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;

/// Longest line that is read, in bytes.
pub const MAX_LINE_BYTES: usize = 16 << 20;

/// The object on one line.
#[derive(Clone, Debug, PartialEq)]
pub struct Line {
    /// File and line from 1, for errors: `train.jsonl:17`.
    pub place: String,
    /// The object's fields.
    pub fields: Map<String, Value>,
}

impl Line {
    /// An [`Error::Input`] at this line.
    pub fn error(&self, found: impl Into<String>, expected: impl Into<String>) -> Error {
        Error::input(&self.place, found, expected)
    }

    /// A field's value; `None` where it is absent or null.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.fields.get(key).filter(|v| !v.is_null())
    }

    /// A field that must be a string, and more than white space.
    ///
    /// # Errors
    /// [`Error::Input`] where it is absent, no string, or blank.
    pub fn text(&self, key: &str) -> Result<&str> {
        let expected = || format!("`{key}`: a string that is not empty");
        match self.get(key) {
            Some(Value::String(s)) if !s.trim().is_empty() => Ok(s),
            Some(Value::String(_)) => Err(self.error(format!("an empty `{key}`"), expected())),
            Some(other) => Err(self.error(format!("`{key}` is {}", kind(other)), expected())),
            None => Err(self.error(format!("no `{key}` among the keys {}", self.keys()), expected())),
        }
    }

    /// A field that may be absent or null and must else be a string or a whole number, as text.
    ///
    /// # Errors
    /// [`Error::Input`] where it is of another type.
    pub fn optional_name(&self, key: &str) -> Result<Option<String>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(s)) => Ok(Some(s.clone())),
            Some(Value::Number(n)) if !n.is_f64() => Ok(Some(n.to_string())),
            Some(other) => Err(self.error(format!("`{key}` is {}", kind(other)), "a string or a whole number")),
        }
    }

    /// The keys, for errors: the first eight, long ones cut.
    pub(super) fn keys(&self) -> String {
        let mut shown: Vec<String> = self.fields.keys().take(8).map(|k| format!("`{}`", short(k))).collect();
        if self.fields.len() > shown.len() {
            shown.push("…".into());
        }
        format!("[{}]", shown.join(", "))
    }
}

/// What a JSON value is, without its content, which may be harmful text.
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

/// A name from a file, cut to what an error message can hold.
pub(super) fn short(text: &str) -> String {
    let mut chars = text.chars();
    let head: String = chars.by_ref().take(32).flat_map(char::escape_debug).collect();
    if chars.next().is_some() { head + "…" } else { head }
}

/// The objects of a file, line by line. Blank lines and a byte-order mark are skipped; a file without an object is an
/// error; nothing comes after an error. A key that occurs twice with different values is an error.
pub struct JsonLines<R> {
    reader: R,
    name: String,
    number: u64,
    objects: u64,
    buffer: Vec<u8>,
    done: bool,
}

impl JsonLines<BufReader<File>> {
    /// Opens a file; errors name it as `path` does.
    ///
    /// # Errors
    /// [`Error::Io`] where the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path, "open"))?;
        Ok(Self::new(BufReader::new(file), path.display().to_string()))
    }
}

impl<R: BufRead> JsonLines<R> {
    /// Lines of anything, called `name` in errors.
    pub fn new(reader: R, name: impl Into<String>) -> Self {
        Self { reader, name: name.into(), number: 0, objects: 0, buffer: Vec::new(), done: false }
    }

    /// Every line, turned into something else.
    ///
    /// # Errors
    /// What `parse` returns for the first line that it refuses; a line that is no JSON object.
    pub fn parse_all<T>(self, mut parse: impl FnMut(&Line) -> Result<T>) -> Result<Vec<T>> {
        self.map(|line| line.and_then(|l| parse(&l))).collect()
    }

    fn next_line(&mut self) -> Result<Option<Line>> {
        loop {
            self.buffer.clear();
            // One byte more than is allowed tells a line that is too long from one that just fits.
            let limit = MAX_LINE_BYTES as u64 + 1;
            let read = self.reader.by_ref().take(limit).read_until(b'\n', &mut self.buffer);
            read.map_err(Error::io(Path::new(&self.name), "read"))?;
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
    // Messages about data, unlike those about syntax, would quote the line's content.
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

/// An object's fields with repeated keys, which a map would hide.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(bytes: &[u8]) -> Result<Vec<Line>> {
        JsonLines::new(bytes, "train.jsonl").collect()
    }

    fn error(bytes: &[u8]) -> String {
        lines(bytes).unwrap_err().to_string()
    }

    #[test]
    fn lines_are_numbered_as_in_the_file_and_blank_ones_skipped() {
        let read = lines(b"\xef\xbb\xbf\n{\"a\":1}\r\n  \n\n{\"b\":\"\xc3\xa9\"}").unwrap();
        let places: Vec<&str> = read.iter().map(|l| l.place.as_str()).collect();
        assert_eq!(places, ["train.jsonl:2", "train.jsonl:5"]);
        assert_eq!(read[1].text("b").unwrap(), "é");
    }

    #[test]
    fn errors_name_line_and_reason() {
        assert!(error(b"").starts_with("train.jsonl: found no line with an object"));
        assert!(error(b"\n \n").starts_with("train.jsonl: found no line with an object"));
        assert!(error(b"{}\n{\"a\": }").starts_with("train.jsonl:2: found invalid JSON at column 7 (expected value)"));
        assert!(error(b"{}\n\n{\"a\":\"\xff\"}").starts_with("train.jsonl:3: found bytes that are not UTF-8 (byte 7"));
        assert!(error(b"[{\"a\":1}]").contains("jq -c"));
        assert!(error(b"{\"a\":1}{\"a\":1}").contains("trailing characters"));
    }

    #[test]
    fn an_error_about_a_value_does_not_quote_it() {
        let message = error(b"\"secret words\"");
        assert!(message.contains("not an object") && !message.contains("secret"), "{message}");
    }

    #[test]
    fn a_key_may_be_repeated_only_with_the_same_value() {
        assert_eq!(lines(b"{\"a\":[1],\"a\":[1]}").unwrap()[0].fields.len(), 1);
        assert!(error(b"{\"a\":1,\"a\":2}").contains("the key `a` twice"));
    }

    #[test]
    fn a_line_may_be_as_long_as_the_limit_and_no_longer() {
        let line = |bytes: usize| format!("{{\"a\":\"{}\"}}\n", "x".repeat(bytes - 8)).into_bytes();
        assert_eq!(lines(&line(MAX_LINE_BYTES)).unwrap().len(), 1);
        assert!(error(&line(MAX_LINE_BYTES + 1)).contains("a line of more than"));
    }

    #[test]
    fn deep_nesting_is_an_error() {
        let deep = format!("{{\"a\":{}", "[".repeat(1 << 20));
        assert!(error(deep.as_bytes()).contains("recursion limit"));
    }

    #[test]
    fn nothing_comes_after_an_error() {
        let mut lines = JsonLines::new(&b"{}\nx\n{}"[..], "f");
        assert!(lines.next().unwrap().is_ok() && lines.next().unwrap().is_err());
        assert!(lines.next().is_none());
    }
}
