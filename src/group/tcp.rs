//! Ranks that are processes, on one machine or several, connected by TCP: each with each.
//!
//! The connections are not encrypted, and who can reach the port can join: for networks that are trusted.

use super::Share;
use super::hosted::{Hosted, Transport};
use super::liveness::Liveness;
use super::meet::{Met, failed, meet};
use super::place::Place;
use crate::error::{Error, Result};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The connections of one rank. Where the last handle is dropped without [`Tcp::end`], the other ranks learn that this
/// one has ended.
#[derive(Clone)]
pub struct Tcp {
    connections: Arc<Connections>,
}

struct Connections {
    share: Share,
    /// By rank; none to itself.
    peers: Vec<Option<Mutex<TcpStream>>>,
    liveness: Liveness,
}

impl Tcp {
    /// Meets the other ranks, all of which must come `within` a time. `on_loss` is called on a thread of its own, once,
    /// with the reason, where a rank ends before its work is done or gives no sign of life; exchanges fail from then on.
    ///
    /// # Errors
    /// [`Error::Failed`] names the ranks that did not come, or what is wrong with one that did: another number of ranks,
    /// another version of swat; a port that another job has.
    pub fn join(place: &Place, version: &str, within: Duration, on_loss: fn(&str)) -> Result<Hosted<Self>> {
        let Met { peers, links } = meet(place, version, within)?;
        let messages = peers.iter().flatten().map(TcpStream::try_clone).collect::<std::io::Result<Vec<_>>>();
        let liveness = messages.and_then(|messages| Liveness::start(place.share.rank, links, messages, on_loss));
        let liveness = liveness.map_err(|e| failed(format!("rank {}: {e}", place.share.rank)))?;
        let peers = peers.into_iter().map(|peer| peer.map(Mutex::new)).collect();
        Ok(Hosted::new(Self { connections: Arc::new(Connections { share: place.share, peers, liveness }) }))
    }

    /// Tells the other ranks that this one has done its work, or that an error ends it. An interruption is none: all ranks
    /// end by it at the same step.
    pub fn end(&self, error: Option<&Error>) {
        let error = error.filter(|error| !matches!(error, Error::Interrupted { .. }));
        let rank = self.connections.share.rank;
        self.connections.liveness.end(error.map(|error| format!("rank {rank} has ended: {error}")));
    }

    /// Which rank has ended before its work was done, and why.
    pub fn lost(&self) -> Option<String> {
        self.connections.liveness.lost()
    }
}

impl Transport for Tcp {
    fn share(&self) -> Share {
        self.connections.share
    }

    /// In step k a rank sends to the k-th rank after it and hears the k-th before it, so that no two wait for each
    /// other.
    fn exchange(&self, mut messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        let Connections { share: Share { rank, size }, peers, liveness } = &*self.connections;
        let (rank, size) = (*rank, *size);
        let mut received: Vec<Vec<u8>> = (0..size).map(|_| Vec::new()).collect();
        received[rank] = std::mem::take(&mut messages[rank]);
        let streams = peers.iter().map(|peer| peer.as_ref().map(|peer| peer.lock()));
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
                received[from] = read(stream(from)?).map_err(|_| ended(from))?;
                Ok(())
            });
            if hear.is_err() {
                // A send that waits for a rank that waits itself would never end.
                streams.iter().flatten().for_each(|stream| drop(stream.shutdown(Shutdown::Both)));
            }
            let sent = sends.join().unwrap_or_else(|_| Err(failed("a thread that sends has failed".into())));
            hear.and(sent)
        });
        // All name the rank that ended first, and not the one that they were waiting for.
        result.map(|()| received).map_err(|e| match liveness.wait_lost() {
            Some(reason) => Error::failed(reason, "see its own error"),
            None => e,
        })
    }
}

fn ended(rank: usize) -> Error {
    Error::failed(format!("rank {rank} has ended"), "see its own error")
}

fn write(mut stream: &TcpStream, message: &[u8]) -> std::io::Result<()> {
    stream.write_all(&(message.len() as u64).to_le_bytes())?;
    stream.write_all(message)
}

fn read(mut stream: &TcpStream) -> std::io::Result<Vec<u8>> {
    let mut length = [0; 8];
    stream.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    let mut message = Vec::new();
    // Grows with what comes, whatever was announced.
    stream.take(length).read_to_end(&mut message)?;
    if (message.len() as u64) < length {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::time::Instant;

    /// A port that was free a moment ago.
    fn port() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    fn place(rank: usize, size: usize, port: u16) -> Place {
        let share = Share { rank, size };
        Place { share, local_rank: rank, local_size: size, host: "127.0.0.1".into(), port, job: "job".into() }
    }

    fn join(place: &Place, version: &str) -> Result<Hosted<Tcp>, String> {
        Tcp::join(place, version, Duration::from_millis(1500), |_| {}).map_err(|e| e.to_string())
    }

    /// What becomes of ranks with these places and versions.
    fn join_all(ranks: &[(Place, &str)]) -> Vec<Result<Hosted<Tcp>, String>> {
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
        let groups: Vec<Hosted<Tcp>> = join_all(&places).into_iter().map(Result::unwrap).collect();
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
    fn an_error_of_one_rank_reaches_all_whatever_they_wait_for() {
        let (size, port) = (4, port());
        let places: Vec<(Place, &str)> = (0..size).map(|rank| (place(rank, size, port), "1")).collect();
        let groups: Vec<Hosted<Tcp>> = join_all(&places).into_iter().map(Result::unwrap).collect();
        let errors: Vec<String> = std::thread::scope(|scope| {
            let waiting = [0, 1, 3].map(|rank| {
                let group = &groups[rank];
                scope.spawn(move || group.transport().exchange(vec![Vec::new(); size]).unwrap_err().to_string())
            });
            groups[2].transport().end(Some(&Error::failed("no memory", "buy some")));
            waiting.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        assert!(errors.iter().all(|error| error.contains("rank 2 has ended: no memory; buy some")), "{errors:?}");
        assert!(groups[0].transport().lost().is_some());
    }

    #[test]
    fn who_has_done_its_work_may_leave() {
        let (size, port) = (3, port());
        let places: Vec<(Place, &str)> = (0..size).map(|rank| (place(rank, size, port), "1")).collect();
        let mut groups: Vec<Hosted<Tcp>> = join_all(&places).into_iter().map(Result::unwrap).collect();
        let first = groups.remove(2);
        first.transport().end(None);
        drop(first);
        std::thread::sleep(Duration::from_millis(300));
        assert!(groups.iter().all(|group| group.transport().lost().is_none()));
        drop(groups.remove(1));
        let began = Instant::now();
        while groups[0].transport().lost().is_none() {
            assert!(began.elapsed() < Duration::from_secs(5), "rank 1 has ended without its work done");
        }
        assert!(groups[0].transport().lost().unwrap().contains("rank 1 has ended"));
    }

    #[test]
    fn ranks_that_do_not_belong_together_are_refused_by_name() {
        let at = port();
        let found = join_all(&[(place(0, 4, at), "1"), (place(1, 4, at), "1")]);
        assert!(error(&found[0]).contains("of 4 ranks these did not come") && error(&found[0]).contains(": 2, 3"));
        assert!(error(&found[1]).contains(": 2, 3"), "{}", error(&found[1]));

        let at = port();
        let found = join_all(&[(place(0, 2, at), "1"), (place(1, 3, at), "1")]);
        assert!(found.iter().all(|rank| error(rank).contains("rank 1 counts 3 ranks, and rank 0 counts 2")));

        let at = port();
        let found = join_all(&[(place(0, 2, at), "1.0"), (place(1, 2, at), "1.1")]);
        assert!(found.iter().all(|rank| error(rank).contains("rank 1 is swat 1.1, and rank 0 is swat 1.0")));

        // A second job on the port of a first one, which is not disturbed; nor by who is no rank at all.
        let at = port();
        let other = Place { job: "other".into(), ..place(1, 2, at) };
        let stranger = std::thread::spawn(move || {
            let began = Instant::now();
            let mut stream = loop {
                match TcpStream::connect(("127.0.0.1", at)) {
                    Ok(stream) => break stream,
                    Err(e) => assert!(began.elapsed() < Duration::from_secs(1), "{e}"),
                }
            };
            let _ = stream.write_all(b"GET / HTTP/1.1\r\n\r\n");
        });
        let first = std::thread::spawn(move || join(&place(0, 2, at), "1").map(drop));
        assert!(error(&join(&other, "1")).contains("another job"));
        let joined = join(&place(1, 2, at), "1");
        assert!(first.join().unwrap().is_ok() && joined.is_ok());
        stranger.join().unwrap();

        // One that is none of the group leaves the others to meet.
        let at = port();
        let first = std::thread::spawn(move || join(&place(0, 2, at), "1").map(drop));
        let error_of_third = join(&place(7, 2, at), "1").map(drop).unwrap_err();
        assert!(error_of_third.contains("rank 7 is none of the 2 ranks"), "{error_of_third}");
        assert!(join(&place(1, 2, at), "1").is_ok() && first.join().unwrap().is_ok());

        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let found = join(&place(0, 2, taken.local_addr().unwrap().port()), "1");
        assert!(error(&found).contains("set MASTER_PORT"), "{}", error(&found));
        let nowhere = Place { host: "no host".into(), ..place(1, 2, port()) };
        assert!(error(&join(&nowhere, "1")).starts_with("MASTER_ADDR: found `no host`"));
        let found = join(&place(1, 2, port()), "1");
        assert!(error(&found).contains("rank 1: rank 0 did not come"), "{}", error(&found));
    }
}
