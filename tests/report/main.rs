//! The report: pages, drawings, tables, traces, and the files of a study.

#[path = "../common/mod.rs"]
mod common;
mod drawings;
mod format;
mod memory;
mod secure;
mod study;
mod verdict;
mod xml;
