//! Tensors of a checkpoint as safetensors, written and read in pieces: between steps there is little memory to spare.

use crate::backend::{Backend, Buffer, Element};
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Larger headers are refused before they are read, as in the `safetensors` crate.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Elements on the host at once, on the way from a backend or to it.
const PIECE: usize = 1 << 20;

/// Size and hash of a finished file.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct FileMark {
    pub(super) bytes: u64,
    pub(super) blake3: String,
}

/// One tensor of the header.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// What a file will hold.
#[derive(Default)]
pub(super) struct Header {
    entries: serde_json::Map<String, serde_json::Value>,
    data_bytes: u64,
}

impl Header {
    /// Announces a tensor of `T`s; they must be written in the order of announcement.
    pub(super) fn add<T: Element>(&mut self, name: String, shape: &[usize]) {
        let bytes = (shape.iter().product::<usize>() * size_of::<T>()) as u64;
        let end = self.data_bytes + bytes;
        let entry = serde_json::json!({
            "dtype": T::NAME.to_uppercase(), "shape": shape, "data_offsets": [self.data_bytes, end],
        });
        self.entries.insert(name, entry);
        self.data_bytes = end;
    }
}

/// A file that is being written.
pub(super) struct TensorWriter {
    path: PathBuf,
    file: BufWriter<File>,
    hasher: blake3::Hasher,
    bytes: u64,
    expected_bytes: u64,
}

impl TensorWriter {
    /// Creates the file and writes its header.
    pub(super) fn create(path: &Path, header: Header) -> Result<Self> {
        let file = BufWriter::new(File::create(path).map_err(Error::io(path, "write"))?);
        let mut text = serde_json::Value::Object(header.entries).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let expected_bytes = 8 + text.len() as u64 + header.data_bytes;
        let mut writer = Self { path: path.to_owned(), file, hasher: blake3::Hasher::new(), bytes: 0, expected_bytes };
        writer.put(&(text.len() as u64).to_le_bytes())?;
        writer.put(&text)?;
        Ok(writer)
    }

    /// Appends the values of the next tensor.
    pub(super) fn put<T: bytemuck::NoUninit>(&mut self, values: &[T]) -> Result<()> {
        let bytes = bytemuck::cast_slice(values);
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes).map_err(Error::io(&self.path, "write"))
    }

    /// Appends the next tensor from a backend, bit by bit, a piece at a time.
    pub(super) fn put_buffer<B: Backend, T: Element>(&mut self, backend: &B, buffer: &Buffer<B, T>) -> Result<()> {
        let mut host = vec![T::zeroed(); buffer.len().min(PIECE)];
        for first in (0..buffer.len()).step_by(PIECE) {
            let piece = &mut host[..PIECE.min(buffer.len() - first)];
            backend.read(buffer.range(first..first + piece.len()), piece)?;
            self.put(piece)?;
        }
        Ok(())
    }

    /// Makes the file survive a loss of power.
    pub(super) fn finish(self) -> Result<FileMark> {
        assert_eq!(self.bytes, self.expected_bytes, "{}: announced and written", self.path.display());
        let file = self.file.into_inner().map_err(|e| Error::io(&self.path, "write")(e.into_error()))?;
        file.sync_all().map_err(Error::io(&self.path, "write"))?;
        Ok(FileMark { bytes: self.bytes, blake3: self.hasher.finalize().to_hex().to_string() })
    }
}

/// A file that is being read.
pub(super) struct TensorReader {
    path: PathBuf,
    file: BufReader<File>,
    entries: BTreeMap<String, Entry>,
    data_start: u64,
}

impl TensorReader {
    /// Reads the header.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let wrong = |found: String| Error::input(path.display().to_string(), found, "a safetensors file");
        let mut file = BufReader::new(File::open(path).map_err(Error::io(path, "open"))?);
        let file_bytes = file.get_ref().metadata().map_err(Error::io(path, "read"))?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length).map_err(Error::io(path, "read"))?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER_BYTES.min(file_bytes) {
            return Err(wrong(format!("a header of {length} bytes")));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(Error::io(path, "read"))?;
        let entries = serde_json::from_slice(&header).map_err(|e| wrong(format!("a header that is no JSON ({e})")))?;
        Ok(Self { path: path.to_owned(), file, entries, data_start: 8 + length })
    }

    /// Whether it holds a tensor of this name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The values of a tensor, which must have `len` elements of type `T`.
    pub(super) fn get<T: Element>(&mut self, name: &str, len: usize) -> Result<Vec<T>> {
        self.find::<T>(name, len)?;
        let mut values = vec![T::zeroed(); len];
        self.next(&mut values)?;
        Ok(values)
    }

    /// Puts a tensor into a backend's buffer, bit by bit, a piece at a time.
    pub(super) fn get_buffer<B: Backend, T: Element>(
        &mut self,
        name: &str,
        backend: &B,
        buffer: &mut Buffer<B, T>,
    ) -> Result<()> {
        let len = buffer.len();
        self.find::<T>(name, len)?;
        let mut host = vec![T::zeroed(); len.min(PIECE)];
        for first in (0..len).step_by(PIECE) {
            let piece = &mut host[..PIECE.min(len - first)];
            self.next(piece)?;
            backend.write(piece, buffer.range_mut(first..first + piece.len()))?;
        }
        Ok(())
    }

    /// Goes to the first value of a tensor of `len` elements of type `T`.
    fn find<T: Element>(&mut self, name: &str, len: usize) -> Result<()> {
        let wrong = |found: String| {
            Error::input(
                format!("{}: {name}", self.path.display()),
                found,
                format!("{len} values of {}", T::NAME.to_uppercase()),
            )
        };
        let entry = self.entries.get(name).ok_or_else(|| wrong("no such tensor".into()))?;
        let [start, end] = entry.data_offsets;
        if entry.dtype != T::NAME.to_uppercase() || end.checked_sub(start) != Some((len * size_of::<T>()) as u64) {
            return Err(wrong(format!("{} {:?}", entry.dtype, entry.shape)));
        }
        let at = self.data_start.checked_add(start).ok_or_else(|| wrong(format!("offset {start}")))?;
        self.file.seek(SeekFrom::Start(at)).map(drop).map_err(Error::io(&self.path, "read"))
    }

    fn next<T: Element>(&mut self, values: &mut [T]) -> Result<()> {
        self.file.read_exact(bytemuck::cast_slice_mut(values)).map_err(Error::io(&self.path, "read"))
    }
}

/// Size and hash of a file that is there.
pub(super) fn mark(path: &Path) -> Result<FileMark> {
    let mut file = File::open(path).map_err(Error::io(path, "open"))?;
    let mut hasher = blake3::Hasher::new();
    let bytes = std::io::copy(&mut file, &mut hasher).map_err(Error::io(path, "read"))?;
    Ok(FileMark { bytes, blake3: hasher.finalize().to_hex().to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(path: &Path) -> FileMark {
        let mut header = Header::default();
        header.add::<f32>("a".into(), &[2, 1]);
        header.add::<half::bf16>("b".into(), &[3]);
        let mut writer = TensorWriter::create(path, header).unwrap();
        writer.put(&[1.5f32, f32::from_bits(0x7fc0_1234)]).unwrap();
        writer.put(&[half::bf16::from_f32(-2.0); 3]).unwrap();
        writer.finish().unwrap()
    }

    #[test]
    fn bits_come_back_and_other_readers_agree() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        assert_eq!(write(&path), mark(&path).unwrap());
        let mut reader = TensorReader::open(&path).unwrap();
        assert!(reader.has("a") && !reader.has("c"));
        assert_eq!(reader.get::<half::bf16>("b", 3).unwrap(), [half::bf16::from_f32(-2.0); 3]);
        assert_eq!(reader.get::<f32>("a", 2).unwrap()[1].to_bits(), 0x7fc0_1234);
        let bytes = std::fs::read(&path).unwrap();
        let others = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(others.tensor("a").unwrap().shape(), [2, 1]);
        assert_eq!(others.tensor("b").unwrap().dtype(), safetensors::Dtype::BF16);
    }

    #[test]
    fn wrong_type_length_and_name_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        write(&path);
        let mut reader = TensorReader::open(&path).unwrap();
        assert!(reader.get::<u32>("a", 2).unwrap_err().to_string().contains("U32"));
        assert!(reader.get::<f32>("a", 3).is_err());
        assert!(reader.get::<f32>("c", 3).unwrap_err().to_string().contains("no such tensor"));
    }

    #[test]
    fn no_bytes_make_the_reader_panic() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        write(&path);
        let good = std::fs::read(&path).unwrap();
        for cut in 0..good.len() {
            std::fs::write(&path, &good[..cut]).unwrap();
            if let Ok(mut reader) = TensorReader::open(&path) {
                let _ = reader.get::<f32>("a", 2);
                assert!(reader.get::<half::bf16>("b", 3).is_err());
            }
        }
        for huge in [u64::MAX, 1 << 40] {
            let mut bytes = good.clone();
            bytes[..8].copy_from_slice(&huge.to_le_bytes());
            std::fs::write(&path, &bytes).unwrap();
            assert!(TensorReader::open(&path).is_err());
        }
    }
}
