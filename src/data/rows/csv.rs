//! Comma- and tab-separated values (RFC 4180) with a header.

use super::source::{Source, utf8};
use super::{MAX_ROW_BYTES, Row, Rows, short};
use crate::error::{Error, FileOp, Result};
use ::csv::{ByteRecord, ErrorKind, Reader, ReaderBuilder};
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{self, BufRead, Read};
use std::path::Path;
use std::rc::Rc;

/// Bytes that the parser reads ahead.
const BUFFER_BYTES: usize = 1 << 16;

/// The rows of a file; values are strings, and an empty one is null.
pub(super) struct Csv {
    reader: Reader<Tracked>,
    name: String,
    columns: Vec<String>,
    record: ByteRecord,
    input: Rc<RefCell<Input>>,
}

impl Csv {
    /// Reads the header.
    pub(super) fn new(source: Source, name: &str, separator: u8) -> Result<Self> {
        let input = Rc::new(RefCell::new(Input::default()));
        let tracked = Tracked { inner: source.into_reader(), input: input.clone() };
        let mut builder = ReaderBuilder::new();
        let builder = builder.delimiter(separator).has_headers(false).flexible(true).buffer_capacity(BUFFER_BYTES);
        let reader = builder.from_reader(tracked);
        let mut csv = Self { reader, name: name.to_owned(), columns: Vec::new(), record: ByteRecord::new(), input };
        if let Some(line) = csv.advance()? {
            csv.columns = csv.header(&format!("{name}:{line}"), separator)?;
        }
        Ok(csv)
    }

    /// Reads a record and returns its first line.
    fn advance(&mut self) -> Result<Option<u64>> {
        self.input.borrow_mut().left = MAX_ROW_BYTES + BUFFER_BYTES;
        let start = self.reader.position().byte();
        let read = self.reader.read_byte_record(&mut self.record);
        let end = self.reader.position().byte();
        let mut input = self.input.borrow_mut();
        let place = format!("{}:{}", self.name, input.lines_before(start) + 1);
        match read {
            Ok(true) => {
                // Counted from its last byte, since the parser begins a record at the blank lines before it.
                let inside: usize = self.record.iter().flatten().filter(|byte| **byte == b'\n').count();
                Ok(Some(input.lines_before(end.saturating_sub(1)) + 1 - inside as u64))
            }
            Ok(false) => Ok(None),
            Err(_) if input.left == 0 => {
                let found = format!("a row of more than {MAX_ROW_BYTES} bytes");
                Err(Error::input(place, found, "a quote at the end of each quoted value"))
            }
            Err(error) => Err(match error.into_kind() {
                ErrorKind::Io(cause) => Error::io(Path::new(&self.name), FileOp::Read)(cause),
                other => Error::input(place, format!("{other:?}"), "comma-separated values"),
            }),
        }
    }

    fn header(&self, place: &str, separator: u8) -> Result<Vec<String>> {
        let columns = self.record.iter().map(|name| Ok(utf8(name, place, "a column's name")?.to_owned()));
        let columns = columns.collect::<Result<Vec<String>>>()?;
        if let ([only], b',') = (columns.as_slice(), separator)
            && only.contains([';', '\t'])
        {
            let found = format!("a header of one column, `{}`", short(only));
            return Err(Error::input(place, found, "columns separated by commas, or by tabs in a file named .tsv"));
        }
        for (i, name) in columns.iter().enumerate().filter(|(_, name)| !name.is_empty()) {
            if columns[..i].contains(name) {
                return Err(Error::input(place, format!("the column `{}` twice", short(name)), "each column once"));
            }
        }
        Ok(columns)
    }

    fn row(&self, place: String) -> Result<Row> {
        let (values, columns) = (self.record.len(), self.columns.len());
        if values != columns {
            let found = format!("{values} values");
            return Err(Error::input(place, found, format!("{columns}, one for each column of the header")));
        }
        let mut fields = Map::new();
        for (column, value) in self.columns.iter().zip(&self.record) {
            let text = utf8(value, &place, &format!("column `{column}`"))?;
            let value = if text.is_empty() { Value::Null } else { Value::from(text) };
            fields.insert(column.clone(), value);
        }
        Ok(Row::new(place, fields))
    }
}

impl Rows for Csv {
    fn next(&mut self) -> Result<Option<Result<Row>>> {
        let line = self.advance()?;
        Ok(line.map(|line| self.row(format!("{}:{line}", self.name))))
    }

    fn nothing(&self) -> (&'static str, &'static str) {
        ("no rows", "a header and at least one row")
    }
}

/// What the parser has read.
#[derive(Default)]
struct Input {
    /// Bytes that may be read for the current row.
    left: usize,
    bytes: u64,
    /// Offsets of line feeds that are not yet counted.
    feeds: VecDeque<u64>,
    /// Line feeds that are counted.
    lines: u64,
}

impl Input {
    /// Number of line feeds before an offset; offsets ascend.
    fn lines_before(&mut self, offset: u64) -> u64 {
        while self.feeds.front().is_some_and(|feed| *feed < offset) {
            self.feeds.pop_front();
            self.lines += 1;
        }
        self.lines
    }
}

/// A reader that keeps account, and fails where a row is too long, such as behind a quote that is never closed.
struct Tracked {
    inner: Box<dyn BufRead>,
    input: Rc<RefCell<Input>>,
}

impl Read for Tracked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        let mut input = self.input.borrow_mut();
        input.left = input.left.saturating_sub(read);
        if input.left == 0 {
            return Err(io::Error::other("a row that is too long"));
        }
        let feeds = buffer.iter().take(read).enumerate().filter(|(_, byte)| **byte == b'\n');
        let start = input.bytes;
        input.feeds.extend(feeds.map(|(at, _)| start + at as u64));
        input.bytes += read as u64;
        Ok(read)
    }
}
