//! Ranks that are threads of one process.

use super::Share;
use super::hosted::{Hosted, Transport};
use crate::error::{Error, Result};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

/// The channels of one rank to and from each.
pub struct Threads {
    share: Share,
    to: Vec<Sender<Vec<u8>>>,
    from: Vec<Mutex<Receiver<Vec<u8>>>>,
}

impl Threads {
    /// The groups of `size` ranks, one for each thread.
    pub fn groups(size: usize) -> Vec<Hosted<Self>> {
        let mut to: Vec<Vec<Sender<Vec<u8>>>> = (0..size).map(|_| Vec::new()).collect();
        let mut from: Vec<Vec<Mutex<Receiver<Vec<u8>>>>> = (0..size).map(|_| Vec::new()).collect();
        for sender in &mut to {
            for receiver in &mut from {
                let (send, receive) = channel();
                sender.push(send);
                receiver.push(Mutex::new(receive));
            }
        }
        let ranks = to.into_iter().zip(from).enumerate();
        ranks.map(|(rank, (to, from))| Hosted::new(Self { share: Share { rank, size }, to, from })).collect()
    }
}

impl Transport for Threads {
    fn share(&self) -> Share {
        self.share
    }

    fn exchange(&self, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        let ended = |rank: usize| Error::failed(format!("rank {rank} has ended"), "see its own error");
        for (rank, (to, message)) in self.to.iter().zip(messages).enumerate() {
            to.send(message).map_err(|_| ended(rank))?;
        }
        let receive = |(rank, from): (usize, &Mutex<Receiver<Vec<u8>>>)| {
            from.lock().unwrap_or_else(PoisonError::into_inner).recv().map_err(|_| ended(rank))
        };
        self.from.iter().enumerate().map(receive).collect()
    }
}
