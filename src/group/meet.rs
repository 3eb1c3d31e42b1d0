//! How the ranks of a group that are processes meet: each with each over TCP, by way of rank 0.
//!
//! Rank 0 waits at the address that the launcher names until all others have come, and tells each where the others are.

use super::Share;
use super::place::Place;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// Time between two attempts to connect, or looks for who comes.
const PAUSE: Duration = Duration::from_millis(50);
/// Time in which who has connected must introduce itself.
const HELLO: Duration = Duration::from_secs(5);
/// Most bytes of an introduction and of its answer.
const MAX_HELLO_BYTES: u64 = 1 << 20;

/// The connections of one rank.
pub(super) struct Met {
    /// By rank; none to itself.
    pub(super) peers: Vec<Option<TcpStream>>,
    /// For signs of life: of rank 0 to each other rank, of each other rank to rank 0.
    pub(super) links: Vec<(usize, TcpStream)>,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
enum Purpose {
    Messages,
    SignsOfLife,
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
    purpose: Purpose,
}

/// What rank 0 answers.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
enum Answer {
    /// Where the ranks from 1 on are.
    Ranks(Vec<SocketAddr>),
    Refused(String),
}

/// Meets the other ranks, all of which must come `within` a time.
pub(super) fn meet(place: &Place, version: &str, within: Duration) -> Result<Met> {
    let deadline = Instant::now() + within;
    let Share { rank, size } = place.share;
    let (swat, job) = (version.to_owned(), place.job.clone());
    let own = Hello { swat, job, rank, size, port: 0, purpose: Purpose::Messages };
    let met = match rank {
        0 => gather(place, &own, within, deadline)?,
        _ => come(place, own, within, deadline)?,
    };
    for stream in met.peers.iter().flatten().chain(met.links.iter().map(|(_, stream)| stream)) {
        let set = stream.set_read_timeout(None).and_then(|()| stream.set_nodelay(true));
        set.map_err(|e| failed(format!("a connection between ranks: {e}")))?;
    }
    Ok(met)
}

pub(super) fn failed(what: String) -> Error {
    Error::failed(what, "start all ranks with one command, by one launcher")
}

/// Rank 0: waits for the others.
fn gather(place: &Place, own: &Hello, within: Duration, deadline: Instant) -> Result<Met> {
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
        let (host, port, rank) = (&place.host, place.port, hello.rank);
        let refused = if hello.job != own.job || came.contains_key(&rank) || rank == 0 {
            let expected = "give each job a MASTER_PORT of its own";
            Some(format!("{host}:{port} belongs to another job, or rank {rank} was started twice: {expected}"))
        } else if hello.size == own.size && rank >= own.size {
            Some(format!("rank {rank} is none of the {} ranks that meet at {host}:{port}", own.size))
        } else {
            None
        };
        if let Some(why) = refused {
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
    let mut links: BTreeMap<usize, TcpStream> = BTreeMap::new();
    while links.len() + 1 < own.size {
        let Some(mut stream) = accept(&listener, deadline + HELLO)? else {
            let missing = (1..own.size).find(|rank| !links.contains_key(rank)).unwrap_or(0);
            return Err(failed(format!("rank {missing} has ended: it came and connected no second time")));
        };
        let Ok(hello) = receive::<Hello>(&mut stream) else { continue };
        if hello.purpose == Purpose::SignsOfLife && hello.job == own.job && (1..own.size).contains(&hello.rank) {
            links.entry(hello.rank).or_insert(stream);
        }
    }
    Ok(Met { peers, links: links.into_iter().collect() })
}

/// Any other rank: goes to rank 0, then to the ranks below, and waits for those above.
fn come(place: &Place, own: Hello, within: Duration, deadline: Instant) -> Result<Met> {
    let Hello { rank, size, .. } = own;
    let (name, seconds) = (format!("{}:{}", place.host, place.port), within.as_secs());
    let late = || failed(format!("rank {rank}: rank 0 did not come to {name} within {seconds} s"));
    let mut first = connect(|| resolve(place), deadline)?.ok_or_else(late)?;
    let here = first.local_addr().map_err(|e| failed(format!("rank {rank}: {e}")))?;
    let listener = TcpListener::bind(SocketAddr::new(reachable(here.ip(), place), 0));
    let listener = listener.and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    let listener = listener.map_err(|e| failed(format!("rank {rank}: {e}")))?;
    let port = listener.local_addr().map_err(|e| failed(format!("rank {rank}: {e}")))?.port();
    let own = Hello { port, ..own };
    let left = deadline.saturating_duration_since(Instant::now()).max(PAUSE) + HELLO;
    let answer = send(&mut first, &own)
        .and_then(|()| first.set_read_timeout(Some(left)))
        .and_then(|()| receive_slowly::<Answer>(&mut first));
    let of_first = first.peer_addr().map_err(|e| failed(format!("rank {rank}: {e}")))?.ip();
    // Rank 0 sees those of its own machine at addresses that lead there from that machine alone.
    let elsewhere = |at: SocketAddr| {
        let ip = if at.ip().is_loopback() && !of_first.is_loopback() { of_first } else { at.ip() };
        SocketAddr::new(ip, at.port())
    };
    let ranks: Vec<SocketAddr> = match answer {
        Ok(Answer::Ranks(ranks)) if ranks.len() + 1 == size => ranks.into_iter().map(elsewhere).collect(),
        Ok(Answer::Ranks(_)) => return Err(failed(format!("rank {rank}: rank 0 counts other ranks"))),
        Ok(Answer::Refused(why)) => return Err(failed(why)),
        Err(e) => return Err(failed(format!("rank {rank}: rank 0 at {name} has ended: {e}"))),
    };
    let mut link = connect(|| resolve(place), deadline + HELLO)?.ok_or_else(late)?;
    let hello = Hello { purpose: Purpose::SignsOfLife, ..own.clone() };
    send(&mut link, &hello).map_err(|e| failed(format!("rank {rank}: rank 0 at {name} has ended: {e}")))?;
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
    Ok(Met { peers, links: vec![(0, link)] })
}

fn resolve(place: &Place) -> Result<Vec<SocketAddr>> {
    let found = (place.host.as_str(), place.port).to_socket_addrs().map(Iterator::collect);
    found.map_err(|e| Error::input("MASTER_ADDR", format!("`{}`: {e}", place.host), "a host name or address"))
}

/// The address at which to wait where this machine has `ip`: all of its addresses where its name leads to one that other
/// machines do not reach, though the ranks may be on several.
fn reachable(ip: IpAddr, place: &Place) -> IpAddr {
    let one_machine = place.host == "localhost" || place.host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    if ip.is_loopback() && !one_machine { any(ip) } else { ip }
}

fn any(ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

/// Waits where the launcher says, or on all addresses where that one is not this machine's own, or not known yet.
fn listen(place: &Place) -> Result<TcpListener> {
    let mut result = Err(std::io::Error::from(ErrorKind::NotFound));
    let unknown = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), place.port);
    for address in resolve(place).unwrap_or_else(|_| vec![unknown]) {
        result = TcpListener::bind(SocketAddr::new(reachable(address.ip(), place), place.port));
        if result.as_ref().is_err_and(|e| e.kind() == ErrorKind::AddrNotAvailable) {
            result = TcpListener::bind(SocketAddr::new(any(address.ip()), place.port));
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

/// Connects as soon as there is somebody, whose name may not be known before; `None` after the deadline.
fn connect(to: impl Fn() -> Result<Vec<SocketAddr>>, deadline: Instant) -> Result<Option<TcpStream>> {
    loop {
        let addresses = to();
        for address in addresses.iter().flatten() {
            if let Ok(stream) = TcpStream::connect_timeout(address, HELLO) {
                return Ok(Some(stream));
            }
        }
        if Instant::now() >= deadline {
            return addresses.map(|_| None);
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
