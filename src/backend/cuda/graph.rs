//! CUDA graph cache: the parts of a step that recur ([`crate::backend::Backend::replay`]) are launched as one graph.
//!
//! While such a part runs, its kernels and memsets are recorded instead of launched. At its end the sequence is
//! compared with the sequences of earlier parts: the same work becomes a graph, and from then on one launch; where some
//! kernels have other arguments or sizes (a loss scale, more keys to look at), their nodes are changed first. The GPU
//! runs exactly what this very pass has recorded, with the memory that this pass holds: a graph needs no memory of its
//! own and no key. What must wait for the device, or copies, ends the recording, and the whole part is launched
//! eagerly.
//!
//! | the same work, with the same memory | what happens |
//! |---|---|
//! | seen for the first time | launched eagerly, and remembered |
//! | for the second | made a graph, and launched |
//! | again | launched |
//!
//! A part that others wait for while it goes on, as the sums of gradients do, is split: each of its segments is a
//! sequence of its own, compared with those of the same number.
//!
//! The first steps of a shape allocate; after that the engine's pool and the arena give the same request the same
//! memory.
//!
//! `SWAT_CUDA_GRAPHS=off` launches everything eagerly. While `swat profile` records, every kernel is launched and timed
//! by itself.

use super::context::Context;
use super::launch::{Arg, Function, Launch};
use crate::error::{Error, Result};
use cudarc::driver::{DriverError, result, sys};
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::null_mut;

/// Cached sequences of each segment's number; the graphs of a whole part may take some megabytes of the driver's own
/// memory.
const KNOWN: usize = 8;
/// A graph is updated where at most one node in this many differs.
const CHANGED: usize = 2;

/// The sequence that is being recorded, and those of earlier parts.
#[derive(Default)]
pub(super) struct GraphCache {
    /// That of the part of a step that runs now.
    open: Option<Sequence>,
    /// The most recently used last.
    known: Vec<Known>,
}

// SAFETY: graphs of the driver may be used from any thread, one at a time; they are behind a mutex.
unsafe impl Send for GraphCache {}

/// Kernels and memsets in the order of their launch.
#[derive(Default)]
struct Sequence {
    nodes: Vec<Node>,
    /// Arguments of all nodes: sixteen words for a tensor map, one for anything else.
    words: Vec<u64>,
    /// Number of the segment of its part, from 0.
    segment: usize,
}

struct Node {
    work: Work,
    words: Range<usize>,
}

#[derive(Clone)]
enum Work {
    Kernel {
        function: Function,
        grid: [u32; 3],
        block: u32,
        shared_bytes: u32,
    },
    /// Zeros; its words are the address and the number of bytes.
    Clear,
}

impl Work {
    /// Whether a node of this can be updated to `other`.
    fn fits(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Clear, Self::Clear) => true,
            (Self::Kernel { function, .. }, Self::Kernel { function: other, .. }) => function.raw == other.raw,
            _ => false,
        }
    }

    fn dimensions(&self) -> Option<([u32; 3], u32, u32)> {
        match self {
            Self::Kernel { grid, block, shared_bytes, .. } => Some((*grid, *block, *shared_bytes)),
            Self::Clear => None,
        }
    }
}

struct Known {
    sequence: Sequence,
    graph: Graph,
}

/// A launch that the driver refused.
struct Refusal {
    what: &'static str,
    error: DriverError,
}

impl Refusal {
    fn of(what: &'static str) -> impl FnOnce(DriverError) -> Self {
        move |error| Self { what, error }
    }

    fn into_error(self, context: &Context) -> Error {
        context.failed(&format!("cannot launch {} in a recorded part of a step", self.what), self.error)
    }
}

/// The driver's form of a sequence.
enum Graph {
    /// Seen once.
    None,
    /// The driver refused to make one.
    Refused,
    Ready {
        graph: sys::CUgraph,
        executable: sys::CUgraphExec,
        nodes: Vec<sys::CUgraphNode>,
    },
}

impl Sequence {
    fn add(&mut self, work: Work, words: impl Iterator<Item = u64>) {
        let first = self.words.len();
        self.words.extend(words);
        self.nodes.push(Node { work, words: first..self.words.len() });
    }

    fn words(&self, node: usize) -> &[u64] {
        &self.words[self.nodes[node].words.clone()]
    }

    /// Nodes that differ from `other`'s; `None` where more differs than sizes and arguments of a few kernels.
    fn changes(&self, other: &Self) -> Option<Vec<usize>> {
        let (nodes, others) = (&self.nodes, &other.nodes);
        if nodes.len() != others.len() || !nodes.iter().zip(others).all(|(node, other)| node.work.fits(&other.work)) {
            return None;
        }
        let mut changed: Vec<usize> = Vec::new();
        for (i, (node, other_node)) in nodes.iter().zip(others).enumerate() {
            if self.words(i) == other.words(i) && node.work.dimensions() == other_node.work.dimensions() {
                continue;
            }
            if matches!(node.work, Work::Clear) || (changed.len() + 1) * CHANGED > nodes.len() {
                return None;
            }
            changed.push(i);
        }
        Some(changed)
    }

    /// Hands a kernel's arguments to `to` in the driver's form.
    fn with_arguments<R>(&self, node: usize, function: &Function, to: impl FnOnce(&mut [*mut c_void]) -> R) -> R {
        let words = self.words(node);
        // Room for tensor maps, which are aligned to more than words are.
        let mut maps: Vec<sys::CUtensorMap> = Vec::with_capacity(function.parameters.len());
        let mut pointers = Vec::with_capacity(function.parameters.len());
        let mut at = 0;
        for bytes in function.parameters.iter() {
            if *bytes <= size_of::<u64>() {
                pointers.push(std::ptr::from_ref(&words[at]) as *mut c_void);
                at += 1;
            } else {
                let mut map = sys::CUtensorMap { opaque: [0; 16] };
                map.opaque.copy_from_slice(&words[at..at + 16]);
                maps.push(map);
                // The capacity was reserved: elements never move.
                pointers.push(maps.last().map_or(null_mut(), |map| std::ptr::from_ref(map) as *mut c_void));
                at += 16;
            }
        }
        to(&mut pointers)
    }

    /// The driver's description of a kernel, handed to `to`.
    fn with_kernel<R>(&self, node: usize, to: impl FnOnce(&sys::CUDA_KERNEL_NODE_PARAMS) -> R) -> Option<R> {
        let Work::Kernel { function, grid, block, shared_bytes } = &self.nodes[node].work else { return None };
        Some(self.with_arguments(node, function, |arguments| {
            to(&sys::CUDA_KERNEL_NODE_PARAMS {
                func: function.raw,
                gridDimX: grid[0],
                gridDimY: grid[1],
                gridDimZ: grid[2],
                blockDimX: *block,
                blockDimY: 1,
                blockDimZ: 1,
                sharedMemBytes: *shared_bytes,
                kernelParams: arguments.as_mut_ptr(),
                extra: null_mut(),
                kern: null_mut(),
                ctx: null_mut(),
            })
        }))
    }

    /// Queues everything, one by one.
    ///
    /// # Safety
    /// The context is current, and all of it was recorded by [`GraphCache::record_launch`].
    unsafe fn queue(&self, stream: sys::CUstream) -> Result<(), Refusal> {
        for (i, node) in self.nodes.iter().enumerate() {
            let words = self.words(i);
            match &node.work {
                Work::Kernel { function, grid: [x, y, z], block, shared_bytes } => {
                    self.with_arguments(i, function, |arguments| {
                        // SAFETY: a launch that was checked when it was recorded.
                        unsafe {
                            let (grid, block) = ((*x, *y, *z), (*block, 1, 1));
                            result::launch_kernel(function.raw, grid, block, *shared_bytes, stream, arguments)
                        }
                    })
                    .map_err(Refusal::of(function.kernel))?;
                }
                Work::Clear => {
                    // SAFETY: memory that was borrowed mutably when this was recorded.
                    let cleared = unsafe { result::memset_d8_async(words[0], 0, words[1] as usize, stream) };
                    cleared.map_err(Refusal::of("a memset"))?;
                }
            }
        }
        Ok(())
    }
}

impl Graph {
    /// A chain of the nodes of `sequence`.
    ///
    /// # Safety
    /// The context is current, and all of it was recorded by [`GraphCache::record_launch`].
    unsafe fn new(sequence: &Sequence, context: sys::CUcontext) -> Result<Self, DriverError> {
        let mut graph = null_mut();
        // SAFETY: writes the handle of a new graph.
        unsafe { sys::cuGraphCreate(&mut graph, 0) }.result()?;
        let mut nodes: Vec<sys::CUgraphNode> = Vec::with_capacity(sequence.nodes.len());
        let mut fill = || {
            for i in 0..sequence.nodes.len() {
                let (before, count) = nodes.last().map_or((std::ptr::null(), 0), |last| (std::ptr::from_ref(last), 1));
                let mut node = null_mut();
                let kernel = sequence.with_kernel(i, |kernel| {
                    // SAFETY: a launch that was checked when it was recorded; the driver copies the arguments.
                    unsafe { sys::cuGraphAddKernelNode_v2(&mut node, graph, before, count, kernel) }
                });
                let words = sequence.words(i);
                let clear = || {
                    let params = sys::CUDA_MEMSET_NODE_PARAMS {
                        dst: words[0],
                        pitch: 0,
                        value: 0,
                        elementSize: 1,
                        width: words[1] as usize,
                        height: 1,
                    };
                    // SAFETY: memory that was borrowed mutably when this was recorded.
                    unsafe { sys::cuGraphAddMemsetNode(&mut node, graph, before, count, &params, context) }
                };
                kernel.unwrap_or_else(clear).result()?;
                nodes.push(node);
            }
            // SAFETY: a graph of this function's own.
            unsafe { result::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0)) }
        };
        match fill() {
            Ok(executable) => Ok(Self::Ready { graph, executable, nodes }),
            Err(error) => {
                // SAFETY: as above; nothing uses it.
                let _ = unsafe { result::graph::destroy(graph) };
                Err(error)
            }
        }
    }

    /// Frees it.
    ///
    /// # Safety
    /// The context is current and the stream is idle.
    unsafe fn destroy(&mut self) {
        if let Self::Ready { graph, executable, .. } = std::mem::replace(self, Self::None) {
            // SAFETY: handles of ours that nothing uses any more. A refusal leaks them, until the process ends.
            unsafe {
                let _ = (result::graph::exec_destroy(executable), result::graph::destroy(graph));
            }
        }
    }
}

impl Known {
    /// Queues `sequence`, which differs from the known one in the nodes `changed`.
    ///
    /// # Safety
    /// As [`Sequence::queue`].
    unsafe fn queue(&mut self, context: &Context, sequence: Sequence, changed: &[usize]) -> Result<(), Refusal> {
        self.sequence = sequence;
        let sequence = &self.sequence;
        // SAFETY: the caller's promise; a node belongs to the graph that this one was made of.
        unsafe {
            let ready = match &self.graph {
                Graph::Refused => Ok(()),
                Graph::None => Graph::new(sequence, context.handle()).map(|graph| self.graph = graph),
                Graph::Ready { executable, nodes, .. } => changed.iter().try_for_each(|node| {
                    let set = |kernel: &_| sys::cuGraphExecKernelNodeSetParams_v2(*executable, nodes[*node], kernel);
                    sequence.with_kernel(*node, set).map_or(Ok(()), sys::CUresult::result)
                }),
            };
            // Where the driver has no memory for a graph, or refuses to update it, the work is launched eagerly.
            let launched = ready.and_then(|()| match &self.graph {
                Graph::Ready { executable, .. } => result::graph::launch(*executable, context.stream()).map(|()| true),
                Graph::None | Graph::Refused => Ok(false),
            });
            match launched {
                Ok(true) => Ok(()),
                Ok(false) => sequence.queue(context.stream()),
                Err(error) => {
                    context.wait().map_err(|_| Refusal { what: "a graph", error })?;
                    self.graph.destroy();
                    self.graph = Graph::Refused;
                    sequence.queue(context.stream())
                }
            }
        }
    }
}

impl GraphCache {
    /// Begins to record; false where that has begun already.
    pub(super) fn begin(&mut self) -> bool {
        let begins = self.open.is_none();
        self.open.get_or_insert_default();
        begins
    }

    /// Records a launch where a part of a step runs; false where it is to be launched now.
    ///
    /// # Safety
    /// As [`super::device::Device::launch`], which has checked the arguments.
    pub(super) unsafe fn record_launch(&mut self, launch: &Launch, function: &Function, arguments: &[Arg]) -> bool {
        let Some(sequence) = &mut self.open else { return false };
        let &Launch { grid, block, shared_bytes, .. } = launch;
        let words = arguments.iter().flat_map(Arg::words);
        sequence.add(Work::Kernel { function: function.clone(), grid, block, shared_bytes }, words);
        true
    }

    /// The same for `bytes` of zeros at `pointer`.
    ///
    /// # Safety
    /// That memory is live and borrowed mutably.
    pub(super) unsafe fn record_memset(&mut self, pointer: sys::CUdeviceptr, bytes: usize) -> bool {
        let Some(sequence) = &mut self.open else { return false };
        sequence.add(Work::Clear, [pointer, bytes as u64].into_iter());
        true
    }

    /// Ends a segment of the recording, and begins the next one; nothing where nothing was recorded since the last end.
    pub(super) fn split(&mut self, context: &Context) -> Result<()> {
        let Some(segment) = self.open.as_ref().filter(|open| !open.nodes.is_empty()).map(|open| open.segment) else {
            return Ok(());
        };
        self.finish(context)?;
        self.open = Some(Sequence { segment: segment + 1, ..Sequence::default() });
        Ok(())
    }

    /// Ends the recording and queues it: as one graph where the sequence is known.
    pub(super) fn finish(&mut self, context: &Context) -> Result<()> {
        let Some(sequence) = self.open.take() else { return Ok(()) };
        if sequence.segment > 0 && sequence.nodes.is_empty() {
            return Ok(());
        }
        context.bind()?;
        let of_segment = |known: &Known| known.sequence.segment == sequence.segment;
        let found = |(i, known): (usize, &Known)| {
            let changed = of_segment(known).then(|| known.sequence.changes(&sequence)).flatten()?;
            Some((i, changed))
        };
        let found = self.known.iter().enumerate().rev().find_map(found);
        let oldest = self.known.iter().position(of_segment);
        let full = self.known.iter().filter(|known| of_segment(known)).count() == KNOWN;
        // SAFETY: the context is current; what is in a sequence was recorded above; the stream is idle where a graph goes.
        let queued = unsafe {
            match found {
                Some((i, changed)) => {
                    let mut known = self.known.remove(i);
                    let queued = known.queue(context, sequence, &changed);
                    self.known.push(known);
                    queued
                }
                None => {
                    if let Some(oldest) = oldest.filter(|_| full) {
                        let mut oldest = self.known.remove(oldest);
                        if matches!(oldest.graph, Graph::Ready { .. }) {
                            let _ = context.wait();
                            oldest.graph.destroy();
                        }
                    }
                    let queued = sequence.queue(context.stream());
                    self.known.push(Known { sequence, graph: Graph::None });
                    queued
                }
            }
        };
        queued.map_err(|refusal| refusal.into_error(context))
    }

    /// Ends the recording and launches it eagerly, as the rest of the part will be. Comes before anything that is not
    /// recorded.
    pub(super) fn flush(&mut self, context: &Context) -> Result<()> {
        let Some(sequence) = self.open.take() else { return Ok(()) };
        context.bind()?;
        // SAFETY: the context is current, and the sequence was recorded above.
        let queued = unsafe { sequence.queue(context.stream()) };
        queued.map_err(|refusal| refusal.into_error(context))
    }

    /// Frees all graphs.
    ///
    /// # Safety
    /// The context is current and the stream is idle.
    pub(super) unsafe fn clear(&mut self) {
        for mut known in self.known.drain(..) {
            // SAFETY: the caller's promise.
            unsafe { known.graph.destroy() };
        }
    }
}
