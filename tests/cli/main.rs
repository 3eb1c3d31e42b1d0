//! The binary as a user meets it.

#[path = "../common/mod.rs"]
mod common;
mod contract;
mod eval;
mod gpu_machines;
mod precision;
mod run;
