//! Ranks that are processes: this executable again, one test of it for each.

use crate::common::standin;
use crate::training::{Done, Kind, train};
use crate::{WITHIN, meet, port};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};
use swat::backend::ViewMut;
use swat::backend::cuda::{Cuda, F32State};
use swat::error::Result;
use swat::group::{Bucket, Group, Nccl, Place, ReduceScatter, Share, Traffic};

type Gpu = Cuda<F32State>;

/// Where a rank writes what it ends with, by its number.
const OUT: &str = "SWAT_TEST_OUT";
/// The [`Kind`] of a run.
const KIND: &str = "SWAT_TEST_KIND";
/// In which sum a rank ends, as if it were killed: `RANK:SUM`, from 1.
const DIES: &str = "SWAT_TEST_DIES";
/// Time for a run.
const TIMEOUT: Duration = Duration::from_secs(240);

/// A run of several processes that share this machine, or a part of them.
pub struct Run {
    size: usize,
    environment: Vec<(String, String)>,
    /// Of one rank alone.
    own: Vec<(usize, String, String)>,
    out: tempfile::TempDir,
}

/// How a run went.
pub struct Story {
    /// What each rank ends with, or its error.
    pub done: Vec<Result<Done, String>>,
    /// Bytes that all ranks have sent, as the stand-in counts them.
    pub sent_bytes: u64,
    /// The time that it took.
    pub took: Duration,
}

impl Run {
    /// Of `size` ranks; `None` without a stand-in.
    pub fn new(size: usize) -> Option<Self> {
        let (driver, nccl) = (standin::for_children()?, standin::BUILD.nccl_for_children()?);
        let out = tempfile::tempdir().unwrap();
        let text = |path: &Path| path.to_str().expect("UTF-8").to_owned();
        let environment = [
            ("LD_LIBRARY_PATH", format!("{}:{}", text(&driver.folder), text(&nccl))),
            ("STANDIN_KERNELS", text(&driver.kernels)),
            ("STANDIN_NCCL_SENT", text(out.path())),
            ("WORLD_SIZE", size.to_string()),
            ("MASTER_ADDR", "127.0.0.1".into()),
            ("MASTER_PORT", (port() - 1).to_string()),
            (OUT, text(out.path())),
        ];
        let environment = environment.map(|(name, value)| (name.to_owned(), value)).to_vec();
        Some(Self { size, environment, own: Vec::new(), out })
    }

    /// With a variable of all ranks.
    pub fn with(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.to_owned(), value.to_owned()));
        self
    }

    /// With a variable of one rank.
    pub fn with_rank(mut self, rank: usize, name: &str, value: &str) -> Self {
        self.own.push((rank, name.to_owned(), value.to_owned()));
        self
    }

    /// Without NCCL for one rank.
    pub fn without_nccl(self, rank: usize) -> Self {
        let driver = standin::for_children().expect("there is a stand-in").folder;
        self.with_rank(rank, "LD_LIBRARY_PATH", driver.to_str().expect("UTF-8"))
    }

    /// Of this kind, in place of [`Kind::SHORT`].
    pub fn of(self, kind: Kind) -> Self {
        self.with(KIND, &serde_json::to_string(&kind).expect("JSON"))
    }

    /// With a rank that ends in a sum.
    pub fn dies(self, rank: usize, sum: usize) -> Self {
        self.with(DIES, &format!("{rank}:{sum}"))
    }

    /// The program of a rank, with the arguments that make it one, in the environment of all.
    pub fn program(&self) -> (PathBuf, [&'static str; 4], &[(String, String)]) {
        let program = std::env::current_exe().expect("a path");
        (program, ["ranks::rank", "--exact", "--ignored", "--nocapture"], &self.environment)
    }

    /// Runs it.
    pub fn story(self) -> Story {
        let began = Instant::now();
        let (program, arguments, environment) = self.program();
        let rank = |rank: usize| {
            let mut command = Command::new(&program);
            let own = self.own.iter().filter(|(of, _, _)| *of == rank).map(|(_, name, value)| (name, value));
            command.args(arguments).envs(environment.iter().cloned()).env("RANK", rank.to_string()).envs(own);
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts")
        };
        let mut children: Vec<Child> = (0..self.size).map(rank).collect();
        while children.iter_mut().any(|child| child.try_wait().expect("a child").is_none()) {
            if began.elapsed() > TIMEOUT {
                children.iter_mut().for_each(|child| drop(child.kill()));
                panic!("ranks that do not end: {:?}", self.read().done.iter().map(Result::is_ok).collect::<Vec<_>>());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Story { took: began.elapsed(), ..self.read() }
    }

    /// What its ranks have written.
    pub fn read(&self) -> Story {
        let text = |name: String| std::fs::read_to_string(self.out.path().join(name));
        let done = (0..self.size).map(|rank| match text(format!("{rank}.json")) {
            Ok(text) => serde_json::from_str(&text).expect("JSON"),
            Err(_) => Err("it left nothing".to_owned()),
        });
        let done = done.collect();
        let sent = (0..self.size).filter_map(|rank| text(format!("rank-{rank}")).ok()?.trim().parse::<u64>().ok());
        Story { done, sent_bytes: sent.sum(), took: Duration::ZERO }
    }

    /// Runs it, and panics where a rank fails.
    pub fn done(self) -> Vec<Done> {
        let ranks = self.story().done.into_iter().enumerate();
        ranks.map(|(rank, done)| done.unwrap_or_else(|error| panic!("rank {rank}: {error}"))).collect()
    }
}

/// A group one of whose ranks ends in a sum, before it takes part.
struct Dying<'a> {
    group: &'a dyn Group<Gpu>,
    sums_left: AtomicUsize,
}

impl Group<Gpu> for Dying<'_> {
    fn share(&self) -> Share {
        self.group.share()
    }
    fn all_reduce(&self, values: &mut [f64]) -> Result<()> {
        self.group.all_reduce(values)
    }
    fn reduce_scatter(&self, backend: &Gpu) -> Result<Box<dyn ReduceScatter<Gpu> + '_>> {
        Ok(Box::new(DyingSums { sums: self.group.reduce_scatter(backend)?, left: &self.sums_left }))
    }
    fn all_gather(&self, backend: &Gpu, tensors: &mut [ViewMut<'_, Gpu, half::bf16>]) -> Result<()> {
        self.group.all_gather(backend, tensors)
    }
    fn exchange(&self, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        self.group.exchange(messages)
    }
    fn traffic(&self) -> Traffic {
        self.group.traffic()
    }
}

struct DyingSums<'a> {
    sums: Box<dyn ReduceScatter<Gpu> + 'a>,
    left: &'a AtomicUsize,
}

impl ReduceScatter<Gpu> for DyingSums<'_> {
    fn begin(&mut self, bucket: Bucket<Gpu>) -> Result<()> {
        if self.left.fetch_sub(1, Relaxed) == 1 {
            std::process::abort();
        }
        self.sums.begin(bucket)
    }
    fn finish(self: Box<Self>) -> Result<Vec<Bucket<Gpu>>> {
        self.sums.finish()
    }
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok()
}

/// The rank that this process is, by its environment.
fn run_rank() -> Result<Done> {
    let kind = variable(KIND).map_or(Kind::SHORT, |text| serde_json::from_str(&text).expect("a kind"));
    let Some(place) = Place::from_launcher(variable)? else {
        return train(&Gpu::open(0)?, &swat::group::Alone, kind);
    };
    let hosts = meet(&place)?;
    let tcp = hosts.transport().clone();
    let run = || {
        let cuda = Gpu::open(0)?;
        let group = Nccl::join(hosts, &cuda, WITHIN)?;
        let dies = variable(DIES).and_then(|text| {
            let (rank, sum) = text.split_once(':')?;
            Some((rank.parse::<usize>().ok()?, sum.parse::<usize>().ok()?))
        });
        match dies {
            Some((rank, sum)) if place.share.rank == rank => {
                let sums_left = AtomicUsize::new(sum);
                train(&cuda, &Dying { group: &group, sums_left }, kind)
            }
            _ => train(&cuda, &group, kind),
        }
    };
    let done = run();
    tcp.end(done.as_ref().err());
    done
}

#[test]
#[ignore = "a rank of the other tests, which start it"]
fn rank() {
    let Some(out) = variable(OUT) else { return };
    let done = run_rank().map_err(|error| error.to_string());
    let rank = variable("RANK").expect("a rank");
    let partial = Path::new(&out).join(format!("{rank}.partial"));
    std::fs::write(&partial, serde_json::to_string(&done).unwrap()).unwrap();
    std::fs::rename(partial, Path::new(&out).join(format!("{rank}.json"))).unwrap();
}
