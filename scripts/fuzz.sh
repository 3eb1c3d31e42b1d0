#!/usr/bin/env bash
# Fuzzes readers of untrusted files under libFuzzer. usage: scripts/fuzz.sh [INPUTS [TARGET...]]   default: 1000000 inputs of every target
#
# Needs a nightly compiler and cargo-fuzz (`rustup toolchain install nightly; cargo install cargo-fuzz`). No input may panic, take a second or
# a gigabyte. What was seen is kept in target/fuzz: the same command goes on where an earlier one ended, and with FUZZ_SECONDS=N it ends after
# about N seconds, so that a long run can be made in pieces. New inputs go to target/fuzz/TARGET; one that fails is written to
# fuzz/artifacts/TARGET: mend the cause and move the input into fuzz/corpus/TARGET, where `cargo test --test fuzz` runs it from then on.
#
# Ends with a table: inputs, the slowest in seconds, the peak of memory in MB. Exit codes: 0 all inputs seen, 75 some are left, 1 one failed.
set -euo pipefail
cd "$(dirname "$0")/.."
inputs=${1:-1000000}
shift || true
seconds=${FUZZ_SECONDS:-0}
export SWAT_CUDA=off
# Safe Rust: no address sanitizer, which would double time and memory.
cargo +nightly fuzz build --sanitizer none
[ $# -gt 0 ] || set -- $(cargo +nightly fuzz list)
binaries=fuzz/target/$(rustc +nightly -vV | sed -n 's/^host: //p')/release
limits="-timeout=1 -rss_limit_mb=1024"
# Templates are rendered on a stack of 64 MiB: on this one if it is large, which spares a new one for each rendering.
ulimit -S -s 262144 || true

# What earlier runs of a target saw: inputs, slowest, peak.
seen() { cat "target/fuzz/$1.seen" 2>/dev/null || echo 0 0 0; }
statistic() { sed -n "s/^stat::$2: *//p" "target/fuzz/$1.log" | tail -n 1 | grep . || echo 0; }
larger() { if [ "$1" -gt "$2" ]; then echo "$1"; else echo "$2"; fi; }

# Whether the input that took a second, the last of a target's run, passes in one of three tries: a busy machine, or one that was suspended,
# makes any input slow.
passes() {
  local input
  input=$(sed -n 's/.*Test unit written to //p' "target/fuzz/$1.log" | tail -n 1)
  for _ in 1 2 3; do
    "$binaries/$1" $limits "$input" 2>>"target/fuzz/$1.log" && rm "$input" && return
  done
  false
}

# One run of a target; fails where an input does.
run() {
  local count slowest peak limit status=0
  read -r count slowest peak <<<"$(seen "$1")"
  limit=$((seconds == 0 ? 0 : seconds - SECONDS))
  mkdir -p "target/fuzz/$1" "fuzz/artifacts/$1"
  "$binaries/$1" "target/fuzz/$1" "fuzz/corpus/$1" $limits -artifact_prefix="fuzz/artifacts/$1/" -runs="$((inputs - count))" \
    -max_total_time="$limit" -max_len=8192 -reload=0 -print_final_stats=1 2>"target/fuzz/$1.log" || status=$?
  count=$((count + $(statistic "$1" number_of_executed_units)))
  slowest=$(larger "$slowest" "$(statistic "$1" slowest_unit_time_sec)")
  echo "$count $slowest $(larger "$peak" "$(statistic "$1" peak_rss_mb)")" >"target/fuzz/$1.seen"
  # libFuzzer's exit codes after an interruption, and for an input that took too long.
  [ "$status" -ne 72 ] || interrupted=yes
  [ "$status" -eq 0 ] || [ "$status" -eq 72 ] || { [ "$status" -eq 70 ] && passes "$1"; }
}

# Whether a target has inputs left, and there is time for them.
goes_on() {
  local count rest
  [ -z "$interrupted" ] || return
  read -r count rest <<<"$(seen "$1")"
  [ "$count" -lt "$inputs" ] && { [ "$seconds" -eq 0 ] || [ "$SECONDS" -lt "$seconds" ]; }
}

SECONDS=0
interrupted=
failed=
mkdir -p target/fuzz
for target in "$@"; do
  while goes_on "$target"; do
    run "$target" || { failed="$failed $target"; break; }
  done
done

left=
printf '%-16s %10s %8s %8s\n' target inputs slowest peak
for target in "$@"; do
  read -r count slowest peak <<<"$(seen "$target")"
  printf '%-16s %10s %6s s %5s MB\n' "$target" "$count" "$slowest" "$peak"
  [ "$count" -ge "$inputs" ] || left="$left $target"
done
for target in $failed; do
  echo "scripts/fuzz.sh: an input of $target fails:" >&2
  tail -n 20 "target/fuzz/$target.log" >&2
done
[ -z "$failed" ] || exit 1
[ -z "$left" ] || { echo "left:$left" >&2; exit 75; }
