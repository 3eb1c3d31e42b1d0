//! The data room: readers, masks, loaders, and the tiny language.

mod conversation;
mod example;
mod loader;
mod masks;
mod parquet;
mod readers;
mod rng;
mod rows;
mod security;
mod task;
mod tiny;
mod tiny_model;
