//! A short run of every fuzz target, the same on every machine: the corpus, then mutations of it. `scripts/fuzz.sh` runs
//! them under libFuzzer, for as long as it is let.

#[path = "../../fuzz/src/lib.rs"]
#[allow(dead_code)]
mod targets;

use std::path::Path;
use std::time::{Duration, Instant};
use swat::rng::Philox;

/// Mutations of each target; a second each, or less, of an optimised build.
const MUTATIONS: usize = 4000;
/// Longest input that mutations grow to, in bytes.
const MAX_BYTES: usize = 1 << 13;
const SLOW: Duration = Duration::from_secs(1);
/// Numbers at which parsers overflow.
const NUMBERS: [&str; 12] = [
    "0",
    "-1",
    "1e999",
    "1e-400",
    "65536",
    "2147483648",
    "4294967295",
    "9223372036854775807",
    "18446744073709551615",
    "1e308",
    "NaN",
    "0.1",
];
/// What the formats are made of.
const WORDS: [&str; 24] = [
    "{",
    "}",
    "[",
    "]",
    "\"",
    "\\",
    ",",
    ":",
    "null",
    "true",
    "\\ud800",
    "\u{feff}",
    "\r\n",
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "range(99999)",
    " * 9999999",
    "(?:a{999}){999}",
    "(a+)+$",
    "../",
    "\0",
];

/// The inputs of a target's corpus, with their names.
fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files: Vec<_> = std::fs::read_dir(&dir).expect("a corpus").map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let read = |path: &std::path::PathBuf| {
        (path.file_name().unwrap().to_string_lossy().into_owned(), std::fs::read(path).unwrap())
    };
    files.iter().map(read).collect()
}

/// Changes the input in one place.
fn mutate(input: &mut Vec<u8>, corpus: &[(String, Vec<u8>)], random: &mut Philox) {
    let at = random.below(input.len() + 1);
    let end = at + random.below((input.len() - at).min(64) + 1);
    let insert = |input: &mut Vec<u8>, bytes: &[u8]| drop(input.splice(at..at, bytes.iter().copied()));
    match random.below(9) {
        0 if at < input.len() => input[at] ^= 1 << random.below(8),
        1 if at < input.len() => input[at] = random.next_u32() as u8,
        2 => insert(input, &random.next_u64().to_le_bytes()[..1 + random.below(8)]),
        3 => drop(input.drain(at..end)),
        4 => {
            let piece = input[at..end].to_vec();
            input.splice(at..at, piece.repeat(1 + random.below(40)));
        }
        5 => {
            let is_digit = |byte: &u8| byte.is_ascii_digit();
            let Some(first) = input.iter().skip(at).position(is_digit).map(|found| at + found) else { return };
            let count = input[first..].iter().take_while(|byte| is_digit(byte)).count();
            input.splice(first..first + count, random.pick(&NUMBERS).bytes());
        }
        6 => insert(input, random.pick(&WORDS).as_bytes()),
        7 => {
            let (_, other) = random.pick(corpus);
            let from = random.below(other.len() + 1);
            let to = from + random.below(other.len() - from + 1);
            input.splice(at..end, other[from..to].iter().copied());
        }
        _ => input.truncate(at.max(1)),
    }
}

/// Runs an input; one that takes a second gets two more tries, since the machine may be busy.
fn check(name: &str, run: fn(&[u8]) -> bool, input: &[u8]) {
    for _ in 0..3 {
        let start = Instant::now();
        run(input);
        if start.elapsed() < SLOW {
            return;
        }
    }
    panic!("{name} takes a second for {:?}", String::from_utf8_lossy(input));
}

/// The corpus and its mutations.
fn short_run(name: &str) {
    let (_, run) = targets::TARGETS.into_iter().find(|(known, _)| *known == name).unwrap();
    let corpus = corpus(name);
    for (file, input) in &corpus {
        check(name, run, input);
        // What begins with another word was found by fuzzing, and is refused or not.
        assert!(!file.starts_with("seed") || run(input), "{name} refuses {file}");
    }
    let mut random = Philox::new(1, 0);
    for _ in 0..MUTATIONS {
        let mut input = random.pick(&corpus).1.clone();
        for _ in 0..1 + random.below(4) {
            mutate(&mut input, &corpus, &mut random);
        }
        input.truncate(MAX_BYTES);
        check(name, run, &input);
    }
    // The high-water mark of the process: of all targets that ran so far.
    let peak = swat::train::peak_bytes();
    assert!(peak < 1 << 30, "{name}: {peak} bytes at most");
}

/// A test for each target, so that they run side by side.
macro_rules! short_runs {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            short_run(stringify!($name));
        })*

        #[test]
        fn every_target_is_run() {
            assert_eq!(targets::TARGETS.map(|(name, _)| name), [$(stringify!($name)),*]);
            let manifest = include_str!("../../fuzz/Cargo.toml");
            for (name, _) in targets::TARGETS {
                assert!(manifest.contains(&format!("name = \"{name}\"\n")), "fuzz/Cargo.toml has no binary {name}");
            }
        }
    };
}

short_runs!(safetensors index config side_files tokenizer template rows parquet probe map adapter_config adapter_weights);
