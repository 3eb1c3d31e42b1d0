//! Tensors of a checkpoint, in one file or in one for each rank of the run that wrote them.

use super::access::Access;
use crate::backend::Element;
use crate::error::Result;
use crate::group::Share;
use crate::io::safetensors::Safetensors;
use std::cell::OnceCell;
use std::ops::Range;
use std::path::PathBuf;

/// Name of the file of a rank's moments, without its suffix: `moments-RANK-of-N`, or `moments` of a single rank.
pub(super) fn part_name(Share { rank, size }: Share) -> String {
    if size == 1 { "moments".into() } else { format!("moments-{rank}-of-{size}") }
}

/// Files with a part of each tensor, that of a [`Share`]; a file is opened when one of its elements is read.
pub(super) struct TensorFiles {
    parts: Vec<(PathBuf, OnceCell<Safetensors>)>,
}

impl TensorFiles {
    /// Of the parts of all ranks, in their order.
    pub(super) fn new(paths: Vec<PathBuf>) -> Self {
        Self { parts: paths.into_iter().map(|path| (path, OnceCell::new())).collect() }
    }

    fn open(&self, part: usize) -> Result<&Safetensors> {
        let (path, file) = &self.parts[part];
        if let Some(file) = file.get() {
            return Ok(file);
        }
        let opened = Safetensors::open(path)?;
        Ok(file.get_or_init(|| opened))
    }

    /// The bytes of these elements of the tensor `name`, which has `len` elements of `T` in all files together.
    pub(super) fn bytes<T: Element>(&self, name: &str, len: usize, range: &Range<usize>) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(range.len() * size_of::<T>());
        for share in (Share { rank: 0, size: self.parts.len() }).all() {
            let held = share.of(len);
            let (start, end) = (range.start.max(held.start), range.end.min(held.end));
            if start < end {
                let values = self.open(share.rank)?.typed_bytes(name, T::DTYPE, held.len())?;
                bytes.extend_from_slice(
                    &values[(start - held.start) * size_of::<T>()..(end - held.start) * size_of::<T>()],
                );
            }
        }
        Ok(bytes)
    }

    /// Releases a tensor's pages.
    fn release(&self, name: &str) -> Result<()> {
        let opened = self.parts.iter().filter_map(|(_, file)| file.get()).filter(|file| file.contains(name));
        opened.into_iter().try_for_each(|file| file.release(name))
    }
}

impl From<Safetensors> for TensorFiles {
    fn from(file: Safetensors) -> Self {
        Self { parts: vec![(file.path().to_owned(), OnceCell::from(file))] }
    }
}

/// Where a rank reads tensors.
pub(super) enum Source {
    /// In the files.
    Own(TensorFiles),
    /// From rank 0, which has the files.
    First(Option<TensorFiles>),
}

impl Source {
    /// Of files that this rank sees.
    pub(super) fn new(access: Access, files: Option<TensorFiles>) -> Self {
        match (access, files) {
            (Access::Each, Some(files)) => Self::Own(files),
            (_, files) => Self::First(files),
        }
    }

    /// Releases a tensor's pages.
    pub(super) fn release(&self, name: &str) -> Result<()> {
        match self {
            Self::Own(files) | Self::First(Some(files)) => files.release(name),
            Self::First(None) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tensors::spec;
    use super::*;
    use crate::io::safetensors::SafetensorsWriter;

    /// Any range of a tensor, whichever parts hold it, empty ones included.
    #[test]
    fn ranges_are_put_together() {
        let dir = tempfile::tempdir().unwrap();
        for (size, len) in [(1, 50), (3, 50), (4, 50), (4, 7), (3, 64)] {
            let all: Vec<f32> = (0..len).map(|i| i as f32).collect();
            let mut paths = Vec::new();
            for share in (Share { rank: 0, size }).all() {
                let path = dir.path().join(part_name(share));
                let own = &all[share.of(len)];
                let mut writer = SafetensorsWriter::create(&path, &[spec::<f32>("a".into(), &[own.len()])]).unwrap();
                writer.write(bytemuck::cast_slice(own)).unwrap();
                writer.finish().unwrap();
                paths.push(path);
            }
            let files = TensorFiles::new(paths);
            for start in 0..=len {
                for end in start..=len {
                    let bytes = files.bytes::<f32>("a", len, &(start..end)).unwrap();
                    assert_eq!(bytes, bytemuck::cast_slice::<f32, u8>(&all[start..end]), "{start}..{end} of {size}");
                }
            }
            files.release("a").unwrap();
            // A part of another length, dtype or name is refused.
            assert!(files.bytes::<f32>("a", len + 64, &(0..len)).unwrap_err().to_string().contains("tensor `a`"));
            assert!(files.bytes::<u32>("a", len, &(0..len)).unwrap_err().to_string().contains("U32"));
            assert!(files.bytes::<f32>("b", len, &(0..len)).unwrap_err().to_string().contains("no tensor `b`"));
        }
    }

    #[test]
    fn only_files_that_hold_the_range_are_opened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("part");
        let mut writer = SafetensorsWriter::create(&path, &[spec::<f32>("a".into(), &[24])]).unwrap();
        writer.write(bytemuck::cast_slice(&[1f32; 24])).unwrap();
        writer.finish().unwrap();
        let missing = dir.path().join("missing");
        let files = TensorFiles::new(vec![missing.clone(), path, missing]);
        assert_eq!(files.bytes::<f32>("a", 50, &(24..48)).unwrap().len(), 96);
        let error = files.bytes::<f32>("a", 50, &(23..48)).unwrap_err().to_string();
        assert!(error.contains("missing: cannot open"), "{error}");
    }
}
