//! The safetensors format: a memory-mapped reader and a streaming writer.
//!
//! A file is 8 bytes of little-endian header length, a JSON header `{"name": {"dtype", "shape", "data_offsets": [begin,
//! end]}, "__metadata__"?: {…}}`, then the tensors' bytes without gaps.

mod writer;

pub use safetensors::Dtype;
pub use writer::{SafetensorsWriter, TensorSpec, write_weights};

use super::input::{LFS_POINTER, LFS_REMEDY, printable};
use crate::error::{Error, FileOp, Result};
use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::tensor::TensorInfo;
use serde::de::{Error as _, MapAccess, Visitor};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Maximum header length, by the format.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Elements converted per parallel task.
const CHUNK: usize = 1 << 16;

/// A memory-mapped file with a valid header: offsets are in bounds, do not overlap, leave no gaps, and agree with
/// shapes and dtypes.
pub struct Safetensors {
    path: PathBuf,
    map: Mmap,
    /// Offset of the tensors' bytes.
    data: usize,
    tensors: BTreeMap<String, TensorInfo>,
}

impl Safetensors {
    /// Maps a file and validates its header.
    ///
    /// # Errors
    /// [`Error::Input`] for an invalid header; [`Error::Io`].
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path, FileOp::Open))?;
        let bytes = file.metadata().map_err(Error::io(path, FileOp::Read))?.len();
        let place = path.display().to_string();
        if bytes < 8 {
            return Err(Error::input(place, format!("{bytes} bytes"), "a safetensors file, which has at least 8"));
        }
        // SAFETY: the mapping is read-only and private to this value. The one way to misuse it is another process that
        // changes the file meanwhile, which every mapping loader of checkpoints accepts; bytes are only read as
        // integers and floats, for which every pattern is valid.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::io(path, FileOp::Map))?;
        let (data, tensors) = parse(&map, &place)?;
        Ok(Self { path: path.to_owned(), map, data, tensors })
    }

    /// Names, dtypes and shapes of all tensors.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, Dtype, &[usize])> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info.dtype, info.shape.as_slice()))
    }

    /// Dtype and shape of a tensor.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no such tensor.
    pub fn info(&self, name: &str) -> Result<(Dtype, &[usize])> {
        self.entry(name).map(|info| (info.dtype, info.shape.as_slice()))
    }

    /// The bytes of a tensor.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no such tensor.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let (begin, end) = self.entry(name)?.data_offsets;
        let bytes = self.map.get(self.data..).and_then(|data| data.get(begin..end));
        bytes.ok_or_else(|| Error::input(self.place(), format!("tensor `{name}` outside the file"), "valid offsets"))
    }

    /// Whether the file has a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The bytes of a tensor that must have `len` elements of `dtype`.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no such tensor, or one of another dtype or size.
    pub fn typed_bytes(&self, name: &str, dtype: Dtype, len: usize) -> Result<&[u8]> {
        let info = self.entry(name)?;
        if info.dtype == dtype && info.shape.iter().product::<usize>() == len {
            return self.bytes(name);
        }
        let place = format!("{}: tensor `{}`", self.place(), name.escape_debug());
        Err(Error::input(
            place,
            format!("{} of shape {:?}", info.dtype, info.shape),
            format!("{len} values of {dtype}"),
        ))
    }

    /// The values of a bf16, f16 or f32 tensor as f32, converted in parallel.
    ///
    /// # Errors
    /// [`Error::Input`] with the index of a value that is not finite; [`Error::Unsupported`] for any other dtype.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        let (dtype, shape) = self.info(name)?;
        let bytes = self.bytes(name)?;
        let width = float_bytes(dtype).ok_or_else(|| self.not_float(name, dtype))?;
        let mut values = vec![0.0_f32; bytes.len() / width];
        let bad = values
            .par_chunks_mut(CHUNK)
            .zip(bytes.par_chunks(CHUNK * width))
            .enumerate()
            .filter_map(|(chunk, (values, bytes))| {
                widen(dtype, bytes, values);
                values.iter().position(|v| !v.is_finite()).map(|i| chunk * CHUNK + i)
            })
            .min();
        self.release(name)?;
        match bad {
            None => Ok(values),
            Some(at) => Err(Error::input(
                format!("{}: tensor `{name}`", self.place()),
                format!("{} at index {:?}", values[at], coordinates(at, shape)),
                "finite weights",
            )),
        }
    }

    /// Releases a tensor's pages, so that a loaded file does not occupy memory twice.
    pub(crate) fn release(&self, name: &str) -> Result<()> {
        let bytes = self.bytes(name)?;
        #[cfg(unix)]
        if !bytes.is_empty() {
            let len = bytes.len();
            let offset = self.data + self.entry(name)?.data_offsets.0;
            // SAFETY: the map is of a file and read-only: dropped pages hold nothing that the file does not, and are read again
            // when touched. The range lies inside the map: `bytes` checked it.
            let advised = unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, offset, len) };
            advised.map_err(Error::io(&self.path, FileOp::Release))?;
        }
        Ok(())
    }

    /// The entry `key` of the header's `__metadata__`.
    pub(crate) fn metadata(&self, key: &str) -> Option<String> {
        let header: serde_json::Value = serde_json::from_slice(self.map.get(8..self.data)?).ok()?;
        Some(header.get("__metadata__")?.get(key)?.as_str()?.to_owned())
    }

    /// Path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn entry(&self, name: &str) -> Result<&TensorInfo> {
        self.tensors.get(name).ok_or_else(|| {
            Error::input(self.place(), format!("no tensor `{}`", name.escape_debug()), "a file that holds it")
        })
    }

    pub(crate) fn not_float(&self, name: &str, dtype: Dtype) -> Error {
        let place = format!("{}: tensor `{name}`", self.place());
        Error::unsupported(place, format!("the dtype {dtype}"), "store weights as BF16, F16 or F32")
    }
}

/// Bytes per element of a floating-point dtype; `None` for dtypes that weights may not have.
pub fn float_bytes(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::BF16 | Dtype::F16 => Some(2),
        Dtype::F32 => Some(4),
        _ => None,
    }
}

/// A value as it comes back after it was stored in `dtype`.
pub fn rounded(value: f32, dtype: Dtype) -> f32 {
    match dtype {
        Dtype::BF16 => bf16::from_f32(value).to_f32(),
        Dtype::F16 => f16::from_f32(value).to_f32(),
        _ => value,
    }
}

/// Converts to f32; `bytes` holds exactly `values.len()` elements.
fn widen(dtype: Dtype, bytes: &[u8], values: &mut [f32]) {
    let pairs = bytes.chunks_exact(2).zip(values.iter_mut());
    match dtype {
        Dtype::BF16 => pairs.for_each(|(b, v)| *v = bf16::from_le_bytes([b[0], b[1]]).to_f32()),
        Dtype::F16 => pairs.for_each(|(b, v)| *v = f16::from_le_bytes([b[0], b[1]]).to_f32()),
        _ => {
            for (b, v) in bytes.chunks_exact(4).zip(values) {
                *v = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            }
        }
    }
}

/// The index per dimension of a row-major offset.
fn coordinates(mut at: usize, shape: &[usize]) -> Vec<usize> {
    let mut index: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&size| {
            let i = at % size.max(1);
            at /= size.max(1);
            i
        })
        .collect();
    index.reverse();
    index
}

/// Validates the header; returns the offset of the data, and the tensors.
fn parse(file: &[u8], place: &str) -> Result<(usize, BTreeMap<String, TensorInfo>)> {
    let wrong = |found: String, expected: &str| Error::input(place, found, expected);
    if file.starts_with(LFS_POINTER) {
        return Err(wrong("a Git LFS pointer".to_owned(), LFS_REMEDY));
    }
    let length = file.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let after = file.get(8..).unwrap_or_default();
    if length > MAX_HEADER_BYTES || length > after.len() as u64 {
        let found = format!("a header of {length} bytes in a file of {}", file.len());
        return Err(wrong(found, "a complete safetensors file with a header of at most 100 MB"));
    }
    let (header, data) = after.split_at(length as usize);
    let header = std::str::from_utf8(header)
        .map_err(|e| wrong(format!("a header that is not UTF-8 at byte {}", e.valid_up_to()), "a JSON header"))?;
    let Header(tensors) = serde_json::from_str(header)
        .map_err(|e| wrong(format!("a malformed header ({})", printable(&e)), "a JSON header"))?;

    let mut by_offset: Vec<(&String, &TensorInfo)> = tensors.iter().collect();
    by_offset.sort_by_key(|(_, info)| info.data_offsets);
    let mut covered = 0;
    for (name, info) in by_offset {
        let name = name.escape_debug();
        let at = |found: String, expected: String| Error::input(format!("{place}: tensor `{name}`"), found, expected);
        let (begin, end) = info.data_offsets;
        let span = format!("bytes {begin}..{end}");
        if begin > end || end > data.len() {
            return Err(at(span, format!("bytes inside the file, which holds {}; is it truncated?", data.len())));
        }
        let elements = info.shape.iter().try_fold(1_usize, |n, size| n.checked_mul(*size));
        let bits = elements.and_then(|n| n.checked_mul(info.dtype.bitsize()));
        if bits != (end - begin).checked_mul(8) {
            let expected = match bits {
                Some(bits) => format!("{} bytes for {} of shape {:?}", bits.div_ceil(8), info.dtype, info.shape),
                None => format!("a shape that a file can hold, not {:?}", info.shape),
            };
            return Err(at(span, expected));
        }
        if begin != covered {
            let what = if begin < covered { "overlap" } else { "leave a gap before them" };
            return Err(at(format!("{span}, which {what}"), format!("bytes that begin at {covered}")));
        }
        covered = end;
    }
    if covered != data.len() {
        let found = format!("{} bytes of data; tensors cover {covered}", data.len());
        return Err(wrong(found, "tensors that cover the file"));
    }
    Ok((8 + length as usize, tensors))
}

/// The JSON header; unlike a plain map it rejects duplicate names and names the tensor in errors.
struct Header(BTreeMap<String, TensorInfo>);

impl<'de> serde::Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Header, A::Error> {
                let mut tensors = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<BTreeMap<String, String>>()?;
                        continue;
                    }
                    let info: TensorInfo = map
                        .next_value()
                        .map_err(|e| A::Error::custom(format!("tensor `{}`: {e}", name.escape_debug())))?;
                    if tensors.insert(name.clone(), info).is_some() {
                        return Err(A::Error::custom(format!("tensor `{}` comes twice", name.escape_debug())));
                    }
                }
                Ok(Header(tensors))
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}
