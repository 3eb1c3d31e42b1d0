#!/usr/bin/env bash
# Packs what a GPU host without Rust needs: stripped release executables (swat, the tests of the CUDA backend, the benches), the
# known-answer kernels compiled by nvcc, the peers in Python, and the check that runs them all.
#
#   here:   scripts/gpu_pack.sh [OUT]         -> OUT (default target/gpu), and OUT.tar.xz, of at most 60 MiB
#   there:  tar xJf gpu.tar.xz && python3 gpu/gpu_check.py
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/gpu}
most=$((60 << 20))
commit=$(git rev-parse HEAD)
[ -z "$(git status --porcelain --untracked-files=no)" ] || commit="$commit-dirty"
export SWAT_CUDA=require
rm -rf "$out" "$out.tar.xz"
mkdir -p "$out/peers"

# Names and paths of executables, from cargo's own messages.
executables() {
  cargo "$@" --locked --message-format json-render-diagnostics |
    python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("reason") == "compiler-artifact" and message.get("executable"):
        print(message["target"]["name"], message["executable"])'
}
# One command for all packages: separate ones would unify the features of dependencies differently, and build the library twice.
tests=(--test ops --test cuda --test cuda_graphs --test standin)
executables build --release --bin swat "${tests[@]}" --bench kernels >"$out/built"
while read -r name path; do
  strip -o "$out/$name" "$path"
done <"$out/built"
rm "$out/built"
for name in swat ops cuda cuda_graphs standin kernels; do
  [ -x "$out/$name" ] || { echo "$name was not built" >&2; exit 1; }
done
SWAT_KNOWN_IMAGES="$(cd "$out" && pwd)/known" "$out/standin" --exact known::nvcc_compiles_them >/dev/null
cp scripts/gpu_check.py scripts/gpu_runs.py scripts/bench_report.py benches/shapes.json "$out/"
cp benches/peers/{clock,kernels,steps,train_against_torch}.py "$out/peers/"
echo "$commit" >"$out/commit"
tar -C "$(dirname "$out")" -cJf "$out.tar.xz" "$(basename "$out")"
size=$(stat -c %s "$out.tar.xz")
echo "$out.tar.xz: $((size >> 10)) KiB, unpacked $(du -sk "$out" | cut -f1) KiB"
[ "$size" -le "$most" ] || { echo "more than $((most >> 20)) MiB" >&2; exit 1; }
