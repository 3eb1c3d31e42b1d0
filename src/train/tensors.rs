//! Device buffers to and from safetensors files, bit for bit and in chunks, as memory is scarce between steps.

use crate::backend::{Backend, Buffer, Element};
use crate::error::Result;
use crate::io::safetensors::{Safetensors, SafetensorsWriter, TensorSpec};

/// Elements per chunk on the host.
const PIECE: usize = 1 << 20;

/// Header entry of a tensor of `T`.
pub(super) fn spec<T: Element>(name: String, shape: &[usize]) -> TensorSpec {
    TensorSpec { name, dtype: T::DTYPE, shape: shape.to_vec() }
}

/// Writes a buffer as the next tensor.
pub(super) fn write_buffer<B: Backend, T: Element>(
    writer: &mut SafetensorsWriter,
    backend: &B,
    buffer: &Buffer<B, T>,
) -> Result<()> {
    let mut host = vec![T::zeroed(); buffer.len().min(PIECE)];
    for first in (0..buffer.len()).step_by(PIECE) {
        let piece = &mut host[..PIECE.min(buffer.len() - first)];
        backend.read(buffer.range(first..first + piece.len()), piece)?;
        writer.write(bytemuck::cast_slice(piece))?;
    }
    Ok(())
}

/// Reads the tensor `name` into a buffer of its length and dtype.
pub(super) fn read_buffer<B: Backend, T: Element>(
    file: &Safetensors,
    name: &str,
    backend: &B,
    buffer: &mut Buffer<B, T>,
) -> Result<()> {
    let len = buffer.len();
    let bytes = file.typed_bytes(name, T::DTYPE, len)?;
    let mut host = vec![T::zeroed(); len.min(PIECE)];
    for (piece, bytes) in bytes.chunks(PIECE * size_of::<T>()).enumerate() {
        let values = &mut host[..bytes.len() / size_of::<T>()];
        bytemuck::cast_slice_mut(values).copy_from_slice(bytes);
        let first = piece * PIECE;
        backend.write(values, buffer.range_mut(first..first + values.len()))?;
    }
    file.release(name)
}

/// Values of the tensor `name`, which must have `len` elements of `T`.
pub(super) fn read_values<T: Element>(file: &Safetensors, name: &str, len: usize) -> Result<Vec<T>> {
    let mut values = vec![T::zeroed(); len];
    bytemuck::cast_slice_mut(&mut values).copy_from_slice(file.typed_bytes(name, T::DTYPE, len)?);
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use half::bf16;
    use std::path::Path;

    fn write(path: &Path) {
        let specs = [spec::<f32>("a".into(), &[2, 1]), spec::<bf16>("b".into(), &[3])];
        let mut writer = SafetensorsWriter::create(path, &specs).unwrap();
        writer.write(bytemuck::cast_slice(&[1.5f32, f32::from_bits(0x7fc0_1234)])).unwrap();
        writer.write(bytemuck::cast_slice(&[bf16::from_f32(-2.0); 3])).unwrap();
        writer.finish().unwrap();
    }

    #[test]
    fn bits_come_back_and_other_readers_agree() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        write(&path);
        let file = Safetensors::open(&path).unwrap();
        assert!(file.contains("a") && !file.contains("c"));
        assert_eq!(read_values::<bf16>(&file, "b", 3).unwrap(), [bf16::from_f32(-2.0); 3]);
        let backend = Cpu::new();
        let mut buffer = backend.zeros::<f32>(2).unwrap();
        read_buffer(&file, "a", &backend, &mut buffer).unwrap();
        let mut values = [0f32; 2];
        backend.read(buffer.view(), &mut values).unwrap();
        assert_eq!(values.map(f32::to_bits), [1.5f32.to_bits(), 0x7fc0_1234]);
        let bytes = std::fs::read(&path).unwrap();
        let others = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(others.tensor("a").unwrap().shape(), [2, 1]);
        assert_eq!(others.tensor("b").unwrap().dtype(), safetensors::Dtype::BF16);
    }

    #[test]
    fn wrong_dtype_length_and_name_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        write(&path);
        let file = Safetensors::open(&path).unwrap();
        assert!(read_values::<u32>(&file, "a", 2).unwrap_err().to_string().contains("U32"));
        assert!(read_values::<f32>(&file, "a", 3).is_err());
        assert!(read_values::<f32>(&file, "c", 3).unwrap_err().to_string().contains("no tensor `c`"));
    }
}
