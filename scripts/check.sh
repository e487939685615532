#!/usr/bin/env bash
# Everything that can be said about the sources without running them.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
$bin/ruff format --check .
$bin/ruff check .
$bin/mypy
$bin/lint-imports
mapfile -t shell < <(git ls-files '*.sh' '*.sbatch' .ci/run)
$bin/shellcheck "${shell[@]}"
fresh=$(mktemp -d)
trap 'rm -rf "$fresh"' EXIT
scripts/proto.sh "$fresh"
for package in "$fresh"/kvrelay/*; do
  name=$(basename "$package")
  (cd "$package" && find . -type f) | while read -r stub; do
    cmp -s "$package/$stub" "src/kvrelay/$name/$stub" || { echo "stale stub: src/kvrelay/$name/$stub; run make proto"; exit 1; }
  done
done
echo "check: all good"
