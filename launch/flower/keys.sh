#!/usr/bin/env bash
# Makes what TLS and node authentication need: a certificate authority of your own, the server's certificate, and a key
# pair for each node.
#
#   bash launch/flower/keys.sh FOLDER NUM_NODES HOST [HOST ...]
#
# HOST: every name or IP address that nodes know the server by. ca.crt goes to all machines; server.pem and server.key
# stay on the server; node_K goes to node K, and to nobody else; node_K.pub is registered with the server. A folder that
# has keys in it is not touched.
set -euo pipefail

[ $# -ge 3 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
folder=$1 num_nodes=$2
shift 2
[ ! -e "$folder/ca.crt" ] || { echo "$folder has keys already; name another folder" >&2; exit 1; }
mkdir -p "$folder"
chmod 700 "$folder"
cd "$folder"

names="DNS:localhost,IP:127.0.0.1"
for host in "$@"; do
    if [[ $host =~ ^[0-9.]+$ || $host == *:* ]]; then names="$names,IP:$host"; else names="$names,DNS:$host"; fi
done

umask 077
openssl ecparam -genkey -name prime256v1 -noout -out ca.key
openssl req -x509 -new -key ca.key -sha256 -days 730 -subj "/CN=efftrain federation" -out ca.crt
openssl ecparam -genkey -name prime256v1 -noout -out server.key
openssl req -new -key server.key -sha256 -subj "/CN=$1" -out server.csr
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -sha256 -days 365 -out server.pem \
    -extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names") 2>/dev/null
rm server.csr
for ((node = 0; node < num_nodes; node++)); do
    ssh-keygen -q -t ecdsa -b 384 -N "" -C "" -f "node_$node"
done
echo "keys for a server and $num_nodes nodes in $PWD"
