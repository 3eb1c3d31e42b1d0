//! Collective operations between GPUs, by NCCL: on a stream of their own, behind the work that was queued before them.
//!
//! A communicator does not block, so that a rank that has ended cannot hold the others: what may take long is waited
//! for here, with a look at the other ranks, and given up by `ncclCommAbort`.

mod library;
mod sums;

pub use sums::Sums;

use super::context::lock;
use super::device::Device;
use super::memory::slice_mut;
use super::{Cuda, Precision};
use crate::backend::{FloatElement, ViewMut};
use crate::error::{Error, Result};
use cudarc::driver::sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
use cudarc::driver::sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
use cudarc::driver::{DriverError, result, sys};
use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclDataType_t, ncclRedOp_t, ncclUniqueId};
use library::{IN_PROGRESS, Nccl, SUCCESS};
use std::ffi::{c_int, c_void};
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Calls that are handed over at once: NCCL makes few launches of them.
const GROUP_CALLS: usize = 128;
/// Time in which a wait keeps the thread busy, for collectives that are short.
const BUSY: Duration = Duration::from_millis(1);
/// Time between two looks at a collective after that, and at the other ranks.
const PAUSE: Duration = Duration::from_micros(50);
const LOOK: Duration = Duration::from_millis(20);
/// Longest time that a collective may take: other ranks may be busy with checkpoints or evaluations before they take
/// part.
const PATIENCE: Duration = Duration::from_secs(1800);
/// Time in which a rank that has ended is found, after NCCL has lost it.
const NAMING: Duration = Duration::from_secs(3);
/// Time for what other ranks have not yet fetched, when a communicator is closed.
const CLOSING: Duration = Duration::from_secs(10);

/// How a first rank introduces all ranks to each other.
pub type NcclId = [u8; 128];

/// Says which of the other ranks has ended, by an error.
pub type Alive<'a> = &'a dyn Fn() -> Result<()>;

/// The part of a tensor of some length that a rank has: of a rank and a length.
pub type Part<'a> = &'a dyn Fn(usize, usize) -> Range<usize>;

/// NCCL on this machine.
fn nccl() -> Result<&'static Nccl> {
    library::find().map_err(|why| {
        let expected = "NCCL 2.18 or newer, for several ranks: install the package libnccl2; or nvidia-nccl-cu13 of Python, \
                        and its folder nvidia/nccl/lib into LD_LIBRARY_PATH";
        Error::input("--device cuda", format!("no NCCL ({why})"), expected)
    })
}

/// The version of NCCL on this machine, such as `2.24.3`.
///
/// # Errors
/// [`Error::Input`] where there is none that can be used.
pub fn nccl_version() -> Result<String> {
    nccl().map(|nccl| library::show(nccl.version_number()))
}

/// A new identity of a group, which its first rank makes and hands to the others.
///
/// # Errors
/// [`Error::Input`] where there is no NCCL; [`Error::Failed`] with NCCL's own text.
pub fn nccl_id() -> Result<NcclId> {
    let nccl = nccl()?;
    let mut id = ncclUniqueId { internal: [0; 128] };
    // SAFETY: writes an identity.
    match unsafe { (nccl.unique_id)(&mut id) } {
        SUCCESS => Ok(id.internal.map(|c| c as u8)),
        other => {
            let why = nccl.describe(other, std::ptr::null_mut());
            Err(Error::failed(format!("NCCL cannot begin a group: {why}"), HELP))
        }
    }
}

/// This rank's end of a group of GPUs.
pub struct Communicator {
    device: Arc<Device>,
    nccl: &'static Nccl,
    rank: usize,
    size: usize,
    /// `None` once it was given up.
    handle: Mutex<Option<ncclComm_t>>,
    stream: sys::CUstream,
    /// After the work that a collective must wait for.
    queued: sys::CUevent,
    /// After the collective.
    done: sys::CUevent,
}

// SAFETY: handles of the driver may be used from any thread, which binds the context first; the communicator is
// behind a mutex.
unsafe impl Send for Communicator {}
// SAFETY: as above.
unsafe impl Sync for Communicator {}

/// A call of NCCL on `count` elements at `from`, in place.
struct Call {
    operation: Operation,
    from: sys::CUdeviceptr,
    to: sys::CUdeviceptr,
    count: usize,
}

/// With the rank that gets a sum, or that sends.
enum Operation {
    ReduceScatter,
    Reduce(usize),
    AllGather,
    Broadcast(usize),
}

impl Communicator {
    /// Connects this rank, of `size`, with all others, each of which has a GPU of its own.
    ///
    /// # Errors
    /// [`Error::Input`] where there is no NCCL; [`Error::Device`] with NCCL's own text, and where others do not come in
    /// time; the error of `alive`.
    pub fn open<P: Precision>(
        cuda: &Cuda<P>,
        id: &NcclId,
        (rank, size): (usize, usize),
        within: Duration,
        alive: Alive<'_>,
    ) -> Result<Self> {
        let device = cuda.device.clone();
        let nccl = nccl()?;
        device.context.bind()?;
        let failed = |error: DriverError| device.context.failed("cannot make a stream", error);
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed)?;
        let event = || result::event::create(CU_EVENT_DISABLE_TIMING).map_err(failed);
        let (queued, done) = (event()?, event()?);
        let opened = Self { device: device.clone(), nccl, rank, size, handle: Mutex::new(None), stream, queued, done };
        let id = ncclUniqueId { internal: id.map(|byte| byte as _) };
        let mut config = config();
        let mut handle = std::ptr::null_mut();
        // SAFETY: the context is current; the configuration is whole, and is read before the call returns.
        let result = unsafe { (nccl.init)(&mut handle, size as c_int, id, rank as c_int, &mut config) };
        if result != SUCCESS && result != IN_PROGRESS {
            return Err(opened.failed("cannot connect", result, std::ptr::null_mut()));
        }
        *lock(&opened.handle) = Some(handle);
        opened.guarded(alive, |handle| opened.settle(handle, ("connect", within), result, alive))?;
        Ok(opened)
    }

    /// Replaces the parts of the other ranks in each tensor by theirs.
    ///
    /// # Errors
    /// [`Error::Device`] with NCCL's own text; the error of `alive`.
    pub fn all_gather<P: Precision, T: FloatElement>(
        &self,
        tensors: &mut [ViewMut<'_, Cuda<P>, T>],
        part: Part<'_>,
        alive: Alive<'_>,
    ) -> Result<()> {
        let calls = self.calls(tensors, part, Operation::AllGather, Operation::Broadcast);
        self.guarded(alive, |handle| {
            // SAFETY: the calls are made of tensors that are borrowed mutably until their end is waited for below, or the
            // communicator was given up.
            unsafe { self.begin::<T>(handle, &calls, alive) }?;
            self.wait(handle, alive)
        })
    }

    /// One call for each tensor whose parts are alike, `whole`; for another, one for each part, `single`.
    fn calls<P: Precision, T: FloatElement>(
        &self,
        tensors: &mut [ViewMut<'_, Cuda<P>, T>],
        part: Part<'_>,
        whole: Operation,
        single: fn(usize) -> Operation,
    ) -> Vec<Call> {
        let mut calls = Vec::new();
        for tensor in tensors {
            let slice = slice_mut(tensor.reborrow());
            let (start, len) = (slice.pointer(), slice.len());
            let at = |element: usize| start + (element * size_of::<T>()) as u64;
            // The first part is the largest. All ranks must decide alike, by what all know.
            if part(0, len).len() * self.size == len {
                let own = part(self.rank, len);
                let (all, own_at) = (at(0), at(own.start));
                let (operation, from, to) = match whole {
                    Operation::AllGather => (Operation::AllGather, own_at, all),
                    _ => (Operation::ReduceScatter, all, own_at),
                };
                calls.push(Call { operation, from, to, count: own.len() });
                continue;
            }
            for rank in 0..self.size {
                let part = part(rank, len);
                if !part.is_empty() {
                    let at = at(part.start);
                    calls.push(Call { operation: single(rank), from: at, to: at, count: part.len() });
                }
            }
        }
        calls
    }

    /// Queues calls behind what the device has to do already.
    ///
    /// # Safety
    /// The memory of all calls is the caller's until [`Communicator::wait`] has returned, or the communicator was given up.
    unsafe fn begin<T: FloatElement>(&self, handle: ncclComm_t, calls: &[Call], alive: Alive<'_>) -> Result<()> {
        let device = &self.device;
        device.split()?;
        device.context.bind()?;
        // SAFETY: events and streams of the context, which is current.
        unsafe {
            result::event::record(self.queued, device.context.stream()).map_err(|error| self.refused(error))?;
            let waits = result::stream::wait_event(self.stream, self.queued, CU_EVENT_WAIT_DEFAULT);
            waits.map_err(|error| self.refused(error))?;
        }
        for group in calls.chunks(GROUP_CALLS) {
            // SAFETY: the caller's promise.
            let result = unsafe { self.queue::<T>(handle, group) };
            self.settle(handle, ("begin a collective operation", PATIENCE), result, alive)?;
        }
        Ok(())
    }

    fn refused(&self, error: DriverError) -> Error {
        self.device.context.failed("cannot queue a collective operation", error)
    }

    /// The first result that is no success, or the group's.
    ///
    /// # Safety
    /// The memory of all calls is the caller's until they have ended.
    unsafe fn queue<T: FloatElement>(&self, handle: ncclComm_t, calls: &[Call]) -> c_int {
        let Nccl { reduce_scatter, reduce, all_gather, broadcast, group_start, group_end, .. } = *self.nccl;
        let kind = if T::NAME == "f32" { ncclDataType_t::ncclFloat32 } else { ncclDataType_t::ncclBfloat16 };
        let (sum, stream) = (ncclRedOp_t::ncclSum, self.stream as cudaStream_t);
        // SAFETY: a communicator of this library and a stream of the current context; the memory is the caller's
        // promise.
        unsafe {
            let mut first = group_start();
            for Call { operation, from, to, count } in calls {
                let (from, to) = (*from as *const c_void, *to as *mut c_void);
                let result = match operation {
                    Operation::ReduceScatter => reduce_scatter(from, to, *count, kind, sum, handle, stream),
                    Operation::Reduce(root) => reduce(from, to, *count, kind, sum, *root as c_int, handle, stream),
                    Operation::AllGather => all_gather(from, to, *count, kind, handle, stream),
                    Operation::Broadcast(root) => broadcast(from, to, *count, kind, *root as c_int, handle, stream),
                };
                if first == SUCCESS && result != IN_PROGRESS {
                    first = result;
                }
            }
            let end = group_end();
            if first == SUCCESS { end } else { first }
        }
    }

    /// Calls `work` with the communicator, and gives it up where that fails; the error then names a rank that has
    /// ended, if there is one.
    fn guarded(&self, alive: Alive<'_>, work: impl FnOnce(ncclComm_t) -> Result<()>) -> Result<()> {
        let mut handle = lock(&self.handle);
        let Some(open) = *handle else {
            return Err(Error::failed("NCCL was given up after an error", "see the first error"));
        };
        let Err(error) = work(open) else { return Ok(()) };
        self.abort(&mut handle);
        let began = Instant::now();
        while began.elapsed() < NAMING && matches!(error, Error::Device { .. }) {
            alive()?;
            std::thread::sleep(LOOK);
        }
        Err(error)
    }

    /// Gives the communicator up, and with it what it works on.
    fn abort(&self, handle: &mut Option<ncclComm_t>) {
        if let Some(open) = handle.take() {
            // SAFETY: the communicator is used no more.
            unsafe { (self.nccl.abort)(open) };
        }
    }

    /// Waits until a call that has begun with `result` is over on the host.
    fn settle(
        &self,
        handle: ncclComm_t,
        (what, within): (&str, Duration),
        mut result: c_int,
        alive: Alive<'_>,
    ) -> Result<()> {
        let began = Instant::now();
        while result == IN_PROGRESS {
            alive()?;
            if began.elapsed() > within {
                return Err(Error::Device {
                    device: self.device.context.label(),
                    what: format!("rank {}: NCCL cannot {what} within {} s", self.rank, within.as_secs()),
                    help: HELP.into(),
                });
            }
            std::thread::sleep(PAUSE);
            result = self.state(handle);
        }
        if result == SUCCESS { Ok(()) } else { Err(self.failed(what, result, handle)) }
    }

    /// Waits until the GPU has done all calls that were queued.
    fn wait(&self, handle: ncclComm_t, alive: Alive<'_>) -> Result<()> {
        // SAFETY: an event and a stream of the context, which is current.
        unsafe { result::event::record(self.done, self.stream) }.map_err(|error| self.refused(error))?;
        let began = Instant::now();
        let mut looked = began;
        loop {
            // SAFETY: an event of the context, which is current.
            match unsafe { result::event::query(self.done) } {
                Ok(()) => return Ok(()),
                Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => {}
                Err(error) => return Err(self.device.context.failed("a collective operation failed", error)),
            }
            if looked.elapsed() > LOOK {
                looked = Instant::now();
                alive()?;
                self.settle(handle, ("go on", PATIENCE), self.state(handle), alive)?;
                if began.elapsed() > PATIENCE {
                    return Err(Error::Device {
                        device: self.device.context.label(),
                        what: format!("rank {}: others do not take part for {} s", self.rank, PATIENCE.as_secs()),
                        help: HELP.into(),
                    });
                }
            }
            if began.elapsed() < BUSY { std::thread::yield_now() } else { std::thread::sleep(PAUSE) }
        }
    }

    fn state(&self, handle: ncclComm_t) -> c_int {
        let mut state = SUCCESS;
        // SAFETY: a communicator of this library; writes one integer.
        let known = unsafe { (self.nccl.state)(handle, &mut state) };
        if known == SUCCESS { state } else { known }
    }

    fn failed(&self, what: &str, result: c_int, handle: ncclComm_t) -> Error {
        Error::Device {
            device: self.device.context.label(),
            what: format!("rank {}: NCCL cannot {what}: {}", self.rank, self.nccl.describe(result, handle)),
            help: HELP.into(),
        }
    }
}

const HELP: &str = "NCCL_DEBUG=INFO shows what NCCL does, NCCL_SOCKET_IFNAME names the network between machines";

/// One that does not block, with NCCL's defaults otherwise: NCCL_CONFIG_INITIALIZER.
fn config() -> ncclConfig_t {
    const UNDEFINED: c_int = c_int::MIN;
    ncclConfig_t {
        size: size_of::<ncclConfig_t>(),
        magic: 0xcafe_beef,
        version: 22_400,
        blocking: 0,
        cgaClusterSize: UNDEFINED,
        minCTAs: UNDEFINED,
        maxCTAs: UNDEFINED,
        netName: std::ptr::null(),
        splitShare: UNDEFINED,
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // Nothing can be done where a call is refused here; the process's end frees it all.
        if self.device.context.bind().is_err() {
            return;
        }
        if let Some(handle) = lock(&self.handle).take() {
            // SAFETY: a communicator that is used no more. Others may still fetch from it: so it is not given up at
            // once.
            unsafe {
                let ended = (self.nccl.finalize)(handle);
                match self.settle(handle, ("end", CLOSING), ended, &|| Ok(())) {
                    Ok(()) => (self.nccl.destroy)(handle),
                    Err(_) => (self.nccl.abort)(handle),
                };
            }
        }
        // SAFETY: nothing uses the handles any more.
        unsafe {
            let _ = result::event::destroy(self.queued);
            let _ = result::event::destroy(self.done);
            let _ = result::stream::destroy(self.stream);
        }
    }
}
