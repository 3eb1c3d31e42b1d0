//! The binary as a user meets it.

mod adapters;
mod chat;
mod check;
#[path = "../common/mod.rs"]
mod common;
mod contract;
mod data_files;
mod eval;
mod gpu_machines;
mod hub;
mod interrupted;
mod merge;
mod outputs;
mod precision;
mod replay;
mod run;
mod screen;
mod screened;
mod secure;
mod snapshots;
mod tuning;
mod watched;
