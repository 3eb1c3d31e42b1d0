//! Rows of data files: one reader for training, security, task and chat files, in every form that they come in.

mod csv;
mod json;
mod options;
mod parquet;
mod source;

pub use options::{Column, RowOptions};
pub(crate) use options::{read_columns, write_columns};

use crate::error::{Error, FileOp, Result};
use crate::io::input::open_stream;
use serde_json::{Map, Value};
use source::{Form, Piped, Source};
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

/// Maximum length of a row, in bytes.
pub const MAX_ROW_BYTES: usize = 16 << 20;
/// Bad rows of a file that an error or a summary shows; the others are counted.
const SHOWN_BAD_ROWS: usize = 5;

/// A row: an object and its place in the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// `train.jsonl:17`: file and line, counted from 1.
    pub place: String,
    /// The object's fields, in file order.
    pub fields: Map<String, Value>,
    /// The fields that have another name in the file.
    renamed: Arc<[Column]>,
}

impl Row {
    fn new(place: String, fields: Map<String, Value>) -> Self {
        Self { place, fields, renamed: Arc::default() }
    }

    /// An [`Error::Input`] at this row.
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
        let name = self.name(key);
        match self.fields.get(key) {
            Some(Value::String(s)) if !s.trim().is_empty() => Ok(s),
            Some(Value::String(_)) => Err(self.error(format!("an empty {name}"), expected())),
            Some(other) => Err(self.error(format!("{name} is {}", kind(other)), expected())),
            None => Err(self.error(format!("no {name} among the keys {}", self.keys()), expected())),
        }
    }

    /// A required word, one of those that `expected` lists.
    ///
    /// # Errors
    /// As [`Row::text`], with the words.
    pub(super) fn word(&self, key: &str, expected: &str) -> Result<&str> {
        self.text(key).map_err(|error| match error {
            Error::Input { place, found, .. } => Error::input(place, found, expected),
            other => other,
        })
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
            Some(other) => {
                Err(self.error(format!("{} is {}", self.name(key), kind(other)), "a string or a whole number"))
            }
        }
    }

    /// Refuses a row with a value under one of these keys, which would change what the row means; `expected` says what
    /// to do.
    pub(super) fn refuse(&self, keys: &[&str], expected: &str) -> Result<()> {
        match keys.iter().find(|key| self.get(key).is_some_and(|value| !is_blank(value))) {
            Some(key) => Err(self.error(format!("{}, which swat cannot honour here", self.name(key)), expected)),
            None => Ok(()),
        }
    }

    /// A key as errors show it, with the column's name in the file.
    pub(super) fn name(&self, key: &str) -> String {
        match self.renamed.iter().find(|column| column.key == key) {
            Some(Column { column, .. }) => format!("`{key}` (column `{}`)", short(column)),
            None => format!("`{}`", short(key)),
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

/// Null, blank text, an empty list or an empty object.
pub(super) fn is_blank(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.trim().is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// Escapes a name and cuts it to 32 characters for an error message.
pub(super) fn short(text: &str) -> String {
    let mut chars = text.chars();
    let head: String = chars.by_ref().take(32).flat_map(char::escape_debug).collect();
    if chars.next().is_some() { head + "…" } else { head }
}

/// The rows of a file in one of its forms.
trait Rows {
    /// The next row, or the error of one that is malformed; `None` at the end.
    ///
    /// # Errors
    /// Where nothing behind it can be read either.
    fn next(&mut self) -> Result<Option<Result<Row>>>;

    /// What a file without rows holds, and should hold.
    fn nothing(&self) -> (&'static str, &'static str);
}

/// Rows that were left out of a file.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct SkippedRows {
    /// The file.
    pub file: String,
    /// How many.
    pub rows: usize,
    /// What is wrong with the first five, each with its line.
    pub first: Vec<String>,
}

/// Reads data files by the same options, and keeps account of what was left out.
#[derive(Debug, Default)]
pub struct RowReader {
    options: RowOptions,
    /// Whether a file had the column, for each of [`RowOptions::columns`].
    found: Vec<bool>,
    used_field: bool,
    skipped: Vec<SkippedRows>,
}

impl RowReader {
    /// A reader with these options.
    pub fn new(options: &RowOptions) -> Self {
        Self { options: options.clone(), found: vec![false; options.columns.len()], ..Self::default() }
    }

    /// Reads a file: Parquet, or JSON lines, a JSON list, CSV or TSV, plain or packed by gzip or Zstandard; all but
    /// Parquet also from a pipe, up to 1 GiB. Blank lines and
    /// byte-order marks are skipped; NaN and infinities count as null. Malformed rows, and those that `parse` refuses,
    /// are skipped where the options say so.
    ///
    /// # Errors
    /// [`Error::Input`] for the first bad row, which counts the others; for a file without rows; [`Error::Io`].
    pub fn read<T>(&mut self, path: &Path, parse: impl FnMut(&Row) -> Result<T>) -> Result<Vec<T>> {
        let mut file = open_stream(path)?;
        let metadata = file.metadata().map_err(Error::io(path, FileOp::Read))?;
        if metadata.is_dir() {
            return Err(directory(path));
        }
        let name = path.display().to_string();
        if parquet::Parquet::is(&mut file, path)? {
            let rows = parquet::Parquet::new(file, &name)?;
            return self.parse_all(Box::new(rows), &name, parse);
        }
        // Files of the kernel, too, have no size.
        match metadata.is_file() && metadata.len() > 0 {
            true => self.read_from(file, &name, parse),
            false => self.read_from(Piped::new(file), &name, parse),
        }
    }

    /// Reads any bytes but Parquet's as the file `name`, whose ending tells CSV from JSON.
    ///
    /// # Errors
    /// As [`RowReader::read`].
    pub fn read_from<T>(
        &mut self,
        bytes: impl Read + 'static,
        name: &str,
        parse: impl FnMut(&Row) -> Result<T>,
    ) -> Result<Vec<T>> {
        let mut source = Source::new(bytes, name)?;
        let form = source.form()?;
        let field = self.options.field.as_deref().filter(|_| form == Form::Objects);
        self.used_field |= field.is_some();
        let rows: Box<dyn Rows> = match (form, field) {
            (Form::Separated(separator), _) => Box::new(csv::Csv::new(source, name, separator)?),
            (Form::List, _) => Box::new(json::List::new(source, name)?),
            (Form::Objects, Some(field)) => Box::new(json::List::under(source, name, field)?),
            (Form::Objects, None) => Box::new(json::Lines::new(source, name)),
        };
        self.parse_all(rows, name, parse)
    }

    fn parse_all<T>(
        &mut self,
        mut rows: Box<dyn Rows>,
        name: &str,
        mut parse: impl FnMut(&Row) -> Result<T>,
    ) -> Result<Vec<T>> {
        let mut bad = BadRows::default();
        let mut items = Vec::new();
        while let Some(row) = rows.next()? {
            let parsed = row.and_then(|row| {
                let row = self.renamed(row)?;
                parse(&row).map_err(|error| if json::holds_columns(&row.fields) { columns(&row) } else { error })
            });
            match parsed {
                Ok(item) => items.push(item),
                Err(error) => bad.add(error)?,
            }
        }
        if items.is_empty() && bad.errors.is_empty() {
            let (found, expected) = rows.nothing();
            return Err(Error::input(name, found, expected));
        }
        self.settle(name, items, bad)
    }

    /// The results that are no error; bad rows are treated as those of [`RowReader::read`].
    ///
    /// # Errors
    /// As [`RowReader::read`]; any error that is not about an input.
    pub fn keep<T>(&mut self, file: &str, results: impl IntoIterator<Item = Result<T>>) -> Result<Vec<T>> {
        let mut bad = BadRows::default();
        let mut items = Vec::new();
        for result in results {
            match result {
                Ok(item) => items.push(item),
                Err(error) => bad.add(error)?,
            }
        }
        self.settle(file, items, bad)
    }

    fn settle<T>(&mut self, file: &str, items: Vec<T>, bad: BadRows) -> Result<Vec<T>> {
        if bad.errors.is_empty() {
            return Ok(items);
        }
        if !self.options.skip_bad_rows || items.is_empty() {
            return Err(bad.into_error());
        }
        let first = bad.errors.iter().map(Error::to_string).collect();
        let skipped = SkippedRows { file: file.to_owned(), rows: bad.count, first };
        // A study reads a file once for each of its settings.
        if !self.skipped.contains(&skipped) {
            self.skipped.push(skipped);
        }
        Ok(items)
    }

    /// The row with its columns named as [`RowOptions::columns`] says.
    fn renamed(&mut self, mut row: Row) -> Result<Row> {
        let mut taken: Vec<(Column, Value)> = Vec::new();
        for (column, found) in self.options.columns.iter().zip(&mut self.found) {
            let Some(value) = row.fields.shift_remove(&column.column) else { continue };
            *found = true;
            if let Some((other, _)) = taken.iter().find(|(other, _)| other.key == column.key) {
                let found = format!("both `{}` and `{}`", short(&other.column), short(&column.column));
                return Err(row.error(found, format!("one column for `{}`", column.key)));
            }
            taken.push((column.clone(), value));
        }
        if !taken.is_empty() {
            row.renamed = taken.iter().map(|(column, _)| column.clone()).collect();
            row.fields.extend(taken.into_iter().map(|(column, value)| (column.key, value)));
        }
        Ok(row)
    }

    /// Checks, after all files, that the options had an effect.
    ///
    /// # Errors
    /// [`Error::Input`] for a column that no file has, or a `field` where no file is a JSON object.
    pub fn check_used(&self) -> Result<()> {
        if let Some((column, _)) = self.options.columns.iter().zip(&self.found).find(|(_, found)| !**found) {
            let found = format!("no column `{}` in any file", short(&column.column));
            return Err(Error::input("--columns", found, "KEY=COLUMN, with columns that the files have"));
        }
        if self.options.field.is_some() && !self.used_field {
            return Err(Error::input("--field", "no file that is a JSON object", "--field for such files only"));
        }
        Ok(())
    }

    /// What was skipped so far, by file.
    pub fn skipped(&self) -> &[SkippedRows] {
        &self.skipped
    }

    /// Number of rows skipped so far.
    pub fn skipped_rows(&self) -> usize {
        self.skipped.iter().map(|skipped| skipped.rows).sum()
    }
}

/// The error for an object that holds the columns of a table.
fn columns(row: &Row) -> Error {
    let expected = "one object a row, as pandas writes by `df.to_json(FILE, orient=\"records\", lines=True)` and the library \
                    `datasets` by `to_json(FILE)`";
    row.error(format!("a table by columns, {}", row.keys()), expected)
}

/// The error for a directory in the place of a data file.
fn directory(path: &Path) -> Error {
    let place = path.display().to_string();
    if ["state.json", "dataset_dict.json"].iter().any(|file| path.join(file).exists()) {
        let expected = "Parquet or JSON lines: `to_parquet` or `to_json` of the library `datasets` converts it";
        return Error::input(place, "a directory of Arrow files, as `save_to_disk` writes it", expected);
    }
    let known = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst"];
    let is_data = |name: &String| known.iter().any(|end| name.to_lowercase().ends_with(end));
    let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    names.retain(is_data);
    names.sort();
    let there: String = names.iter().take(3).map(|name| format!(" {}", path.join(name).display())).collect();
    let such = if there.is_empty() { String::new() } else { format!(", such as{there}") };
    Error::input(place, "a directory", format!("its files, each by itself{such}"))
}

/// The bad rows of a file.
#[derive(Default)]
struct BadRows {
    /// The first of them.
    errors: Vec<Error>,
    count: usize,
}

impl BadRows {
    /// Adds a row's error; other errors, such as those of a device, come back.
    fn add(&mut self, error: Error) -> Result<()> {
        if !matches!(error, Error::Input { .. } | Error::Unsupported { .. }) {
            return Err(error);
        }
        self.count += 1;
        if self.errors.len() < SHOWN_BAD_ROWS {
            self.errors.push(error);
        }
        Ok(())
    }

    /// The first error, which names the next ones and counts all.
    fn into_error(self) -> Error {
        let (count, mut errors) = (self.count, self.errors.into_iter());
        let Some(mut first) = errors.next() else {
            return Error::failed("a file without bad rows was refused", "this is a bug; please report it");
        };
        if count > 1 {
            let more: String = errors.map(|error| format!("\n  {error}")).collect();
            let unseen = count.saturating_sub(SHOWN_BAD_ROWS);
            let unseen = if unseen > 0 { format!("\n  and {unseen} more") } else { String::new() };
            let list = format!("\n{count} rows are bad (--skip-bad-rows leaves such rows out):{more}{unseen}");
            if let Error::Input { expected: text, .. } | Error::Unsupported { help: text, .. } = &mut first {
                text.push_str(&list);
            }
        }
        first
    }
}
