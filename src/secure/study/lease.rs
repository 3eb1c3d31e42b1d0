//! Leases by which the processes of a study share its stages, on a directory that all of them see.
//!
//! A lease is a file that one process alone creates. Its holder rewrites it as a sign of life; who sees it unchanged for
//! as long as the lease itself states renames it away and takes the stage over. Nothing depends on clocks that agree, nor
//! on locks of the file system: both are unreliable over NFS.

use crate::error::{Error, FileOp, Result};
use crate::io::input::read_text;
use crate::io::json;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Looks at a lease that is away before it counts as lost.
const LOOKS: u32 = 10;
/// Heartbeats in the time after which a lease is taken over.
const BEATS: u32 = 6;
/// Shortest and longest such time that is believed, in milliseconds.
const TIMES: std::ops::RangeInclusive<u64> = 100..=86_400_000;
const MAX_BYTES: u64 = 1 << 12;

/// How a process takes part in a study.
#[derive(Clone, Debug)]
pub struct Worker {
    /// Time without a sign of life after which another process takes a stage over.
    pub timeout: Duration,
    /// Called, with the reason, where another process has taken a stage over from this one, which must then end: both
    /// write the same files.
    pub lost: fn(&str),
}

/// Content of a lease.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Record {
    /// Host, process and a random number.
    worker: String,
    timeout_ms: u64,
    /// Heartbeats written so far.
    beat: u64,
}

/// Leases of a process, and what it saw of those of others.
pub(super) struct Leases {
    worker: Worker,
    id: String,
    /// Content of another's lease, and since when it has been the same.
    seen: Mutex<BTreeMap<PathBuf, (String, Instant)>>,
}

impl Leases {
    pub(super) fn new(worker: Worker) -> Self {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let now = std::time::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_nanos());
        let random = blake3::hash(format!("{now} {:?}", std::thread::current().id()).as_bytes());
        let id = format!("{}:{}:{:.8}", host.trim(), std::process::id(), random.to_hex());
        Self { worker, id, seen: Mutex::default() }
    }

    /// Time between two looks at a stage that another process holds.
    pub(super) fn pause(&self) -> Duration {
        (self.worker.timeout / BEATS).min(Duration::from_secs(1))
    }

    /// Takes the lease at `path`; `None` while another process holds it.
    pub(super) fn take(&self, path: &Path) -> Result<Option<Lease>> {
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(Error::io(parent, FileOp::Create))?;
        }
        let mut file = match File::create_new(path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                if !self.is_dead(path)? {
                    return Ok(None);
                }
                match File::create_new(path) {
                    Ok(file) => file,
                    // Another process was faster.
                    Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => return Ok(None),
                    Err(e) => return Err(Error::io(path, FileOp::Create)(e)),
                }
            }
            Err(e) => return Err(Error::io(path, FileOp::Create)(e)),
        };
        let timeout_ms = self.worker.timeout.as_millis() as u64;
        let mut record = Record { worker: self.id.clone(), timeout_ms, beat: 0 };
        write(&mut file, path, &record)?;
        let end = Arc::new((Mutex::new(false), Condvar::new()));
        let (stop, at, worker) = (end.clone(), path.to_owned(), self.worker.clone());
        let beat = move || {
            let (stopped, signal) = &*stop;
            let mut guard = stopped.lock().unwrap_or_else(PoisonError::into_inner);
            let mut gone = 0;
            loop {
                guard = signal.wait_timeout(guard, worker.timeout / BEATS).unwrap_or_else(PoisonError::into_inner).0;
                if *guard {
                    return;
                }
                // Away for a moment while another process finds that it was not dead: see `is_dead`.
                gone = if at.try_exists().is_ok_and(|there| !there) { gone + 1 } else { 0 };
                if gone > 1 || holder(&at).is_some_and(|holder| holder != record.worker) {
                    return (worker.lost)(&format!("another process has taken {} over", at.display()));
                }
                record.beat += 1;
                // A file system that is away for a while is no reason to end: who takes over is seen above.
                let _ = write(&mut file, &at, &record);
            }
        };
        let thread = std::thread::Builder::new().name("lease".into()).spawn(beat);
        let thread =
            thread.map_err(|e| Error::failed(format!("cannot start a thread: {e}"), "close other programs"))?;
        Ok(Some(Lease { path: path.to_owned(), id: self.id.clone(), end, thread: Some(thread) }))
    }

    /// Whether a lease showed no sign of life for the time that it states; it is then removed.
    fn is_dead(&self, path: &Path) -> Result<bool> {
        let text = match read_text(path, MAX_BYTES) {
            Ok(text) => text,
            // Given back meanwhile.
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => return Ok(true),
            Err(e) => return Err(e),
        };
        let stated = serde_json::from_str::<Record>(&text).ok().map(|record| record.timeout_ms);
        let timeout = stated.filter(|ms| TIMES.contains(ms)).map_or(self.worker.timeout, Duration::from_millis);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let (last, since) = seen.entry(path.to_owned()).or_insert_with(|| (text.clone(), Instant::now()));
        if *last != text {
            (*last, *since) = (text, Instant::now());
            return Ok(false);
        }
        if since.elapsed() < timeout {
            return Ok(false);
        }
        let (dead, _) = seen.remove(path).unwrap_or((text, Instant::now()));
        // Of several processes one alone renames it; the holder, should it live after all, sees that it is gone. What was
        // renamed may be the lease of a process that was faster: it gets it back.
        let mut away = path.as_os_str().to_owned();
        away.push(format!(".{}.dead", blake3::hash(self.id.as_bytes()).to_hex().split_at(8).0));
        let away = PathBuf::from(away);
        match fs::rename(path, &away) {
            Ok(()) => {
                let dead = read_text(&away, MAX_BYTES).is_ok_and(|found| found == dead);
                if !dead {
                    let _ = fs::hard_link(&away, path);
                }
                fs::remove_file(&away).map_err(Error::io(&away, FileOp::Remove))?;
                Ok(dead)
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(Error::io(path, FileOp::Rename)(e)),
        }
    }
}

/// A stage of this process alone, until it is dropped.
pub(super) struct Lease {
    path: PathBuf,
    id: String,
    end: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
}

impl Lease {
    /// Nothing while this process holds it.
    ///
    /// # Errors
    /// [`Error::InUse`] where another process has taken it over.
    pub(super) fn check(&self) -> Result<()> {
        for _ in 0..LOOKS {
            match holder(&self.path) {
                Some(holder) if holder == self.id => return Ok(()),
                Some(_) => break,
                // Away for a moment while another process finds that it was not dead: see `is_dead`.
                None => std::thread::sleep(Duration::from_millis(50)),
            }
        }
        Err(Error::InUse { path: self.path.clone() })
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let (stopped, signal) = &*self.end;
        *stopped.lock().unwrap_or_else(PoisonError::into_inner) = true;
        signal.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // What cannot be removed is taken over after its time.
        if holder(&self.path).as_deref() == Some(&self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn holder(path: &Path) -> Option<String> {
    serde_json::from_str::<Record>(&read_text(path, MAX_BYTES).ok()?).ok().map(|record| record.worker)
}

/// Rewrites a lease in place, so that one that was renamed away stays away. Every record is at least as long as the one
/// before.
fn write(file: &mut File, path: &Path, record: &Record) -> Result<()> {
    let line = json::line(record)?;
    let written = file.seek(SeekFrom::Start(0)).and_then(|_| file.write_all(line.as_bytes()));
    written.and_then(|()| file.sync_all()).map_err(Error::io(path, FileOp::Write))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    static LOST: AtomicBool = AtomicBool::new(false);

    fn leases(timeout_ms: u64) -> Leases {
        Leases::new(Worker {
            timeout: Duration::from_millis(timeout_ms),
            lost: |_| LOST.store(true, Ordering::Relaxed),
        })
    }

    fn wait(mut until: impl FnMut() -> bool) -> Duration {
        let began = Instant::now();
        while !until() {
            assert!(began.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(5));
        }
        began.elapsed()
    }

    #[test]
    fn one_holds_a_lease_until_it_gives_it_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tune/a.lease");
        let (one, other) = (leases(200), leases(200));
        let held = one.take(&path).unwrap().expect("nobody has it");
        // Longer than the time after which it would be taken over without a heartbeat.
        let began = Instant::now();
        while began.elapsed() < Duration::from_millis(1000) {
            assert!(other.take(&path).unwrap().is_none());
            std::thread::sleep(Duration::from_millis(20));
        }
        drop(held);
        assert!(!path.exists());
        assert!(other.take(&path).unwrap().is_some());
    }

    #[test]
    fn a_dead_lease_is_taken_over_once_and_its_holder_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.lease");
        for content in ["", "{\"worker\":\"gone\",\"timeout_ms\":300,\"beat\":7}\n", "nonsense"] {
            fs::write(&path, content).unwrap();
            let all: Vec<Leases> = (0..4).map(|_| leases(300)).collect();
            let mut held = Vec::new();
            let took = wait(|| {
                held.extend(all.iter().filter_map(|leases| leases.take(&path).unwrap()));
                !held.is_empty()
            });
            assert!(took >= Duration::from_millis(300), "{took:?}");
            assert_eq!(held.len(), 1, "{content}");
        }
        let names = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(names, 0, "nothing is left");
        // A holder whose lease was taken from it is told.
        let one = leases(300);
        let held = one.take(&path).unwrap().unwrap();
        held.check().unwrap();
        LOST.store(false, Ordering::Relaxed);
        fs::rename(&path, dir.path().join("away")).unwrap();
        fs::write(&path, "{\"worker\":\"other\",\"timeout_ms\":300,\"beat\":0}\n").unwrap();
        wait(|| LOST.load(Ordering::Relaxed));
        assert!(matches!(held.check(), Err(Error::InUse { .. })));
        drop(held);
        assert!(fs::read_to_string(&path).unwrap().contains("other"), "another's lease is not removed");
    }
}
