#!/usr/bin/env bash
# Starts one node. It finds out that the server is the right one by ca.crt, and proves by its own key who it is.
#
#   bash launch/flower/supernode.sh KEYS NUMBER SERVER:PORT [LOCAL_PORT]
#
# NUMBER: whose data this node holds (partition-id), and which key it has. LOCAL_PORT: for its own processes on loopback,
# 9094 + NUMBER by default, so that several fit on one machine.
set -euo pipefail

[ $# -ge 3 ] || { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
keys=$1 number=$2
export FLWR_TELEMETRY_ENABLED=${FLWR_TELEMETRY_ENABLED:-0} FLWR_DISABLE_UPDATE_CHECK=1
exec flower-supernode \
    --root-certificates "$keys/ca.crt" --auth-supernode-private-key "$keys/node_$number" \
    --superlink "$3" --port "${4:-$((9094 + number))}" --node-config "partition-id=$number"
