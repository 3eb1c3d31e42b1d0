#!/usr/bin/env bash
# Fuzzes readers of untrusted files under libFuzzer. usage: scripts/fuzz.sh [RUNS [TARGET...]]   default: 1000000 runs of every target
#
# Needs a nightly compiler and cargo-fuzz (`rustup toolchain install nightly; cargo install cargo-fuzz`). No input may panic, take a second or
# a gigabyte. New inputs go to target/fuzz/TARGET; one that fails is written to fuzz/artifacts/TARGET: mend the cause and move the input
# into fuzz/corpus/TARGET, where `cargo test --test fuzz` runs it from then on.
set -euo pipefail
cd "$(dirname "$0")/.."
runs=${1:-1000000}
shift || true
export SWAT_CUDA=off
# Safe Rust: no address sanitizer, which would double time and memory.
[ $# -gt 0 ] || set -- $(cargo +nightly fuzz list)
for target in "$@"; do
  mkdir -p "target/fuzz/$target"
  printf '%s: ' "$target"
  cargo +nightly fuzz run --sanitizer none "$target" "target/fuzz/$target" "fuzz/corpus/$target" -- \
    -runs="$runs" -timeout=1 -rss_limit_mb=1024 -max_len=8192 -print_final_stats=1 2>"target/fuzz/$target.log" ||
    { tail -n 40 "target/fuzz/$target.log"; exit 1; }
  grep -E 'number_of_executed_units|peak_rss_mb' "target/fuzz/$target.log" | tr '\n' ' '
  echo
done
