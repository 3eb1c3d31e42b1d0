#!/usr/bin/env bash
# A release tarball: the binary with its kernels, shell completions, manual pages, licence. usage: scripts/package.sh [OUT_DIR]
#
# Writes OUT_DIR/swat-VERSION-TARGET.tar.gz (default: target/package) and its SHA-256. The same commit gives the same bytes on the same
# toolchain. The binary needs the C library of the building machine or a newer one: build on the oldest system that is to be served.
# Kernels are compiled where nvcc is found (scripts/install_nvcc.sh fetches it); SWAT_CUDA=off leaves them out.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/package}
export SWAT_CUDA=${SWAT_CUDA:-require}

cargo build --release --locked --bin swat
binary=${CARGO_TARGET_DIR:-target}/release/swat
version=$("$binary" --version | awk '{print $2}')
target=$(rustc -vV | sed -n 's/^host: //p')
name=swat-$version-$target

mkdir -p "$out"
stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
root=$stage/$name
mkdir -p "$root"/{bin,share/man/man1,share/bash-completion/completions,share/zsh/site-functions,share/fish/vendor_completions.d,share/doc/swat}
install -m 755 "$binary" "$root/bin/swat"
"$binary" man "$root/share/man/man1" >/dev/null
"$binary" completions bash >"$root/share/bash-completion/completions/swat"
"$binary" completions zsh >"$root/share/zsh/site-functions/_swat"
"$binary" completions fish >"$root/share/fish/vendor_completions.d/swat.fish"
"$binary" schema >"$root/share/doc/swat/swat.schema.json"
install -m 644 LICENSE README.md CHANGELOG.md "$root/share/doc/swat/"

# Names, owners and times that do not depend on the machine.
tar --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$(git log -1 --format=%ct 2>/dev/null || echo 0)" \
  -C "$stage" -cf - "$name" | gzip -9n >"$out/$name.tar.gz"
(cd "$out" && sha256sum "$name.tar.gz" >"$name.tar.gz.sha256")
ls -l "$out/$name.tar.gz"
