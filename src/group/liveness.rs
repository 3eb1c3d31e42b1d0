//! Which ranks live: each but rank 0 has a second connection to rank 0, on which both give signs of life. Who ends is
//! known to all within seconds, whatever they wait for: messages, or an operation of a GPU.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Time between two signs of life.
const INTERVAL: Duration = Duration::from_secs(2);
/// Time without a sign of life after which a rank has ended: its machine has no power, or no network.
const SILENCE: Duration = Duration::from_secs(15);
/// Time in which rank 0 tells who has ended, after a connection is lost.
const VERDICT: Duration = Duration::from_secs(3);

/// What goes over a connection, beside the text of a reason.
const ALIVE: u8 = b'.';
const DONE: u8 = b'd';
const ENDED: u8 = b'e';

/// Signs of life of one rank.
pub(super) struct Liveness {
    shared: Arc<Shared>,
}

struct Shared {
    rank: usize,
    links: Vec<Mutex<TcpStream>>,
    /// Connections of messages, which are shut down when a rank is lost.
    messages: Vec<TcpStream>,
    state: Mutex<State>,
    changed: Condvar,
    on_loss: fn(&str),
}

#[derive(Default)]
struct State {
    /// Who ended before its work was done, and why.
    lost: Option<String>,
    /// Whether this rank has told that it ends.
    ended: bool,
}

impl Liveness {
    /// Begins to watch the ranks at the other end of `links`, and to be watched by them.
    pub(super) fn start(
        rank: usize,
        links: Vec<(usize, TcpStream)>,
        messages: Vec<TcpStream>,
        on_loss: fn(&str),
    ) -> std::io::Result<Self> {
        let mut heard = Vec::new();
        for (peer, stream) in &links {
            stream.set_read_timeout(Some(SILENCE))?;
            stream.set_write_timeout(Some(INTERVAL))?;
            heard.push((*peer, stream.try_clone()?));
        }
        let links = links.into_iter().map(|(_, stream)| Mutex::new(stream)).collect();
        let (state, changed) = (Mutex::default(), Condvar::new());
        let shared = Arc::new(Shared { rank, links, messages, state, changed, on_loss });
        for (peer, stream) in heard {
            let shared = shared.clone();
            std::thread::Builder::new().name(format!("rank {peer}")).spawn(move || shared.hear(peer, stream))?;
        }
        let signs = shared.clone();
        std::thread::Builder::new().name("signs of life".into()).spawn(move || signs.give_signs())?;
        Ok(Self { shared })
    }

    /// See [`super::Tcp::lost`].
    pub(super) fn lost(&self) -> Option<String> {
        self.shared.state().lost.clone()
    }

    /// As [`Liveness::lost`], after the time that a reason takes to get here.
    pub(super) fn wait_lost(&self) -> Option<String> {
        let unknown = |state: &mut State| state.lost.is_none();
        let waited = self.shared.changed.wait_timeout_while(self.shared.state(), VERDICT, unknown);
        waited.unwrap_or_else(PoisonError::into_inner).0.lost.clone()
    }

    /// Tells the others that this rank has done its work, or why it ends before.
    pub(super) fn end(&self, reason: Option<String>) {
        let mut state = self.shared.state();
        if std::mem::replace(&mut state.ended, true) {
            return;
        }
        // That of the first is known already.
        let reason = reason.filter(|_| state.lost.is_none());
        drop(state);
        match reason {
            Some(reason) => self.shared.tell_reason(&reason),
            None => self.shared.tell(&[DONE]),
        }
        self.shared.changed.notify_all();
    }
}

impl Drop for Liveness {
    fn drop(&mut self) {
        self.end(Some(format!("rank {} has ended", self.shared.rank)));
        // So that the threads end.
        for link in &self.shared.links {
            let _ = link.lock().unwrap_or_else(PoisonError::into_inner).shutdown(Shutdown::Both);
        }
        self.shared.shut_down();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give_signs(&self) {
        let mut state = self.state();
        while !state.ended {
            drop(state);
            self.tell(&[ALIVE]);
            let waited = self.changed.wait_timeout_while(self.state(), INTERVAL, |state| !state.ended);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn hear(&self, peer: usize, mut stream: TcpStream) {
        let ended = format!("rank {peer} has ended");
        loop {
            let mut sign = [0];
            match stream.read_exact(&mut sign).map(|()| sign[0]) {
                Ok(ALIVE) => {}
                Ok(DONE) => return,
                Ok(ENDED) => return self.lose(&read_reason(&mut stream).unwrap_or(ended)),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    let seconds = SILENCE.as_secs();
                    return self.lose(&format!("{ended}, or cannot be reached: no sign of life for {seconds} s"));
                }
                Ok(_) | Err(_) => return self.lose(&ended),
            }
        }
    }

    /// A rank has ended before its work was done.
    fn lose(&self, reason: &str) {
        {
            let mut state = self.state();
            if state.ended || state.lost.is_some() {
                return;
            }
            state.lost = Some(reason.to_owned());
        }
        self.changed.notify_all();
        // Whatever rank 0 hears of one, it tells the others.
        if self.rank == 0 {
            self.tell_reason(reason);
        }
        self.shut_down();
        (self.on_loss)(reason);
    }

    fn shut_down(&self) {
        self.messages.iter().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
    }

    fn tell_reason(&self, reason: &str) {
        let text = &reason.as_bytes()[..reason.len().min(usize::from(u16::MAX))];
        self.tell(&[&[ENDED][..], &(text.len() as u16).to_le_bytes(), text].concat());
    }

    /// To all; one that does not hear it has ended.
    fn tell(&self, message: &[u8]) {
        for link in &self.links {
            let _ = link.lock().unwrap_or_else(PoisonError::into_inner).write_all(message);
        }
    }
}

fn read_reason(stream: &mut TcpStream) -> Option<String> {
    let mut length = [0; 2];
    stream.read_exact(&mut length).ok()?;
    let mut text = vec![0; usize::from(u16::from_le_bytes(length))];
    stream.read_exact(&mut text).ok()?;
    Some(String::from_utf8_lossy(&text).chars().filter(|c| !c.is_control() || *c == '\n').collect())
}
