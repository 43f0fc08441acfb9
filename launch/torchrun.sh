#!/usr/bin/env bash
# Start a recipe with torchrun, on one node or the same way on each of many.
#
#   launch/torchrun.sh pretrain experiment=debug engine=megatron engine.tensor_parallel=2
#   NNODES=4 MASTER_ADDR=node0 launch/torchrun.sh pretrain experiment=... run_dir=/shared/run    # on every node
#
# NPROC_PER_NODE  processes on this node    (default: one per GPU, or 2 without a GPU)
# NNODES          nodes                     (default 1)
# MASTER_ADDR     a node all others reach   (needed from 2 nodes on)
# MASTER_PORT     a free port there         (default 29500)
# RUN_ID          the same on every node of a run (default stepaudio)
# MAX_RESTARTS    restarts after a failure, each from the last checkpoint (default 0)
# SHUTDOWN_S      time for the checkpoint after a stop signal (default 1800)
# PYTHON          interpreter               (default .venv/bin/python)
# DRY_RUN=1       print the command instead of running it
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
fail() { echo "launch/torchrun.sh: $*" >&2; exit 2; }

[ $# -ge 1 ] || fail "which recipe? type: launch/torchrun.sh RECIPE [KEY=VALUE ...]"
program="$root/recipes/$1.py"
[ -f "$program" ] || fail "no recipe '$1'; recipes: $(cd "$root/recipes" && ls -- *.py | sed 's/\.py$//' | tr '\n' ' ')"
shift

python="${PYTHON:-$root/.venv/bin/python}"
nnodes="${NNODES:-1}"
count_gpus='import torch; print(torch.cuda.device_count() or 2)'
ranks="${NPROC_PER_NODE:-$("$python" -c "$count_gpus")}"

if [ "$nnodes" -gt 1 ]; then
  [ -n "${MASTER_ADDR:-}" ] || fail "NNODES=$nnodes needs MASTER_ADDR=HOST, a node that all others reach"
  meeting=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:${MASTER_PORT:-29500}" --rdzv-id "${RUN_ID:-stepaudio}")
else
  meeting=(--standalone)
fi
# Older releases of torchrun always kill the ranks 30 s after a stop signal. Its source is read, since asking torchrun
# itself takes seconds.
grace=()
find_torch='import importlib.util; print(importlib.util.find_spec("torch").submodule_search_locations[0])'
if grep -qe --shutdown-timeout "$("$python" -c "$find_torch")/distributed/run.py"; then
  grace=(--shutdown-timeout "${SHUTDOWN_S:-1800}")
fi

threads="$(($(nproc) / ranks))"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}"
command=("$python" -m torch.distributed.run --nnodes "$nnodes" --nproc-per-node "$ranks" "${meeting[@]}"
  --max-restarts "${MAX_RESTARTS:-0}" "${grace[@]}" "$program" "$@")
if [ -n "${DRY_RUN:-}" ]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
