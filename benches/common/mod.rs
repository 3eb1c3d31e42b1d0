//! The bench framework: ladders of variants, their timing, and the reports.
//!
//! ```text
//! cargo bench                                                everything, by criterion
//! cargo bench -- rmsnorm                                     one family: its ladders, then a roofline table
//! cargo bench -- rmsnorm/forward/qwen2.5-7b                  ids that contain this
//! cargo bench -- --ab baseline,swat rmsnorm                  A against B, interleaved: the ratio with a 95 % interval
//! cargo bench -- --json rmsnorm                              JSON lines on stdout, for records
//! cargo bench -- --json --variants swat,cublaslt gemm        only these variants of each ladder
//! cargo bench -- --list gemm/forward                         ids
//! cargo bench -- --once --variants swat gemm/forward         untimed: a warm-up call, and one for an external profiler
//! ```
//!
//! An id is `family/operation/shape/variant`. Variants: `swat`, what the backend chooses; its versions by name, from
//! `baseline` up; peers (`cublaslt`; `copy`, which moves as many bytes from device to device; `gemm-crate` on the CPU).
//! Benches run on a GPU if there is one, else on the CPU backend; with `--gpu` a missing GPU is an error. `--ab`,
//! `--json`, `--list` and `--once` are followed by parts of ids to choose; otherwise criterion's options apply. Exit
//! code 2: nothing was chosen. Peers in Python are in `benches/peers/kernels.py`.
//!
//! Times are device times ([`clock`]) on random data, in buffers that are rotated so that no call finds its own in a
//! cache. With `--json` the variants of a ladder are sampled interleaved, so that a drifting clock affects all of them;
//! one more line for each peer compares `swat` with it, sample by sample. `--ab` prints the median over pairs of
//! samples of B's time over A's: above 1, A is faster; "not told apart" means that the interval contains 1.
//!
//! A missing peer is reported on stderr and by a line `{"family", "missing", "reason"}`.

pub mod clock;
pub mod cublaslt;
pub mod ladder;
pub mod libraries;
pub mod roofline;
pub mod session;
pub mod shapes;
pub mod stats;

pub use clock::Device;
pub use session::Session;
pub use shapes::{Model, Scale, documents, integers, random};

use session::Mode;
use swat::backend::cpu::Cpu;
use swat::backend::cuda::{self, Cuda, F32State};

/// A kernel family's benches, for both backends.
pub struct Family {
    /// First part of its ids.
    pub name: &'static str,
    pub cpu: fn(&mut Session, &Cpu),
    pub cuda: fn(&mut Session, &Cuda<F32State>),
}

/// Runs the ladders of the families on the GPU, or on the CPU backend if there is none, and prints the results.
pub fn main(families: &[Family]) {
    let mode = Mode::from_args();
    let done = match open() {
        Ok(device) => run(families, Session::new("", mode, Scale::gpu()), &device, |family| family.cuda),
        Err(reason) if std::env::args().any(|argument| argument == "--gpu") => {
            Err(format!("no CUDA device ({reason}), and --gpu asks for one"))
        }
        Err(reason) => {
            let mut session = Session::new("", mode, Scale::cpu());
            session.note = Some(format!("no CUDA device ({reason}): these are the CPU backend's operations"));
            run(families, session, &Cpu::new(), |family| family.cpu)
        }
    };
    if let Err(why) = done {
        eprintln!("{why}");
        std::process::exit(2);
    }
}

fn run<D: Device>(
    families: &[Family],
    mut session: Session,
    device: &D,
    ladders: fn(&Family) -> fn(&mut Session, &D),
) -> Result<(), String> {
    let names: Vec<_> = families.iter().map(|family| family.name).collect();
    for family in families {
        if session.begin(family.name, &names) {
            ladders(family)(&mut session, device);
            session.report(device);
        }
    }
    session.end()
}

/// The first GPU.
fn open() -> Result<Cuda<F32State>, String> {
    match cuda::survey().devices? {
        0 => Err("the driver shows none".into()),
        _ => Cuda::open(0).map_err(|error| error.to_string()),
    }
}
