# shellcheck shell=bash
# How is a process started, looked at and ended on its own machine? ssh.sh sends this file to bash there, and after
# it a call of one function.
#
# A process has a directory: `pid` while it should run, `log`, `log.1` of the run before, and `data` of an etcd. `pid`
# has its pid, its start time and the machine's boot, which together name one process for ever, and its directory for
# temporary files; sockets there need a short path. It leads a session and a process group of its own.

set -u
umask 077

# start_time PID: in clock ticks since boot. Fails for a process that is gone or only waits to be reaped.
start_time() {
  local stat fields
  { stat=$(<"/proc/$1/stat"); } 2>/dev/null || return 1
  # The name, in parentheses, may contain anything.
  read -r -a fields <<<"${stat##*) }"
  [[ ${fields[0]} != [ZX] ]] && echo "${fields[19]}"
}

boot_id() { cat /proc/sys/kernel/random/boot_id; }

# recorded DIR: sets pid, started, boot and scratch of what was started there.
recorded() { { read -r pid started boot scratch <"$1/pid"; } 2>/dev/null; }

is_alive() {
  local pid started boot scratch
  recorded "$1" && [[ $boot == "$(boot_id)" && $(start_time "$pid") == "$started" ]]
}

# executable KIND KVRELAY: prints the path of kvrelay or etcd. Fails with the reason.
executable() {
  local kvrelay=$2 found
  if [[ $kvrelay != /* ]]; then kvrelay=$HOME/$kvrelay; fi
  if [[ ! -x $kvrelay ]]; then
    echo "there is no $kvrelay; run make setup there, or correct KVRELAY_DIR or KVRELAY_COMMAND"
    return 1
  fi
  if [[ $1 != @etcd ]]; then
    echo "$kvrelay"
  elif found=$(command -v etcd) || found=$(command -v "$(dirname "$kvrelay")/etcd"); then
    echo "$found"
  else
    echo "there is no etcd on PATH nor next to $kvrelay; install one, or use one that runs by KVRELAY_ETCD"
    return 1
  fi
}

# check KVRELAY DIR KIND: can KIND (@kvrelay, @etcd) be started, and does it not run yet?
check() {
  local pid started boot scratch
  if is_alive "$2" && recorded "$2"; then
    echo "it runs already (process $pid); stop it first"
    return 1
  fi
  if ! mkdir -p "$2"; then return 1; fi
  executable "$3" "$1" >/dev/null || executable "$3" "$1"
}

# start KVRELAY DIR SETTING... -- COMMAND...
start() {
  local kvrelay=$1 directory settings=() command=() program scratch pid
  mkdir -p "$2" && directory=$(cd "$2" && pwd) || return 1
  shift 2
  while [[ $1 != -- ]]; do
    settings+=("$1")
    shift
  done
  shift
  program=$(executable "$1" "$kvrelay") || { echo "$program"; return 1; }
  shift
  command=("$program" "${@/#@dir/$directory}")
  if [[ -e $directory/log ]]; then mv -f "$directory/log" "$directory/log.1"; fi
  rm -rf "${directory:?}/data"
  # Relative paths in the hostfile are those of the checkout.
  if [[ $kvrelay == */.venv/bin/* ]]; then cd "${kvrelay%/.venv/bin/*}" || return 1; fi
  scratch=$(mktemp -d -t kvrelay-ssh-XXXXXX) || return 1
  setsid nohup env "TMPDIR=$scratch" ${settings[@]+"${settings[@]}"} "${command[@]}" >"$directory/log" 2>&1 </dev/null &
  pid=$!
  echo "$pid $(start_time "$pid") $(boot_id) $scratch" >"$directory/pid"
}

# http_get HOST:PORT PATH: prints the answer with its head.
http_get() {
  # shellcheck disable=SC2016
  timeout 3 bash -c 'exec 3<>"/dev/tcp/$0/$1" && printf "GET %s HTTP/1.0\r\nHost: %s\r\n\r\n" "$2" "$0" >&3 && cat <&3' \
    "$(tr -d '[]' <<<"${1%:*}")" "${1##*:}" "$2" 2>/dev/null
}

# await DIR|- TIMEOUT_S HOST:PORT PATH: until the answer is 200, while the process of the directory lives.
await() {
  local -i end=$((SECONDS + $2))
  until [[ $(http_get "$3" "$4") == HTTP/1.?" 200 "* ]]; do
    if [[ $1 != - ]] && ! is_alive "$1"; then
      echo "it ended; its log:"
      tail -n 15 "$1/log"
      return 1
    fi
    if ((SECONDS >= end)); then
      echo "http://$3$4 did not answer 200 within $2 s; ${1/#-/the logs tell more}"
      return 1
    fi
    sleep 0.2
  done
}

# registered KVRELAY ETCD CLUSTER: prints "ID STATE" of the workers, as seen from here.
registered() {
  local kvrelay
  kvrelay=$(executable @kvrelay "$1") && "$kvrelay" workers --json --timeout 2 --etcd "$2" --cluster "$3" </dev/null |
    awk -F'"' '$2 == "worker_id" { id = $4 } $2 == "state" { print id, $4 }'
}

# status DIR: one line: running PID TIME, died or stopped.
status() {
  local pid started boot scratch
  if is_alive "$1" && recorded "$1"; then
    echo "running $pid $(ps -o etime= -p "$pid" | tr -d ' ')"
  elif [[ -e $1/pid ]]; then
    echo "died"
  else
    echo "stopped"
  fi
}

# last_words DIR: the end of the log of a process that ended. Fails when it runs.
last_words() {
  if is_alive "$1"; then return 1; fi
  tail -n 15 "$1/log"
}

# stop DIR GRACE_S: SIGTERM to the process, SIGKILL to its group after the grace. Prints what happened.
stop() {
  local pid started boot scratch how="was not running"
  local -i end=$((SECONDS + $2))
  if ! recorded "$1"; then
    echo "$how"
    return
  fi
  if is_alive "$1"; then
    how=stopped
    kill -TERM "$pid" 2>/dev/null
    while is_alive "$1" && ((SECONDS < end)); do sleep 0.05; done
    if is_alive "$1"; then how="killed after $2 s"; fi
  elif start_time "$pid" >/dev/null || [[ $boot != "$(boot_id)" ]]; then
    pid=""  # The number belongs to somebody else by now.
  fi
  if [[ -n $pid ]] && ! end_group "$pid"; then
    echo "process group $pid does not end"
    return 1
  fi
  if [[ $scratch == */kvrelay-ssh-* ]]; then rm -rf "$scratch"; fi
  rm -rf "${1:?}/pid" "${1:?}/data"
  echo "$how"
}

# end_group PID: SIGKILL to what is left of the group.
end_group() {
  local -i end=$((SECONDS + 10))
  while kill -KILL -- "-$1" 2>/dev/null && group_lives "$1"; do
    if ((SECONDS >= end)); then return 1; fi
    sleep 0.05
  done
}

group_lives() { ps -e -o pgid= -o state= | awk -v group="$1" '$1 == group && $2 !~ /^[ZX]/ { found = 1 } END { exit !found }'; }

# stop_others RUN_DIR ADDRESS GRACE_S: what earlier hostfiles started here.
stop_others() {
  local directory
  for directory in "$1"/*@"$2"; do
    if [[ -e $directory/pid ]]; then echo "$(basename "$directory"): $(stop "$directory" "$3")"; fi
  done
}

# show_log DIR LINES
show_log() { tail -n "$2" "$1/log"; }

# follow_log DIR LINES: until the connection ends.
follow_log() {
  tail -n "$2" -F "$1/log" 2>/dev/null &
  cat >/dev/null
  kill $!
}
