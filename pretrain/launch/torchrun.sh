#!/usr/bin/env bash
# Train on several machines without a scheduler: run this on every one of them, with the same arguments.
#
#   HEAD=node0 NODES=4 pretrain/launch/torchrun.sh --size xl --opt celo2 --data /shared/fineweb-edu --out-dir /shared/xl
#
# HEAD     address of one of the machines, where they meet (default: localhost)
# NODES    number of machines (default: 1)
# GPUS     processes a machine (default: gpu, one for each; give a number on machines without)
# PORT     a free port of HEAD (default: 29500)
# JOB      name of the meeting, the same everywhere (default: celo2)
# RESTARTS how often all ranks start again, from their last checkpoint, after one has failed (default: 0: a run that ended
#          itself, as after --max-skips, would go on as well)
#
# It may be called from any folder: relative paths are the caller's. --data and --out-dir must be folders that every machine
# sees. SIGTERM or SIGUSR1 to this process saves and stops the run; torchrun itself then ends with a status that is not 0.
# A terminal that is closed (SIGHUP) makes no difference.
set -euo pipefail
trainer="$(dirname "$(readlink -f "$0")")/../train_gpt.py"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}"
# ranks that start again must not read the addresses of those before them
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# without SIGHUP, at which torchrun would end its ranks
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGQUIT,SIGUSR1
trap '' HUP
TORCHRUN="${TORCHRUN:-torchrun}"
options=()
help="$("$TORCHRUN" --help)"
if [[ $help == *--shutdown-timeout* ]]; then
    # a save of a large model may take longer than the 30 seconds that torchrun leaves it by default
    options+=(--shutdown-timeout 600)
fi
if [[ $help == *--signals-to-handle* ]]; then
    # where it is an option, it overwrites the variable
    options+=(--signals-to-handle "$TORCHELASTIC_SIGNALS_TO_HANDLE")
fi
exec "$TORCHRUN" ${options[@]+"${options[@]}"} \
    --nnodes "${NODES:-1}" --nproc-per-node "${GPUS:-gpu}" --max-restarts "${RESTARTS:-0}" \
    --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost}:${PORT:-29500}" --rdzv-id "${JOB:-celo2}" \
    "$trainer" --resume auto "$@"
