//! TensorBoard event files: scalars by step.
//!
//! A file is a sequence of records: length (u64, little-endian), masked CRC-32C of the length, a serialized `Event` of
//! TensorFlow's `event.proto`, masked CRC-32C of that. TensorBoard reads all files of a directory.

use crate::error::{Error, FileOp, Result};
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// Field numbers of `Event`, `Summary` and `Summary.Value`.
const WALL_TIME: u64 = 1;
const STEP: u64 = 2;
const FILE_VERSION: u64 = 3;
const SUMMARY: u64 = 5;
const SESSION_LOG: u64 = 7;
const VALUE: u64 = 1;
const TAG: u64 = 1;
const SIMPLE_VALUE: u64 = 2;

/// An event file that is being written.
#[derive(Debug)]
pub struct EventFile {
    file: File,
    /// Whether the first step is to hide those that a killed run wrote behind the checkpoint.
    resumed: bool,
}

impl EventFile {
    /// [`EventFile::create`] for a run that goes on from a checkpoint: its first step hides those that the earlier process
    /// wrote behind it.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn resume(dir: &Path) -> Result<Self> {
        Ok(Self { resumed: true, ..Self::create(dir)? })
    }

    /// Creates a file of a new name in `dir`, which is created if missing.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(Error::io(dir, FileOp::Create))?;
        let now = since_1970();
        let name = format!(
            "events.out.tfevents.{:010}.swat.{}.{}",
            now as u64,
            std::process::id(),
            (now.fract() * 1e6) as u64
        );
        let path = dir.join(name);
        let file = File::create_new(&path).map_err(Error::io(&path, FileOp::Create))?;
        let mut events = Self { file, resumed: false };
        let mut version = Vec::new();
        bytes_field(FILE_VERSION, b"brain.Event:2", &mut version);
        events.write(0, &version).map_err(Error::io(&path, FileOp::Write))?;
        Ok(events)
    }

    /// Appends scalars of a step.
    ///
    /// # Errors
    /// What the operating system reports; the run goes on without.
    pub fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> std::io::Result<()> {
        if std::mem::take(&mut self.resumed) {
            // SessionLog with the status START: steps from this one on in other files are no longer shown.
            let mut started = Vec::new();
            bytes_field(SESSION_LOG, &[0x08, 0x01], &mut started);
            self.write(step, &started)?;
        }
        let mut summary = Vec::new();
        for (tag, value) in scalars {
            let mut own = Vec::new();
            bytes_field(TAG, tag.as_bytes(), &mut own);
            varint(SIMPLE_VALUE << 3 | 5, &mut own);
            own.extend((*value as f32).to_le_bytes());
            bytes_field(VALUE, &own, &mut summary);
        }
        let mut event = Vec::new();
        bytes_field(SUMMARY, &summary, &mut event);
        self.write(step, &event)
    }

    /// Appends an event with the time of now.
    fn write(&mut self, step: u64, fields: &[u8]) -> std::io::Result<()> {
        let mut event = Vec::new();
        varint(WALL_TIME << 3 | 1, &mut event);
        event.extend(since_1970().to_le_bytes());
        varint(STEP << 3, &mut event);
        varint(step, &mut event);
        event.extend(fields);
        let length = (event.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(event.len() + 16);
        record.extend(length);
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(&event);
        record.extend(masked_crc(&event).to_le_bytes());
        // One write a record, so that a killed run leaves no partial one.
        self.file.write_all(&record)
    }
}

fn since_1970() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// A field of bytes, text or a message.
fn bytes_field(number: u64, bytes: &[u8], out: &mut Vec<u8>) {
    varint(number << 3 | 2, out);
    varint(bytes.len() as u64, out);
    out.extend(bytes);
}

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// CRC-32C (Castagnoli), rotated and offset as TensorFlow's records have it.
fn masked_crc(bytes: &[u8]) -> u32 {
    let crc = !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    });
    crc.rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, B.4: the CRC-32C of 32 bytes of zeros, and of the digits 1 to 9.
        let plain = |bytes: &[u8]| masked_crc(bytes).wrapping_sub(0xa282_ead8).rotate_left(15);
        assert_eq!((plain(&[0; 32]), plain(b"123456789")), (0x8a91_36aa, 0xe306_9283));
    }

    #[test]
    fn records_hold_events() {
        let dir = tempfile::tempdir().unwrap();
        let mut events = EventFile::resume(dir.path()).unwrap();
        events.scalars(300, &[("train/loss", 1.5)]).unwrap();
        let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        assert!(name.starts_with("events.out.tfevents."), "{name}");
        let mut bytes = &std::fs::read(path).unwrap()[..];
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let crc = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
            assert_eq!((crc(8), crc(12 + length)), (masked_crc(&bytes[..8]), masked_crc(&bytes[12..12 + length])));
            // Behind the time, of 9 bytes.
            found.push(bytes[21..12 + length].to_vec());
            bytes = &bytes[16 + length..];
        }
        let value = [&[0x0a, 10][..], b"train/loss", &[0x15], &1.5f32.to_le_bytes()].concat();
        let step = [0x10, 0xac, 0x02];
        assert_eq!(found[0], [&[0x10, 0, 0x1a, 13][..], b"brain.Event:2"].concat());
        assert_eq!(found[1], [&step[..], &[0x3a, 2, 8, 1]].concat());
        assert_eq!(found[2], [&step[..], &[0x2a, 19, 0x0a, 17], &value[..]].concat());
    }
}
