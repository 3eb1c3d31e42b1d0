//! Several processes for one command: the ranks of a data-parallel `swat tune`, by `--gpus` or by the variables of a
//! launcher; and those among which `--gpus` divides other work.

use super::common::{Common, Device, say};
use super::run::seconds;
use crate::backend::cuda;
use crate::error::{Error, Result};
use crate::group::{Ended, Hosted, Place, Share, Tcp, Together, Transport, launch, obey_launcher, part};
use crate::io::input::is_pipe;
use crate::options::count;
use clap::Args;
use std::path::Path;
use std::time::Duration;

/// Version and commit, which all ranks have in common.
const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), env!("SWAT_COMMIT"));
/// Time in which a rank ends by itself after another is lost; in a long operation of its device it does not.
const GRACE: Duration = Duration::from_secs(10);

/// How many processes train together.
#[derive(Args, Clone, Debug)]
pub(super) struct RankArgs {
    /// Train with N processes, one for each GPU of this machine; with --device cpu, on its cores. Each micro-batch is
    /// divided among them. Without it, torchrun, srun and mpirun say by their variables how many there are, on one machine
    /// or several; 1 ignores these
    #[arg(long, value_name = "N", value_parser = count)]
    gpus: Option<usize>,
    /// Seconds to wait until all processes of the run have come
    #[arg(long, value_name = "SECONDS", value_parser = seconds, default_value = "300")]
    rendezvous_timeout: Duration,
}

/// Among how many processes of this machine a command divides its work.
#[derive(Args, Clone, Debug)]
pub(super) struct PartArgs {
    /// Divide the work among N processes, one for each GPU of this machine; with --device cpu, on its cores
    #[arg(long, value_name = "N", value_parser = count)]
    gpus: Option<usize>,
}

/// What this process does of a command's work.
pub(super) enum Work {
    Whole,
    /// Starts so many others.
    Launcher(usize),
    /// A part, with the options of its process.
    Part(Share, Common),
}

/// What this process is.
pub(super) enum Role {
    /// The whole run.
    Alone,
    /// Starts so many others.
    Launcher(usize),
    /// One of several.
    Rank(Place),
}

/// A rank and its connections to the others.
pub(super) struct Rank {
    pub(super) place: Place,
    pub(super) hosts: Hosted<Tcp>,
}

fn place() -> Result<Option<Place>> {
    Place::from_launcher(|name| std::env::var(name).ok())
}

impl RankArgs {
    pub(super) fn role(&self) -> Result<Role> {
        if self.gpus == Some(1) {
            return Ok(Role::Alone);
        }
        match (self.gpus, place()?) {
            (None, None) => Ok(Role::Alone),
            (Some(size), None) => Ok(Role::Launcher(size)),
            (Some(size), Some(place)) if size != place.share.size => {
                let found = format!("{size} processes, beside {} of a launcher", place.share.size);
                Err(Error::input("--gpus", found, "no --gpus: the launcher says how many there are"))
            }
            (_, Some(place)) => Ok(Role::Rank(place)),
        }
    }

    /// Meets the other ranks.
    pub(super) fn join(&self, place: Place, common: &Common) -> Result<Rank> {
        obey_launcher()?;
        let hosts = Tcp::join(&place, VERSION, self.rendezvous_timeout, lost)?;
        if place.share.rank == 0 && !common.quiet {
            say(&format!("training with {} ranks, which met at {}:{}\n", place.share.size, place.host, place.port));
        }
        Ok(Rank { place, hosts })
    }
}

impl PartArgs {
    /// What this process does. One that was started for a part ends when the one that started it does.
    pub(super) fn work(&self, common: &Common) -> Result<Work> {
        match (self.gpus, part()) {
            (None | Some(1), _) => Ok(Work::Whole),
            (Some(size), None) => Ok(Work::Launcher(size)),
            (Some(_), Some(share)) => {
                obey_launcher()?;
                Ok(Work::Part(share, of_process(common, share.rank, share.rank == 0)?))
            }
        }
    }
}

/// Ends a process that a lost rank would leave waiting.
fn lost(why: &str) {
    std::thread::sleep(GRACE);
    say(&format!("error: {why}\n"));
    std::process::exit(1);
}

/// Refuses a pipe as an input of several processes, each of which would read a part of it.
pub(super) fn refuse_pipes(inputs: &[(&str, &Path)]) -> Result<()> {
    let Some((option, path)) = inputs.iter().find(|(_, path)| is_pipe(path)) else { return Ok(()) };
    let found = format!("{}, a pipe, which several processes cannot read", path.display());
    Err(Error::input(*option, found, "a file"))
}

/// Starts processes and waits for them; where one fails, the exit code is its.
pub(super) fn start_processes(size: usize, together: Together, common: &Common) -> Result<()> {
    match common.gpu() {
        None if common.device == Device::Auto => {
            let expected = "--device cpu as well, for processes on its cores";
            return Err(Error::input("--gpus", format!("{size}, and no GPU that can be used"), expected));
        }
        None => {}
        Some(_) => {
            let found = cuda::survey().devices.unwrap_or(0);
            if size > found as usize {
                return Err(Error::input(
                    "--gpus",
                    format!("{size}, on a machine with {found}"),
                    "at most as many as there are",
                ));
            }
        }
    }
    let Ended { code, message } = launch(size, together)?;
    if let Some(message) = message {
        say(&format!("error: {message}\n"));
    }
    if code == 0 { Ok(()) } else { std::process::exit(i32::from(code)) }
}

impl Rank {
    /// The options of this rank: the GPU of its number on this machine, and nothing printed but by the first.
    pub(super) fn options(&self, common: &Common) -> Result<Common> {
        of_process(common, self.place.local_rank, self.place.share.rank == 0)
    }

    /// Waits until all ranks have come here.
    pub(super) fn wait_for_all(&self) -> Result<()> {
        self.hosts.transport().exchange(vec![Vec::new(); self.place.share.size]).map(drop)
    }
}

/// The options of a process of this number on this machine; only the `first` of all prints anything.
fn of_process(common: &Common, number: usize, first: bool) -> Result<Common> {
    let gpus = || match cuda::survey() {
        found if found.images.is_empty() => 0,
        found => found.devices.unwrap_or(0) as usize,
    };
    let device = match common.device {
        Device::Cuda(ordinal @ 1..) => {
            let expected = "cuda, of which each process takes its own; CUDA_VISIBLE_DEVICES says which there are";
            return Err(Error::input("--device", format!("cuda:{ordinal} for all processes"), expected));
        }
        Device::Cpu => Device::Cpu,
        Device::Auto if gpus() == 0 => Device::Cpu,
        // The GPU is not opened here: in exclusive mode only one process can. If it turns out to be unusable, that is an error
        // rather than a fallback to the CPU, since all ranks must use the same kind of device.
        Device::Auto | Device::Cuda(0) => Device::Cuda(gpu_of(number, gpus())?),
    };
    Ok(Common { device, quiet: common.quiet || !first, ..common.clone() })
}

/// The GPU of a process, of which a scheduler may show it one alone.
fn gpu_of(local_rank: usize, gpus: usize) -> Result<u32> {
    match gpus {
        1 => Ok(0),
        _ if local_rank < gpus => Ok(local_rank as u32),
        _ => {
            let found = format!("process {local_rank} of a machine with {gpus} GPUs, counted from 0");
            Err(Error::input("the number of ranks", found, "at most one a GPU"))
        }
    }
}

/// Number of ranks that share the cores of this machine, where the launcher leaves it to them to divide these.
pub(super) fn local_ranks() -> usize {
    place().ok().flatten().map_or(1, |place| place.local_size)
}

/// Number of processes among which a command's work is divided.
pub(super) fn parts() -> usize {
    part().map_or(1, |share| share.size)
}

/// Number of threads of each of several processes of this machine; none where they have all, or it is set.
pub(super) fn threads(processes: usize) -> Option<usize> {
    let set = std::env::var_os("RAYON_NUM_THREADS").is_some() || processes == 1;
    let cores = std::thread::available_parallelism().ok()?.get();
    (!set).then(|| (cores / processes).max(1))
}

/// Refuses a command that one process does, where a launcher has started several.
pub(super) fn refuse_ranks(command: &str, instead: &str) -> Result<()> {
    let Ok(Some(place)) = place() else { return Ok(()) };
    let what = format!("a run by {} processes of a launcher such as torchrun", place.share.size);
    Err(Error::unsupported(format!("swat {command}"), what, format!("start it once, or take {instead}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_process_has_a_gpu_of_its_own() {
        assert_eq!((gpu_of(0, 4).unwrap(), gpu_of(3, 4).unwrap()), (0, 3));
        // Slurm with --gpus-per-task=1.
        assert_eq!(gpu_of(3, 1).unwrap(), 0);
        assert!(gpu_of(4, 4).unwrap_err().to_string().contains("process 4 of a machine with 4 GPUs"));
    }
}
