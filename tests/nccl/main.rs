//! Groups of GPUs: NCCL's calls on the stand-in GPU and the stand-in NCCL. Sums alone, runs of several processes,
//! what goes wrong, and two machines.

mod collectives;
#[path = "../common/mod.rs"]
mod common;
mod failures;
mod machines;
mod overlap;
mod ranks;
mod training;
mod tune;

use std::net::TcpListener;
use std::time::Duration;
use swat::group::{Hosted, Place, Tcp};

/// Time for ranks to meet, on a machine that is busy.
const WITHIN: Duration = Duration::from_secs(60);

/// A port that was free a moment ago.
fn port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn meet(place: &Place) -> swat::error::Result<Hosted<Tcp>> {
    Tcp::join(place, "test", WITHIN, |_| {})
}
