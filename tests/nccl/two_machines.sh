# Two network namespaces that a cable joins, in the place of two machines: its end is called `wire` in both, with the addresses 10.0.0.1
# and 10.0.0.2. In each, EACH times the command with a RANK of its own. To be run in a new user and network namespace.
#
#   unshare --user --map-root-user --net sh two_machines.sh EACH COMMAND…
set -eu
each=$1
shift

# EACH processes from a first rank on.
ranks() {
  first=$1
  shift
  rank=$first
  while [ "$rank" -lt $((first + each)) ]; do
    RANK=$rank "$@" &
    rank=$((rank + 1))
  done
  wait
}

case $each in
  second) # The other machine, when it has its end of the cable.
    each=$1
    shift
    until ip link show wire >/dev/null 2>&1; do sleep 0.05; done
    ip link set lo up
    ip address add 10.0.0.2/24 dev wire
    ip link set wire up
    ranks "$each" "$@"
    ;;
  *)
    unshare --net sh "$0" second "$each" "$@" &
    other=$!
    until [ "$(readlink "/proc/$other/ns/net")" != "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
    ip link set lo up
    ip link add wire type veth peer name far
    ip link set far netns "$other" name wire
    ip address add 10.0.0.1/24 dev wire
    ip link set wire up
    ranks 0 "$@"
    wait "$other"
    ;;
esac
