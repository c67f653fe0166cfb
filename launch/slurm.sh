#!/usr/bin/env bash
# Trains on the GPU nodes of a SLURM cluster. From the checkout, on a file system that all nodes share:
#
#     mkdir -p runs && sbatch launch/slurm.sh --config=configs/streamo.py:7b --workdir=runs/streamo
#     sbatch --nodes=4 --time=12:00:00 launch/slurm.sh --config=…          # options of sbatch go before the script
#
# What stands at the top can be changed there or on the command line; everything after the script goes to jstream.train.
# A job that is preempted, loses a node or reaches its time limit goes back into the queue, and the run goes on from its
# last checkpoint, so the time limit may be shorter than the run. A run that fails of itself is not started again.
#
#SBATCH --job-name=jstream
#SBATCH --output=runs/slurm-%j.log
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
#
# One process a GPU, as JAX expects of SLURM: it gives the n-th process of a node the n-th GPU. Therefore as many tasks
# as GPUs on a node, and every task has to see all of them (no --gpus-per-task).
#
# The signal is what has the run save before its time is over (SLURM may send it a minute early). It is not B:TERM: that
# reaches only this shell, and srun, told to end, kills its tasks where they stand. Preemption sends SIGTERM by itself.

set -euo pipefail

PYTHON=${PYTHON:-.venv/bin/python}

# Where a cluster sets a proxy, JAX may look for its coordinator through it, and not find it:
# unset http_proxy https_proxy HTTP_PROXY HTTPS_PROXY all_proxy ALL_PROXY

# When one process fails all end at once; without --kill-on-bad-exit the others would first miss its heartbeats.
status=0
srun --kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  "$PYTHON" -m jstream.train --distributed "$@" || status=$?

# 128 + SIGTERM: the run has saved and is not done.
if [ "$status" = 143 ]; then
  echo "interrupted; back into the queue (start ${SLURM_RESTART_COUNT:-0})"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
