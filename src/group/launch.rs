//! Processes of one machine that a first one starts, tells of signals, and waits for: ranks that train together, or
//! processes each of which does a part of other work.

use super::{Place, Share};
use crate::error::{Error, FileOp, Result};
use crate::interrupt::{self, Section};
use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

/// Time between two looks at the processes.
const PAUSE: Duration = Duration::from_millis(50);
/// Time in which the others end by themselves after one has failed.
const GRACE: Duration = Duration::from_secs(20);
/// Bytes of what a rank writes to stderr that are kept, the last ones.
const KEPT_BYTES: usize = 1 << 12;
/// Tells a rank that its standard input carries signals.
const OBEYS: &str = "SWAT_SIGNALS_ON_STDIN";
/// Exit code of a program of Rust's that panics.
const PANICKED: i32 = 101;
/// As which the end of the first process counts.
const TERMINATE: i32 = 15;
/// Tells a process of [`Together::Apart`] its number and how many there are: `2/8`.
const PART: &str = "SWAT_PROCESS";

/// What processes that are started together have to do with each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Together {
    /// They are the ranks of a group: [`Place::from_launcher`] finds the place of each. Where one ends before its work is
    /// done, the others notice it and end by themselves.
    Ranks,
    /// Each does its own part: [`part`] finds it. Where one fails, the others are told to end.
    Apart,
}

/// How the processes have ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Exit code of the first that failed; 0 where none did.
    pub code: u8,
    /// What there is to say that the first process has not said itself.
    pub message: Option<String>,
}

struct Process {
    child: Child,
    /// What it says on stderr; the first one says it itself.
    said: Option<JoinHandle<Vec<u8>>>,
    ended: bool,
    /// None of one that has ended if the system does not tell how.
    status: Option<ExitStatus>,
    /// Whether it did not end by itself after another had failed.
    killed: bool,
}

/// The number of this process, and how many there are, if [`launch`] has started it for a part of some work.
pub fn part() -> Option<Share> {
    let text = std::env::var(PART).ok()?;
    let (rank, size) = text.split_once('/')?;
    let share = Share { rank: rank.parse().ok()?, size: size.parse().ok()? };
    (share.rank < share.size).then_some(share)
}

/// Starts this program again with its own arguments, `size` times, and waits until all have ended. The first has stdout and
/// stderr. A signal is passed on; where a process fails, the others end within half a minute.
///
/// # Errors
/// [`Error::Io`] where the program cannot be started.
pub fn launch(size: usize, together: Together) -> Result<Ended> {
    interrupt::watch();
    let _section = Section::begin();
    let program = std::env::current_exe().map_err(Error::io(std::path::Path::new("swat"), FileOp::Resolve))?;
    let mut processes = Vec::new();
    let port = free_port().map_err(|e| Error::failed(format!("no free port: {e}"), "close some connections"))?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let job = format!("{}-{}", std::process::id(), now.as_nanos());
    for rank in 0..size {
        let host = Ipv4Addr::LOCALHOST.to_string();
        let share = Share { rank, size };
        let place = Place { share, local_rank: rank, local_size: size, host, port, job: job.clone() };
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1)).env(OBEYS, "1").stdin(Stdio::piped());
        match together {
            Together::Ranks => command.envs(place.variables()),
            Together::Apart => command.env(PART, format!("{rank}/{size}")),
        };
        if rank > 0 {
            command.stdout(Stdio::null()).stderr(Stdio::piped());
        }
        // The terminal's signals reach this process alone, which passes them on once.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        match command.spawn() {
            Ok(mut child) => {
                let said = child.stderr.take().map(|stderr| std::thread::spawn(|| last_bytes(stderr)));
                processes.push(Process { child, said, ended: false, status: None, killed: false });
            }
            Err(source) => {
                processes.iter_mut().for_each(|process: &mut Process| drop(process.child.kill()));
                return Err(Error::Io { path: program, doing: FileOp::Open, source });
            }
        }
    }
    Ok(wait(processes, together))
}

/// A port that nothing has, and whose predecessor is a port as well.
fn free_port() -> std::io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

fn last_bytes(mut stderr: ChildStderr) -> Vec<u8> {
    let (mut kept, mut piece) = (VecDeque::new(), [0; 1 << 12]);
    while let Ok(read @ 1..) = stderr.read(&mut piece) {
        kept.extend(&piece[..read]);
        kept.drain(..kept.len().saturating_sub(KEPT_BYTES));
    }
    kept.into()
}

/// Tells the processes of a signal.
fn tell(processes: &mut [Process], signal: i32) {
    for stdin in processes.iter_mut().filter_map(|process| process.child.stdin.as_mut()) {
        let _ = stdin.write_all(&[signal as u8]).and_then(|()| stdin.flush());
    }
}

fn wait(mut processes: Vec<Process>, together: Together) -> Ended {
    // Processes in the order in which they failed, and when the rest is killed.
    let (mut failed, mut deadline, mut told): (Vec<usize>, Option<Instant>, bool) = (Vec::new(), None, false);
    while processes.iter().any(|process| !process.ended) {
        if let Some(signal) = interrupt::asked().filter(|_| !told) {
            told = true;
            tell(&mut processes, signal);
        }
        for (i, process) in processes.iter_mut().enumerate().filter(|(_, process)| !process.ended) {
            let found = process.child.try_wait();
            process.ended = !matches!(found, Ok(None));
            process.status = found.unwrap_or_default();
            if process.ended && !process.status.is_some_and(|status| status.success()) {
                failed.push(i);
            }
        }
        // After a signal a process has ended as it should, though the first may still be saving.
        if !failed.is_empty() && !told {
            if deadline.is_none() && together == Together::Apart {
                tell(&mut processes, TERMINATE);
            }
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + GRACE);
            for process in processes.iter_mut().filter(|process| !process.ended && Instant::now() > deadline) {
                process.killed = process.child.kill().is_ok();
            }
        }
        std::thread::sleep(PAUSE);
    }
    ended(&mut processes, &failed, (together, told))
}

/// How processes have ended, of which some `failed`; `told` says that they were told of a signal.
fn ended(processes: &mut [Process], failed: &[usize], (together, told): (Together, bool)) -> Ended {
    let code = |process: usize| processes[process].status.and_then(|status| status.code());
    let died = |process: usize| match code(process) {
        None => !processes[process].killed && !told,
        Some(code) => code == PANICKED,
    };
    let find = |of: &dyn Fn(usize) -> bool| failed.iter().copied().find(|process| of(*process));
    let first = match together {
        // The failures that others fail of, exit codes of their own, then those that may be a consequence.
        Together::Ranks => find(&died).or_else(|| find(&|rank| code(rank).is_some_and(|code| code != 1))),
        Together::Apart => None,
    };
    let Some(first) = first.or_else(|| failed.first().copied()) else { return Ended { code: 0, message: None } };
    // Who is killed or panics tells nobody why. Rank 0 tells of any other rank, unless it is killed itself.
    let silent = match together {
        Together::Ranks => died(first) || died(0) || processes[0].killed,
        Together::Apart => !told && (first > 0 || died(0)),
    };
    let code = processes[first].status.map_or(1, exit_code);
    let name = match together {
        Together::Ranks => "rank",
        Together::Apart => "process",
    };
    let message = silent.then(|| {
        let process = &mut processes[first];
        let status = process.status.map_or_else(|| "it has ended".to_owned(), |status| status.to_string());
        let said = process.said.take().and_then(|said| said.join().ok()).unwrap_or_default();
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        if said.is_empty() {
            format!("{name} {first}: {status}")
        } else {
            format!("{name} {first}: {status}; it said:\n{said}")
        }
    });
    Ended { code, message }
}

/// As a shell gives it.
fn exit_code(status: ExitStatus) -> u8 {
    #[cfg(unix)]
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    #[cfg(not(unix))]
    let signal = None;
    let code = status.code().or(signal.map(|signal: i32| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

/// Where [`launch`] has started this process, takes signals from it; its end counts as one, so that no process is left.
///
/// # Errors
/// [`Error::Failed`] where no thread can be started.
pub fn obey_launcher() -> Result<()> {
    if std::env::var_os(OBEYS).is_none() {
        return Ok(());
    }
    let listen = || {
        let mut signal = [0];
        loop {
            match std::io::stdin().lock().read(&mut signal) {
                Ok(1..) => interrupt::raise(i32::from(signal[0])),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => return interrupt::raise(TERMINATE),
            }
        }
    };
    let started = std::thread::Builder::new().name("signals".into()).spawn(listen);
    started.map(drop).map_err(|e| Error::failed(format!("a thread for signals: {e}"), "allow more threads"))
}
