//! A target under libFuzzer, by the name of its binary.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| swat_fuzz::run(env!("CARGO_BIN_NAME"), bytes));
