#!/usr/bin/env bash
# Generates the stubs of protos/ below the folder given.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: scripts/proto.sh FOLDER}
mapfile -t sources < <(find protos -name '*.proto' | sort)
.venv/bin/python -m grpc_tools.protoc -Iprotos \
  --plugin=protoc-gen-mypy=.venv/bin/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=.venv/bin/protoc-gen-mypy_grpc \
  --python_out="$out" --grpc_python_out="$out" --mypy_out="quiet:$out" --mypy_grpc_out="quiet:$out" "${sources[@]}"
# Files without a service get an empty service stub; nobody imports it.
find "$out/kvrelay" -name '*_pb2_grpc.py' | while read -r stub; do
  if ! grep -q '^class ' "$stub"; then rm -f "$stub" "${stub}i"; fi
done
