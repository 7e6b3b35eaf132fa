#!/bin/bash
# Starts a run over several machines under Slurm. Each machine holds a whole model, sharded over its GPUs (--hsdp). If
# VLLM_NODES is above 0, that many more machines run vLLM servers. Arguments are options of dwrl_fast.train:
#
#   sbatch --nodes 2 recipes/machines/slurm.sh --config recipes/backbones/qwen2.5-7b-instruct.yaml recipes/data/hh.yaml \
#       recipes/methods/dwrl.yaml recipes/machines/8-gpus.yaml --output_dir runs/hh-dwrl
#
#   VLLM_NODES=1 MODEL=Qwen/Qwen2.5-7B-Instruct sbatch --nodes 3 recipes/machines/slurm.sh --config ...
#
# All machines must see the checkout, --output_dir and, with servers, TMPDIR. The script was tested only with stand-ins
# for Slurm's commands; no cluster has run it yet.
#SBATCH --job-name dwrl
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 64
#SBATCH --requeue
set -euo pipefail

GPUS=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}}
VLLM_NODES=${VLLM_NODES:-0}
PYTHON=${PYTHON:-python}
PORT=${PORT:-29500}
mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
TRAINERS=("${HOSTS[@]:0:$((${#HOSTS[@]} - VLLM_NODES))}")
WRITERS=("${HOSTS[@]:${#TRAINERS[@]}}")
OPTIONS=("$@" --resume_from_checkpoint auto) # a job that is queued again resumes
if ((${#TRAINERS[@]} == 0)); then
    echo "VLLM_NODES=$VLLM_NODES leaves no machine to train on: request more --nodes" >&2
    exit 2
fi
if ((${#TRAINERS[@]} > 1)); then
    OPTIONS+=(--hsdp)
fi

if ((VLLM_NODES > 0)); then
    # Anyone who can reach these ports controls the server: keep them in the cluster's own network.
    ADDRESSES=()
    for host in "${WRITERS[@]}"; do
        srun --nodes 1 --ntasks 1 --nodelist "$host" env VLLM_SERVER_DEV_MODE=1 \
            "$PYTHON" -m vllm.entrypoints.openai.api_server --model "${MODEL:?the model that is trained}" --host "$host" \
            --port 8000 --dtype bfloat16 --logprobs-mode processed_logprobs --generation-config vllm \
            --tensor-parallel-size "$GPUS" &
        ADDRESSES+=("http://$host:8000")
    done
    trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
    OPTIONS+=(--use_vllm --vllm_mode server --vllm_server_base_url "${ADDRESSES[@]}")
fi

srun --nodes "${#TRAINERS[@]}" --ntasks "${#TRAINERS[@]}" --nodelist "$(IFS=,; echo "${TRAINERS[*]}")" \
    "$PYTHON" -m torch.distributed.run --nnodes "${#TRAINERS[@]}" --nproc-per-node "$GPUS" \
    --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID" --rdzv-endpoint "${TRAINERS[0]}:$PORT" \
    -m dwrl_fast.train "${OPTIONS[@]}"
