//! Device buffers to and from safetensors files, bit for bit and in chunks, as memory is scarce between steps. Of several
//! ranks, each reads and writes its part of the files itself, or rank 0 has them: the others send it their parts, and get
//! them from it.

use super::parts::Source;
use crate::backend::{Backend, Buffer, Element, ViewMut};
use crate::error::{Error, Result};
use crate::group::{Group, Share};
use crate::io::safetensors::{Safetensors, SafetensorsWriter, TensorSpec};
use std::ops::Range;

/// Elements per chunk on the host.
const PIECE: usize = 1 << 20;
/// Bytes of a tensor that are on their way to or from rank 0 at once.
const ON_THE_WAY_BYTES: usize = 256 << 20;

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

/// Which elements of a tensor a rank has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holds {
    /// Those of its [`Share`].
    Part,
    /// All.
    Whole,
}

impl Holds {
    fn of(self, share: Share, len: usize) -> Range<usize> {
        if self == Self::Part { share.of(len) } else { 0..len }
    }

    /// The elements of each rank that are on their way in each round; those of all parts are in their order.
    fn rounds<T: Element>(self, share: Share, len: usize, most_bytes: usize) -> Vec<Vec<Range<usize>>> {
        let most = most_bytes / size_of::<T>();
        match self {
            Self::Whole => pieces(0..len, most / share.size).map(|piece| vec![piece; share.size]).collect(),
            Self::Part if share.size > 1 && len <= most => vec![share.all().map(|of| of.of(len)).collect()],
            Self::Part => {
                let alone = |owner: Share, piece: Range<usize>| {
                    share.all().map(|of| if of == owner { piece.clone() } else { 0..0 }).collect()
                };
                let most = if share.size == 1 { PIECE } else { most };
                let of_owner = |owner: Share| pieces(owner.of(len), most).map(move |piece| alone(owner, piece));
                share.all().flat_map(of_owner).collect()
            }
        }
    }
}

/// A range in pieces of at most so many elements.
fn pieces(range: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    range.clone().step_by(most.max(1)).map(move |first| first..(first + most.max(1)).min(range.end))
}

/// Writes a tensor of `len` elements, of which each rank has its part, as the next one; ranks without the file send
/// theirs.
pub(super) fn write_parts<B: Backend, T: Element>(
    mut writer: Option<&mut SafetensorsWriter>,
    backend: &B,
    part: &Buffer<B, T>,
    len: usize,
    group: &dyn Group<B>,
) -> Result<()> {
    let share = group.share();
    let first = share.of(len).start;
    for ranges in Holds::Part.rounds::<T>(share, len, ON_THE_WAY_BYTES) {
        let own = ranges[share.rank].clone();
        let mut values = vec![T::zeroed(); own.len()];
        if !own.is_empty() {
            backend.read(part.range(own.start - first..own.end - first), &mut values)?;
        }
        let mut messages = vec![Vec::new(); share.size];
        messages[0] = bytemuck::cast_slice(&values).to_vec();
        let received = group.exchange(messages)?;
        if let Some(writer) = &mut writer {
            for (message, range) in received.iter().zip(&ranges) {
                check_length::<T>(message, range.len())?;
                writer.write(message)?;
            }
        }
    }
    Ok(())
}

/// Reads what this rank holds of the tensor `name` of `len` elements into `to`.
pub(super) fn read_parts<B: Backend, T: Element>(
    source: &Source,
    name: &str,
    backend: &B,
    (mut to, len): (ViewMut<'_, B, T>, usize),
    holds: Holds,
    group: &dyn Group<B>,
) -> Result<()> {
    let share = group.share();
    let held = holds.of(share, len);
    let mut put = |bytes: &[u8], range: &Range<usize>| {
        check_length::<T>(bytes, range.len())?;
        let mut values = vec![T::zeroed(); range.len()];
        bytemuck::cast_slice_mut(&mut values).copy_from_slice(bytes);
        if range.is_empty() {
            return Ok(());
        }
        backend.write(&values, to.part(range.start - held.start..range.end - held.start))
    };
    match source {
        Source::Own(files) => {
            pieces(held.clone(), PIECE).try_for_each(|range| put(&files.bytes::<T>(name, len, &range)?, &range))?;
        }
        Source::First(files) => {
            for ranges in holds.rounds::<T>(share, len, ON_THE_WAY_BYTES) {
                let message = |range: &Range<usize>| {
                    files.as_ref().map_or(Ok(Vec::new()), |files| files.bytes::<T>(name, len, range))
                };
                let received = group.exchange(ranges.iter().map(message).collect::<Result<_>>()?)?;
                put(&received[0], &ranges[share.rank])?;
            }
        }
    }
    source.release(name)
}

fn check_length<T: Element>(message: &[u8], elements: usize) -> Result<()> {
    if message.len() == elements * size_of::<T>() {
        return Ok(());
    }
    let what = format!("a rank sent {} bytes of a tensor in place of {}", message.len(), elements * size_of::<T>());
    Err(Error::failed(what, "start all ranks with the same command, data and version of swat"))
}

/// Values of the tensor `name`, which must have `len` elements of `T`.
pub(super) fn read_values<T: Element>(file: &Safetensors, name: &str, len: usize) -> Result<Vec<T>> {
    let mut values = vec![T::zeroed(); len];
    bytemuck::cast_slice_mut(&mut values).copy_from_slice(file.typed_bytes(name, T::DTYPE, len)?);
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::super::access::Access;
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::group::{Alone, Threads};
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
        let source = Source::First(Some(Safetensors::open(&path).unwrap().into()));
        read_parts(&source, "a", &backend, (buffer.view_mut(), 2), Holds::Part, &Alone).unwrap();
        let mut values = [0f32; 2];
        backend.read(buffer.view(), &mut values).unwrap();
        assert_eq!(values.map(f32::to_bits), [1.5f32.to_bits(), 0x7fc0_1234]);
        let bytes = std::fs::read(&path).unwrap();
        let others = safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(others.tensor("a").unwrap().shape(), [2, 1]);
        assert_eq!(others.tensor("b").unwrap().dtype(), safetensors::Dtype::BF16);
    }

    #[test]
    fn rounds_cover_a_tensor_once_and_in_order() {
        for (size, len, most) in [(1, 100, 16), (3, 100, 16), (3, 100, 1 << 20), (4, 7, 8), (4, 0, 8), (2, 64, 100)] {
            let share = Share { rank: 0, size };
            let rounds = Holds::Part.rounds::<f32>(share, len, most);
            let all: Vec<usize> = rounds.iter().flatten().cloned().flatten().collect();
            assert_eq!(all, (0..len).collect::<Vec<_>>(), "{size} ranks, {len} elements");
            for ranges in &rounds {
                assert_eq!(ranges.len(), size);
                let owned = |(range, of): (&Range<usize>, Share)| range.clone().all(|i| of.of(len).contains(&i));
                assert!(ranges.iter().zip(share.all()).all(owned));
                assert!(size == 1 || ranges.iter().map(|range| 4 * range.len()).sum::<usize>() <= most);
            }
            for rank in 0..size {
                let rounds = Holds::Whole.rounds::<f32>(share, len, most);
                let own: Vec<usize> = rounds.iter().flat_map(|ranges| ranges[rank].clone()).collect();
                assert_eq!(own, (0..len).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn parts_of_ranks_are_one_tensor_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (path, len) = (dir.path().join("t.safetensors"), 50);
        let all: Vec<f32> = (0..len).map(|i| i as f32).collect();
        let groups = Threads::groups(3);
        std::thread::scope(|scope| {
            for group in &groups {
                let (path, all) = (&path, &all);
                scope.spawn(move || {
                    let group: &dyn Group<Cpu> = group;
                    let (backend, share) = (Cpu::new(), group.share());
                    let own = &all[share.of(len)];
                    let mut part = backend.zeros::<f32>(own.len()).unwrap();
                    backend.write(own, part.view_mut()).unwrap();
                    let first = share.rank == 0;
                    let specs = [spec::<f32>("a".into(), &[len])];
                    let mut writer = first.then(|| SafetensorsWriter::create(path, &specs).unwrap());
                    write_parts(writer.as_mut(), &backend, &part, len, group).unwrap();
                    if let Some(writer) = writer {
                        writer.finish().unwrap();
                    }
                    group.exchange(vec![Vec::new(); share.size]).unwrap();
                    let file = first.then(|| Safetensors::open(path).unwrap().into());
                    let by_first = Source::new(Access::First, file);
                    let by_each = Source::new(Access::Each, Some(Safetensors::open(path).unwrap().into()));
                    for source in [by_first, by_each] {
                        for (holds, expected) in [(Holds::Part, own), (Holds::Whole, &all[..])] {
                            let mut buffer = backend.zeros::<f32>(expected.len()).unwrap();
                            let to = (buffer.view_mut(), len);
                            read_parts(&source, "a", &backend, to, holds, group).unwrap();
                            let mut values = vec![0f32; expected.len()];
                            backend.read(buffer.view(), &mut values).unwrap();
                            assert_eq!(values, expected, "rank {}", share.rank);
                        }
                    }
                });
            }
        });
        assert_eq!(read_values::<f32>(&Safetensors::open(&path).unwrap(), "a", len).unwrap(), all);
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
