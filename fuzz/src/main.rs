//! A target under libFuzzer, by the name of its binary.
#![no_main]

/// The target.
const TARGET: fn(&[u8]) -> bool = swat_fuzz::target(env!("CARGO_BIN_NAME"));

libfuzzer_sys::fuzz_target!(
    init: {
        // No input is worth a second thread, least of all on a busy machine.
        rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread().build_global().expect("a pool");
        swat_fuzz::keep_panics();
    },
    |bytes: &[u8]| swat_fuzz::run(TARGET, bytes)
);
