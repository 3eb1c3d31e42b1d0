#!/usr/bin/env bash
# Three machines with a rank each: network namespaces on one bridge. usage: unshare -Urnm machines.sh DIR [CUT] COMMAND...
#
# DIR gets RANK.err and RANK.status. With CUT, a file, the second machine loses its link once the file has five lines.
set -euo pipefail
dir=$1 cut=$2
shift 2
mount -t tmpfs none /run
ip link add switch type bridge
ip link set switch up
for rank in 0 1 2; do
  ip netns add "machine$rank"
  ip link add "port$rank" type veth peer name eth0 netns "machine$rank"
  ip link set "port$rank" master switch up
  ip -n "machine$rank" address add "10.77.0.$((rank + 1))/24" dev eth0
  ip -n "machine$rank" link set eth0 up
  ip -n "machine$rank" link set lo up
done
export WORLD_SIZE=3 LOCAL_RANK=0 LOCAL_WORLD_SIZE=1 MASTER_ADDR=10.77.0.1 MASTER_PORT=29500 RAYON_NUM_THREADS=1
for rank in 0 1 2; do
  (
    status=0
    RANK=$rank nsenter --net="/run/netns/machine$rank" "$@" >/dev/null 2>"$dir/$rank.err" || status=$?
    echo "$status" >"$dir/$rank.status"
  ) &
done
if [ -n "$cut" ]; then
  while [ ! -e "$cut" ] || [ "$(wc -l <"$cut")" -lt 5 ]; do sleep 0.02; done
  ip -n machine1 link set eth0 down
fi
wait
