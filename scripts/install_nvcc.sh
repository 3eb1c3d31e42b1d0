#!/usr/bin/env bash
# Puts the pinned CUDA compiler into .cuda/ beside Cargo.toml: no root, GPU or driver needed. About 150 MB.
# build.rs finds it there by itself; tests/kernels.rs reads the machine code with cuobjdump. g++ must be installed.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .cuda/bin/python ] || python3 -m venv .cuda
# --no-deps: the wheels' own dependency ranges pull parts of a newer release, which break it.
.cuda/bin/python -m pip install -q --disable-pip-version-check --no-deps \
  nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
  nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 \
  nvidia-cuda-cuobjdump==13.2.51 nvidia-cuda-nvdisasm==13.2.51
ls .cuda/lib/python3.*/site-packages/nvidia/cu13/bin/nvcc
