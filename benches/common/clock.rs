//! Timing of calls. On a GPU: events around many calls, behind an untimed one, so that the host runs ahead when the
//! clock starts; calls under 50 µs are replayed from a CUDA graph, so that launch overhead does not count. On the CPU:
//! the host's clock.

use super::cublaslt::CublasLt;
use super::shapes::{Scale, random};
use std::time::{Duration, Instant};
use swat::backend::Roofline;
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{Captured, Cuda, GemmLayout, GemmShape, Precision, with_version};
use swat::backend::{Backend, Linear, LinearShape, Operator, trace};

/// Shorter calls are captured into a CUDA graph.
const SHORT: Duration = Duration::from_micros(50);
/// Longer calls need no untimed call before them.
const LONG: Duration = Duration::from_millis(1);
/// Minimum number of calls in a graph.
const REPLAYED: usize = 64;
/// Assumed size of the last-level cache.
const CPU_CACHE_BYTES: u64 = 64 << 20;

/// A backend whose calls can be timed.
pub trait Device: Backend {
    /// State of prepared calls, for [`Device::elapsed`].
    type Prepared;

    /// Product name, for reports.
    fn product(&self) -> String;
    /// Size of its last-level cache.
    fn cache_bytes(&self) -> u64;
    /// Runs `call` with the kernel version `version` forced.
    ///
    /// # Panics
    /// If no kernel of that version was launched.
    fn with_version(&self, version: &'static str, call: &mut dyn FnMut());
    /// Warms up `call(0), call(1), …`, of which `rotation` use different buffers; captures them if they are short.
    fn prepare(&self, rotation: usize, capture: bool, call: &mut dyn FnMut(usize)) -> Self::Prepared;
    /// Time of `calls` calls.
    fn elapsed(&self, prepared: &Self::Prepared, calls: u64, call: &mut dyn FnMut(usize)) -> Duration;
    /// The measured roofline: best of a few runs of a large matrix product and a large copy; and whose product it was.
    fn ceilings(&self, scale: &Scale) -> (Roofline, &'static str);
}

impl Device for Cpu {
    type Prepared = ();

    fn product(&self) -> String {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
        let threads = rayon::current_num_threads();
        format!("{}, {threads} threads", name.map_or(std::env::consts::ARCH, |(_, name)| name))
    }

    fn cache_bytes(&self) -> u64 {
        CPU_CACHE_BYTES
    }

    fn with_version(&self, version: &'static str, _: &mut dyn FnMut()) {
        panic!("{version}: the CPU backend has one version of each operation");
    }

    fn prepare(&self, rotation: usize, _: bool, call: &mut dyn FnMut(usize)) {
        (0..rotation.min(2)).for_each(call);
    }

    fn elapsed(&self, (): &(), calls: u64, call: &mut dyn FnMut(usize)) -> Duration {
        let began = Instant::now();
        (0..calls as usize).for_each(call);
        began.elapsed()
    }

    fn ceilings(&self, _: &Scale) -> (Roofline, &'static str) {
        (Roofline::measure(self).expect("memory for a large product"), "swat")
    }
}

/// Warmed-up calls on a GPU.
pub struct CudaCalls {
    captured: Option<Captured>,
    /// Calls in the graph.
    replayed: u64,
    /// Whether a call is too short for the host to run ahead without an untimed call before it.
    short: bool,
}

impl<P: Precision> Device for Cuda<P> {
    type Prepared = CudaCalls;

    fn product(&self) -> String {
        Cuda::product(self).unwrap_or_else(|_| self.name())
    }

    fn cache_bytes(&self) -> u64 {
        self.l2_bytes().unwrap_or(0)
    }

    fn with_version(&self, version: &'static str, call: &mut dyn FnMut()) {
        with_version(version, call);
    }

    fn prepare(&self, rotation: usize, capture: bool, call: &mut dyn FnMut(usize)) -> CudaCalls {
        (0..rotation).for_each(&mut *call);
        self.synchronize().expect("a working device");
        let one = timed(self, || call(0));
        let replayed = rotation * REPLAYED.div_ceil(rotation);
        let captured = (capture && one < SHORT).then(|| {
            // SAFETY: the ladder holds the tensors of `call` until it drops the graph, and allocates nothing in between.
            let captured = unsafe {
                self.capture(|| {
                    (0..replayed).for_each(&mut *call);
                    Ok(())
                })
            };
            captured.expect("work that may be captured")
        });
        CudaCalls { captured, replayed: replayed as u64, short: one < LONG }
    }

    fn elapsed(&self, prepared: &CudaCalls, calls: u64, call: &mut dyn FnMut(usize)) -> Duration {
        let Some(captured) = &prepared.captured else {
            if prepared.short {
                call(0);
            }
            return timed(self, || (1..=calls as usize).for_each(call));
        };
        let replay = || captured.launch().expect("a working device");
        let replays = calls.div_ceil(prepared.replayed);
        replay();
        let time = timed(self, || (0..replays).for_each(|_| replay()));
        time.mul_f64(calls as f64 / (replays * prepared.replayed) as f64)
    }

    fn ceilings(&self, scale: &Scale) -> (Roofline, &'static str) {
        let Scale { ceiling_side: side, ceiling_bytes: copied_bytes, .. } = *scale;
        let best = |call: &mut dyn FnMut()| (0..6).map(|_| timed(self, &mut *call)).min().unwrap_or_default();
        let rate = |work: f64, time: Duration| work / time.as_secs_f64().max(1e-9);
        let [x, w, mut y] = [(); 3].map(|()| random(self, side * side));
        let peer = if scale.libraries { CublasLt::open(self).ok() } else { None };
        let whose = if peer.is_some() { "cublaslt" } else { "swat" };
        let shape = GemmShape { layout: GemmLayout::Tn, m: side, n: side, k: side };
        let time = match peer.map(|peer| peer.product(shape, &x, &w, &mut y)) {
            Some(product) => best(&mut || product.run(&x, &w, &mut y)),
            None => best(&mut || {
                let shape = LinearShape { tokens: side, inputs: side, outputs: side };
                Linear::new(x.view(), w.view(), y.view_mut(), shape).run(self).expect("a working device");
            }),
        };
        let flops_per_s = rate(2.0 * (side as f64).powi(3), time);
        drop((x, w, y));
        let [from, mut to] = [(); 2].map(|()| random::<_, half::bf16>(self, copied_bytes / 2));
        let time = best(&mut || self.copy(from.view(), to.view_mut()).expect("a working device"));
        (Roofline { flops_per_s, bytes_per_s: rate(2.0 * copied_bytes as f64, time) }, whose)
    }
}

/// Elapsed time by CUDA events.
fn timed<P: Precision>(cuda: &Cuda<P>, queue: impl FnOnce()) -> Duration {
    let queue = || {
        queue();
        Ok(())
    };
    cuda.time(queue).expect("a working device")
}

/// Names of the kernels that `call` launches; empty on the CPU.
pub fn kernels<B: Backend>(device: &B, call: impl FnOnce()) -> Vec<&'static str> {
    let recording = trace::record().expect("nothing else records");
    call();
    device.synchronize().expect("a working device");
    recording.take().iter().filter(|span| span.kind == trace::SpanKind::Kernel).map(|span| span.name).collect()
}
