//! Check of what a Parquet file claims to unpack to, before anything is unpacked: the reader allocates what a page
//! claims, holds a row with all its lists, and recurses into the schema.

use super::super::source::{MAX_RATIO, UNPACKED_FLOOR};
use super::thrift::{Compact, I32, LIST, STRUCT, malformed};
use super::{EXPECTED, MAGIC, fault};
use crate::error::{Error, FileOp, Result};
use crate::io::input::guarded;
use ::parquet::basic::Type;
use ::parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData, ParquetMetaDataReader};
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// Longest description of a file, in bytes.
const MAX_FOOTER_BYTES: u64 = 64 << 20;
/// Most columns and groups of columns.
const MAX_COLUMNS: u64 = 4096;
/// Deepest nesting of columns.
const MAX_DEPTH: usize = 32;
/// Largest page, in bytes, unpacked.
const MAX_PAGE_BYTES: i64 = 512 << 20;
/// Most elements of lists in a group of rows: one row might have them all.
pub(super) const MAX_LIST_VALUES: i64 = 8 << 20;
/// Rows that any file may have, and further rows for each of its bytes.
const ROWS: u64 = 1 << 20;
const ROWS_PER_BYTE: u64 = 16;
/// Values, nulls included, that any file may have, and further ones for each of its bytes.
const VALUES: u64 = 16 << 20;
const VALUES_PER_BYTE: u64 = 64;

/// A file whose sizes are checked.
pub(super) struct Checked {
    /// Its length, in bytes.
    pub(super) length: u64,
    /// Group and number of each column with a page in a delta encoding of texts.
    pub(super) delta: Vec<(usize, usize)>,
}

/// Checks a file.
pub(super) fn check(file: &mut File, name: &str) -> Result<Checked> {
    let read = |e: io::Error| match e.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput => {
            Error::input(name, format!("a malformed Parquet file ({e})"), EXPECTED)
        }
        _ => Error::io(Path::new(name), FileOp::Read)(e),
    };
    let length = file.metadata().map_err(read)?.len();
    check_schema(file, length).map_err(read)?;
    let parse = || ParquetMetaDataReader::new().parse_and_finish(file);
    let metadata = guarded(name, "Parquet reader", parse)?.map_err(|e| fault(&e, name))?;
    let limit = UNPACKED_FLOOR.max(length.saturating_mul(MAX_RATIO));
    let wrong = |found: String, expected: &str| Err(Error::input(name, found, expected));
    let rows: u64 = metadata.row_groups().iter().map(|group| group.num_rows().max(0) as u64).sum();
    if rows > ROWS + ROWS_PER_BYTE.saturating_mul(length) {
        return wrong(format!("{rows} rows in {length} bytes"), "a file that holds its rows");
    }
    let columns = metadata.file_metadata().schema_descr().num_columns() as u64;
    if rows.saturating_mul(columns) > VALUES + VALUES_PER_BYTE.saturating_mul(length) {
        return wrong(format!("{rows} rows of {columns} columns in {length} bytes"), "a file that holds its values");
    }
    match sizes(file, &metadata, length).map_err(read)? {
        Sizes { page, .. } if page > MAX_PAGE_BYTES => {
            wrong(format!("a page of {page} bytes"), "pages of at most 512 MiB")
        }
        Sizes { list_values, .. } if list_values > MAX_LIST_VALUES => wrong(
            format!("{list_values} elements of lists in a group of rows"),
            "at most 8388608: write the file with smaller groups (`row_group_size`)",
        ),
        Sizes { unpacked, .. } if unpacked > limit => {
            let found = format!("{unpacked} bytes in a file of {length}, more than {MAX_RATIO} times its size");
            wrong(found, "JSON lines, written from the file if you trust it")
        }
        Sizes { delta, .. } => Ok(Checked { length, delta }),
    }
}

/// Checks number and nesting of the columns.
fn check_schema(file: &mut File, length: u64) -> io::Result<()> {
    let start = length.checked_sub(8).ok_or_else(|| malformed("no footer"))?;
    file.seek(SeekFrom::Start(start))?;
    let mut tail = [0; 8];
    file.read_exact(&mut tail)?;
    let footer = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    if tail[4..] != MAGIC[..] || footer > start.min(MAX_FOOTER_BYTES) {
        return Err(malformed("no footer"));
    }
    file.seek(SeekFrom::Start(start - footer))?;
    let mut compact = Compact::new(BufReader::new(file.by_ref().take(footer)));
    let mut last = 0;
    while let Some((id, kind)) = compact.field(last)? {
        match (id, kind) {
            (2, LIST) => return check_columns(&mut compact),
            _ => compact.skip(kind)?,
        }
        last = id;
    }
    Err(malformed("no schema"))
}

fn check_columns<R: Read>(compact: &mut Compact<R>) -> io::Result<()> {
    let (columns, kind) = compact.list()?;
    if columns > MAX_COLUMNS || kind != STRUCT {
        return Err(malformed("more than 4096 columns"));
    }
    // Children that are still to come, of each group from the root to the current one.
    let mut open: Vec<i64> = Vec::new();
    for _ in 0..columns {
        let (mut children, mut last) = (0, 0);
        while let Some((id, kind)) = compact.field(last)? {
            match (id, kind) {
                (5, I32) => children = compact.integer()?,
                _ => compact.skip(kind)?,
            }
            last = id;
        }
        if !(0..=MAX_COLUMNS as i64).contains(&children) {
            return Err(malformed("a group of more than 4096 columns"));
        }
        open.push(children);
        if open.len() > MAX_DEPTH {
            return Err(malformed("columns nested more than 32 deep"));
        }
        while open.pop_if(|children| *children == 0).is_some() {
            if let Some(parent) = open.last_mut() {
                *parent -= 1;
            }
        }
    }
    Ok(())
}

/// What a file claims.
#[derive(Default)]
struct Sizes {
    /// Bytes of all pages, unpacked.
    unpacked: u64,
    /// The largest page, in bytes, unpacked.
    page: i64,
    /// Most values of lists in a group of rows.
    list_values: i64,
    /// Group and number of each column with a page in a delta encoding of texts.
    delta: Vec<(usize, usize)>,
}

/// Sizes by the headers of all pages.
fn sizes(file: &mut File, metadata: &ParquetMetaData, length: u64) -> io::Result<Sizes> {
    let mut all = Sizes::default();
    let mut reader = BufReader::with_capacity(1 << 12, file);
    for (group_number, group) in metadata.row_groups().iter().enumerate() {
        let mut list_values = 0i64;
        for (column_number, column) in group.columns().iter().enumerate() {
            let data = column.data_page_offset();
            let start = column.dictionary_page_offset().filter(|offset| *offset > 0).map_or(data, |o| o.min(data));
            let end = start.checked_add(column.compressed_size()).filter(|end| *end as u64 <= length);
            let (Ok(start), Some(end)) = (u64::try_from(start), end) else {
                return Err(malformed("a column outside the file"));
            };
            reader.seek(SeekFrom::Start(start))?;
            let mut at = start;
            while at < end as u64 {
                let page = page(&mut reader)?;
                let compressed = u64::try_from(page.compressed).map_err(|_| malformed("a page of negative size"))?;
                let unpacked = u64::try_from(page.unpacked).map_err(|_| malformed("a page of negative size"))?;
                if !(0..=page.unpacked / smallest_value(column)).contains(&page.dictionary) {
                    return Err(malformed("a dictionary of more values than its page has room for"));
                }
                reader.seek_relative(compressed as i64)?;
                at += page.header_bytes + compressed;
                all.unpacked += unpacked;
                all.page = all.page.max(page.unpacked);
                let own = (group_number, column_number);
                if DELTA_TEXTS.contains(&page.encoding) && all.delta.last() != Some(&own) {
                    all.delta.push(own);
                }
                if column.column_descr().max_rep_level() > 0 {
                    list_values = list_values.saturating_add(page.values.max(0));
                }
            }
        }
        all.list_values = all.list_values.max(list_values);
    }
    Ok(all)
}

/// Numbers of the encodings DELTA_LENGTH_BYTE_ARRAY and DELTA_BYTE_ARRAY.
const DELTA_TEXTS: [i64; 2] = [6, 7];

/// Sizes of a page by its header.
#[derive(Default)]
struct Page {
    header_bytes: u64,
    unpacked: i64,
    compressed: i64,
    values: i64,
    /// Values of a dictionary.
    dictionary: i64,
    /// Encoding of a data page, by its number.
    encoding: i64,
}

/// Bytes of the smallest value of a column in a dictionary, which holds them plain.
fn smallest_value(column: &ColumnChunkMetaData) -> i64 {
    match column.column_type() {
        Type::INT64 | Type::DOUBLE => 8,
        Type::INT96 => 12,
        Type::FIXED_LEN_BYTE_ARRAY => i64::from(column.column_descr().type_length()).max(1),
        // A text has its length in front.
        Type::BOOLEAN | Type::INT32 | Type::FLOAT | Type::BYTE_ARRAY => 4,
    }
}

/// Reads a page's header: `PageHeader` of parquet.thrift.
fn page(reader: &mut impl Read) -> io::Result<Page> {
    let mut compact = Compact::new(reader);
    let mut page = Page::default();
    let mut last = 0;
    while let Some((id, kind)) = compact.field(last)? {
        match (id, kind) {
            (2, I32) => page.unpacked = compact.integer()?,
            (3, I32) => page.compressed = compact.integer()?,
            // The headers of data pages, old and new, and of dictionaries begin with the number of values; encodings
            // are the second, the fourth and the second field.
            (5 | 7 | 8, STRUCT) => {
                let mut inner = 0;
                while let Some((field, kind)) = compact.field(inner)? {
                    match (id, field, kind) {
                        (7, 1, I32) => page.dictionary = compact.integer()?,
                        (_, 1, I32) => page.values = compact.integer()?,
                        (5, 2, I32) | (8, 4, I32) => page.encoding = compact.integer()?,
                        _ => compact.skip(kind)?,
                    }
                    inner = field;
                }
            }
            _ => compact.skip(kind)?,
        }
        last = id;
    }
    page.header_bytes = compact.bytes;
    Ok(page)
}
