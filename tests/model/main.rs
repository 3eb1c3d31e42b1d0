//! Model directories: configuration, weights, tokenizer, chat template, and names of modules.

mod adapters;
mod config;
mod files;
mod modules;
mod text;
