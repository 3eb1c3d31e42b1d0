#!/bin/sh
# One machine, a process a GPU:   docs/scale/torchrun.sh 8 --model DIR --data train.jsonl --out tuned …
# Several machines: on each of them the same command, with the name of one of them and how many there are:
#   NODES=2 HEAD=node1 docs/scale/torchrun.sh 8 …
set -eu
gpus=$1
shift
if [ "${NODES:-1}" = 1 ]; then
    set -- --standalone --nproc-per-node "$gpus" --no-python swat tune "$@"
else
    set -- --nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "$HEAD:29400" --nproc-per-node "$gpus" --no-python swat tune "$@"
fi
exec torchrun "$@"
