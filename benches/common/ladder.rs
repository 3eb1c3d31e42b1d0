//! A ladder: the variants of one operation at one shape (ours, its versions, peers), and how they are timed.

use super::clock::{self, Device};
use super::roofline::Measured;
use super::session::{Choice, Mode, Session};
use super::shapes::random;
use super::stats::{median, median_interval};
use criterion::{Criterion, SamplingMode, Throughput};
use serde_json::json;
use std::time::Duration;
use swat::backend::Cost;

/// Arithmetic intensity, in FLOPs a byte, from which criterion shows throughput in FLOPs (as elements) instead of
/// bytes.
const COMPUTES: u64 = 64;
/// Samples of a variant, pairs of an A/B run; target time of a sample, maximum time of all.
const SAMPLES: usize = 21;
const PAIRS: usize = 41;
const SAMPLE_TIME: Duration = Duration::from_millis(5);
const MOST_TIME: Duration = Duration::from_secs(1);
/// Minimum samples and pairs, of variants too slow for that.
const LEAST: usize = 7;
/// Smaller working sets are rotated as if they had this size.
const SMALL_BYTES: u64 = 64 << 10;

type Work<'a, D, T> = Box<dyn FnMut(&D, &mut T) + 'a>;

struct Variant<'a, D: Device, T> {
    name: String,
    peer: bool,
    /// Name of the kernel version that is forced; checked before timing.
    version: Option<&'static str>,
    work: Work<'a, D, T>,
    prepared: Option<D::Prepared>,
}

/// The tensors of the calls, allocated at the first timing.
struct Tensors<'a, D: Device, T> {
    make: Box<dyn Fn(&D) -> T + 'a>,
    refresh: Option<Work<'a, D, T>>,
    sets: Vec<T>,
}

/// The variants of one operation at one shape: built with the methods below, ended by [`Ladder::run`].
#[must_use = "a ladder is run by `run`"]
pub struct Ladder<'a, D: Device, T> {
    session: &'a mut Session,
    device: &'a D,
    op: String,
    shape: String,
    cost: Cost,
    tensors: Tensors<'a, D, T>,
    /// Tokens of a call, if throughput is in tokens a second.
    tokens: Option<u64>,
    capture: bool,
    variants: Vec<Variant<'a, D, T>>,
}

impl<'a, D: Device, T> Ladder<'a, D, T> {
    pub(super) fn new(
        session: &'a mut Session,
        device: &'a D,
        op: String,
        shape: String,
        cost: Cost,
        make: Box<dyn Fn(&D) -> T + 'a>,
    ) -> Self {
        let tensors = Tensors { make, refresh: None, sets: Vec::new() };
        Self { session, device, op, shape, cost, tensors, tokens: None, capture: true, variants: Vec::new() }
    }

    /// Restores, before each sample and untimed, what calls change in place.
    pub fn refresh(mut self, work: impl FnMut(&D, &mut T) + 'a) -> Self {
        self.tensors.refresh = Some(Box::new(work));
        self
    }

    /// Shows throughput in tokens a second.
    pub fn tokens(mut self, of_a_call: usize) -> Self {
        self.tokens = Some(of_a_call as u64);
        self
    }

    /// Never captures calls into a CUDA graph, however short they are.
    pub fn uncaptured(mut self) -> Self {
        self.capture = false;
        self
    }

    /// Adds a variant of ours.
    pub fn variant(self, name: impl Into<String>, work: impl FnMut(&D, &mut T) + 'a) -> Self {
        self.with(name, false, None, work)
    }

    /// Adds a peer: another implementation to compare with.
    pub fn peer(self, name: impl Into<String>, work: impl FnMut(&D, &mut T) + 'a) -> Self {
        self.with(name, true, None, work)
    }

    /// Adds `swat`, what the backend chooses, then each of its versions.
    pub fn versions(self, versions: &[&'static str], work: impl Fn(&D, &mut T) + Copy + 'a) -> Self {
        versions.iter().copied().fold(self.variant("swat", work), |ladder, version| {
            let forced = move |d: &D, tensors: &mut T| d.with_version(version, &mut || work(d, tensors));
            ladder.with(version, false, Some(version), forced)
        })
    }

    /// Adds the peer of memory-bound operations: a copy that reads and writes as many bytes.
    pub fn copy(self) -> Self {
        let (len, rotation) = (self.cost.bytes as usize / 2 / size_of::<D::Float>(), self.rotation());
        let (mut buffers, mut next) = (Vec::new(), 0);
        self.peer("copy", move |device, _| {
            if buffers.is_empty() {
                buffers = (0..rotation).map(|_| [random(device, len), random::<D, D::Float>(device, len)]).collect();
            }
            next = (next + 1) % rotation;
            let [from, to] = &mut buffers[next];
            device.copy(from.view(), to.view_mut()).expect("a working device");
        })
    }

    /// Number of buffers to rotate so that no call finds its own in a cache.
    fn rotation(&self) -> usize {
        match self.cost.bytes {
            0 => 1,
            bytes => {
                (self.session.scale.rotated_caches * self.device.cache_bytes() / bytes.max(SMALL_BYTES)) as usize + 1
            }
        }
    }

    fn with(
        mut self,
        name: impl Into<String>,
        peer: bool,
        version: Option<&'static str>,
        work: impl FnMut(&D, &mut T) + 'a,
    ) -> Self {
        self.variants.push(Variant { name: name.into(), peer, version, work: Box::new(work), prepared: None });
        self
    }

    /// Runs the chosen variants in the session's mode.
    pub fn run(mut self) {
        let id = format!("{}/{}/{}", self.session.family, self.op, self.shape);
        // Taken out while the ladder is borrowed; restored below.
        let mut mode = std::mem::replace(&mut self.session.mode, Mode::List(Choice::default()));
        let named = |ladder: &Self, at: usize| format!("{id}/{}", ladder.variants[at].name);
        match &mut mode {
            Mode::Criterion(criterion) => self.by_criterion(criterion, &id),
            Mode::Ab(names, choice) => {
                let found = names.each_ref().map(|name| self.variants.iter().position(|v| v.name == *name));
                if let ([Some(a), Some(b)], true) = (found, names.iter().all(|name| choice.takes(&id, name))) {
                    self.session.chosen += 1;
                    println!("{id}: {}", verdict(names, &self.ratios([a, b])));
                }
            }
            Mode::Json(choice) => match &self.chosen(&id, choice)[..] {
                [] => {}
                chosen => self.record(chosen),
            },
            Mode::Once(choice) => self.chosen(&id, choice).into_iter().for_each(|at| {
                println!("{}", named(&self, at));
                self.once(at);
            }),
            Mode::List(choice) => {
                self.chosen(&id, choice).into_iter().for_each(|at| println!("{}", named(&self, at)));
            }
        }
        self.session.mode = mode;
    }

    /// Indices of the variants that `choice` takes.
    fn chosen(&mut self, id: &str, choice: &Choice) -> Vec<usize> {
        let taken = |at: &usize| choice.takes(id, &self.variants[*at].name);
        let chosen: Vec<usize> = (0..self.variants.len()).filter(taken).collect();
        self.session.chosen += usize::from(!chosen.is_empty());
        chosen
    }

    /// Samples the variants interleaved and prints JSON lines; before the first of a family, that of the roofline.
    fn record(&mut self, chosen: &[usize]) {
        self.session.head(self.device);
        let product = self.device.product();
        let samples = self.in_turns(chosen);
        for (at, samples) in chosen.iter().zip(&samples) {
            self.keep(*at, samples.clone());
            println!("{}", self.session.measured.last().expect("kept above").json(&product));
        }
        let all = || chosen.iter().zip(&samples).map(|(at, samples)| (&self.variants[*at], samples));
        let Some((_, ours)) = all().find(|(variant, _)| variant.name == "swat") else { return };
        for (peer, theirs) in all().filter(|(variant, _)| variant.peer) {
            let ratios: Vec<f64> = theirs.iter().zip(ours).map(|(theirs, ours)| theirs / ours).collect();
            let [low, high] = median_interval(&ratios);
            let line = json!({
                "family": self.session.family, "op": self.op, "shape": self.shape, "pair": ["swat", peer.name],
                "ratio": median(&ratios), "low": low, "high": high, "pairs": ratios.len(), "device": product,
            });
            println!("{line}");
        }
    }

    /// A warm-up call, then an untimed one within the range of an external profiler.
    fn once(&mut self, at: usize) {
        let (device, variant) = (self.device, &mut self.variants[at]);
        let mut set = (self.tensors.make)(device);
        (variant.work)(device, &mut set);
        if let Some(refresh) = &mut self.tensors.refresh {
            refresh(device, &mut set);
        }
        device.start_profiler().expect("a working device");
        (variant.work)(device, &mut set);
        device.stop_profiler().expect("a working device");
    }

    fn keep(&mut self, at: usize, samples: Vec<f64>) {
        let Variant { name, peer, .. } = &self.variants[at];
        self.session.measured.push(Measured {
            family: self.session.family,
            op: self.op.clone(),
            shape: self.shape.clone(),
            variant: name.clone(),
            peer: *peer,
            samples,
            cost: self.cost,
        });
    }

    fn by_criterion(&mut self, criterion: &mut Criterion, id: &str) {
        let mut group = criterion.benchmark_group(id);
        group.sampling_mode(SamplingMode::Flat);
        let Cost { bytes, flops } = self.cost;
        let work = if flops >= COMPUTES * bytes { Throughput::Elements(flops) } else { Throughput::Bytes(bytes) };
        group.throughput(self.tokens.map_or(work, Throughput::Elements));
        for at in 0..self.variants.len() {
            // Criterion warms up by 1, 2, 4 … calls; what follows are samples.
            let (mut samples, mut before, mut warm) = (Vec::new(), 0, false);
            group.bench_function(self.variants[at].name.clone(), |bencher| {
                // Here, outside the call from which criterion plans its samples.
                self.ready(at);
                bencher.iter_custom(|calls| {
                    if !warm && calls != (2 * before).max(1) {
                        (samples, warm) = (Vec::new(), true);
                    }
                    before = calls;
                    let time = self.time(at, calls);
                    samples.push(time.as_nanos() as f64 / calls as f64);
                    time
                });
            });
            if !samples.is_empty() {
                self.keep(at, samples);
            }
        }
        group.finish();
    }

    /// Allocates the tensors, checks that a forced version runs, and prepares the variant, once.
    fn ready(&mut self, at: usize) {
        self.session.tell();
        let rotation = self.rotation();
        let (device, variant) = (self.device, &mut self.variants[at]);
        let Tensors { make, sets, .. } = &mut self.tensors;
        while sets.len() < rotation {
            sets.push(make(device));
        }
        if variant.prepared.is_some() {
            return;
        }
        if let Some(version) = variant.version {
            let kernels = clock::kernels(device, || (variant.work)(device, &mut sets[0]));
            let named = kernels.iter().any(|kernel| kernel.split('_').any(|part| part == version));
            assert!(named, "{} {}: {version} is not among {kernels:?}", self.op, self.shape);
        }
        let mut call = |i: usize| (variant.work)(device, &mut sets[i % rotation]);
        variant.prepared = Some(device.prepare(rotation, self.capture, &mut call));
    }

    /// Time of `calls` calls of a variant.
    fn time(&mut self, at: usize, calls: u64) -> Duration {
        self.ready(at);
        let (device, variant) = (self.device, &mut self.variants[at]);
        let Tensors { refresh, sets, .. } = &mut self.tensors;
        if let Some(refresh) = refresh {
            sets.iter_mut().for_each(|set| refresh(device, set));
        }
        let rotation = sets.len();
        let mut call = |i: usize| (variant.work)(device, &mut sets[i % rotation]);
        let prepared = variant.prepared.as_ref().expect("prepared above");
        device.elapsed(prepared, calls, &mut call)
    }

    /// Calls of a sample.
    fn calls(&mut self, at: usize) -> u64 {
        self.time(at, 1);
        let mut calls = 1;
        loop {
            let time = self.time(at, calls);
            if time >= SAMPLE_TIME / 2 || calls >= 1 << 20 {
                let one = time.as_secs_f64().max(1e-9) / calls as f64;
                return (SAMPLE_TIME.as_secs_f64() / one).ceil().max(1.0) as u64;
            }
            calls *= 4;
        }
    }

    /// Nanoseconds a call, one for each sample.
    pub fn samples(&mut self, at: usize) -> Vec<f64> {
        self.in_turns(&[at]).remove(0)
    }

    /// Samples of several variants, interleaved; slow ones get fewer.
    fn in_turns(&mut self, chosen: &[usize]) -> Vec<Vec<f64>> {
        let calls: Vec<u64> = chosen.iter().map(|at| self.calls(*at)).collect();
        let mut sampled = vec![(Vec::new(), Duration::ZERO); chosen.len()];
        let open = |(samples, total): &(Vec<f64>, Duration)| {
            samples.len() < LEAST || (samples.len() < SAMPLES && *total < MOST_TIME)
        };
        while sampled.iter().any(open) {
            for ((at, calls), sampled) in chosen.iter().zip(&calls).zip(&mut sampled) {
                if open(sampled) {
                    let time = self.time(*at, *calls);
                    sampled.0.push(time.as_nanos() as f64 / *calls as f64);
                    sampled.1 += time;
                }
            }
        }
        sampled.into_iter().map(|(samples, _)| samples).collect()
    }

    /// B's time over A's, for each pair of samples.
    pub fn ratios(&mut self, [a, b]: [usize; 2]) -> Vec<f64> {
        let calls = [a, b].map(|at| self.calls(at));
        let (mut ratios, mut total) = (Vec::new(), Duration::ZERO);
        while ratios.len() < LEAST || (ratios.len() < PAIRS && total < 2 * MOST_TIME) {
            let [a, b] = [(a, calls[0]), (b, calls[1])].map(|(at, calls)| {
                let time = self.time(at, calls);
                total += time;
                time.as_secs_f64() / calls as f64
            });
            ratios.push(b / a);
        }
        ratios
    }
}

/// The median ratio with its interval, as text.
pub fn verdict([a, b]: &[String; 2], ratios: &[f64]) -> String {
    let ([low, high], ratio) = (median_interval(ratios), median(ratios));
    let said = match () {
        () if low > 1.0 => format!("{a} is faster"),
        () if high < 1.0 => format!("{b} is faster"),
        () => "not told apart".into(),
    };
    let pairs = ratios.len();
    format!("time of {b} / {a} = {ratio:.3} (95 %: {low:.3} to {high:.3}; {pairs} pairs): {said}")
}
