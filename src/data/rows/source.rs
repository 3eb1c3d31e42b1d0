//! The bytes of a data file: unpacked, without byte-order mark, and told apart by their first ones.

use super::short;
use crate::error::{Error, FileOp, Result};
use crate::io::input::{LFS_POINTER, LFS_REMEDY};
use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::Path;
use std::rc::Rc;

/// Bytes of text that any compressed file may hold.
pub(super) const UNPACKED_FLOOR: u64 = 64 << 20;
/// Largest ratio of text to compressed bytes above [`UNPACKED_FLOOR`]; text in natural language has up to 20.
pub(super) const MAX_RATIO: u64 = 256;
/// Most bytes that are read from a pipe.
const MAX_PIPE_BYTES: u64 = 1 << 30;
/// Bytes by which a file is told.
const HEAD: usize = 24;
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Files that are no text, by their first bytes, and what to do with them.
const OTHERS: [(&[u8], &str, &str); 17] = [
    (b"PAR1", "a packed Parquet file, or one in a pipe", "the Parquet file itself"),
    (b"\xff\xfe", "text in UTF-16", "a file saved as UTF-8"),
    (b"\xfe\xff", "text in UTF-16", "a file saved as UTF-8"),
    (LFS_POINTER, "a Git LFS pointer", LFS_REMEDY),
    (b"<!DOCTYPE", "a web page", "the file itself: was its page downloaded?"),
    (b"<html", "a web page", "the file itself: was its page downloaded?"),
    (
        b"PK\x03\x04",
        "a zip archive or a workbook",
        "its file, unpacked or packed by gzip or zstd; a workbook saved as CSV",
    ),
    (b"\x1f\x8b", "a file packed twice", "a file packed once"),
    (b"\x28\xb5\x2f\xfd", "a file packed twice", "a file packed once"),
    (b"SQLite format 3", "an SQLite database", "its table, exported as CSV or JSON lines"),
    (b"\x80\x04\x95", "a pickled object, which can run code when it is read", "JSON lines"),
    (b"\x80\x05\x95", "a pickled object, which can run code when it is read", "JSON lines"),
    (b"BZh", "a file packed by bzip2", "a file unpacked, or packed by gzip or zstd"),
    (b"\xfd7zXZ", "a file packed by xz", "a file unpacked, or packed by gzip or zstd"),
    (b"7z\xbc\xaf", "a 7z archive", "its file, unpacked or packed by gzip or zstd"),
    (b"ARROW1", "an Arrow file", "JSON lines: `to_json` of the library `datasets` converts it"),
    (b"\xff\xff\xff\xff", "an Arrow stream", "JSON lines: `to_json` of the library `datasets` converts it"),
];

/// How a file holds its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// A header and rows of values with this separator.
    Separated(u8),
    /// A JSON list.
    List,
    /// JSON objects: one a line, or one that holds the list.
    Objects,
}

/// A text file.
pub(super) struct Source {
    reader: Box<dyn BufRead>,
    name: String,
    /// Lines before the next byte.
    pub(super) lines: u64,
}

impl Source {
    pub(super) fn new(bytes: impl Read + 'static, name: &str) -> Result<Self> {
        let read = |e| Error::io(Path::new(name), FileOp::Read)(e);
        let packed = Rc::new(Cell::new(0));
        let (head, bytes) = peek(Counted { inner: bytes, count: packed.clone() }).map_err(read)?;
        let bytes = BufReader::with_capacity(1 << 16, bytes);
        let unpacked: Box<dyn Read> = match head.as_slice() {
            [0x1f, 0x8b, ..] => Box::new(Unpacked::new(flate2::bufread::MultiGzDecoder::new(bytes), packed)),
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                Box::new(Unpacked::new(zstd::Decoder::with_buffer(bytes).map_err(read)?, packed))
            }
            _ => Box::new(bytes),
        };
        let (mut head, text) = peek(unpacked).map_err(read)?;
        let ends = [".tar", ".tar.gz", ".tgz", ".tar.zst"];
        if ends.iter().any(|end| name.to_lowercase().ends_with(end)) {
            return Err(Error::input(
                name,
                "a tar archive",
                "its files, each by itself, unpacked or packed by gzip or zstd",
            ));
        }
        if let Some((_, found, expected)) = OTHERS.iter().find(|(magic, ..)| head.starts_with(magic)) {
            return Err(Error::input(name, *found, *expected));
        }
        let mut reader: Box<dyn BufRead> = Box::new(BufReader::new(text));
        while head.starts_with(BYTE_ORDER_MARK) {
            reader.read_exact(&mut [0; BYTE_ORDER_MARK.len()]).map_err(read)?;
            head.drain(..BYTE_ORDER_MARK.len());
        }
        Ok(Self { reader, name: name.to_owned(), lines: 0 })
    }

    /// Tells the form by the file's name and its first byte that is not white space, up to which the source is read.
    pub(super) fn form(&mut self) -> Result<Form> {
        let name = self.name.to_lowercase();
        let name = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(&name);
        match name.rsplit_once('.') {
            Some((_, "csv")) => return Ok(Form::Separated(b',')),
            Some((_, "tsv" | "tab")) => return Ok(Form::Separated(b'\t')),
            _ => {}
        }
        loop {
            match self.peek()? {
                Some(byte) if byte.is_ascii_whitespace() => self.bump(byte),
                Some(b'[') => return Ok(Form::List),
                _ => return Ok(Form::Objects),
            }
        }
    }

    /// The next byte; `None` at the end.
    pub(super) fn peek(&mut self) -> Result<Option<u8>> {
        let buffer = self.reader.fill_buf().map_err(Error::io(Path::new(&self.name), FileOp::Read))?;
        Ok(buffer.first().copied())
    }

    /// Moves behind the byte that [`Source::peek`] returned.
    pub(super) fn bump(&mut self, byte: u8) {
        self.reader.consume(1);
        self.lines += u64::from(byte == b'\n');
    }

    /// Reads the next line, with its line feed, into `line`, but no more than `most` bytes.
    pub(super) fn read_line(&mut self, line: &mut Vec<u8>, most: usize) -> Result<()> {
        line.clear();
        let read = self.reader.by_ref().take(most as u64).read_until(b'\n', line);
        read.map_err(Error::io(Path::new(&self.name), FileOp::Read))?;
        self.lines += u64::from(line.last() == Some(&b'\n'));
        Ok(())
    }

    /// The rest, as a reader.
    pub(super) fn into_reader(self) -> Box<dyn BufRead> {
        self.reader
    }
}

/// UTF-8 text, or an error that names the first other byte, counted from 1.
pub(super) fn utf8<'b>(bytes: &'b [u8], place: &str, of: &str) -> Result<&'b str> {
    std::str::from_utf8(bytes).map_err(|e| {
        let found = format!("bytes that are not UTF-8 (byte {} of {})", e.valid_up_to() + 1, short(of));
        Error::input(place, found, "a file saved as UTF-8")
    })
}

/// The first bytes, and a reader of all.
fn peek<R: Read>(mut bytes: R) -> io::Result<(Vec<u8>, impl Read + use<R>)> {
    let mut head = Vec::with_capacity(HEAD);
    bytes.by_ref().take(HEAD as u64).read_to_end(&mut head)?;
    Ok((head.clone(), Cursor::new(head).chain(bytes)))
}

/// Counts the bytes that were read.
struct Counted<R> {
    inner: R,
    count: Rc<Cell<u64>>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.count.set(self.count.get() + read as u64);
        Ok(read)
    }
}

/// The bytes of a pipe, which need have no end.
pub(super) struct Piped<R> {
    inner: R,
    left: u64,
}

impl<R> Piped<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner, left: MAX_PIPE_BYTES }
    }
}

impl<R: Read> Read for Piped<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        let left = self.left.checked_sub(read as u64);
        let what = || format!("more than {MAX_PIPE_BYTES} bytes from a pipe; write them to a file first");
        self.left = left.ok_or_else(|| io::Error::other(what()))?;
        Ok(read)
    }
}

/// Unpacked bytes, limited by the packed ones.
struct Unpacked<R> {
    inner: R,
    packed: Rc<Cell<u64>>,
    count: u64,
}

impl<R> Unpacked<R> {
    fn new(inner: R, packed: Rc<Cell<u64>>) -> Self {
        Self { inner, packed, count: 0 }
    }
}

impl<R: Read> Read for Unpacked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.count += read as u64;
        if self.count > UNPACKED_FLOOR.max(self.packed.get().saturating_mul(MAX_RATIO)) {
            let what = format!("it unpacks to more than {MAX_RATIO} times its size; unpack it if you trust it");
            return Err(io::Error::other(what));
        }
        Ok(read)
    }
}
