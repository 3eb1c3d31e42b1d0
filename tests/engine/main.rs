//! The decoder: every fast path against the plain computation, and planned against measured memory.

#[path = "../common/mod.rs"]
mod common;
mod fast_paths;
mod final_gradients;
mod plan_memory;
mod shared_prefixes;
