//! The decoder: every fast path against the plain one that it replaces, and the plan of memory against what a device uses.

#[path = "../common/mod.rs"]
mod common;
mod fast_paths;
mod plan_memory;
