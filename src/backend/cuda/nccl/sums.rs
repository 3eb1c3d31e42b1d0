//! Sums of gradients over GPUs, under way while the GPU computes others.

use super::{Alive, Communicator, Operation, Part};
use crate::backend::Buffer;
use crate::backend::cuda::context::lock;
use crate::backend::cuda::{Cuda, Precision};
use crate::error::Result;

/// Buckets of gradients whose sums have begun, in this order. The communicator is given up where this is dropped before
/// they have ended.
pub struct Sums<'c, P: Precision> {
    communicator: &'c Communicator,
    buckets: Vec<Bucket<P>>,
}

type Bucket<P> = Vec<Buffer<Cuda<P>, <P as Precision>::Grad>>;

impl Communicator {
    /// No sums yet.
    pub fn sums<P: Precision>(&self) -> Sums<'_, P> {
        Sums { communicator: self, buckets: Vec::new() }
    }
}

impl<P: Precision> Sums<'_, P> {
    /// Begins to add up each tensor over all ranks, in their parts, behind what the device has to do already: on the
    /// communicator's stream, beside what the device is given to do from now on. f32 is added in f32, bf16 is rounded after
    /// each addition; the order is NCCL's, the same each time for the same ranks on the same machines.
    ///
    /// # Errors
    /// [`crate::error::Error::Device`] with NCCL's own text; the error of `alive`.
    pub fn begin(&mut self, mut bucket: Bucket<P>, part: Part<'_>, alive: Alive<'_>) -> Result<()> {
        let communicator = self.communicator;
        let mut tensors: Vec<_> = bucket.iter_mut().map(Buffer::view_mut).collect();
        let calls = communicator.calls(&mut tensors, part, Operation::ReduceScatter, Operation::Reduce);
        drop(tensors);
        // Whatever becomes of the calls, it is not given back before they have ended.
        self.buckets.push(bucket);
        // SAFETY: the calls are made of the bucket, which is kept until their end was waited for, or the communicator was
        // given up.
        communicator.guarded(alive, |handle| unsafe { communicator.begin::<P::Grad>(handle, &calls, alive) })
    }

    /// Waits for all sums, and returns the buckets: with the sums in this rank's part of each tensor. What other parts hold
    /// is undefined.
    ///
    /// # Errors
    /// As [`Sums::begin`].
    pub fn finish(&mut self, alive: Alive<'_>) -> Result<Vec<Bucket<P>>> {
        let communicator = self.communicator;
        communicator.device.context.bind()?;
        communicator.guarded(alive, |handle| communicator.wait(handle, alive))?;
        Ok(std::mem::take(&mut self.buckets))
    }
}

impl<P: Precision> Drop for Sums<'_, P> {
    fn drop(&mut self) {
        // Where the context cannot be bound, the process can use the GPU no more.
        if !self.buckets.is_empty() && self.communicator.device.context.bind().is_ok() {
            self.communicator.abort(&mut lock(&self.communicator.handle));
        }
    }
}
