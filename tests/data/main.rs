//! The data room: readers, masks, loaders, and the tiny language.

mod conversation;
mod example;
mod jsonl;
mod loader;
mod masks;
mod readers;
mod rng;
mod security;
mod task;
mod tiny;
mod tiny_model;
