//! Check of the delta encodings of texts (Encodings.md of Apache Parquet) before a page of them is read: the reader
//! allocates as many lengths as a page claims, and repeats for each value what it shares with the one before.

use super::check::MAX_LIST_VALUES;
use super::thrift::Compact;
use ::parquet::basic::Encoding;
use ::parquet::column::page::Page;
use ::parquet::errors::{ParquetError, Result};
use ::parquet::file::reader::FileReader;
use ::parquet::file::serialized_reader::SerializedFileReader;
use std::fs::File;

/// Bytes that the values of these columns, each a group and a number in it, repeat of the values before them. Counting
/// ends above `most`.
pub(super) fn repeated_bytes(
    reader: &SerializedFileReader<File>,
    columns: &[(usize, usize)],
    most: u64,
) -> Result<u64> {
    let mut repeated = 0u64;
    for &(group, number) in columns {
        let group = reader.get_row_group(group)?;
        let column = group.metadata().column(number).column_descr_ptr();
        let levels = [column.max_rep_level(), column.max_def_level()];
        let values = if levels[0] > 0 { MAX_LIST_VALUES } else { group.metadata().num_rows() };
        let mut left = u64::try_from(values).unwrap_or(0);
        for page in group.get_column_page_reader(number)? {
            let page = page?;
            let encoding = page.encoding();
            if !matches!(encoding, Encoding::DELTA_LENGTH_BYTE_ARRAY | Encoding::DELTA_BYTE_ARRAY) {
                continue;
            }
            let bytes = values_of(&page, levels).ok_or_else(wrong)?;
            let first = Packed::read(bytes, left).ok_or_else(wrong)?;
            left -= first.count;
            if encoding == Encoding::DELTA_BYTE_ARRAY {
                let rest = bytes.get(first.bytes..).ok_or_else(wrong)?;
                Packed::read(rest, first.count).ok_or_else(wrong)?;
                repeated = repeated.saturating_add(first.sum);
            }
            if repeated > most {
                return Ok(repeated);
            }
        }
    }
    Ok(repeated)
}

fn wrong() -> ParquetError {
    ParquetError::General("lengths of texts that are not those of its values".into())
}

/// The values of a data page, behind its levels: of repetition and of definition.
fn values_of(page: &Page, levels: [i16; 2]) -> Option<&[u8]> {
    match page {
        Page::DictionaryPage { .. } => None,
        Page::DataPageV2 { buf, rep_levels_byte_len, def_levels_byte_len, .. } => {
            buf.get(*rep_levels_byte_len as usize..)?.get(*def_levels_byte_len as usize..)
        }
        Page::DataPage { buf, num_values, rep_level_encoding, def_level_encoding, .. } => {
            let mut rest = &buf[..];
            for (level, encoding) in levels.into_iter().zip([rep_level_encoding, def_level_encoding]) {
                let bytes = match (level, encoding) {
                    (..=0, _) => 0,
                    (_, Encoding::RLE) => {
                        let (length, _) = rest.split_first_chunk()?;
                        4 + u32::from_le_bytes(*length) as usize
                    }
                    // The older encoding, of as many bits as the largest level has.
                    (level, _) => {
                        let bits = 16 - level.leading_zeros();
                        (*num_values as usize * bits as usize).div_ceil(8)
                    }
                };
                rest = rest.get(bytes..)?;
            }
            Some(rest)
        }
    }
}

/// Whole numbers in the encoding DELTA_BINARY_PACKED.
struct Packed {
    /// How many.
    count: u64,
    /// The sum of those above 0.
    sum: u64,
    /// Bytes that they take.
    bytes: usize,
}

impl Packed {
    /// Reads at most `most` numbers.
    fn read(bytes: &[u8], most: u64) -> Option<Self> {
        let mut head = Compact::new(bytes);
        let (block, parts) = (head.varint().ok()?, head.varint().ok()?);
        let count = head.varint().ok().filter(|count| *count <= most)?;
        let mut last = head.integer().ok()? as i32;
        let mut at = head.bytes as usize;
        let mut sum = if count > 0 { above_zero(last) } else { 0 };
        let mut left = count.saturating_sub(1);
        // Numbers of a part, whose bits fill whole bytes.
        let part = block.checked_div(parts).filter(|part| *part > 0 && part.is_multiple_of(8) && *part <= 1 << 32)?;
        while left > 0 {
            let mut head = Compact::new(bytes.get(at..)?);
            let least = head.integer().ok()? as i32;
            at += head.bytes as usize;
            let widths = bytes.get(at..)?.get(..usize::try_from(parts).ok()?)?;
            at += widths.len();
            for width in widths.iter().map(|width| usize::from(*width)) {
                if left == 0 {
                    break;
                }
                let packed = bytes.get(at..)?.get(..width * (part / 8) as usize).filter(|_| width <= 32)?;
                at += packed.len();
                let here = left.min(part);
                left -= here;
                for i in 0..here as usize {
                    last = last.wrapping_add(least).wrapping_add(bits(packed, i * width, width) as i32);
                    sum += above_zero(last);
                }
            }
        }
        Some(Self { count, sum, bytes: at })
    }
}

fn above_zero(x: i32) -> u64 {
    u64::try_from(x).unwrap_or(0)
}

/// The number of `width` bits, at most 32, that begins at the bit `at`, lowest bit first.
fn bits(bytes: &[u8], at: usize, width: usize) -> u32 {
    let window = bytes.iter().skip(at / 8).take(5).rev().fold(0u64, |sum, byte| sum << 8 | u64::from(*byte));
    (window >> (at % 8) & ((1 << width) - 1)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of Encodings.md: 1 to 5, and 7, 5, 3, 1, 2, 3, 4, 5, with blocks of 128 in four parts.
    #[test]
    fn numbers_are_those_of_the_specification() {
        let head = |count: u8, first: u8| vec![0x80, 0x01, 0x04, count, first];
        let mut one = head(5, 2);
        // Deltas of 1: least 1 (as 2), no bits.
        one.extend([2, 0, 0, 0, 0]);
        let read = Packed::read(&one, 5).unwrap();
        assert_eq!((read.count, read.sum, read.bytes), (5, 15, one.len()));
        let mut two = head(8, 14);
        // Deltas -2 -2 -2 1 1 1 1: least -2 (as 3), then 0 0 0 3 3 3 3 in two bits, 32 of them in 8 bytes.
        two.extend([3, 2, 0, 0, 0, 0b1100_0000, 0b0011_1111, 0, 0, 0, 0, 0, 0]);
        two.push(99);
        let read = Packed::read(&two, 8).unwrap();
        assert_eq!((read.count, read.sum, read.bytes), (8, 30, two.len() - 1));
        assert!(Packed::read(&two, 7).is_none(), "more numbers than values");
        assert!(Packed::read(&two[..12], 8).is_none(), "cut off");
        assert!(Packed::read(&[0x80, 0x01, 0, 1, 2], 8).is_none(), "blocks without parts");
    }

    /// A claim of a few bytes that a reader would allocate gigabytes for.
    #[test]
    fn claims_are_bounded_before_anything_is_read() {
        assert!(Packed::read(&[0x80, 0x01, 0x04, 0xff, 0xff, 0xff, 0xff, 0x7f, 0], 1 << 20).is_none());
    }

    #[test]
    fn bits_are_read_across_bytes() {
        let bytes = [0b1010_1100, 0b0111_0001, 0xff, 0, 0x80];
        assert_eq!((bits(&bytes, 0, 3), bits(&bytes, 6, 5), bits(&bytes, 8, 32)), (0b100, 0b00110, 0x8000_ff71));
        assert_eq!((bits(&[], 0, 0), bits(&bytes, 3, 0)), (0, 0));
    }
}
