#!/usr/bin/env bash
# A kvrelay cluster on several machines, by ssh. --help tells how.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=deploy/launch/hostfile.sh
source "$HERE/hostfile.sh"
# shellcheck source=deploy/launch/commands.sh
source "$HERE/commands.sh"
# shellcheck source=deploy/launch/start.sh
source "$HERE/start.sh"

usage() {
  cat <<'HELP'
Runs a kvrelay cluster on several machines, by ssh.

  ssh.sh HOSTFILE start               start what the hostfile lists, and wait until it serves
  ssh.sh HOSTFILE status              a line per process
  ssh.sh HOSTFILE logs [-f] [-n LINES] [N|NAME]
                                      the end of every log, or of one; -f follows
  ssh.sh HOSTFILE stop                end what start started, in reverse order
  ssh.sh HOSTFILE show                print the commands that start would run

The hostfile has a line per process; deploy/launch/hosts.example explains it:

  # host          role         devices  model      options
  10.0.0.1        etcd         -        -
  10.0.0.1        coordinator  -        -
  me@10.0.0.1:22  prefill      gpu:0,1  /models/m  --kv-host-bytes 32GiB -- --tensor-parallel-size 2
  10.0.0.2        decode       gpu:0,1  /models/m  --kv-host-bytes 32GiB -- --tensor-parallel-size 2

Every machine needs the checkout after `make setup` (KVRELAY_DIR), the same version of it, and a login by key. Nothing
is copied there. Each process has a directory there with its log; a process that is stopped leaves its log.
There is no TLS yet: the machines must share a private network. docs/multi-node.md tells the ports.

Settings, from the environment:
  KVRELAY_DIR          the checkout on the machines            (this one's path)
  KVRELAY_COMMAND      the kvrelay command there               (KVRELAY_DIR/.venv/bin/kvrelay)
  KVRELAY_RUN_DIR      where pid files and logs are            (.local/state/kvrelay/ssh/NAME OF THE HOSTFILE)
  KVRELAY_ETCD         host:port[,...] of an etcd that runs    (the one that the hostfile starts)
  KVRELAY_CLUSTER      the cluster's name in etcd              (default)
  KVRELAY_SETTINGS     NAME=value for all, spaces between      (none)
  KVRELAY_SSH_OPTIONS  options of ssh, for example -i key      (none)
  KVRELAY_START_S      longest wait for a start, seconds       (600)
  KVRELAY_GRACE_S      from SIGTERM to SIGKILL, seconds        (15)
Relative paths there are those of the home directory.

Exit codes: 0 success, 1 a process or a machine failed, 2 wrong usage or hostfile, 3 status: not all are running.
HELP
}

complain() { printf 'ssh.sh: %s\n' "$*" >&2; }

# fail CODE MESSAGE
fail() {
  local -i code=$1
  shift
  complain "$*"
  exit $code
}

say() { printf '%s\n' "$*"; }

configure() {
  HOSTFILE=$1
  CLUSTER=${KVRELAY_CLUSTER:-default}
  DIRECTORY=${KVRELAY_DIR:-$(cd "$HERE/../.." && pwd)}
  KVRELAY=${KVRELAY_COMMAND:-$DIRECTORY/.venv/bin/kvrelay}
  local base=${HOSTFILE##*/}
  RUN_DIR=${KVRELAY_RUN_DIR:-.local/state/kvrelay/ssh/${base%.*}}
  START_S=${KVRELAY_START_S:-600}
  GRACE_S=${KVRELAY_GRACE_S:-15}
  local setting
  for setting in START_S GRACE_S; do
    if [[ ! ${!setting} =~ ^[0-9]+$ ]]; then fail 2 "KVRELAY_$setting=${!setting} is not a number of whole seconds"; fi
  done
  # Worker ids must differ from those of the run before.
  TOKEN=$(printf '%04x' "$RANDOM")
  read -r -a SSH_OPTIONS <<<"${KVRELAY_SSH_OPTIONS:-}"
  SSH=(ssh -T -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 ${SSH_OPTIONS[@]+"${SSH_OPTIONS[@]}"})
}

directory_of() { printf '%s' "$RUN_DIR/${NAMES[$1]}@${ADDRESSES[$1]}"; }

where() { printf '%s line %s (%s on %s)' "$HOSTFILE" "${LINES_AT[$1]}" "${NAMES[$1]}" "${HOSTS[$1]}"; }

# connect INDEX COMMAND...: ssh to the host of a line.
connect() {
  local -i i=$1
  shift
  "${SSH[@]}" ${SSH_PORTS[i]:+-p "${SSH_PORTS[i]}"} "${HOSTS[i]}" "$@"
}

# on_host INDEX FUNCTION ARGUMENT...: run a function of remote.sh on the host of a line. Fails as it does, and with
# 255 and a message when there is no connection.
on_host() {
  local -i i=$1 status=0
  shift
  { cat "$HERE/remote.sh" && quoted "$@"; } | connect "$i" bash -s || status=$?
  if ((status == 255)); then
    complain "$(where "$i"): no ssh connection; try: ${SSH[*]} ${SSH_PORTS[i]:+-p ${SSH_PORTS[i]} }${HOSTS[i]} true"
  fi
  return $status
}

# first_index ROLE...: of the first line with such a role. Fails where there is none.
first_index() {
  local -i i
  for i in "${!ROLES[@]}"; do
    if [[ " $* " == *" ${ROLES[i]} "* ]]; then
      echo "$i"
      return
    fi
  done
  return 1
}

run_status() {
  local -i i all=0
  local state
  for i in "${!ROLES[@]}"; do
    if state=$(on_host "$i" status "$(directory_of "$i")"); then
      read -r state pid time <<<"$state"
    else
      state=unreachable pid="" time=""
    fi
    if [[ $state != running ]]; then all=3; fi
    printf '%3d  %-14s  %-20s  %-9s  %-11s  %8s  %s\n' \
      $((i + 1)) "${NAMES[i]}" "${HOSTS[i]}" "${DEVICES[i]}" "$state" "$pid" "$time"
  done
  return $all
}

# stop_lines INDEX...: workers together, then coordinators, then etcd.
stop_lines() {
  local -i i failed=0
  local role jobs job
  for role in "prefill decode" coordinator etcd; do
    jobs=()
    for i in "$@"; do
      if [[ " $role " == *" ${ROLES[i]} "* ]]; then
        stop_one "$i" &
        jobs+=($!)
      fi
    done
    for job in ${jobs[@]+"${jobs[@]}"}; do wait "$job" || failed=1; done
  done
  return $failed
}

stop_one() {
  local answer
  answer=$(on_host "$1" stop "$(directory_of "$1")" "$GRACE_S") || {
    complain "$(where "$1"): ${answer:-not stopped}"
    return 1
  }
  say "  $(printf '%-14s' "${NAMES[$1]}") $answer"
}

run_stop() {
  local -i i failed=0
  local others
  local -A seen=()
  stop_lines "${!ROLES[@]}" || failed=1
  for i in "${!HOSTS[@]}"; do
    if [[ -z ${seen[${HOSTS[i]}]:-} ]] && seen[${HOSTS[i]}]=1; then
      others=$(on_host "$i" stop_others "$RUN_DIR" "${ADDRESSES[i]}" "$GRACE_S") || failed=1
      if [[ -n $others ]]; then say "not in the hostfile any more: $others"; fi
    fi
  done
  return $failed
}

# run_logs [-f] [-n LINES] [N|NAME]
run_logs() {
  local -i i lines=100
  local follow="" wanted="" chosen=()
  while (($# > 0)); do
    case $1 in
      -f) follow=1 ;;
      -n)
        if [[ ! ${2:-} =~ ^[0-9]+$ ]]; then fail 2 "logs -n takes a number of lines"; fi
        lines=$2
        shift
        ;;
      *) wanted=$1 ;;
    esac
    shift
  done
  for i in "${!NAMES[@]}"; do
    if [[ -z $wanted || $wanted == "${NAMES[i]}" || $wanted == $((i + 1)) ]]; then chosen+=("$i"); fi
  done
  if ((${#chosen[@]} == 0)); then fail 2 "there is no process $wanted; it is 1 to ${#NAMES[@]}, or one of ${NAMES[*]}"; fi
  if [[ -n $follow ]]; then
    # Interrupted, this shell takes its connections with it, and each of them its tail on the other side.
    trap 'trap - TERM; kill -TERM $(jobs -p) 2>/dev/null; wait; exit 130' INT TERM HUP
    for i in "${chosen[@]}"; do follow_log "$i" "$lines" & done
    wait
    return
  fi
  for i in "${chosen[@]}"; do
    if ((${#chosen[@]} > 1)); then say "==> ${NAMES[i]} on ${HOSTS[i]} <=="; fi
    on_host "$i" show_log "$(directory_of "$i")" "$lines" || true
  done
}

# follow_log INDEX LINES: every line with the name of the process before it.
follow_log() {
  exec > >(exec sed -u "s/^/${NAMES[$1]}: /")
  # The standard input that stays open is what keeps the other side following.
  exec < <(cat "$HERE/remote.sh" && quoted follow_log "$(directory_of "$1")" "$2" && echo && exec tail -f --pid=$$ /dev/null)
  exec "${SSH[@]}" ${SSH_PORTS[$1]:+-p "${SSH_PORTS[$1]}"} "${HOSTS[$1]}" bash -s
}

run_show() {
  local -i i
  for i in "${!ROLES[@]}"; do
    build_command "$i"
    say "${NAMES[i]} on ${HOSTS[i]}: ${SETTINGS[i]}$(quoted "${COMMAND[@]}")"
  done
}

main() {
  if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
    usage
    exit 0
  fi
  if (($# < 2)); then
    usage >&2
    exit 2
  fi
  configure "$1"
  case $2 in
    start | status | logs | stop | show) ;;
    *) fail 2 "'$2' is none of start, status, logs, stop, show; --help tells more" ;;
  esac
  if (($# > 2)) && [[ $2 != logs ]]; then fail 2 "$2 takes no argument '$3'"; fi
  read_hostfile
  case $2 in start | show) find_etcd ;; esac
  "run_$2" "${@:3}"
}

main "$@"
