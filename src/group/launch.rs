//! The ranks of one machine as processes that a first one starts, tells of signals, and waits for.

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

/// How the ranks have ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    /// Exit code of the first that failed; 0 where none did.
    pub code: u8,
    /// What there is to say that rank 0 has not said itself.
    pub message: Option<String>,
}

struct Rank {
    child: Child,
    /// What it says on stderr; rank 0 says it itself.
    said: Option<JoinHandle<Vec<u8>>>,
    status: Option<ExitStatus>,
    /// Whether it did not end by itself after another had failed.
    killed: bool,
}

/// Starts this program again with its own arguments, as each of `size` ranks, and waits until all have ended. Rank 0 has
/// stdout and stderr. A signal is passed on; where a rank fails, the others end within half a minute.
///
/// # Errors
/// [`Error::Io`] where the program cannot be started.
pub fn launch(size: usize) -> Result<Ended> {
    interrupt::watch();
    let _section = Section::begin();
    let program = std::env::current_exe().map_err(Error::io(std::path::Path::new("swat"), FileOp::Resolve))?;
    let mut ranks = Vec::new();
    let port = free_port().map_err(|e| Error::failed(format!("no free port: {e}"), "close some connections"))?;
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let job = format!("{}-{}", std::process::id(), now.as_nanos());
    for rank in 0..size {
        let host = Ipv4Addr::LOCALHOST.to_string();
        let share = Share { rank, size };
        let place = Place { share, local_rank: rank, local_size: size, host, port, job: job.clone() };
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1)).envs(place.variables()).env(OBEYS, "1").stdin(Stdio::piped());
        if rank > 0 {
            command.stdout(Stdio::null()).stderr(Stdio::piped());
        }
        // The terminal's signals reach this process alone, which passes them on once.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        match command.spawn() {
            Ok(mut child) => {
                let said = child.stderr.take().map(|stderr| std::thread::spawn(|| last_bytes(stderr)));
                ranks.push(Rank { child, said, status: None, killed: false });
            }
            Err(source) => {
                ranks.iter_mut().for_each(|rank: &mut Rank| drop(rank.child.kill()));
                return Err(Error::Io { path: program, doing: FileOp::Open, source });
            }
        }
    }
    Ok(wait(ranks))
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

fn wait(mut ranks: Vec<Rank>) -> Ended {
    // Ranks in the order in which they failed, and when the rest is killed.
    let (mut failed, mut deadline, mut told): (Vec<usize>, Option<Instant>, bool) = (Vec::new(), None, false);
    while ranks.iter().any(|rank| rank.status.is_none()) {
        if let Some(signal) = interrupt::asked().filter(|_| !told) {
            told = true;
            for stdin in ranks.iter_mut().filter_map(|rank| rank.child.stdin.as_mut()) {
                let _ = stdin.write_all(&[signal as u8]).and_then(|()| stdin.flush());
            }
        }
        for (i, rank) in ranks.iter_mut().enumerate().filter(|(_, rank)| rank.status.is_none()) {
            rank.status = rank.child.try_wait().unwrap_or_default();
            if rank.status.is_some_and(|status| !status.success()) {
                failed.push(i);
            }
        }
        // After a signal a rank has ended as it should, though rank 0 may still be saving.
        if !failed.is_empty() && !told {
            let deadline = *deadline.get_or_insert_with(|| Instant::now() + GRACE);
            for rank in ranks.iter_mut().filter(|rank| rank.status.is_none() && Instant::now() > deadline) {
                rank.killed = rank.child.kill().is_ok();
            }
        }
        std::thread::sleep(PAUSE);
    }
    ended(&mut ranks, &failed, told)
}

/// How ranks have ended, of which some `failed`; `told` says that they were told of a signal.
fn ended(ranks: &mut [Rank], failed: &[usize], told: bool) -> Ended {
    let code = |rank: usize| ranks[rank].status.and_then(|status| status.code());
    let died = |rank: usize| match code(rank) {
        None => !ranks[rank].killed && !told,
        Some(code) => code == PANICKED,
    };
    let find = |of: &dyn Fn(usize) -> bool| failed.iter().copied().find(|rank| of(*rank));
    // The failures that others fail of, exit codes of their own, then those that may be a consequence.
    let first = find(&died).or_else(|| find(&|rank| code(rank).is_some_and(|code| code != 1)));
    let Some(first) = first.or_else(|| failed.first().copied()) else { return Ended { code: 0, message: None } };
    // A rank that is killed or panics tells nobody why; rank 0 tells of any other, unless it is killed itself.
    let silent = died(first) || died(0) || ranks[0].killed;
    let code = ranks[first].status.map_or(1, exit_code);
    let message = silent.then(|| {
        let rank = &mut ranks[first];
        let status = rank.status.map(|status| status.to_string()).unwrap_or_default();
        let said = rank.said.take().and_then(|said| said.join().ok()).unwrap_or_default();
        let said = String::from_utf8_lossy(&said).trim().to_owned();
        if said.is_empty() {
            format!("rank {first}: {status}")
        } else {
            format!("rank {first}: {status}; it said:\n{said}")
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

/// Where [`launch`] has started this process, takes signals from it; its end counts as one, so that no rank is left.
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
