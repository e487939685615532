# shellcheck shell=bash
# shellcheck disable=SC2034
# Which command does a line of the hostfile run? Sourced by ssh.sh, after hostfile.sh.

HTTP_PORT=8000
GRPC_PORT=50051
# Of the first worker; the next port takes its KV blocks, the one after that is the next worker's.
WORKER_PORT=7001
ETCD_PORT=2379

# option_value NAME WORD...: prints the last value of --NAME among kvrelay's own options. Fails where there is none.
option_value() {
  local name=--$1 value="" found=1
  shift
  while (($# > 0)) && [[ $1 != -- ]]; do
    case $1 in
      "$name") value=${2:-} found=0 ;;
      "$name"=*) value=${1#*=} found=0 ;;
    esac
    shift
  done
  printf '%s' "$value"
  return $found
}

# add_default NAME VALUE: to COMMAND, unless the line has the option itself (in `words`).
add_default() {
  if ! option_value "$1" "${words[@]}" >/dev/null; then COMMAND+=("--$1" "$2"); fi
}

# Where a process listens whose line does not say so. A name may mean loopback on the machine it belongs to, so only
# an address is taken literally.
listen_host() {
  if [[ $1 =~ ^[0-9.]+$ || $1 == \[*\] ]]; then printf '%s' "$1"; else printf '0.0.0.0'; fi
}

# What the machine itself calls an address it listens at.
own_address() {
  case $1 in
    0.0.0.0:* | :* | '[::]:'*) printf '127.0.0.1:%s' "${1##*:}" ;;
    *) printf '%s' "$1" ;;
  esac
}

# Sets ETCD, the addresses that every process is given.
find_etcd() {
  local -i i
  local url words=()
  ETCD=${KVRELAY_ETCD:-}
  for i in "${!ROLES[@]}"; do
    if [[ ${ROLES[i]} != etcd ]]; then continue; fi
    if [[ -n $ETCD ]]; then
      fail 2 "$HOSTFILE line ${LINES_AT[i]} starts an etcd, and KVRELAY_ETCD=$ETCD names one; drop either"
    fi
    eval "words=(${OPTIONS[i]})"
    url=$(option_value advertise-client-urls "${words[@]}") || url=http://${ADDRESSES[i]}:$ETCD_PORT
    if [[ $url != http://* ]]; then
      fail 2 "$HOSTFILE line ${LINES_AT[i]}: --advertise-client-urls $url must begin with http://; there is no TLS yet"
    fi
    ETCD=${url#http://}
    ETCD=${ETCD%/}
  done
  if [[ -z $ETCD ]]; then
    fail 2 "$HOSTFILE has no etcd line; add one, or set KVRELAY_ETCD=HOST:PORT to use an etcd that runs"
  fi
}

# build_command INDEX: sets COMMAND, and ADDRESS (HTTP of a coordinator, what others dial of a worker),
# GRPC_ADDRESS, WORKER_ID where the role has them. @dir, @kvrelay and @etcd are replaced on the host.
build_command() {
  local words=() listen
  ADDRESS="" GRPC_ADDRESS="" WORKER_ID="" COMMAND=()
  eval "words=(${OPTIONS[$1]})"
  case ${ROLES[$1]} in
    etcd) etcd_command "$1" ;;
    coordinator) coordinator_command "$1" ;;
    prefill | decode) worker_command "$1" ;;
  esac
  COMMAND+=("${words[@]}")
}

etcd_command() {
  local client peer=http://127.0.0.1:0
  client=http://$(listen_host "${ADDRESSES[$1]}"):${ETCD##*:}
  ADDRESS=$ETCD
  COMMAND=(@etcd)
  add_default name throw-away
  add_default data-dir @dir/data
  add_default listen-client-urls "$client"
  add_default advertise-client-urls "http://$ETCD"
  if ! option_value initial-cluster "${words[@]}" >/dev/null; then
    add_default listen-peer-urls "$peer"
    add_default initial-advertise-peer-urls "$peer"
    add_default initial-cluster "throw-away=$peer"
  fi
  # Clients tell by it this etcd from its predecessor at the same address.
  add_default initial-cluster-token "$TOKEN"
  add_default auto-compaction-mode periodic
  add_default auto-compaction-retention 10m
}

coordinator_command() {
  local host
  host=$(listen_host "${ADDRESSES[$1]}")
  COMMAND=(@kvrelay coordinator --etcd "$ETCD" --cluster "$CLUSTER")
  if [[ ${MODELS[$1]} != - ]]; then COMMAND+=(--model "${MODELS[$1]}"); fi
  add_default coordinator-id "${NAMES[$1]}-$TOKEN"
  add_default http "$host:$((HTTP_PORT + NUMBERS[$1]))"
  add_default grpc "$host:$((GRPC_PORT + NUMBERS[$1]))"
  add_default advertise-host "${ADDRESSES[$1]}"
  ADDRESS=$(option_value http "${COMMAND[@]}" "${words[@]}")
  GRPC_ADDRESS=$(option_value grpc "${COMMAND[@]}" "${words[@]}")
}

worker_command() {
  local listen
  COMMAND=(@kvrelay "${ROLES[$1]}-worker" --etcd "$ETCD" --cluster "$CLUSTER")
  if [[ ${MODELS[$1]} != - ]]; then COMMAND+=(--model "${MODELS[$1]}"); fi
  add_default worker-id "${NAMES[$1]}-$TOKEN"
  add_default listen "$(listen_host "${ADDRESSES[$1]}"):$((WORKER_PORT + 2 * NUMBERS[$1]))"
  listen=$(option_value listen "${COMMAND[@]}" "${words[@]}")
  if [[ $listen =~ :[1-9][0-9]*$ ]]; then add_default kv-listen "${listen%:*}:$((${listen##*:} + 1))"; fi
  add_default advertise "${ADDRESSES[$1]}:${listen##*:}"
  ADDRESS=$(option_value advertise "${COMMAND[@]}" "${words[@]}")
  WORKER_ID=$(option_value worker-id "${COMMAND[@]}" "${words[@]}")
}
