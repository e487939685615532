# shellcheck shell=bash
# In which order does a cluster start, and when does it serve? Sourced by ssh.sh.

check_all() {
  local -i i failed=0
  local kind answer
  for i in "${!ROLES[@]}"; do
    kind=@kvrelay
    if [[ ${ROLES[i]} == etcd ]]; then kind=@etcd; fi
    if ! answer=$(on_host "$i" check "$KVRELAY" "$(directory_of "$i")" "$kind"); then
      if [[ -n $answer ]]; then complain "$(where "$i"): $answer"; fi
      failed=1
    fi
  done
  if ((failed)); then fail 1 "nothing was started"; fi
}

# start_one INDEX: start the process of a line, without waiting until it serves.
start_one() {
  local settings=() common=() answer
  # shellcheck disable=SC2153
  eval "settings=(${SETTINGS[$1]})"
  read -r -a common <<<"${KVRELAY_SETTINGS:-}"
  build_command "$1"
  if ! answer=$(on_host "$1" start "$KVRELAY" "$(directory_of "$1")" \
    ${common[@]+"${common[@]}"} ${settings[@]+"${settings[@]}"} -- "${COMMAND[@]}"); then
    fail 1 "$(where "$1"): $answer"
  fi
}

# await_http INDEX ADDRESS PATH: until it answers 200.
await_http() {
  local answer
  if ! answer=$(on_host "$1" await "$(directory_of "$1")" "$START_S" "$(own_address "$2")" "$3"); then
    fail 1 "$(where "$1"): $answer"
  fi
}

report_up() { say "  $(printf '%-14s' "${NAMES[$1]}") up on ${HOSTS[$1]} after $SECONDS s"; }

# await_workers: until all are registered and answer the machine of the coordinator.
await_workers() {
  local -i i viewer
  local rows answer state
  viewer=$(first_index coordinator prefill decode) || return 0
  while ((${#WAITING[@]} > 0)); do
    rows=$(on_host "$viewer" registered "$KVRELAY" "$ETCD" "$CLUSTER") || fail 1 "$(where "$viewer"): cannot list workers"
    for i in "${!WAITING[@]}"; do
      state=$(awk -v id="${WAITING[$i]}" '$1 == id { print $2 }' <<<"$rows")
      if [[ $state == ready ]]; then
        report_up "$i"
        unset "WAITING[$i]"
      elif answer=$(on_host "$i" last_words "$(directory_of "$i")"); then
        fail 1 "$(where "$i"): it ended; its log:"$'\n'"$answer"
      elif ((SECONDS >= START_S)); then
        if [[ $state == silent ]]; then
          fail 1 "$(where "$i"): ${HOSTS[viewer]} cannot reach it at the address it advertises; see --advertise, firewalls"
        fi
        fail 1 "$(where "$i"): not ready within $START_S s; ssh.sh $HOSTFILE logs ${NAMES[i]}, or a larger KVRELAY_START_S"
      fi
    done
  done
}

# Ends what this start began, when it does not succeed.
undo_start() {
  trap - EXIT INT TERM HUP
  if ((${#STARTED[@]} > 0)); then
    complain "stopping what was started; the logs stay"
    stop_lines "${STARTED[@]}" >&2 || true
  fi
  exit "$1"
}

run_start() {
  local -i i
  local role
  local -A WAITING=()
  STARTED=()
  check_all
  SECONDS=0
  trap 'undo_start $?' EXIT
  trap 'exit 130' INT TERM HUP
  say "starting ${#ROLES[@]} processes; cluster $CLUSTER, etcd $ETCD"
  for role in etcd coordinator "prefill decode"; do
    for i in "${!ROLES[@]}"; do
      if [[ " $role " != *" ${ROLES[i]} "* ]]; then continue; fi
      STARTED+=("$i")
      start_one "$i"
      case $role in
        etcd | coordinator)
          await_http "$i" "$ADDRESS" /health
          report_up "$i"
          ;;
        *) WAITING[$i]=$WORKER_ID ;;
      esac
    done
  done
  await_workers
  for i in "${!ROLES[@]}"; do
    if [[ ${ROLES[i]} == coordinator ]] && first_index decode >/dev/null; then
      build_command "$i"
      await_http "$i" "$ADDRESS" /ready
    fi
  done
  trap - EXIT INT TERM HUP
  report_ready
}

report_ready() {
  local -i i
  say "ready after $SECONDS s"
  for i in "${!ROLES[@]}"; do
    build_command "$i"
    say "  $(printf '%-14s %-20s %-9s' "${NAMES[i]}" "${HOSTS[i]}" "${DEVICES[i]}") ${ADDRESS/#0.0.0.0:/${ADDRESSES[i]}:}"
  done
  for i in "${!ROLES[@]}"; do
    if [[ ${ROLES[i]} == coordinator ]]; then
      build_command "$i"
      say "OpenAI API  http://${ADDRESS/#0.0.0.0:/${ADDRESSES[i]}:}/v1"
      say "gRPC        ${GRPC_ADDRESS/#0.0.0.0:/${ADDRESSES[i]}:}"
    fi
  done
  say "workers     kvrelay workers --etcd $ETCD --cluster $CLUSTER"
  say "logs        $0 $HOSTFILE logs -f"
  say "stop        $0 $HOSTFILE stop"
}
