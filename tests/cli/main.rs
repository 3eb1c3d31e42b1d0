//! The binary as a user meets it.

#[path = "../common/mod.rs"]
mod common;
mod contract;
mod eval;
mod gpu_machines;
mod interrupted;
mod outputs;
mod precision;
mod run;
mod tuning;
mod watched;
