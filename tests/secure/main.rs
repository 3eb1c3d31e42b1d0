//! The method on small models and made-up features: probes, the robustness map, the search for Mods_Rob, the judge.

mod check;
#[path = "../common/mod.rs"]
mod common;
mod config;
mod conflict;
mod control;
mod evaluation;
mod judge;
mod labels;
mod metrics;
mod noise;
mod probe;
mod refusal;
mod robustness;
mod search;
