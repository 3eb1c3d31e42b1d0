//! Training on a tiny random model: the masked optimizer, and runs of the tuner.

mod adamw;
mod adapters;
mod bf16;
#[path = "../common/mod.rs"]
mod common;
mod lisa;
mod options;
mod overlap;
mod parallel;
mod parallel_saved;
mod parts;
mod recipes;
mod reference;
mod resume;
mod run;
mod schedule;
mod tuner;
