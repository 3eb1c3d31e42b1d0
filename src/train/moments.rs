//! The moments of all ranks on their way into a checkpoint: each rank writes a file of its own where all see the directory,
//! else rank 0 gathers them in one.

use super::Optimizer;
use super::access::Access;
use super::checkpoint::{CheckpointWriter, Checkpoints, FileMark};
use super::optimizer::Slot;
use super::parts::part_name;
use super::tensors::{spec, write_buffer, write_parts};
use crate::backend::Backend;
use crate::engine::Decoder;
use crate::error::{Error, Result};
use crate::group::{Group, Share, from_each, from_first};
use crate::io::safetensors::{SafetensorsWriter, TensorSpec};

/// The moments of a run, of which each rank has its part.
pub(super) struct Moments<'a, B: Backend> {
    pub(super) decoder: &'a Decoder<B>,
    /// None between phases that do not carry them over.
    pub(super) optimizer: Option<&'a Optimizer<B>>,
    pub(super) group: &'a dyn Group<B>,
    pub(super) access: Access,
}

impl<'a, B: Backend> Moments<'a, B> {
    /// The tensors that have moments; without a step these are zero and not saved.
    pub(super) fn moving(&self) -> impl Iterator<Item = &'a Slot<B>> + use<'a, B> {
        self.optimizer.into_iter().flat_map(Optimizer::slots).filter(|slot| slot.steps > 0)
    }

    /// Elements of a whole tensor.
    fn len(&self, slot: &Slot<B>) -> usize {
        self.decoder.param(slot.id).map_or(0, |param| param.values.len())
    }

    /// The part of each tensor that this rank writes.
    fn written(&self) -> Share {
        match self.access {
            Access::First => Share::WHOLE,
            Access::Each => self.group.share(),
        }
    }

    /// Number of files.
    pub(super) fn parts(&self) -> usize {
        self.written().size
    }

    fn specs(&self) -> Vec<TensorSpec> {
        let share = self.written();
        let of_slot = |slot: &Slot<B>| {
            let len = share.of(self.len(slot)).len();
            ["m", "v"].map(|moment| spec::<B::Moment>(format!("{moment}.{}", slot.id), &[len]))
        };
        self.moving().flat_map(of_slot).collect()
    }

    /// Writes this rank's part.
    fn write_own(&self, writer: &mut SafetensorsWriter) -> Result<()> {
        let mut buffers = self.moving().flat_map(|slot| [&slot.m, &slot.v]);
        buffers.try_for_each(|buffer| write_buffer(writer, &self.decoder.backend, buffer))
    }

    /// Writes the parts of all ranks; those without the file send theirs.
    fn gather(&self, mut writer: Option<&mut SafetensorsWriter>) -> Result<()> {
        for slot in self.moving() {
            for moment in [&slot.m, &slot.v] {
                let len = self.len(slot);
                write_parts(writer.as_deref_mut(), &self.decoder.backend, moment, len, self.group)?;
            }
        }
        Ok(())
    }

    /// On rank 0: writes those of all ranks, or its own.
    pub(super) fn write(&self, draft: &mut CheckpointWriter) -> Result<()> {
        draft.tensors(&part_name(self.written()), &self.specs(), |writer| match self.access {
            Access::First => self.gather(Some(writer)),
            Access::Each => self.write_own(writer),
        })
    }

    /// On rank 0: tells the others that a checkpoint has begun.
    pub(super) fn announce(&self) -> Result<()> {
        match self.access {
            Access::First => Ok(()),
            Access::Each => from_first(self.group, || Ok(())),
        }
    }

    /// On rank 0, whose files were `written`: adds the files of the others, as soon as all are there.
    pub(super) fn collect(&self, draft: &mut CheckpointWriter, written: Result<()>) -> Result<()> {
        if self.access == Access::First {
            return written;
        }
        let marks = self.all_written(written.map(|()| None))?;
        for (share, mark) in self.group.share().all().zip(marks) {
            mark.map_or(Ok(()), |mark| draft.add(&part_name(share), mark))?;
        }
        Ok(())
    }

    /// On the other ranks: writes this rank's part into the checkpoint that rank 0 begins, or sends it to rank 0.
    pub(super) fn give(&self, checkpoints: &Checkpoints, step: u64) -> Result<()> {
        if self.access == Access::First {
            return self.gather(None);
        }
        from_first(self.group, || Ok(()))?;
        let name = part_name(self.written());
        let written = checkpoints.tensors(step, &name, &self.specs(), |writer| self.write_own(writer));
        self.all_written(written.map(Some)).map(drop)
    }

    /// The files that all ranks have written. Where one has failed, all fail with its reason.
    fn all_written(&self, own: Result<Option<FileMark>>) -> Result<Vec<Option<FileMark>>> {
        let told = own.as_ref().cloned().map_err(Error::to_string);
        let found: Vec<Result<Option<FileMark>, String>> = from_each(self.group, &told)?;
        let failed = found.iter().enumerate().find_map(|(rank, file)| Some((rank, file.as_ref().err()?)));
        let Some((rank, why)) = failed else { return Ok(found.into_iter().flatten().collect()) };
        // So that none sees another one end before it knows why.
        let _ = self.group.exchange(vec![Vec::new(); self.group.share().size]);
        let what = format!("rank {rank} could not write its part of a checkpoint: {why}");
        Err(own.err().unwrap_or_else(|| {
            Error::failed(what, "mend that, and continue with --resume: the previous checkpoint is intact")
        }))
    }
}
