//! What the benches of the kernel families share: ladders of variants, how they are run, and what is made of it.
//!
//! ```text
//! cargo bench                                                everything, by criterion
//! cargo bench -- rmsnorm                                     one family: its ladder, and a table at the end
//! cargo bench --bench rmsnorm -- forward/qwen2.5-7b          some of it
//! cargo bench --bench rmsnorm -- --ab baseline,swat          A against B, in turns: the ratio with a 95 % interval
//! cargo bench --bench rmsnorm -- --json                      a JSON object a line on stdout, for records
//! ```
//!
//! An id is `family/operation/shape/variant`. Variants: `swat`, what the backend chooses; its versions by name, from
//! `baseline` up; peers (`cublaslt`, `copy`: as many bytes moved from device to device; `gemm-crate` on the CPU). On a GPU
//! if there is one, else on the CPU backend. `--ab` and `--json` take parts of ids to choose by; otherwise criterion's
//! options apply. Peers in Python: `benches/peers/kernels.py`.
//!
//! Times are the device's ([`clock`]), of random data, in buffers that are rotated so that no call finds its own in a
//! cache. What `--ab` prints for a pair is the median over pairs of samples, taken in turns: B's time over A's, above 1
//! where A is faster; "not told apart" where the interval holds 1.

// Each bench uses some of it.
#![allow(dead_code, unused_imports)]

pub mod clock;
pub mod cublaslt;
pub mod roofline;
pub mod shapes;
pub mod stats;

pub use clock::Device;
pub use roofline::Measured;
pub use shapes::{Model, Scale, documents, integers, random};

use criterion::{Criterion, SamplingMode, Throughput};
use serde_json::json;
use stats::{median, median_interval};
use std::time::Duration;
use swat::backend::Roofline as Ceilings;
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{self, Cuda, F32State};
use swat::backend::{Backend, Cost};
use swat::report::table::TextStyle;

/// FLOPs a byte from which a ladder's throughput is elements (so that Gelem/s reads as GFLOP/s), not bytes.
const COMPUTES: u64 = 64;
/// Samples of a variant, and pairs of an A/B run; how long one of them should take, and all of them at most.
const SAMPLES: usize = 21;
const PAIRS: usize = 41;
const SAMPLE_TIME: Duration = Duration::from_millis(5);
const MOST_TIME: Duration = Duration::from_secs(1);
/// Least samples and pairs of what is too slow for that.
const LEAST: usize = 7;
/// Buffers smaller than this are not told apart by how many of them a cache holds.
const SMALL_BYTES: u64 = 64 << 10;

/// Runs a family's ladders on the GPU, or on the CPU backend where there is none, and prints what came out.
pub fn main(
    family: &'static str,
    cpu: impl FnOnce(&mut Session, &Cpu),
    cuda: impl FnOnce(&mut Session, &Cuda<F32State>),
) {
    let mode = Mode::from_args();
    match open() {
        Ok(device) => {
            let mut session = Session::new(family, mode, Scale::gpu());
            cuda(&mut session, &device);
            session.finish(&device);
        }
        Err(reason) => {
            let mut session = Session::new(family, mode, Scale::cpu());
            session.note = Some(format!("no CUDA device ({reason}): these are the CPU backend's operations"));
            cpu(&mut session, &Cpu::new());
            session.finish(&Cpu::new());
        }
    }
}

/// The first GPU.
fn open() -> Result<Cuda<F32State>, String> {
    match cuda::survey().devices? {
        0 => Err("the driver shows none".into()),
        _ => Cuda::open(0).map_err(|error| error.to_string()),
    }
}

/// What is done with a ladder.
pub enum Mode {
    /// By criterion.
    Criterion(Box<Criterion>),
    /// Sampled, for a record; ids that hold one of these, all without any.
    Json(Vec<String>),
    /// Two variants in turns.
    Ab([String; 2], Vec<String>),
}

impl Mode {
    fn from_args() -> Self {
        let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
        let (mut json, mut ab, mut filters) = (false, None, Vec::new());
        while let Some(argument) = arguments.next() {
            match argument.as_str() {
                "--json" => json = true,
                "--ab" => ab = Some(arguments.next().unwrap_or_default()),
                _ => filters.push(argument),
            }
        }
        let Some(ab) = ab else {
            return if json { Self::Json(filters) } else { Self::Criterion(Box::new(criterion())) };
        };
        match ab.split_once(',') {
            Some((a, b)) if !a.is_empty() && !b.is_empty() => Self::Ab([a.into(), b.into()], filters),
            _ => {
                eprintln!("--ab {ab}: expected two variants, such as --ab baseline,swat");
                std::process::exit(2);
            }
        }
    }
}

fn criterion() -> Criterion {
    let criterion = Criterion::default().nresamples(10_000).sample_size(10);
    criterion
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400))
        .configure_from_args()
}

/// The run of a bench executable.
pub struct Session {
    family: &'static str,
    mode: Mode,
    /// How large everything is.
    pub scale: &'static Scale,
    /// Said before the first measurement.
    note: Option<String>,
    ceilings: Option<(Ceilings, &'static str)>,
    /// Ladders on which two variants were held against each other.
    compared: usize,
    /// So far.
    pub measured: Vec<Measured>,
}

/// Says what is to be said once.
fn tell(note: &mut Option<String>) {
    if let Some(note) = note.take() {
        eprintln!("{note}");
    }
}

impl Session {
    /// Nothing is measured yet.
    pub fn new(family: &'static str, mode: Mode, scale: &'static Scale) -> Self {
        Self { family, mode, scale, note: None, ceilings: None, compared: 0, measured: Vec::new() }
    }

    /// The variants of an operation at a shape; `make` allocates the tensors of a call, as often as buffers are rotated.
    pub fn ladder<'a, D: Device, T>(
        &'a mut self,
        device: &'a D,
        op: impl Into<String>,
        shape: impl Into<String>,
        cost: Cost,
        make: impl Fn(&D) -> T + 'a,
    ) -> Ladder<'a, D, T> {
        Ladder {
            session: self,
            device,
            op: op.into(),
            shape: shape.into(),
            cost,
            tensors: Tensors { make: Box::new(make), refresh: None, sets: Vec::new() },
            tokens: None,
            capture: true,
            variants: Vec::new(),
        }
    }

    /// Prints the table, or the record's lines.
    pub fn finish<D: Device>(mut self, device: &D) {
        if let (Mode::Ab([a, b], _), 0) = (&self.mode, self.compared) {
            tell(&mut self.note);
            eprintln!("{}: no ladder that was chosen has both {a} and {b}", self.family);
        }
        if self.measured.is_empty() {
            return;
        }
        let (ceilings, whose) = self.ceilings(device);
        let table = roofline::table(&self.measured, &device.product(), &ceilings, whose).text(TextStyle::Unicode);
        match self.mode {
            Mode::Json(_) => eprint!("{table}"),
            _ => print!("{table}"),
        }
    }

    /// Measured once.
    fn ceilings<D: Device>(&mut self, device: &D) -> (Ceilings, &'static str) {
        *self.ceilings.get_or_insert_with(|| device.ceilings(self.scale))
    }
}

type Work<'a, D, T> = Box<dyn FnMut(&D, &mut T) + 'a>;

struct Variant<'a, D: Device, T> {
    name: String,
    peer: bool,
    /// Of our kernels; checked before it is timed.
    version: Option<&'static str>,
    work: Work<'a, D, T>,
    prepared: Option<D::Prepared>,
}

/// The tensors of calls, allocated when the first is timed.
struct Tensors<'a, D: Device, T> {
    make: Box<dyn Fn(&D) -> T + 'a>,
    refresh: Option<Work<'a, D, T>>,
    sets: Vec<T>,
}

/// The variants of one operation at one shape.
#[must_use = "a ladder is run by `run`"]
pub struct Ladder<'a, D: Device, T> {
    session: &'a mut Session,
    device: &'a D,
    op: String,
    shape: String,
    cost: Cost,
    tensors: Tensors<'a, D, T>,
    /// Of a call, where they are what counts.
    tokens: Option<u64>,
    capture: bool,
    variants: Vec<Variant<'a, D, T>>,
}

impl<'a, D: Device, T> Ladder<'a, D, T> {
    /// Puts back, before each sample and outside its time, what calls change in place.
    pub fn refresh(mut self, work: impl FnMut(&D, &mut T) + 'a) -> Self {
        self.tensors.refresh = Some(Box::new(work));
        self
    }

    /// Throughput is tokens a second.
    pub fn tokens(mut self, of_a_call: usize) -> Self {
        self.tokens = Some(of_a_call as u64);
        self
    }

    /// Calls that may not be captured, however short.
    pub fn uncaptured(mut self) -> Self {
        self.capture = false;
        self
    }

    /// A variant of ours.
    pub fn variant(self, name: impl Into<String>, work: impl FnMut(&D, &mut T) + 'a) -> Self {
        self.with(name, false, None, work)
    }

    /// A peer.
    pub fn peer(self, name: impl Into<String>, work: impl FnMut(&D, &mut T) + 'a) -> Self {
        self.with(name, true, None, work)
    }

    /// What the backend chooses, then its versions.
    pub fn versions(self, versions: &[&'static str], work: impl Fn(&D, &mut T) + Copy + 'a) -> Self {
        versions.iter().copied().fold(self.variant("swat", work), |ladder, version| {
            let forced = move |d: &D, tensors: &mut T| d.with_version(version, &mut || work(d, tensors));
            ladder.with(version, false, Some(version), forced)
        })
    }

    /// The peer of what is bound by memory: as many bytes, read and written, by a copy.
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

    /// How many buffers are rotated, so that no call finds its own in a cache.
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

    /// Times the variants that are asked for.
    pub fn run(mut self) {
        let id = format!("{}/{}/{}", self.session.family, self.op, self.shape);
        let chosen = |filters: &[String], id: &str| filters.is_empty() || filters.iter().any(|part| id.contains(part));
        match std::mem::replace(&mut self.session.mode, Mode::Json(Vec::new())) {
            Mode::Criterion(mut criterion) => {
                self.by_criterion(&mut criterion, id);
                self.session.mode = Mode::Criterion(criterion);
            }
            Mode::Json(filters) => {
                for at in 0..self.variants.len() {
                    if chosen(&filters, &format!("{id}/{}", self.variants[at].name)) {
                        self.record(at);
                    }
                }
                self.session.mode = Mode::Json(filters);
            }
            Mode::Ab(names, filters) => {
                let found = names.each_ref().map(|name| self.variants.iter().position(|v| v.name == *name));
                if let ([Some(a), Some(b)], true) = (found, chosen(&filters, &id)) {
                    println!("{id}: {}", verdict(&names, &self.ratios([a, b])));
                    self.session.compared += 1;
                }
                self.session.mode = Mode::Ab(names, filters);
            }
        }
    }

    /// Samples a variant and prints the record's line; before the first, the ceilings'.
    fn record(&mut self, at: usize) {
        let product = self.device.product();
        if self.session.ceilings.is_none() {
            let (Ceilings { flops_per_s, bytes_per_s }, whose) = self.session.ceilings(self.device);
            let ceilings = json!({ "flops_per_s": flops_per_s, "bytes_per_s": bytes_per_s });
            let family = self.session.family;
            println!("{}", json!({ "family": family, "ceilings": ceilings, "product_by": whose, "device": product }));
        }
        let samples = self.samples(at);
        self.keep(at, samples);
        let measured = self.session.measured.last().expect("kept above");
        println!("{}", measured.json(&product));
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

    fn by_criterion(&mut self, criterion: &mut Criterion, id: String) {
        let mut group = criterion.benchmark_group(id);
        group.sampling_mode(SamplingMode::Flat);
        let Cost { bytes, flops } = self.cost;
        let work = if flops >= COMPUTES * bytes { Throughput::Elements(flops) } else { Throughput::Bytes(bytes) };
        group.throughput(self.tokens.map_or(work, Throughput::Elements));
        for at in 0..self.variants.len() {
            // Criterion warms up by 1, 2, 4 … calls; samples are what comes behind.
            let (mut samples, mut before, mut warm) = (Vec::new(), 0, false);
            group.bench_function(self.variants[at].name.clone(), |bencher| {
                // Here, not inside the call that criterion plans its samples by.
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

    /// Allocates the tensors, checks a variant and prepares it, once.
    fn ready(&mut self, at: usize) {
        tell(&mut self.session.note);
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

    /// The time of so many calls of a variant.
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

    /// Nanoseconds of a call, sample by sample.
    pub fn samples(&mut self, at: usize) -> Vec<f64> {
        let calls = self.calls(at);
        let (mut samples, mut total) = (Vec::new(), Duration::ZERO);
        while samples.len() < LEAST || (samples.len() < SAMPLES && total < MOST_TIME) {
            let time = self.time(at, calls);
            total += time;
            samples.push(time.as_nanos() as f64 / calls as f64);
        }
        samples
    }

    /// B's time over A's, pair by pair.
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

/// What the ratios of pairs say.
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
