#!/usr/bin/env bash
# bench/compare.sh PYTHON REVISION: builds the package of a revision beside this tree and compares.
set -euo pipefail
python=$(realpath --no-symlinks "$1")
revision=$2
root=$(git -C "$(dirname "$0")" rev-parse --show-toplevel)
base=$(mktemp -d)
trap 'git -C "$root" worktree remove --force "$base/tree"; rm -rf "$base"' EXIT
git -C "$root" worktree add --quiet --detach "$base/tree" "$revision"
(cd "$base/tree" && FASTPG_CUDA=0 FASTPG_STRICT=1 "$python" setup.py -q build_ext --inplace >build.log)
cd "$root"
FASTPG_BASE="$base/tree" "$python" -m pytest -q -s -p no:xdist bench/regression.py \
  --benchmark-columns=median,iqr,rounds --benchmark-sort=name
