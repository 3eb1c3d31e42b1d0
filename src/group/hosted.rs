//! A group over messages between hosts' memories.

use super::{ALIGNMENT, Bucket, Group, ReduceScatter, SAME, Share, Traffic};
use crate::backend::{Backend, Buffer, Element, FloatElement, ViewMut};
use crate::error::{Error, Result};
use std::ops::Range;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Most bytes of a tensor that are exchanged at once, and of several tensors whose weights are: bounds the memory beside
/// the tensors.
const EXCHANGED_BYTES: usize = 32 << 20;

/// Carries messages between ranks.
pub trait Transport: Send + Sync + 'static {
    /// This rank.
    fn share(&self) -> Share;

    /// Sends a message to each rank, itself included, and returns what each has sent to this one.
    ///
    /// # Errors
    /// [`Error::Failed`] names a rank that has ended.
    fn exchange(&self, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>>;
}

/// The group of the ranks that a transport connects, on any backend: tensors go through the host.
pub struct Hosted<T> {
    /// The thread that adds up gradients has it as well.
    connected: Arc<Connected<T>>,
}

struct Connected<T> {
    transport: T,
    traffic: Mutex<Traffic>,
    /// [`EXCHANGED_BYTES`]
    most_bytes: usize,
}

impl<T: Transport> Hosted<T> {
    /// The group over a transport.
    pub fn new(transport: T) -> Self {
        let connected = Connected { transport, traffic: Mutex::default(), most_bytes: EXCHANGED_BYTES };
        Self { connected: Arc::new(connected) }
    }

    /// What carries its messages.
    pub fn transport(&self) -> &T {
        &self.connected.transport
    }
}

impl<T: Transport> Connected<T> {
    /// [`Transport::exchange`] of messages whose lengths all ranks know.
    fn exchange_known(&self, messages: Vec<Vec<u8>>, expected: impl Fn(usize) -> usize) -> Result<Vec<Vec<u8>>> {
        let received = self.transport.exchange(messages)?;
        for (rank, message) in received.iter().enumerate() {
            if message.len() != expected(rank) {
                let what = format!("rank {rank} sent {} bytes in place of {}", message.len(), expected(rank));
                return Err(Error::failed(what, SAME));
            }
        }
        Ok(received)
    }

    fn sent(&self, messages: &[Vec<u8>]) -> u64 {
        let own = self.transport.share().rank;
        messages.iter().enumerate().filter(|(rank, _)| *rank != own).map(|(_, message)| message.len() as u64).sum()
    }

    fn count(&self, add: impl FnOnce(&mut Traffic)) {
        add(&mut self.traffic.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Adds up each tensor over all ranks, in this rank's part.
    fn add_up<B: Backend>(&self, backend: &B, bucket: &mut Bucket<B>) -> Result<()> {
        let share = self.transport.share();
        let mut tensors: Vec<_> = bucket.iter_mut().map(Buffer::view_mut).collect();
        for piece in pieces(&tensors, share, self.most_bytes) {
            let messages = share.all().map(|to| read_parts(backend, &tensors, (to, &piece)));
            let messages = messages.collect::<Result<Vec<_>>>()?;
            let sent = self.sent(&messages);
            let size = messages[share.rank].len();
            let received = self.exchange_known(messages, |_| size)?;
            self.count(|traffic| traffic.reduce_scatter_bytes += sent);
            let mut sums = vec![0f32; size / size_of::<B::Grad>()];
            for message in &received {
                let theirs = message.chunks_exact(size_of::<B::Grad>()).map(bytemuck::pod_read_unaligned::<B::Grad>);
                sums.iter_mut().zip(theirs).for_each(|(sum, value)| *sum += value.to_f32());
            }
            let sums: Vec<B::Grad> = sums.into_iter().map(B::Grad::from_f32).collect();
            write_parts(backend, &mut tensors, (share, &piece), &sums)?;
        }
        Ok(())
    }
}

/// A thread that adds up buckets in their order, while the caller goes on.
struct Adding<B: Backend> {
    buckets: Option<Sender<Bucket<B>>>,
    thread: Option<JoinHandle<Result<Vec<Bucket<B>>>>>,
}

impl<B: Backend> Adding<B> {
    fn end(&mut self) -> Result<Vec<Bucket<B>>> {
        self.buckets = None;
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(added)) => added,
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => Err(Error::failed("sums of gradients have failed before", "see the first error")),
        }
    }
}

impl<B: Backend> ReduceScatter<B> for Adding<B> {
    fn begin(&mut self, bucket: Bucket<B>) -> Result<()> {
        match self.buckets.as_ref().map(|to| to.send(bucket)) {
            Some(Ok(())) => Ok(()),
            // The thread has ended by an error.
            _ => self.end().map(drop),
        }
    }

    fn finish(mut self: Box<Self>) -> Result<Vec<Bucket<B>>> {
        self.end()
    }
}

impl<B: Backend, T: Transport> Group<B> for Hosted<T> {
    fn share(&self) -> Share {
        self.transport().share()
    }

    fn all_reduce(&self, values: &mut [f64]) -> Result<()> {
        let own: Vec<u8> = bytemuck::cast_slice(values).to_vec();
        let size = own.len();
        let received = self.connected.exchange_known(vec![own; self.transport().share().size], |_| size)?;
        values.fill(0.0);
        for message in received {
            // In any alignment.
            let theirs = message.chunks_exact(size_of::<f64>()).map(bytemuck::pod_read_unaligned::<f64>);
            values.iter_mut().zip(theirs).for_each(|(sum, value)| *sum += value);
        }
        Ok(())
    }

    fn reduce_scatter(&self, backend: &B) -> Result<Box<dyn ReduceScatter<B> + '_>> {
        let (connected, backend) = (self.connected.clone(), backend.clone());
        let (buckets, received) = channel::<Bucket<B>>();
        let add = move || -> Result<Vec<Bucket<B>>> {
            let added = received.into_iter().map(|mut bucket| {
                connected.add_up(&backend, &mut bucket)?;
                Ok(bucket)
            });
            added.collect()
        };
        let thread = std::thread::Builder::new().name("gradients".into()).spawn(add);
        let thread = thread.map_err(|e| Error::failed(format!("a thread for gradients: {e}"), "allow more threads"))?;
        Ok(Box::new(Adding { buckets: Some(buckets), thread: Some(thread) }))
    }

    fn all_gather(&self, backend: &B, tensors: &mut [ViewMut<'_, B, B::Float>]) -> Result<()> {
        let (connected, share) = (&self.connected, self.transport().share());
        for bucket in gathered(tensors, connected.most_bytes) {
            for piece in pieces(bucket, share, connected.most_bytes) {
                let messages = vec![read_parts(backend, bucket, (share, &piece))?; share.size];
                let sent = connected.sent(&messages);
                let sizes: Vec<usize> = share.all().map(|from| elements(bucket, (from, &piece))).collect();
                let received = connected.exchange_known(messages, |rank| sizes[rank] * size_of::<B::Float>())?;
                connected.count(|traffic| traffic.all_gather_bytes += sent);
                for (from, message) in share.all().zip(received).filter(|(from, _)| from.rank != share.rank) {
                    let values: Vec<B::Float> =
                        message.chunks_exact(size_of::<B::Float>()).map(bytemuck::pod_read_unaligned).collect();
                    write_parts(backend, bucket, (from, &piece), &values)?;
                }
            }
        }
        Ok(())
    }

    fn exchange(&self, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        self.transport().exchange(messages)
    }

    fn traffic(&self) -> Traffic {
        *self.connected.traffic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tensors in their order, of about `most_bytes` together; a larger one is alone.
fn gathered<'s, 'a, B: Backend, T: Element>(
    tensors: &'s mut [ViewMut<'a, B, T>],
    most_bytes: usize,
) -> impl Iterator<Item = &'s mut [ViewMut<'a, B, T>]> {
    let mut left = tensors;
    std::iter::from_fn(move || {
        let mut bytes = 0;
        let mut fits = |tensor: &ViewMut<'_, B, T>| {
            bytes += tensor.len() * size_of::<T>();
            bytes <= most_bytes
        };
        let count = left.iter().take_while(|tensor| fits(tensor)).count().max(1).min(left.len());
        let (bucket, rest) = std::mem::take(&mut left).split_at_mut(count);
        left = rest;
        (!bucket.is_empty()).then_some(bucket)
    })
}

/// What is exchanged at once: the same elements, counted from its beginning, of each rank's part of each tensor. All parts
/// of a tensor together have at most `most_bytes` of it, but for the rounding of parts.
fn pieces<B: Backend, T: Element>(tensors: &[ViewMut<'_, B, T>], share: Share, most_bytes: usize) -> Vec<Range<usize>> {
    let most = (most_bytes / size_of::<T>() / share.size).max(1).next_multiple_of(ALIGNMENT);
    // The first part is the largest.
    let first = Share { rank: 0, ..share };
    let longest = tensors.iter().map(|tensor| first.of(tensor.len()).len()).max().unwrap_or(0);
    (0..longest).step_by(most).map(|start| start..start + most).collect()
}

/// A piece of a rank's part of a tensor of `len`; the last ones of a part may be empty.
fn within((share, piece): (Share, &Range<usize>), len: usize) -> Range<usize> {
    let part = share.of(len);
    let at = |offset: usize| (part.start + offset).min(part.end);
    at(piece.start)..at(piece.end)
}

/// Elements of a piece of a rank's part of all tensors.
fn elements<B: Backend, T: Element>(tensors: &[ViewMut<'_, B, T>], of: (Share, &Range<usize>)) -> usize {
    tensors.iter().map(|tensor| within(of, tensor.len()).len()).sum()
}

/// A piece of a rank's part of each tensor, one after another.
fn read_parts<B: Backend, T: Element>(
    backend: &B,
    tensors: &[ViewMut<'_, B, T>],
    of: (Share, &Range<usize>),
) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(elements(tensors, of) * size_of::<T>());
    for tensor in tensors {
        let part = within(of, tensor.len());
        let mut values = vec![T::zeroed(); part.len()];
        backend.read(tensor.view().part(part), &mut values)?;
        bytes.extend_from_slice(bytemuck::cast_slice(&values));
    }
    Ok(bytes)
}

fn write_parts<B: Backend, T: Element>(
    backend: &B,
    tensors: &mut [ViewMut<'_, B, T>],
    of: (Share, &Range<usize>),
    mut values: &[T],
) -> Result<()> {
    for tensor in tensors {
        let part = within(of, tensor.len());
        let (own, rest) = values.split_at(part.len());
        values = rest;
        backend.write(own, tensor.part(part))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::Threads;
    use super::*;
    use crate::backend::cpu::Cpu;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Remembers the longest message.
    struct Watched {
        inner: Threads,
        longest: AtomicUsize,
    }

    impl Transport for Watched {
        fn share(&self) -> Share {
            self.inner.share()
        }

        fn exchange(&self, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
            let longest = messages.iter().map(Vec::len).max().unwrap_or(0);
            self.longest.fetch_max(longest, Ordering::Relaxed);
            self.inner.exchange(messages)
        }
    }

    fn buffer(backend: &Cpu, len: usize, value: impl Fn(usize) -> f32) -> Buffer<Cpu, f32> {
        let mut buffer = backend.zeros(len).unwrap();
        backend.write(&(0..len).map(value).collect::<Vec<_>>(), buffer.view_mut()).unwrap();
        buffer
    }

    fn values(backend: &Cpu, buffer: &Buffer<Cpu, f32>) -> Vec<f32> {
        let mut values = vec![0.0; buffer.len()];
        backend.read(buffer.view(), &mut values).unwrap();
        values
    }

    #[test]
    fn large_tensors_are_exchanged_in_pieces() {
        // 120 bytes among 3 ranks are 10 f32 for each, rounded up to 16: the parts of 168, 168 and 164 take 11 exchanges.
        let (most_bytes, lengths) = (120, [500, 7]);
        let run = |group: Hosted<Threads>| {
            let Ok(Connected { transport: inner, traffic, .. }) = Arc::try_unwrap(group.connected) else {
                panic!("nothing else has it yet")
            };
            let transport = Watched { inner, longest: AtomicUsize::new(0) };
            let group = Hosted { connected: Arc::new(Connected { transport, traffic, most_bytes }) };
            let (backend, share) = (Cpu::new(), Group::<Cpu>::share(&group));
            let mut sums = Group::<Cpu>::reduce_scatter(&group, &backend).unwrap();
            // Whole numbers: element i is (rank + 1)(i + 1), and its sum over the ranks 6 (i + 1).
            let own = |i: usize| ((share.rank + 1) * (i + 1)) as f32;
            sums.begin(lengths.map(|len| buffer(&backend, len, own)).into()).unwrap();
            let sums = sums.finish().unwrap().pop().unwrap();
            for sum in &sums {
                let part = share.of(sum.len());
                let expected: Vec<f32> = part.clone().map(|i| 6.0 * (i + 1) as f32).collect();
                assert_eq!(values(&backend, sum)[part], expected);
            }
            let mut gathered = sums;
            let mut views: Vec<_> = gathered.iter_mut().map(Buffer::view_mut).collect();
            group.all_gather(&backend, &mut views).unwrap();
            for whole in &gathered {
                let expected: Vec<f32> = (0..whole.len()).map(|i| 6.0 * (i + 1) as f32).collect();
                assert_eq!(values(&backend, whole), expected);
            }
            let planned = Traffic::of_step::<Cpu>(lengths.into_iter(), share);
            assert_eq!(Group::<Cpu>::traffic(&group), planned);
            let longest = group.transport().longest.load(Ordering::Relaxed);
            assert!((1..=4 * (16 + 7)).contains(&longest), "{longest} bytes");
        };
        std::thread::scope(|scope| {
            for group in Threads::groups(3) {
                scope.spawn(move || run(group));
            }
        });
    }
}
