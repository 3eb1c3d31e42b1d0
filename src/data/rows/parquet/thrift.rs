//! Thrift's compact protocol (thrift-compact-protocol.md of Apache Thrift), as far as the sizes in a Parquet file need
//! it.

use std::io::{self, Read};

/// Deepest nesting of values that are skipped.
const MAX_DEPTH: usize = 16;
/// Longest structure, in bytes.
const MAX_BYTES: u64 = 64 << 20;

/// Reads structures from bytes and counts them.
pub(super) struct Compact<R> {
    inner: R,
    pub(super) bytes: u64,
}

/// Type of a field or an element.
pub(super) type Kind = u8;
pub(super) const I32: Kind = 5;
pub(super) const LIST: Kind = 9;
pub(super) const STRUCT: Kind = 12;

pub(super) fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl<R: Read> Compact<R> {
    pub(super) fn new(inner: R) -> Self {
        Self { inner, bytes: 0 }
    }

    fn byte(&mut self) -> io::Result<u8> {
        let mut byte = [0];
        self.inner.read_exact(&mut byte)?;
        self.bytes += 1;
        match self.bytes > MAX_BYTES {
            true => Err(malformed("a structure that is too long")),
            false => Ok(byte[0]),
        }
    }

    /// A number without sign.
    pub(super) fn varint(&mut self) -> io::Result<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(malformed("a number that is too long"))
    }

    /// A whole number of any width.
    pub(super) fn integer(&mut self) -> io::Result<i64> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// Number and type of the next field of a structure, after the field `last`; `None` at its end.
    pub(super) fn field(&mut self, last: i64) -> io::Result<Option<(i64, Kind)>> {
        let head = self.byte()?;
        match (head & 0x0f, head >> 4) {
            (0, _) => Ok(None),
            (kind, 0) => Ok(Some((self.integer()?, kind))),
            (kind, delta) => Ok(Some((last + i64::from(delta), kind))),
        }
    }

    /// Length and element type of a list.
    pub(super) fn list(&mut self) -> io::Result<(u64, Kind)> {
        let head = self.byte()?;
        match head >> 4 {
            15 => Ok((self.varint()?, head & 0x0f)),
            length => Ok((u64::from(length), head & 0x0f)),
        }
    }

    /// Skips the value of a field.
    pub(super) fn skip(&mut self, kind: Kind) -> io::Result<()> {
        // Booleans have no bytes of their own.
        if matches!(kind, 1 | 2) { Ok(()) } else { self.skip_element(kind, 0) }
    }

    fn skip_element(&mut self, kind: Kind, depth: usize) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(malformed("values nested too deep"));
        }
        match kind {
            1..=3 => self.byte().map(drop),
            4..=6 => self.varint().map(drop),
            7 => (0..8).try_for_each(|_| self.byte().map(drop)),
            8 => {
                let length = self.varint()?;
                (0..length).try_for_each(|_| self.byte().map(drop))
            }
            9 | 10 => {
                let (length, kind) = self.list()?;
                (0..length).try_for_each(|_| self.skip_element(kind, depth + 1))
            }
            11 => {
                let length = self.varint()?;
                let kinds = if length > 0 { self.byte()? } else { 0 };
                (0..length).try_for_each(|_| {
                    self.skip_element(kinds >> 4, depth + 1)?;
                    self.skip_element(kinds & 0x0f, depth + 1)
                })
            }
            STRUCT => {
                let mut last = 0;
                while let Some((id, kind)) = self.field(last)? {
                    if !matches!(kind, 1 | 2) {
                        self.skip_element(kind, depth + 1)?;
                    }
                    last = id;
                }
                Ok(())
            }
            _ => Err(malformed("a value of no known type")),
        }
    }
}
