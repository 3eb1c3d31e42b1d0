#!/bin/sh
# Any shell, without a launcher: N processes of this machine.   docs/scale/shell.sh 4 swat tune --model DIR …
# On two machines of four GPUs:
#   node1$ FIRST=0 ALL=8 MASTER_ADDR=node1 docs/scale/shell.sh 4 swat tune …
#   node2$ FIRST=4 ALL=8 MASTER_ADDR=node1 docs/scale/shell.sh 4 swat tune …
set -eu
processes=$1
shift
export WORLD_SIZE="${ALL:-$processes}" LOCAL_WORLD_SIZE="$processes" MASTER_ADDR="${MASTER_ADDR:-127.0.0.1}"
export MASTER_PORT="${MASTER_PORT:-29400}"
started=
local_rank=0
while [ "$local_rank" -lt "$processes" ]; do
    RANK=$((${FIRST:-0} + local_rank)) LOCAL_RANK=$local_rank "$@" &
    started="$started $!"
    local_rank=$((local_rank + 1))
done
# A signal goes to all, which save at the same step.
trap 'kill -TERM $started' INT TERM
code=0
for process in $started; do
    # Waiting ends early where a signal comes.
    while :; do
        status=0
        wait "$process" || status=$?
        kill -0 "$process" 2>/dev/null || break
    done
    [ "$status" = 0 ] || code=$status
done
exit $code
