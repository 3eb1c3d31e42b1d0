//! Rows of Parquet files.

mod check;
mod delta;
mod thrift;

use super::source::{MAX_RATIO, UNPACKED_FLOOR};
use super::{MAX_ROW_BYTES, Row, Rows, short};
use crate::error::{Error, FileOp, Result};
use crate::io::input::{guarded, printable};
use ::parquet::errors::ParquetError;
use ::parquet::file::serialized_reader::SerializedFileReader;
use ::parquet::record::Field;
use ::parquet::record::reader::RowIter;
use check::Checked;
use serde_json::{Map, Number, Value};
use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

const MAGIC: &[u8; 4] = b"PAR1";
const EXPECTED: &str = "a Parquet file with Snappy, Zstandard or no compression";

/// The rows of a file, numbered from 1.
pub(super) struct Parquet {
    rows: RowIter<'static>,
    name: String,
    number: u64,
    /// Bytes of text that may still be unpacked.
    left: u64,
}

impl Parquet {
    /// Whether the file begins as a Parquet file; it is read from its start afterwards.
    pub(super) fn is(file: &mut File, path: &Path) -> Result<bool> {
        let read = |e| Error::io(path, FileOp::Read)(e);
        if !file.metadata().map_err(read)?.is_file() {
            return Ok(false);
        }
        let mut head = Vec::new();
        file.by_ref().take(MAGIC.len() as u64).read_to_end(&mut head).map_err(read)?;
        file.rewind().map_err(read)?;
        Ok(head == MAGIC)
    }

    /// Opens a file, after a check of its sizes.
    pub(super) fn new(mut file: File, name: &str) -> Result<Self> {
        let Checked { length, delta } = check::check(&mut file, name)?;
        let reader = guarded(name, "Parquet reader", || SerializedFileReader::new(file))?;
        let reader = reader.map_err(|e| fault(&e, name))?;
        let left = UNPACKED_FLOOR.max(length.saturating_mul(MAX_RATIO));
        let texts = guarded(name, "Parquet reader", || delta::repeated_bytes(&reader, &delta, left))?;
        if texts.map_err(|e| fault(&e, name))? > left {
            return Err(too_much(name));
        }
        let rows = guarded(name, "Parquet reader", || RowIter::from_file_into(Box::new(reader)))?;
        Ok(Self { rows, name: name.to_owned(), number: 0, left })
    }
}

impl Rows for Parquet {
    fn next(&mut self) -> Result<Option<Result<Row>>> {
        let next = guarded(&self.name, "Parquet reader", || self.rows.next())?;
        let Some(row) = next.transpose().map_err(|e| fault(&e, &self.name))? else { return Ok(None) };
        self.number += 1;
        let place = format!("{}: row {}", self.name, self.number);
        let mut bytes = 0;
        let columns = row.get_column_iter();
        let fields: Map<String, Value> =
            columns.map(|(name, field)| (name.clone(), value(field, &mut bytes))).collect();
        self.left = self.left.checked_sub(bytes as u64).ok_or_else(|| too_much(&self.name))?;
        if bytes > MAX_ROW_BYTES {
            return Ok(Some(Err(Error::input(place, format!("more than {MAX_ROW_BYTES} bytes"), "a shorter row"))));
        }
        Ok(Some(Ok(Row::new(place, fields))))
    }

    fn nothing(&self) -> (&'static str, &'static str) {
        ("no rows", "at least one row")
    }
}

fn too_much(name: &str) -> Error {
    let found = format!("text of more than {MAX_RATIO} times the file's size");
    Error::input(name, found, "JSON lines, written from the file if you trust it")
}

fn fault(error: &ParquetError, name: &str) -> Error {
    let text = printable(error);
    match text.contains("feature") {
        true => Error::unsupported(name, format!("its compression ({text})"), format!("write {EXPECTED}")),
        false => Error::input(name, format!("a malformed Parquet file ({})", short(&text)), EXPECTED),
    }
}

/// A value as JSON: dates and times as the numbers that the file has, decimals and bytes that are no text as null. Adds
/// to `bytes` what it takes.
fn value(field: &Field, bytes: &mut usize) -> Value {
    let float = |x: f64| Number::from_f64(x).map_or(Value::Null, Value::Number);
    *bytes += size_of::<Value>();
    match field {
        Field::Null => Value::Null,
        Field::Bool(x) => Value::from(*x),
        Field::Byte(x) => Value::from(*x),
        Field::Short(x) => Value::from(*x),
        Field::Int(x) => Value::from(*x),
        Field::Long(x) => Value::from(*x),
        Field::UByte(x) => Value::from(*x),
        Field::UShort(x) => Value::from(*x),
        Field::UInt(x) => Value::from(*x),
        Field::ULong(x) => Value::from(*x),
        Field::Float16(x) => float(f64::from(*x)),
        Field::Float(x) => float(f64::from(*x)),
        Field::Double(x) => float(*x),
        Field::Str(text) => {
            *bytes += text.len();
            Value::from(text.as_str())
        }
        Field::Bytes(raw) => {
            *bytes += raw.len();
            std::str::from_utf8(raw.data()).map_or(Value::Null, Value::from)
        }
        Field::Group(row) => row.get_column_iter().map(|(name, field)| (name.clone(), value(field, bytes))).collect(),
        Field::ListInternal(list) => list.elements().iter().map(|field| value(field, bytes)).collect(),
        Field::MapInternal(map) => {
            let entries = map.entries().iter();
            let entries = entries.map(|(key, field)| match value(key, bytes) {
                Value::String(name) => (name, value(field, bytes)),
                other => (other.to_string(), value(field, bytes)),
            });
            entries.collect()
        }
        Field::Date(x) | Field::TimeMillis(x) => Value::from(*x),
        Field::TimeMicros(x) | Field::TimestampMillis(x) | Field::TimestampMicros(x) => Value::from(*x),
        Field::Decimal(_) => Value::Null,
    }
}
