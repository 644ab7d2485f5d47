#!/usr/bin/env bash
# Starts the server with TLS, open to registered nodes only.
#
#   bash launch/flower/superlink.sh KEYS [ADDRESS] [PORT]
#
# ADDRESS: what it listens on, 0.0.0.0 by default: all interfaces; 127.0.0.1 for one machine. PORT: 8000 by default.
# DATABASE=FILE in the environment keeps runs and registered nodes over a restart.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
keys=$1
export FLWR_TELEMETRY_ENABLED=${FLWR_TELEMETRY_ENABLED:-0} FLWR_DISABLE_UPDATE_CHECK=1
exec flower-superlink \
    --ssl-ca-certfile "$keys/ca.crt" --ssl-certfile "$keys/server.pem" --ssl-keyfile "$keys/server.key" \
    --enable-supernode-auth --disable-runtime-dependency-installation \
    --host "${2:-0.0.0.0}" --port "${3:-8000}" ${DATABASE:+--database "$DATABASE"}
