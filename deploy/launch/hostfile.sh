# shellcheck shell=bash
# What does a hostfile say? Sourced by ssh.sh; hosts.example describes the format.
#
# read_hostfile fills one array per column, indexed alike: line numbers, hosts as ssh names them, addresses (host
# without user and port), ssh ports, roles, names (role and number), ports (default ones of the role), devices,
# models, environment settings and options. The last two hold words quoted for the shell.

LINES_AT=() HOSTS=() ADDRESSES=() SSH_PORTS=() ROLES=() NAMES=() NUMBERS=() DEVICES=() MODELS=() SETTINGS=() OPTIONS=()

# Sets WORDS. Quotes and backslashes as in a shell, nothing is expanded, # begins a comment. Fails on an open quote.
split_words() {
  local text=$1 word="" quote="" started="" char
  local -i at
  WORDS=()
  for ((at = 0; at < ${#text}; at++)); do
    char=${text:at:1}
    if [[ $char == "$quote" ]]; then
      quote=""
    elif [[ -n $quote ]]; then
      word+=$char
    elif [[ $char == [\"\'] ]]; then
      quote=$char started=1
    elif [[ $char == [[:space:]] ]]; then
      if [[ -n $started ]]; then WORDS+=("$word"); fi
      word="" started=""
    elif [[ $char == "#" && -z $started ]]; then
      break
    elif [[ $char == "\\" ]]; then
      at+=1
      word+=${text:at:1} started=1
    else
      word+=$char started=1
    fi
  done
  if [[ -n $started ]]; then WORDS+=("$word"); fi
  [[ -z $quote ]]
}

# hostfile_error LINE MESSAGE: says where, and counts.
hostfile_error() {
  complain "$HOSTFILE line $1: $2"
  num_hostfile_errors+=1
}

read_hostfile() {
  local line
  local -i number=0 num_hostfile_errors=0
  local -A count=()
  if [[ ! -r $HOSTFILE ]]; then fail 2 "there is no hostfile $HOSTFILE; deploy/launch/hosts.example is one"; fi
  while IFS= read -r line || [[ -n $line ]]; do
    number+=1
    if ! split_words "$line"; then
      hostfile_error $number "a quote is opened and not closed"
    elif ((${#WORDS[@]} > 0)); then
      read_line $number "${WORDS[@]}"
    fi
  done <"$HOSTFILE"
  if ((${count[etcd]:-0} > 1)); then
    complain "$HOSTFILE: more than one etcd line; start an etcd cluster by its own means and name it in KVRELAY_ETCD"
    num_hostfile_errors+=1
  fi
  if ((num_hostfile_errors > 0)); then fail 2 "nothing was done; correct $HOSTFILE"; fi
  if ((${#ROLES[@]} == 0)); then fail 2 "$HOSTFILE names no process"; fi
}

# read_line NUMBER HOST ROLE DEVICES MODEL OPTION...
read_line() {
  local -i line=$1
  local host=${2:-} role=${3:-} devices=${4:--} model=${5:--} settings=() port=""
  if [[ ! $role =~ ^(etcd|coordinator|prefill|decode)$ ]]; then
    hostfile_error "$line" "'$role' is no role; write: host etcd|coordinator|prefill|decode devices model options"
    return
  fi
  shift $(($# < 5 ? $# : 5))
  while [[ ${1:-} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; do
    settings+=("$1")
    shift
  done
  case $devices in
    -) ;;
    gpu:* | cpu:*)
      if [[ ! ${devices#*:} =~ ^[A-Za-z0-9,|/-]+$ ]]; then
        hostfile_error "$line" "devices '$devices' name none; write gpu:0,1 or cpu:0-3"
      elif [[ $role == etcd || $role == coordinator ]]; then
        hostfile_error "$line" "devices are for workers; write - for a role like $role"
      elif [[ $devices == gpu:* ]]; then
        settings=("CUDA_VISIBLE_DEVICES=${devices#*:}" "${settings[@]}")
      else
        settings=("VLLM_CPU_OMP_THREADS_BIND=${devices#*:}" "${settings[@]}")
      fi
      ;;
    *) hostfile_error "$line" "devices '$devices' are not known; write gpu:0,1 or cpu:0-3, or - for the default" ;;
  esac
  if [[ $role == etcd && $model != - ]]; then hostfile_error "$line" "etcd has no model; write - for '$model'"; fi
  LINES_AT+=("$line") ROLES+=("$role") DEVICES+=("$devices") MODELS+=("$model")
  NAMES+=("$role-${count[$role]:-0}")
  # Workers of both roles share one range of ports.
  if [[ $role == prefill || $role == decode ]]; then
    NUMBERS+=("${count[workers]:-0}")
    count[workers]=$((${count[workers]:-0} + 1))
  else
    NUMBERS+=("${count[$role]:-0}")
  fi
  count[$role]=$((${count[$role]:-0} + 1))
  if [[ $host =~ ^(.*[^:]):([0-9]+)$ && ${BASH_REMATCH[1]} != *:* || $host =~ ^(.*\]):([0-9]+)$ ]]; then
    host=${BASH_REMATCH[1]} port=${BASH_REMATCH[2]}
  fi
  HOSTS+=("$host") SSH_PORTS+=("$port") ADDRESSES+=("${host##*@}")
  SETTINGS+=("$(quoted "${settings[@]}")")
  OPTIONS+=("$(quoted "$@")")
}

# The words in a form that the shell reads back.
quoted() {
  if (($# > 0)); then printf '%q ' "$@"; fi
}
