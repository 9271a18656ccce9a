#!/usr/bin/env bash
# Train under Slurm, one task a GPU, and go on in a new job until the run is done.
#
#   sbatch --nodes 4 pretrain/launch/slurm.sh --size xl --opt celo2 --data /shared/fineweb-edu --out-dir /shared/xl
#
# Five minutes before the time limit Slurm sends SIGUSR1 to every task: they save together and exit 0, and the job is
# requeued if it has made a step. A preempted job gets SIGTERM, which saves as well. --data and --out-dir must be on a shared
# file system.
# Relative paths are those of the folder that it is submitted from (or of --chdir). PYTHON is an interpreter that celo2 is
# installed for, by default .venv/bin/python of that folder where there is one, else python3.
#SBATCH --job-name celo2
#SBATCH --nodes 1
#SBATCH --ntasks-per-node 8
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 8
#SBATCH --time 24:00:00
#SBATCH --signal USR1@300
#SBATCH --requeue
#SBATCH --open-mode append
#SBATCH --output celo2-%j.log
set -euo pipefail
export MASTER_ADDR MASTER_PORT
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
MASTER_PORT="$((20000 + SLURM_JOB_ID % 20000))"
default=python3
if [[ -x .venv/bin/python ]]; then
    default=.venv/bin/python
fi
export PYTHON="${PYTHON:-$default}" OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-4}"

# the trainer makes this file when it was interrupted and has made progress
export CELO2_REQUEUE="$PWD/.celo2-requeue-$SLURM_JOB_ID"
rm -f "$CELO2_REQUEUE"
# this shell outlives the signal; the tasks answer it
trap '' USR1
status=0
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c '
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))
    # -P: the package that is installed, whatever lies in this folder
    exec "$PYTHON" -P -m celo2.pretrain.train_gpt --resume auto "$@"' bash "$@" || status=$?

if [[ -e $CELO2_REQUEUE ]]; then
    rm "$CELO2_REQUEUE"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
