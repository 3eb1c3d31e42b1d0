//! Rows in JSON: one object a line, or a list of objects.

use super::source::{Source, utf8};
use super::{MAX_ROW_BYTES, Row, Rows, short};
use crate::error::{Error, Result};
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value};
use std::fmt;

const ONE_A_LINE: &str = "one JSON object a line";
/// Length of a line behind which no further row is looked for, in the longest rows: 512 MiB.
const MAX_SKIPPED_ROWS: usize = 32;

/// Whether an object holds the columns of a table: lists of values, or objects of them by the number of the row, all of one
/// length, one of them of lists or, beside another, of texts; or what pandas writes by `orient="split"`.
pub(super) fn holds_columns(fields: &Map<String, Value>) -> bool {
    let length = |value: &Value| match value {
        Value::Array(values) => values.iter().all(|value| !value.is_object()).then_some(values.len()),
        Value::Object(rows) => rows.keys().all(|key| key.parse::<u64>().is_ok()).then_some(rows.len()),
        _ => None,
    };
    let mut lengths = fields.values().map(length);
    let first = lengths.next().flatten().filter(|length| *length > 0);
    let split = ["columns", "data"].iter().all(|key| fields.get(*key).is_some_and(Value::is_array));
    let is_cell = |value: &Value| value.is_array() || fields.len() > 1 && value.is_string();
    let of_cells = |value: &Value| match value {
        Value::Array(values) => values.iter().any(is_cell),
        Value::Object(rows) => rows.values().any(is_cell),
        _ => false,
    };
    split || first.is_some() && lengths.all(|length| length == first) && fields.values().any(of_cells)
}

/// One object a line.
pub(super) struct Lines {
    source: Source,
    name: String,
    buffer: Vec<u8>,
    first: bool,
}

impl Lines {
    pub(super) fn new(source: Source, name: &str) -> Self {
        Self { source, name: name.to_owned(), buffer: Vec::new(), first: true }
    }

    fn row(&mut self, place: String) -> Result<Option<Row>> {
        let text = utf8(&self.buffer, &place, "the line")?.trim_start_matches('\u{feff}');
        if text.trim().is_empty() {
            return Ok(None);
        }
        let first = std::mem::take(&mut self.first);
        let text = text.strip_suffix('\n').unwrap_or(text);
        parse_object(text).map(|fields| Some(Row::new(place.clone(), fields))).map_err(|fault| {
            let expected = match fault.cut_short && first {
                true => {
                    "one JSON object a line, or --field KEY for a list under a key of one object \
                         (`jq -c .` puts each object on a line)"
                }
                false => ONE_A_LINE,
            };
            Error::input(place, fault.found(1), expected)
        })
    }
}

impl Rows for Lines {
    fn next(&mut self) -> Result<Option<Result<Row>>> {
        loop {
            let place = format!("{}:{}", self.name, self.source.lines + 1);
            // One byte above the limit, and one for the line feed, tell a line that is too long from one that just fits.
            self.source.read_line(&mut self.buffer, MAX_ROW_BYTES + 1)?;
            if self.buffer.is_empty() {
                return Ok(None);
            }
            if self.buffer.len() > MAX_ROW_BYTES && self.buffer.last() != Some(&b'\n') {
                let error = |bytes: usize| {
                    let found = format!("a line of more than {bytes} bytes");
                    Error::input(&place, found, format!("one JSON object a line, of at most {MAX_ROW_BYTES} bytes"))
                };
                let mut left = MAX_SKIPPED_ROWS;
                while !self.buffer.is_empty() && self.buffer.last() != Some(&b'\n') {
                    left = left.checked_sub(1).ok_or_else(|| error(MAX_SKIPPED_ROWS * MAX_ROW_BYTES))?;
                    self.source.read_line(&mut self.buffer, MAX_ROW_BYTES)?;
                }
                return Ok(Some(Err(error(MAX_ROW_BYTES))));
            }
            if let Some(row) = self.row(place).transpose() {
                return Ok(Some(row));
            }
        }
    }

    fn nothing(&self) -> (&'static str, &'static str) {
        ("no line with an object", ONE_A_LINE)
    }
}

/// A list of objects, one at a time.
pub(super) struct List {
    source: Source,
    name: String,
    buffer: Vec<u8>,
    /// Bytes of the current line before the next one.
    column: usize,
    at: At,
    /// Whether the list is a value of the object that the file holds.
    inside: bool,
}

/// Where a list is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before the first element.
    Start,
    /// Behind an element.
    Between,
    /// Behind the list.
    End,
}

impl List {
    /// The list that the source begins with.
    pub(super) fn new(source: Source, name: &str) -> Result<Self> {
        let mut list = Self::before(source, name);
        list.expect(b'[', "a list")?;
        Ok(list)
    }

    /// The list under a key of the object that the source begins with.
    pub(super) fn under(source: Source, name: &str, field: &str) -> Result<Self> {
        let mut list = Self { inside: true, ..Self::before(source, name) };
        list.expect(b'{', "an object")?;
        let mut keys = Vec::new();
        while list.space()? == Some(b'"') {
            let key = list.value(true)?;
            let key: String = serde_json::from_slice(&key).map_err(|_| list.error("a malformed key", "JSON"))?;
            list.expect(b':', "`:` behind a key")?;
            if key == field {
                list.expect(b'[', &format!("a list under `{}`", short(field)))?;
                return Ok(list);
            }
            keys.push(format!("`{}`", short(&key)));
            list.value(false)?;
            match list.space()? {
                Some(b',') => list.bump(b','),
                _ => break,
            }
        }
        keys.truncate(8);
        let found = format!("no key `{}` in the object that the file begins with", short(field));
        Err(Error::input(name, found, format!("--field with one of its keys: {}", keys.join(", "))))
    }

    fn before(source: Source, name: &str) -> Self {
        Self { source, name: name.to_owned(), buffer: Vec::new(), column: 0, at: At::Start, inside: false }
    }

    /// Reads what follows the list: the rest of the object around it, and nothing else, as a second list would be lost.
    fn end(&mut self) -> Result<()> {
        while self.inside {
            match self.space()? {
                Some(b',') => {
                    self.bump(b',');
                    self.space()?;
                    self.value(false)?;
                    self.expect(b':', "`:` behind a key")?;
                    self.space()?;
                    self.value(false)?;
                }
                _ => {
                    self.expect(b'}', "the end of the object")?;
                    self.inside = false;
                }
            }
        }
        match self.space()? {
            None => Ok(()),
            Some(_) => Err(self.error("more text behind the list", "one list, or one object a line")),
        }
    }

    fn error(&self, found: &str, expected: &str) -> Error {
        let place = format!("{}:{}", self.name, self.source.lines + 1);
        Error::input(place, format!("{found} (column {})", self.column + 1), expected)
    }

    fn bump(&mut self, byte: u8) {
        self.source.bump(byte);
        self.column = if byte == b'\n' { 0 } else { self.column + 1 };
    }

    /// Skips white space and returns the next byte.
    fn space(&mut self) -> Result<Option<u8>> {
        loop {
            match self.source.peek()? {
                Some(byte) if byte.is_ascii_whitespace() => self.bump(byte),
                other => return Ok(other),
            }
        }
    }

    fn expect(&mut self, byte: u8, expected: &str) -> Result<()> {
        match self.space()? {
            Some(found) if found == byte => {
                self.bump(byte);
                Ok(())
            }
            Some(_) => Err(self.error("another character", expected)),
            None => Err(self.error("the end of the file", expected)),
        }
    }

    /// The text of the next value, or nothing of it if it is only to be skipped: up to the comma, the colon or the
    /// closing bracket behind it.
    fn value(&mut self, kept: bool) -> Result<Vec<u8>> {
        let start = self.source.lines + 1;
        let (mut depth, mut quoted, mut escaped) = (0usize, false, false);
        self.buffer.clear();
        loop {
            let Some(byte) = self.source.peek()? else {
                let place = format!("{}:{start}", self.name);
                return Err(Error::input(place, "a value that the end of the file cuts off", "a whole file"));
            };
            match byte {
                _ if escaped => escaped = false,
                b'\\' if quoted => escaped = true,
                b'"' => quoted = !quoted,
                _ if quoted => {}
                b'[' | b'{' => depth += 1,
                b',' | b':' | b']' | b'}' if depth == 0 => return Ok(std::mem::take(&mut self.buffer)),
                b']' | b'}' => depth -= 1,
                _ => {}
            }
            self.bump(byte);
            if kept {
                if self.buffer.len() == MAX_ROW_BYTES {
                    let place = format!("{}:{start}", self.name);
                    let found = format!("a value of more than {MAX_ROW_BYTES} bytes");
                    return Err(Error::input(place, found, "shorter rows, with a closing bracket behind each"));
                }
                self.buffer.push(byte);
            }
        }
    }
}

impl Rows for List {
    fn next(&mut self) -> Result<Option<Result<Row>>> {
        if self.at == At::End {
            return Ok(None);
        }
        let next = self.space()?;
        match (self.at, next) {
            (_, Some(b']')) => {
                self.bump(b']');
                self.at = At::End;
                return self.end().map(|()| None);
            }
            (At::Start, _) => self.at = At::Between,
            _ => {
                self.expect(b',', "a comma between the rows of a list")?;
                self.space()?;
            }
        }
        let (line, column) = (self.source.lines + 1, self.column);
        let bytes = self.value(true)?;
        let place = format!("{}:{line}", self.name);
        let text = match utf8(&bytes, &place, "the row") {
            Ok(text) => text,
            Err(error) => return Ok(Some(Err(error))),
        };
        Ok(Some(parse_object(text).map(|fields| Row::new(place, fields)).map_err(|fault| {
            let place = format!("{}:{}", self.name, line + fault.line as u64 - 1);
            let before = if fault.line == 1 { column } else { 0 };
            Error::input(place, fault.found(before + 1), "a list of JSON objects")
        })))
    }

    fn nothing(&self) -> (&'static str, &'static str) {
        ("an empty list", "a list of JSON objects")
    }
}

/// Why text is no object.
struct Fault {
    reason: String,
    /// Line in the text, from 1.
    line: usize,
    /// Column of a syntax error, from 1.
    column: Option<usize>,
    /// Whether the text ends too early.
    cut_short: bool,
}

impl Fault {
    /// What was found, where the text begins at the column `first`.
    fn found(&self, first: usize) -> String {
        match self.column {
            Some(column) => format!("invalid JSON at column {} ({})", column + first - 1, self.reason),
            None => self.reason.clone(),
        }
    }
}

/// Parses an object whose keys are unique. NaN, infinities and numbers beyond the range of f64 are null.
fn parse_object(text: &str) -> Result<Map<String, Value>, Fault> {
    let parsed = serde_json::from_str(text).or_else(|error: serde_json::Error| match finite(text) {
        Some(finite) => serde_json::from_str(&finite),
        None => Err(error),
    });
    // serde's messages about data would quote the row; those about syntax do not.
    let Pairs(pairs) = parsed.map_err(|e| {
        if e.is_data() {
            let list = text.trim_start().starts_with('[');
            let reason = if list { "a list in place of an object" } else { "a value that is not an object" };
            return Fault { reason: reason.into(), line: e.line(), column: None, cut_short: false };
        }
        let message = e.to_string();
        let reason = message.split(" at line ").next().unwrap_or_default().to_owned();
        Fault { reason, line: e.line(), column: Some(e.column()), cut_short: e.is_eof() }
    })?;
    let mut fields = Map::new();
    for (key, value) in pairs {
        match fields.get(&key) {
            Some(earlier) if *earlier != value => {
                let reason = format!("the key `{}` twice, with different values", short(&key));
                return Err(Fault { reason, line: 1, column: None, cut_short: false });
            }
            Some(_) => {}
            None => {
                fields.insert(key, value);
            }
        }
    }
    Ok(fields)
}

/// The text with null in place of `NaN`, `Infinity`, `-Infinity`, which Python writes, and of numbers that f64 cannot
/// hold; `None` where there is none of them.
fn finite(text: &str) -> Option<String> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut changed = false;
    while let Some(first) = rest.chars().next() {
        let end = match first {
            '"' => string_end(rest),
            '-' | '0'..='9' | 'A'..='Z' => {
                rest.find(|c: char| !(c.is_ascii_alphanumeric() || "+-.".contains(c))).unwrap_or(rest.len())
            }
            _ => first.len_utf8(),
        };
        let (token, behind) = rest.split_at(end);
        let number = token.trim_start_matches('-').starts_with(|c: char| c.is_ascii_digit());
        let infinite = number && token.parse::<f64>().is_ok_and(f64::is_infinite);
        let special = infinite || matches!(token, "NaN" | "Infinity" | "-Infinity");
        changed |= special;
        out.push_str(if special { "null" } else { token });
        rest = behind;
    }
    changed.then_some(out)
}

/// Length of the string that the text begins with, quotes included.
fn string_end(text: &str) -> usize {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    text.len()
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
