//! Ranks with a GPU each: tensors go from GPU to GPU by NCCL, and what is small or rare goes through the hosts.

use super::hosted::{Hosted, Transport};
use super::tcp::Tcp;
use super::{Bucket, Group, ReduceScatter, Share, Traffic};
use crate::backend::cuda::{Communicator, Cuda, NcclId, Precision, Sums, nccl_id, nccl_version};
use crate::backend::{Backend, ViewMut};
use crate::error::{Error, Result};
use std::any::Any;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// Time for the GPUs of all ranks to be connected.
const CONNECT_WITHIN: Duration = Duration::from_secs(300);

/// The group of the ranks that are connected on their hosts already. A rank that ends is noticed there.
pub struct Nccl {
    hosts: Hosted<Tcp>,
    communicator: Communicator,
    traffic: Mutex<Traffic>,
}

/// What a rank tells the others before they connect.
#[derive(serde::Serialize, serde::Deserialize)]
struct Hello {
    /// NCCL's version, or why the rank has none.
    nccl: Result<String, String>,
    /// The group's identity, from rank 0.
    id: Vec<u8>,
}

impl Nccl {
    /// Connects the GPUs of all ranks.
    ///
    /// # Errors
    /// [`Error::Input`] where this rank has no NCCL; [`Error::Failed`] names a rank that has none, or another version, or
    /// that has ended; [`Error::Device`] with NCCL's own text, and where the GPUs are not connected in time.
    pub fn join<P: Precision>(hosts: Hosted<Tcp>, cuda: &Cuda<P>, within: Duration) -> Result<Self> {
        let share = hosts.transport().share();
        let made = nccl_version().and_then(|version| {
            let id = if share.rank == 0 { nccl_id()?.to_vec() } else { Vec::new() };
            Ok((version, id))
        });
        let hello = match &made {
            Ok((version, id)) => Hello { nccl: Ok(version.clone()), id: id.clone() },
            Err(error) => Hello { nccl: Err(error.to_string()), id: Vec::new() },
        };
        let hello = serde_json::to_vec(&hello).map_err(|e| other_program(share.rank, &e))?;
        let came = hosts.transport().exchange(vec![hello; share.size])?;
        made?;
        let id = identity(&came)?;
        let alive = || alive(&hosts);
        let communicator = Communicator::open(cuda, &id, (share.rank, share.size), within, &alive)?;
        Ok(Self { hosts, communicator, traffic: Mutex::default() })
    }

    fn count(&self, add: impl FnOnce(&mut Traffic)) {
        add(&mut self.traffic.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// The group of the GPUs, where `backend` is one of this precision; else the connected hosts again.
pub(super) fn of_gpus<B: Backend, P: Precision>(
    hosts: Hosted<Tcp>,
    backend: &B,
) -> Result<Result<Box<dyn Group<B>>, Hosted<Tcp>>> {
    let Some(cuda) = (backend as &dyn Any).downcast_ref::<Cuda<P>>() else { return Ok(Err(hosts)) };
    let group: Box<dyn Group<Cuda<P>>> = Box::new(Nccl::join(hosts, cuda, CONNECT_WITHIN)?);
    let group: Box<dyn Any> = Box::new(group);
    let group = group.downcast::<Box<dyn Group<B>>>().unwrap_or_else(|_| unreachable!("B is Cuda<P>"));
    Ok(Ok(*group))
}

fn alive(hosts: &Hosted<Tcp>) -> Result<()> {
    hosts.transport().lost().map_or(Ok(()), |who| Err(Error::failed(who, "see its own error")))
}

fn other_program(rank: usize, why: &serde_json::Error) -> Error {
    let what = format!("rank {rank} does not introduce itself as this version of swat does: {why}");
    Error::failed(what, "start all ranks with the same version of swat")
}

/// The identity of a group whose ranks, in their order, have sent this.
fn identity(came: &[Vec<u8>]) -> Result<NcclId> {
    let hellos: Vec<Hello> = came
        .iter()
        .enumerate()
        .map(|(rank, hello)| serde_json::from_slice(hello).map_err(|e| other_program(rank, &e)))
        .collect::<Result<_>>()?;
    let mut first = None;
    for (rank, hello) in hellos.iter().enumerate() {
        let none = |why: &String| Error::failed(format!("rank {rank}: {why}"), "see its own error");
        let version = hello.nccl.as_ref().map_err(none)?;
        let first = first.get_or_insert(version);
        if *first != version {
            let what = format!("rank {rank} has NCCL {version}, and rank 0 has {first}");
            return Err(Error::failed(what, "install one version on all machines"));
        }
    }
    let id = hellos.first().map_or(&[][..], |hello| &hello.id);
    NcclId::try_from(id).map_err(|_| {
        let what = format!("rank 0 sent an identity of {} bytes for the group of GPUs", id.len());
        Error::failed(what, "start all ranks with the same version of swat")
    })
}

impl<P: Precision> Group<Cuda<P>> for Nccl {
    fn share(&self) -> Share {
        self.hosts.transport().share()
    }

    fn exchange(&self, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        self.hosts.transport().exchange(messages)
    }

    fn all_reduce(&self, values: &mut [f64]) -> Result<()> {
        Group::<Cuda<P>>::all_reduce(&self.hosts, values)
    }

    fn reduce_scatter(&self, _: &Cuda<P>) -> Result<Box<dyn ReduceScatter<Cuda<P>> + '_>> {
        Ok(Box::new(Adding { group: self, sums: self.communicator.sums() }))
    }

    fn all_gather(&self, _: &Cuda<P>, tensors: &mut [ViewMut<'_, Cuda<P>, <Cuda<P> as Backend>::Float>]) -> Result<()> {
        let share = self.hosts.transport().share();
        let part = |rank, len| Share { rank, ..share }.of(len);
        self.communicator.all_gather(tensors, &part, &|| alive(&self.hosts))?;
        let own: usize = tensors.iter().map(|tensor| share.of(tensor.len()).len()).sum();
        let sent = own * (share.size - 1) * size_of::<<Cuda<P> as Backend>::Float>();
        self.count(|traffic| traffic.all_gather_bytes += sent as u64);
        Ok(())
    }

    fn traffic(&self) -> Traffic {
        *self.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sums that NCCL works on.
struct Adding<'g, P: Precision> {
    group: &'g Nccl,
    sums: Sums<'g, P>,
}

impl<P: Precision> ReduceScatter<Cuda<P>> for Adding<'_, P> {
    fn begin(&mut self, bucket: Bucket<Cuda<P>>) -> Result<()> {
        let (group, share) = (self.group, self.group.hosts.transport().share());
        let sent: usize = bucket.iter().map(|tensor| tensor.len() - share.of(tensor.len()).len()).sum();
        let part = |rank, len| Share { rank, ..share }.of(len);
        self.sums.begin(bucket, &part, &|| alive(&group.hosts))?;
        group.count(|traffic| traffic.reduce_scatter_bytes += (sent * size_of::<P::Grad>()) as u64);
        Ok(())
    }

    fn finish(mut self: Box<Self>) -> Result<Vec<Bucket<Cuda<P>>>> {
        let hosts = &self.group.hosts;
        self.sums.finish(&|| alive(hosts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hello(nccl: Result<&str, &str>, id: &[u8]) -> Vec<u8> {
        let hello = Hello { nccl: nccl.map(Into::into).map_err(Into::into), id: id.into() };
        serde_json::to_vec(&hello).unwrap()
    }

    #[test]
    fn a_rank_that_does_not_belong_to_the_group_is_named() {
        let refused = |came: &[Vec<u8>]| identity(came).unwrap_err().to_string();
        let (first, id) = (hello(Ok("2.24.3"), &[7; 128]), [7; 128]);
        assert_eq!(identity(&[first.clone(), hello(Ok("2.24.3"), &[])]).unwrap(), id);
        let error = refused(&[first.clone(), hello(Err("no libnccl.so.2"), &[]), hello(Ok("2.20.5"), &[])]);
        assert!(error.contains("rank 1: no libnccl.so.2"), "{error}");
        let error = refused(&[first.clone(), first.clone(), hello(Ok("2.20.5"), &[])]);
        assert!(error.contains("rank 2 has NCCL 2.20.5, and rank 0 has 2.24.3"), "{error}");
        let error = refused(&[first, b"no message".to_vec()]);
        assert!(error.contains("rank 1 does not introduce itself"), "{error}");
        let error = refused(&[hello(Ok("2.24.3"), &[7; 20])]);
        assert!(error.contains("an identity of 20 bytes"), "{error}");
    }
}
