//! Streaming safetensors writer.

use super::{CHUNK, Dtype, coordinates, float_bytes};
use crate::error::{Error, FileOp, Result};
use half::{bf16, f16};
use rayon::prelude::*;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

/// Header entry of a tensor to be written.
#[derive(Clone, Debug)]
pub struct TensorSpec {
    /// Name of the tensor.
    pub name: String,
    /// Dtype in the file.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Size in the file, in bytes.
    pub fn bytes(&self) -> u64 {
        (self.len() * self.dtype.bitsize() / 8) as u64
    }
}

/// Writes the header, then the tensors' bytes in the header's order.
pub struct SafetensorsWriter {
    path: PathBuf,
    file: BufWriter<File>,
    written_bytes: u64,
    total_bytes: u64,
}

impl SafetensorsWriter {
    /// Creates the file and writes the header.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: &Path, specs: &[TensorSpec]) -> Result<Self> {
        let mut header = serde_json::Map::new();
        header.insert("__metadata__".to_owned(), serde_json::json!({"format": "pt"}));
        let mut begin = 0;
        for spec in specs {
            let end = begin + spec.bytes();
            let entry = serde_json::json!({"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [begin, end]});
            header.insert(spec.name.clone(), entry);
            begin = end;
        }
        let mut header = serde_json::Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let file = BufWriter::new(File::create(path).map_err(Error::io(path, FileOp::Create))?);
        let total_bytes = 8 + header.len() as u64 + begin;
        let mut writer = Self { path: path.to_owned(), file, written_bytes: 0, total_bytes };
        writer.write(&(header.len() as u64).to_le_bytes())?;
        writer.write(&header)?;
        Ok(writer)
    }

    /// Appends bytes of the current tensor.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.written_bytes += bytes.len() as u64;
        self.file.write_all(bytes).map_err(Error::io(&self.path, FileOp::Write))
    }

    /// Flushes the file and syncs it to disk.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// If the number of bytes written differs from what the header announces.
    pub fn finish(self) -> Result<()> {
        assert_eq!(self.written_bytes, self.total_bytes, "{}: written and announced bytes", self.path.display());
        let file = self.file.into_inner().map_err(|e| Error::io(&self.path, FileOp::Write)(e.into_error()))?;
        file.sync_all().map_err(Error::io(&self.path, FileOp::Write))
    }
}

/// Writes weights as BF16, F16 or F32, rounding to nearest even. `values(i)` returns the values of `specs[i]`; it is
/// called once per tensor, in order, so that one tensor is in memory at a time.
///
/// # Errors
/// [`Error::Failed`] with the index of a value that is not finite in its dtype; errors of `values`; [`Error::Io`].
pub fn write_weights(
    path: &Path,
    specs: &[TensorSpec],
    mut values: impl FnMut(usize) -> Result<Vec<f32>>,
) -> Result<()> {
    let mut out = SafetensorsWriter::create(path, specs)?;
    let mut bytes = Vec::new();
    for (i, spec) in specs.iter().enumerate() {
        let values = values(i)?;
        if values.len() != spec.len() {
            let what = format!("{} values for tensor `{}` of shape {:?}", values.len(), spec.name, spec.shape);
            return Err(Error::failed(what, "this is a bug; please report it"));
        }
        let width = float_bytes(spec.dtype).unwrap_or(4);
        // In bounded pieces, so that a large tensor is not held twice.
        for (piece, values) in values.chunks(64 * CHUNK).enumerate() {
            bytes.resize(values.len() * width, 0);
            let bad = bytes
                .par_chunks_mut(CHUNK * width)
                .zip(values.par_chunks(CHUNK))
                .enumerate()
                .filter_map(|(chunk, (bytes, values))| {
                    narrow(spec.dtype, values, bytes);
                    let overflows = |v: &f32| spec.dtype == Dtype::F16 && f16::from_f32(*v).is_infinite();
                    let bad = values.iter().position(|v| !v.is_finite() || overflows(v));
                    bad.map(|i| chunk * CHUNK + i)
                })
                .min();
            if let Some(at) = bad {
                let index = coordinates(piece * 64 * CHUNK + at, &spec.shape);
                let what = format!("{} at index {index:?} of tensor `{}` ({})", values[at], spec.name, spec.dtype);
                return Err(Error::failed(what, "the run has diverged; lower the learning rate"));
            }
            out.write(&bytes)?;
        }
    }
    out.finish()
}

/// Converts from f32, rounding to nearest even.
fn narrow(dtype: Dtype, values: &[f32], bytes: &mut [u8]) {
    let pairs = bytes.chunks_exact_mut(2).zip(values);
    match dtype {
        Dtype::BF16 => pairs.for_each(|(b, v)| b.copy_from_slice(&bf16::from_f32(*v).to_le_bytes())),
        Dtype::F16 => pairs.for_each(|(b, v)| b.copy_from_slice(&f16::from_f32(*v).to_le_bytes())),
        _ => {
            for (b, v) in bytes.chunks_exact_mut(4).zip(values) {
                b.copy_from_slice(&v.to_le_bytes());
            }
        }
    }
}
