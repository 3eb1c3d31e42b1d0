#!/usr/bin/env bash
# A release tarball: the binary with its kernels, shell completions, manual pages, licence. usage: scripts/package.sh [OUT_DIR]
#
# Writes OUT_DIR/swat-VERSION-TARGET.tar.gz (default: target/package) and its SHA-256. The same commit gives the same bytes on the same
# toolchain. Kernels are compiled where nvcc is found (scripts/install_nvcc.sh fetches it); SWAT_CUDA=off leaves them out.
#
# The binary needs a C library as new as the newest of its functions that it uses; the version is printed. One that needs more than
# SWAT_GLIBC (default: 2.36, Debian 12) is refused: build on that system or an older one, such as in the container rust:1-bookworm.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-target/package}
export SWAT_CUDA=${SWAT_CUDA:-require}

cargo build --release --locked --bin swat
binary=${CARGO_TARGET_DIR:-target}/release/swat
glibc=$(objdump -T "$binary" | grep -o 'GLIBC_[0-9.]*' | sed 's/GLIBC_//' | sort -Vu | tail -n 1)
newest=${SWAT_GLIBC:-2.36}
if [ "$(printf '%s\n' "$glibc" "$newest" | sort -V | tail -n 1)" != "$newest" ]; then
  echo "scripts/package.sh: the binary needs glibc $glibc, more than $newest: build on an older system, such as the container rust:1-bookworm, or set SWAT_GLIBC" >&2
  exit 1
fi
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
echo "needs glibc $glibc"
