//! The processes of a data-parallel run, its ranks, and what they tell each other.
//!
//! Each rank holds all weights and computes the gradients of its part of each batch. [`Group::reduce_scatter`] leaves
//! the sum over all ranks in each rank's part of every tensor, bucket by bucket while the backward pass goes on; its
//! optimizer, which has moments of that part alone (ZeRO-1, Rajbhandari et al., arXiv 1910.02054), updates the part, and
//! [`Group::all_gather`] brings the parts of all ranks together. Only tensors that train are communicated.

mod hosted;
mod launch;
mod liveness;
mod meet;
mod nccl;
mod place;
mod tcp;
mod threads;

pub use hosted::{Hosted, Transport};
pub use launch::{Ended, Together, launch, obey_launcher, part};
pub use nccl::Nccl;
pub use place::Place;
pub use tcp::Tcp;
pub use threads::Threads;

use crate::backend::{Backend, Bf16State, Buffer, F32State, ViewMut};
use crate::error::{Error, Result};
use crate::io::json;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::ops::Range;

/// The part of each tensor that a rank updates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The rank, from 0.
    pub rank: usize,
    /// Number of ranks, at least 1.
    pub size: usize,
}

/// Elements to which parts are rounded, so that they begin at the vectors of kernels and the blocks of their random
/// numbers.
const ALIGNMENT: usize = 8;

impl Share {
    /// All of it, of a run without other ranks.
    pub const WHOLE: Self = Self { rank: 0, size: 1 };

    /// Elements of a tensor of `len` that are in the part; the last parts of a short tensor may be empty.
    ///
    /// ```
    /// use swat::group::Share;
    ///
    /// // Parts begin at multiples of eight elements.
    /// let parts: Vec<_> = Share { rank: 0, size: 3 }.all().map(|share| share.of(50)).collect();
    /// assert_eq!(parts, [0..24, 24..48, 48..50]);
    /// ```
    pub fn of(self, len: usize) -> Range<usize> {
        if self.size == 1 {
            return 0..len;
        }
        let part = len.div_ceil(self.size).next_multiple_of(ALIGNMENT);
        let start = (self.rank * part).min(len);
        start..(start + part).min(len)
    }

    /// The parts of all ranks.
    pub fn all(self) -> impl Iterator<Item = Self> {
        (0..self.size).map(move |rank| Self { rank, ..self })
    }
}

/// Bytes that a rank sends in a step, by operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Traffic {
    /// Gradients, to the ranks that update them.
    pub reduce_scatter_bytes: u64,
    /// Updated weights, to all other ranks.
    pub all_gather_bytes: u64,
}

impl Traffic {
    /// Of one step over trained tensors of these lengths, without the few bytes of loss and norm.
    pub fn of_step<B: Backend>(lengths: impl Iterator<Item = usize>, share: Share) -> Self {
        let mut traffic = Self::default();
        for len in lengths {
            let own = share.of(len).len();
            traffic.reduce_scatter_bytes += ((len - own) * size_of::<B::Grad>()) as u64;
            traffic.all_gather_bytes += (own * (share.size - 1) * size_of::<B::Float>()) as u64;
        }
        traffic
    }

    /// Both operations together.
    pub fn total_bytes(&self) -> u64 {
        self.reduce_scatter_bytes + self.all_gather_bytes
    }
}

/// Gradients that are added up together.
pub type Bucket<B> = Vec<Buffer<B, <B as Backend>::Grad>>;

/// Sums of gradients over all ranks, which go on while the caller computes the next ones. The group is of no more use
/// where this is dropped between a beginning and its end.
pub trait ReduceScatter<B: Backend> {
    /// Begins to add up each tensor of a bucket, behind the work that was queued for it. All ranks begin the same buckets
    /// in the same order.
    ///
    /// # Errors
    /// As [`Group::all_reduce`]; a failing device. Some errors are found when the sums end.
    fn begin(&mut self, bucket: Bucket<B>) -> Result<()>;

    /// Waits for all sums, and returns the buckets in the order in which they began: with the sum over all ranks in this
    /// rank's part of each tensor. The rest is left undefined.
    ///
    /// # Errors
    /// As [`ReduceScatter::begin`].
    fn finish(self: Box<Self>) -> Result<Vec<Bucket<B>>>;
}

/// The ranks of a run as one of them sees it. All ranks call the same operations in the same order; results do not depend
/// on which is faster.
pub trait Group<B: Backend>: Send + Sync {
    /// This rank's part.
    fn share(&self) -> Share;

    /// Adds up `values` over all ranks, in their order: the same bits on each.
    ///
    /// # Errors
    /// [`crate::error::Error::Failed`] names a rank that has ended.
    fn all_reduce(&self, values: &mut [f64]) -> Result<()>;

    /// Sums of gradients over all ranks, in one order each time. Over hosts the order is that of the ranks, and sums are in
    /// f32; NCCL has an order of its own, and rounds bf16 after each addition. No other operation of the group may be
    /// called before they have ended.
    ///
    /// # Errors
    /// [`crate::error::Error::Failed`] where no thread can be started.
    fn reduce_scatter(&self, backend: &B) -> Result<Box<dyn ReduceScatter<B> + '_>>;

    /// Replaces the parts of the other ranks in each tensor by theirs.
    ///
    /// # Errors
    /// As [`Group::all_reduce`]; a failing device.
    fn all_gather(&self, backend: &B, tensors: &mut [ViewMut<'_, B, B::Float>]) -> Result<()>;

    /// Sends a message to each rank, itself included, and returns what each has sent to this one: between hosts, for what
    /// is small or rare. It is not counted as traffic.
    ///
    /// # Errors
    /// As [`Group::all_reduce`].
    fn exchange(&self, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>>;

    /// Bytes of tensors that this rank has sent.
    fn traffic(&self) -> Traffic;
}

/// The group of ranks whose hosts are connected, for a backend of theirs: GPUs are connected by NCCL.
///
/// # Errors
/// As [`Nccl::join`].
pub fn over_hosts<B: Backend>(hosts: Hosted<Tcp>, backend: &B) -> Result<Box<dyn Group<B>>> {
    let hosts = match nccl::of_gpus::<B, F32State>(hosts, backend)? {
        Ok(group) => return Ok(group),
        Err(hosts) => hosts,
    };
    Ok(match nccl::of_gpus::<B, Bf16State>(hosts, backend)? {
        Ok(group) => group,
        Err(hosts) => Box::new(hosts),
    })
}

/// What rank 0 computes, on all ranks; the others do not compute it.
///
/// # Errors
/// What `compute` returns, on rank 0; the others learn that rank 0 has ended.
pub fn from_first<B: Backend, T: Serialize + DeserializeOwned>(
    group: &dyn Group<B>,
    compute: impl FnOnce() -> Result<T>,
) -> Result<T> {
    let Share { rank, size } = group.share();
    if size == 1 {
        return compute();
    }
    if rank == 0 {
        let value = compute()?;
        let text = serde_json::to_vec(&value).map_err(json::unserializable)?;
        group.exchange(vec![text; size])?;
        return Ok(value);
    }
    let received = group.exchange(vec![Vec::new(); size])?;
    let text = received.first().map(Vec::as_slice).unwrap_or_default();
    serde_json::from_slice(text).map_err(|e| Error::failed(format!("a message of rank 0: {e}"), SAME))
}

/// What each rank has, on all ranks, in their order.
///
/// # Errors
/// As [`Group::all_reduce`].
pub fn from_each<B: Backend, T: Serialize + DeserializeOwned>(group: &dyn Group<B>, own: &T) -> Result<Vec<T>> {
    let text = serde_json::to_vec(own).map_err(json::unserializable)?;
    let received = group.exchange(vec![text; group.share().size])?;
    let parse = |(rank, text): (usize, &Vec<u8>)| {
        serde_json::from_slice(text).map_err(|e| Error::failed(format!("a message of rank {rank}: {e}"), SAME))
    };
    received.iter().enumerate().map(parse).collect()
}

/// What to do about ranks that do not belong together.
const SAME: &str = "start all ranks with the same command, data and version of swat";

/// A run of one process.
#[derive(Clone, Copy, Debug)]
pub struct Alone;

impl<B: Backend> Group<B> for Alone {
    fn share(&self) -> Share {
        Share::WHOLE
    }

    fn all_reduce(&self, _values: &mut [f64]) -> Result<()> {
        Ok(())
    }

    fn reduce_scatter(&self, _backend: &B) -> Result<Box<dyn ReduceScatter<B> + '_>> {
        Ok(Box::new(Own(Vec::new())))
    }

    fn all_gather(&self, _backend: &B, _tensors: &mut [ViewMut<'_, B, B::Float>]) -> Result<()> {
        Ok(())
    }

    fn exchange(&self, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        Ok(messages)
    }

    fn traffic(&self) -> Traffic {
        Traffic::default()
    }
}

/// Gradients that are sums already.
struct Own<B: Backend>(Vec<Bucket<B>>);

impl<B: Backend> ReduceScatter<B> for Own<B> {
    fn begin(&mut self, bucket: Bucket<B>) -> Result<()> {
        self.0.push(bucket);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<Vec<Bucket<B>>> {
        Ok(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_a_tensor_once() {
        for size in 1..=9 {
            for len in [1, 7, 8, 9, 63, 64, 65, 1000, 4096] {
                let mut end = 0;
                for share in (Share { rank: 0, size }).all() {
                    let part = share.of(len);
                    assert!(part.start == end || part.is_empty(), "{len} by {size}");
                    assert!(part.start % ALIGNMENT == 0 || part.is_empty());
                    end = end.max(part.end);
                }
                assert_eq!(end, len);
            }
        }
        assert_eq!(Share { rank: 1, size: 3 }.of(50), 24..48);
        assert_eq!(Share { rank: 2, size: 3 }.of(50), 48..50);
    }

    #[test]
    fn traffic_of_a_step() {
        use crate::backend::cpu::Cpu;
        // 50 f32: parts of 24, 24 and 2; rank 1 sends 26 gradients, and its 24 weights twice.
        let traffic = Traffic::of_step::<Cpu>([50].into_iter(), Share { rank: 1, size: 3 });
        assert_eq!(traffic, Traffic { reduce_scatter_bytes: 104, all_gather_bytes: 192 });
        assert_eq!(Traffic::of_step::<Cpu>([50, 7].into_iter(), Share::WHOLE).total_bytes(), 0);
    }
}
