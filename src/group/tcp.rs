//! Ranks that are processes, on one machine or several, connected by TCP: each with each.
//!
//! Rank 0 waits at the address that the launcher names until all others have come, and tells each where the others are.
//! The connections are not encrypted, and who can reach the port can join: for networks that are trusted.

use super::Share;
use super::hosted::{Hosted, Transport};
use super::place::Place;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time between two attempts to connect, or looks for who comes.
const PAUSE: Duration = Duration::from_millis(50);
/// Time in which who has connected must introduce itself.
const HELLO: Duration = Duration::from_secs(5);
/// Most bytes of an introduction and of its answer.
const MAX_HELLO_BYTES: u64 = 1 << 20;
/// In the place of a length: a reason for the end follows.
const END: u64 = u64::MAX;
const MAX_REASON_BYTES: u64 = 1 << 12;

/// The connections of one rank.
pub struct Tcp {
    share: Share,
    /// By rank; none to itself.
    peers: Vec<Option<Mutex<TcpStream>>>,
}

/// How a rank introduces itself.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct Hello {
    /// Version of swat.
    swat: String,
    job: String,
    rank: usize,
    size: usize,
    /// Where it waits for ranks above it.
    port: u16,
}

/// What rank 0 answers.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
enum Answer {
    /// Where the ranks from 1 on are.
    Ranks(Vec<SocketAddr>),
    Refused(String),
}

impl Tcp {
    /// Meets the other ranks, all of which must come before the deadline.
    ///
    /// # Errors
    /// [`Error::Failed`] names the ranks that did not come, or what is wrong with one that did: another number of ranks,
    /// another version of swat; a port that another job has.
    pub fn join(place: &Place, version: &str, within: Duration) -> Result<Hosted<Self>> {
        let deadline = Instant::now() + within;
        let own = Hello {
            swat: version.to_owned(),
            job: place.job.clone(),
            rank: place.share.rank,
            size: place.share.size,
            port: 0,
        };
        let peers = match own.rank {
            0 => gather(place, &own, within, deadline)?,
            _ => come(place, own, within, deadline)?,
        };
        for peer in peers.iter().flatten() {
            let set = peer.set_read_timeout(None).and_then(|()| peer.set_nodelay(true));
            set.map_err(|e| failed(format!("a connection between ranks: {e}")))?;
        }
        let peers = peers.into_iter().map(|peer| peer.map(Mutex::new)).collect();
        Ok(Hosted::new(Self { share: place.share, peers }))
    }
}

fn failed(what: String) -> Error {
    Error::failed(what, "start all ranks with one command, by one launcher")
}

/// Rank 0: waits for the others.
fn gather(place: &Place, own: &Hello, within: Duration, deadline: Instant) -> Result<Vec<Option<TcpStream>>> {
    let listener = listen(place)?;
    let mut came: BTreeMap<usize, (TcpStream, SocketAddr)> = BTreeMap::new();
    let refuse_all = |came: BTreeMap<usize, (TcpStream, SocketAddr)>, why: String| {
        for (mut stream, _) in came.into_values() {
            let _ = send(&mut stream, &Answer::Refused(why.clone()));
        }
        failed(why)
    };
    while came.len() + 1 < own.size {
        let Some(mut stream) = accept(&listener, deadline)? else {
            let missing: Vec<String> =
                (1..own.size).filter(|rank| !came.contains_key(rank)).map(|rank| rank.to_string()).collect();
            let (ranks, seconds) = (missing.join(", "), within.as_secs());
            let at = format!("{}:{}", place.host, place.port);
            let why = format!("of {} ranks these did not come to {at} within {seconds} s: {ranks}", own.size);
            return Err(refuse_all(came, why));
        };
        // Whoever it is that does not introduce itself is no rank.
        let Ok(hello) = receive::<Hello>(&mut stream) else { continue };
        if hello.job != own.job || came.contains_key(&hello.rank) || hello.rank == 0 {
            let (host, port, rank) = (&place.host, place.port, hello.rank);
            let why = format!(
                "{host}:{port} belongs to another job, or rank {rank} was started twice: give each job a MASTER_PORT of \
                 its own"
            );
            let _ = send(&mut stream, &Answer::Refused(why));
            continue;
        }
        let peer = stream.peer_addr().map(|peer| SocketAddr::new(peer.ip(), hello.port));
        let peer = peer.map_err(|e| failed(format!("rank {}: {e}", hello.rank)))?;
        let wrong = if hello.size != own.size {
            Some(format!("rank {} counts {} ranks, and rank 0 counts {}", hello.rank, hello.size, own.size))
        } else if hello.swat != own.swat {
            Some(format!("rank {} is swat {}, and rank 0 is swat {}", hello.rank, hello.swat, own.swat))
        } else {
            None
        };
        came.insert(hello.rank, (stream, peer));
        if let Some(why) = wrong {
            return Err(refuse_all(came, why));
        }
    }
    let ranks: Vec<SocketAddr> = came.values().map(|(_, peer)| *peer).collect();
    let mut peers = vec![None];
    for (rank, (mut stream, _)) in came {
        let answer = Answer::Ranks(ranks.clone());
        send(&mut stream, &answer).map_err(|e| failed(format!("rank {rank} has ended: {e}")))?;
        peers.push(Some(stream));
    }
    Ok(peers)
}

/// Any other rank: goes to rank 0, then to the ranks below, and waits for those above.
fn come(place: &Place, own: Hello, within: Duration, deadline: Instant) -> Result<Vec<Option<TcpStream>>> {
    let Hello { rank, size, .. } = own;
    let (name, seconds) = (format!("{}:{}", place.host, place.port), within.as_secs());
    let late = || failed(format!("rank {rank}: rank 0 did not come to {name} within {seconds} s"));
    let mut first = connect(|| resolve(place), deadline)?.ok_or_else(late)?;
    let here = first.local_addr().map_err(|e| failed(format!("rank {rank}: {e}")))?;
    let listener = TcpListener::bind(SocketAddr::new(here.ip(), 0));
    let listener = listener.and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    let listener = listener.map_err(|e| failed(format!("rank {rank}: {e}")))?;
    let port = listener.local_addr().map_err(|e| failed(format!("rank {rank}: {e}")))?.port();
    let own = Hello { port, ..own };
    let left = deadline.saturating_duration_since(Instant::now()).max(PAUSE) + HELLO;
    let answer = send(&mut first, &own)
        .and_then(|()| first.set_read_timeout(Some(left)))
        .and_then(|()| receive_slowly::<Answer>(&mut first));
    let ranks = match answer {
        Ok(Answer::Ranks(ranks)) if ranks.len() + 1 == size => ranks,
        Ok(Answer::Ranks(_)) => return Err(failed(format!("rank {rank}: rank 0 counts other ranks"))),
        Ok(Answer::Refused(why)) => return Err(failed(why)),
        Err(e) => return Err(failed(format!("rank {rank}: rank 0 at {name} has ended: {e}"))),
    };
    let mut peers: Vec<Option<TcpStream>> = (0..size).map(|_| None).collect();
    peers[0] = Some(first);
    for below in 1..rank {
        let late = || failed(format!("rank {rank}: rank {below} at {} cannot be reached", ranks[below - 1]));
        let mut stream = connect(|| Ok(vec![ranks[below - 1]]), deadline)?.ok_or_else(late)?;
        send(&mut stream, &own).map_err(|_| late())?;
        peers[below] = Some(stream);
    }
    while peers[rank + 1..].iter().any(Option::is_none) {
        let Some(mut stream) = accept(&listener, deadline + HELLO)? else {
            let above = (rank + 1..size).find(|above| peers[*above].is_none()).unwrap_or(size);
            return Err(failed(format!("rank {rank}: rank {above} did not come within {seconds} s")));
        };
        let Ok(hello) = receive::<Hello>(&mut stream) else { continue };
        if hello.rank > rank && hello.rank < size && hello.job == own.job && peers[hello.rank].is_none() {
            peers[hello.rank] = Some(stream);
        }
    }
    Ok(peers)
}

fn resolve(place: &Place) -> Result<Vec<SocketAddr>> {
    let found = (place.host.as_str(), place.port).to_socket_addrs().map(Iterator::collect);
    found.map_err(|e| Error::input("MASTER_ADDR", format!("`{}`: {e}", place.host), "a host name or address"))
}

/// Waits where the launcher says, or on all addresses where that one is not this machine's own.
fn listen(place: &Place) -> Result<TcpListener> {
    let mut result = Err(std::io::Error::from(ErrorKind::NotFound));
    for address in resolve(place)? {
        result = TcpListener::bind(address);
        if result.as_ref().is_err_and(|e| e.kind() == ErrorKind::AddrNotAvailable) {
            let any =
                if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { IpAddr::from(Ipv6Addr::UNSPECIFIED) };
            result = TcpListener::bind(SocketAddr::new(any, place.port));
        }
        if result.is_ok() {
            break;
        }
    }
    let listener = result.and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    listener.map_err(|e| {
        let what = format!("rank 0 cannot wait at {}:{}: {e}", place.host, place.port);
        Error::failed(what, "another job may have this port: set MASTER_PORT to another one")
    })
}

/// The next connection; `None` after the deadline.
fn accept(listener: &TcpListener, deadline: Instant) -> Result<Option<TcpStream>> {
    loop {
        match listener.accept() {
            Ok((stream, _)) => {
                if stream.set_nonblocking(false).is_ok() {
                    return Ok(Some(stream));
                }
            }
            Err(e) if e.kind() == ErrorKind::WouldBlock => {
                if Instant::now() >= deadline {
                    return Ok(None);
                }
                std::thread::sleep(PAUSE);
            }
            // Of a connection that has ended already.
            Err(e) if matches!(e.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {}
            Err(e) => return Err(failed(format!("waiting for ranks: {e}"))),
        }
    }
}

/// Connects as soon as there is somebody; `None` after the deadline.
fn connect(to: impl Fn() -> Result<Vec<SocketAddr>>, deadline: Instant) -> Result<Option<TcpStream>> {
    loop {
        for address in to()? {
            if let Ok(stream) = TcpStream::connect_timeout(&address, HELLO) {
                return Ok(Some(stream));
            }
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(PAUSE);
    }
}

fn send(stream: &mut TcpStream, value: &impl serde::Serialize) -> std::io::Result<()> {
    let text = serde_json::to_vec(value)?;
    stream.write_all(&(text.len() as u64).to_le_bytes())?;
    stream.write_all(&text)
}

fn receive<T: serde::de::DeserializeOwned>(stream: &mut TcpStream) -> std::io::Result<T> {
    stream.set_read_timeout(Some(HELLO))?;
    receive_slowly(stream)
}

fn receive_slowly<T: serde::de::DeserializeOwned>(stream: &mut TcpStream) -> std::io::Result<T> {
    let length = read_length(stream)?;
    if length > MAX_HELLO_BYTES {
        return Err(ErrorKind::InvalidData.into());
    }
    let mut text = vec![0; length as usize];
    stream.read_exact(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

fn read_length(stream: &mut TcpStream) -> std::io::Result<u64> {
    let mut length = [0; 8];
    stream.read_exact(&mut length)?;
    Ok(u64::from_le_bytes(length))
}

impl Transport for Tcp {
    fn share(&self) -> Share {
        self.share
    }

    /// In step k a rank sends to the k-th rank after it and hears the k-th before it, so that no two wait for each
    /// other.
    fn exchange(&self, mut messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        let Share { rank, size } = self.share;
        let mut received: Vec<Vec<u8>> = (0..size).map(|_| Vec::new()).collect();
        received[rank] = std::mem::take(&mut messages[rank]);
        let streams = self.peers.iter().map(|peer| peer.as_ref().map(|peer| peer.lock()));
        let streams: Vec<_> =
            streams.map(|peer| peer.map(|peer| peer.unwrap_or_else(PoisonError::into_inner))).collect();
        let stream =
            |rank: usize| streams[rank].as_deref().ok_or_else(|| failed(format!("no connection to rank {rank}")));
        let result = std::thread::scope(|scope| {
            let (messages, stream) = (&messages, &stream);
            let sends = scope.spawn(move || {
                (1..size).map(|k| (rank + k) % size).try_for_each(|to| {
                    let sent = write(stream(to)?, &messages[to]);
                    sent.map_err(|_| ended(to))
                })
            });
            let hear = (1..size).map(|k| (rank + size - k) % size).try_for_each(|from| {
                // Sizes are checked by who knows them.
                received[from] = read(stream(from)?, from)?;
                Ok(())
            });
            if hear.is_err() {
                // A send that waits for a rank that waits itself would never end.
                streams.iter().flatten().for_each(|stream| drop(stream.set_write_timeout(Some(HELLO))));
            }
            let sent = sends.join().unwrap_or_else(|_| Err(failed("a thread that sends has failed".into())));
            hear.and(sent)
        });
        if let Err(e) = &result {
            // So that all name the rank that ended first.
            let reason = match e {
                Error::Failed { what, .. } => what.as_str(),
                _ => "",
            };
            for mut stream in streams.iter().flatten().map(|stream| &**stream) {
                let _ = stream.write_all(&END.to_le_bytes()).and_then(|()| write(stream, reason.as_bytes()));
            }
        }
        result.map(|()| received)
    }
}

fn ended(rank: usize) -> Error {
    Error::failed(format!("rank {rank} has ended"), "see its own error")
}

fn write(mut stream: &TcpStream, message: &[u8]) -> std::io::Result<()> {
    stream.write_all(&(message.len() as u64).to_le_bytes())?;
    stream.write_all(message)
}

fn read(mut stream: &TcpStream, from: usize) -> Result<Vec<u8>> {
    let mut number = || {
        let mut bytes = [0; 8];
        stream.read_exact(&mut bytes).map(|()| u64::from_le_bytes(bytes)).map_err(|_| ended(from))
    };
    let mut length = number()?;
    let is_end = length == END;
    if is_end {
        length = number()?.min(MAX_REASON_BYTES);
    }
    let mut message = Vec::new();
    // Grows with what comes, whatever was announced.
    let mut rest = stream.take(length);
    rest.read_to_end(&mut message).map_err(|_| ended(from))?;
    if (message.len() as u64) < length {
        return Err(ended(from));
    }
    if is_end {
        let reason = String::from_utf8_lossy(&message).chars().filter(|c| !c.is_control()).collect::<String>();
        return Err(Error::failed(reason, "see its own error"));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A port that was free a moment ago.
    fn port() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    fn place(rank: usize, size: usize, port: u16) -> Place {
        let share = Share { rank, size };
        Place { share, local_rank: rank, host: "127.0.0.1".into(), port, job: "job".into() }
    }

    fn join(place: &Place, version: &str) -> Result<Hosted<Tcp>, String> {
        Tcp::join(place, version, Duration::from_millis(1500)).map_err(|e| e.to_string())
    }

    /// What becomes of ranks with these places and versions.
    fn meet(ranks: &[(Place, &str)]) -> Vec<Result<Hosted<Tcp>, String>> {
        std::thread::scope(|scope| {
            let ranks: Vec<_> =
                ranks.iter().map(|(place, version)| scope.spawn(move || join(place, version))).collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    fn error(result: &Result<Hosted<Tcp>, String>) -> &str {
        result.as_ref().err().expect("an error")
    }

    #[test]
    fn messages_of_any_size_arrive() {
        let (size, port) = (5, port());
        let places: Vec<(Place, &str)> = (0..size).map(|rank| (place(rank, size, port), "1")).collect();
        let groups: Vec<Hosted<Tcp>> = meet(&places).into_iter().map(Result::unwrap).collect();
        // Larger than the buffers of a socket, so that somebody has to read meanwhile.
        let message = |from: usize, to: usize, round: usize| {
            let len = [0, 1, 5_000_000][(from + to + round) % 3];
            vec![(10 * from + to) as u8; len]
        };
        std::thread::scope(|scope| {
            for (rank, group) in groups.iter().enumerate() {
                scope.spawn(move || {
                    for round in 0..4 {
                        let sent = (0..size).map(|to| message(rank, to, round)).collect();
                        let received = group.transport().exchange(sent).unwrap();
                        for (from, found) in received.into_iter().enumerate() {
                            assert!(found == message(from, rank, round), "{from} to {rank}");
                        }
                    }
                });
            }
        });
        // One that ends is named by all, also by those that wait for another.
        let mut groups = groups;
        drop(groups.remove(3));
        let errors: Vec<String> = std::thread::scope(|scope| {
            let ranks: Vec<_> = groups
                .iter()
                .map(|group| scope.spawn(|| group.transport().exchange(vec![vec![7; 3_000_000]; size]).unwrap_err()))
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap().to_string()).collect()
        });
        assert!(errors.iter().all(|error| error.contains("rank 3 has ended")), "{errors:?}");
    }

    #[test]
    fn ranks_that_do_not_belong_together_are_refused_by_name() {
        let at = port();
        let found = meet(&[(place(0, 4, at), "1"), (place(1, 4, at), "1")]);
        assert!(error(&found[0]).contains("of 4 ranks these did not come") && error(&found[0]).contains(": 2, 3"));
        assert!(error(&found[1]).contains(": 2, 3"), "{}", error(&found[1]));

        let at = port();
        let found = meet(&[(place(0, 2, at), "1"), (place(1, 3, at), "1")]);
        assert!(found.iter().all(|rank| error(rank).contains("rank 1 counts 3 ranks, and rank 0 counts 2")));

        let at = port();
        let found = meet(&[(place(0, 2, at), "1.0"), (place(1, 2, at), "1.1")]);
        assert!(found.iter().all(|rank| error(rank).contains("rank 1 is swat 1.1, and rank 0 is swat 1.0")));

        // A second job on the port of a first one, which is not disturbed; nor by who is no rank at all.
        let at = port();
        let other = Place { job: "other".into(), ..place(1, 2, at) };
        let stranger = std::thread::spawn(move || {
            let deadline = Instant::now() + Duration::from_secs(1);
            let mut stream = connect(|| Ok(vec![SocketAddr::from(([127, 0, 0, 1], at))]), deadline).unwrap().unwrap();
            let _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n");
        });
        let first = std::thread::spawn(move || join(&place(0, 2, at), "1").map(drop));
        assert!(error(&join(&other, "1")).contains("another job"));
        let joined = join(&place(1, 2, at), "1");
        assert!(first.join().unwrap().is_ok() && joined.is_ok());
        stranger.join().unwrap();

        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let found = join(&place(0, 2, taken.local_addr().unwrap().port()), "1");
        assert!(error(&found).contains("set MASTER_PORT"), "{}", error(&found));
        let found = join(&place(1, 2, port()), "1");
        assert!(error(&found).contains("rank 1: rank 0 did not come"), "{}", error(&found));
    }
}
