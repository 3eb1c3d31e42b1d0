//! What the benches share: ladders of variants, how they are run, and what is made of it.
//!
//! ```text
//! cargo bench                                                everything, by criterion
//! cargo bench -- rmsnorm                                     one family: its ladders, and a table at the end
//! cargo bench -- rmsnorm/forward/qwen2.5-7b                  some of it
//! cargo bench -- --ab baseline,swat rmsnorm                  A against B, in turns: the ratio with a 95 % interval
//! cargo bench -- --json rmsnorm                              a JSON object a line on stdout, for records
//! cargo bench -- --json --variants swat,cublaslt gemm        of each ladder these variants alone
//! cargo bench -- --list gemm/forward                         ids
//! cargo bench -- --once --variants swat gemm/forward         no times: a call to warm up, and one for an outside profiler
//! ```
//!
//! An id is `family/operation/shape/variant`. Variants: `swat`, what the backend chooses; its versions by name, from
//! `baseline` up; peers (`cublaslt`, `copy`: as many bytes moved from device to device; `gemm-crate` on the CPU). On a GPU
//! if there is one, else on the CPU backend. `--ab`, `--json`, `--list` and `--once` take parts of ids to choose by;
//! otherwise criterion's options apply. With `--gpu` the CPU does not stand in. Exit code 2: nothing was chosen. Peers in Python: `benches/peers/kernels.py`.
//!
//! Times are the device's ([`clock`]), of random data, in buffers that are rotated so that no call finds its own in a
//! cache. With `--json` the variants of a ladder are sampled in turns, so that a clock that drifts drifts for all of them;
//! a line of its own holds `swat` against each peer, sample by sample. What `--ab` prints for a pair is the median over
//! pairs of samples: B's time over A's, above 1 where A is faster; "not told apart" where the interval holds 1.
//!
//! A peer that should be there and is not is told on stderr and by a line `{"family", "missing", "reason"}`.

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

/// A family of benches on both backends.
pub struct Family {
    /// The first part of its ids.
    pub name: &'static str,
    pub cpu: fn(&mut Session, &Cpu),
    pub cuda: fn(&mut Session, &Cuda<F32State>),
}

/// Runs the ladders of the families on the GPU, or on the CPU backend where there is none, and prints what came out.
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
