#!/usr/bin/env bash
# Installs the reference for correctness and speed: PyTorch, transformers and peft, in a virtual environment
# outside the repository ($SWAT_ORACLE, else ~/.cache/swat-oracle). Two minutes and about 6 GB, once. The last line on stdout is
# the interpreter:
#   PY=$(scripts/setup_oracle.sh)
# Versions are pinned: golden files and measurements name them.
set -euo pipefail
home=${SWAT_ORACLE:-$HOME/.cache/swat-oracle}
python=$home/venv/bin/python
if [ ! -e "$home/.ready" ]; then
  mkdir -p "$home"
  if ! python3 -m venv "$home/venv"; then
    echo "setup_oracle.sh: python3 cannot make virtual environments; on Debian: apt-get install python3-venv" >&2
    exit 1
  fi
  pip() { "$python" -m pip install --quiet --disable-pip-version-check "$@" >&2; }
  pip torch==2.15.0 numpy==2.4.6
  pip transformers==5.23.0 safetensors==0.8.0 tokenizers==0.23.3 peft==0.21.2 accelerate==1.15.0 \
    gguf==0.19.0 sentencepiece protobuf scikit-learn pyyaml reasoning-gym==0.1.25
  touch "$home/.ready"
fi
echo "$python"
