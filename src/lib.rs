//! Secure tuning of large language models: SWAT (Du et al., arXiv 2410.04524) on a transformer engine written from
//! scratch, with CUDA kernels and a CPU backend.
//!
//! Rooms, each of which uses only those before it: [`error`], [`options`], [`progress`], [`interrupt`], [`rng`], [`io`],
//! [`hub`], [`modules`], [`model`], [`data`], [`backend`], [`group`], [`engine`], [`train`], [`profile`], [`secure`],
//! [`report`], [`cli`].

// A stream that cannot be written to must not end a run, and these macros panic.
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod backend;
pub mod cli;
pub mod data;
pub mod engine;
pub mod error;
pub mod group;
pub mod hub;
pub mod interrupt;
pub mod io;
pub mod model;
pub mod modules;
pub mod options;
pub mod profile;
pub mod progress;
pub mod report;
pub mod rng;
pub mod secure;
pub mod train;
