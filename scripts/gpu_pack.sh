#!/usr/bin/env bash
# Builds what a GPU host without Rust needs into a folder: stripped release tests of the CUDA backend, benches, the binary, the
# check that runs them, and the commit they were made of. Copy the folder to the host and run `python3 gpu_check.py` in it; where
# PyTorch and transformers are, also `python3 train_against_torch.py --swat ./swat --work DIR`.
#
# usage: scripts/gpu_pack.sh [OUT]      (default: target/gpu; benches in its folder bench)
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/gpu}
commit=$(git rev-parse HEAD)
[ -z "$(git status --porcelain --untracked-files=no)" ] || commit="$commit-dirty"
export SWAT_CUDA=require
rm -rf "$out"
mkdir -p "$out/bench"

# Paths of executables, from cargo's own messages.
executables() {
  cargo "$@" --locked --message-format json-render-diagnostics |
    python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("reason") == "compiler-artifact" and message.get("executable"):
        print(message["target"]["name"], message["executable"])'
}
executables build --release --bin swat >"$out/built"
executables test --release --no-run --test ops --test cuda --test cuda_graphs >>"$out/built"
executables bench --no-run --benches | sed '/^swat /d; s|^|bench/|' >>"$out/built"
while read -r name path; do
  strip -o "$out/$name" "$path"
done <"$out/built"
rm "$out/built"
cp scripts/gpu_check.py benches/peers/train_against_torch.py "$out/"
echo "$commit" >"$out/commit"
echo "$out"
