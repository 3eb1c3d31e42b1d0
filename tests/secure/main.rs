//! The method on small models and made-up features: probes, the robustness map, the search for Mods_Rob, the judge.

#[path = "../common/mod.rs"]
mod common;
mod judge;
mod probe;
mod robustness;
mod search;
