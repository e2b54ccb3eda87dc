#!/usr/bin/env bash
# Trains one size through one stage, on one machine or as a rank of a multi-node job.
#
#   PACKS=packs/stage1 CHECKPOINT=checkpoints/qwen3-1.7b-neo OUTPUT=runs/2b-stage1 bash examples/train.sh neo-2b 1 [flags]
#
# Every flag of pretrain_neo may follow and wins over what is set here. PACKS may be the .yaml file of a mixture, such as
# those of examples/mixtures. VALID_PACKS adds evaluation on held-out packs.
# The same command again resumes from the newest complete checkpoint in OUTPUT; OUTPUT/logs has the full log.
# With --dry-run it checks all that can be checked on one process and prints what the run will hold and take.
# Multi-node: the variables of torchrun, set by the scheduler: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
set -euo pipefail

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
size=$1 stage=$2
shift 2
: "${PACKS:?directory written by neo-megatron pack, or file of a mixture}" "${OUTPUT:?directory for checkpoints and TensorBoard}"

# For machines with 8 GPUs of 80 GB and the longest packs of docs/training.md, for U1 of 16k and 32k tokens: the first
# choices of neo-megatron plan --search --gpus 8 --global-batch-size 128.
layout=() recomputed=()
elementwise=(--recompute-granularity selective --recompute-modules mlp_act)
case $size:$stage in
  neo-2b:1 | neo-ov-2b:1) ;;
  neo-2b:2) layout=(--context-parallel-size 2) recomputed=("${elementwise[@]}") ;;
  neo-2b:*) layout=(--pipeline-model-parallel-size 2 --context-parallel-size 2
    --pipeline-model-parallel-layout 'Ettt|ttt|ttt|ttt|ttt|ttt|ttt|tttt|tttt|tttt|tttt|tttL')
    recomputed=("${elementwise[@]}") ;;
  neo-ov-2b:*) layout=(--context-parallel-size 4) ;;
  neo-9b:1 | neo-ov-9b:1) layout=(--pipeline-model-parallel-size 2 --context-parallel-size 2
    --pipeline-model-parallel-layout 'Ettt|ttt|tttt|tttt|tttt|ttttt|ttttt|ttttt|ttttt|ttttL') ;;
  neo-9b:*) layout=(--pipeline-model-parallel-size 2 --context-parallel-size 4) recomputed=("${elementwise[@]}") ;;
  neo-ov-9b:*) layout=(--tensor-model-parallel-size 4 --sequence-parallel --context-parallel-size 2) ;;
  u1-8b:1) layout=(--context-parallel-size 2) ;;
  u1-8b:*) layout=(--tensor-model-parallel-size 2 --sequence-parallel
    --pipeline-model-parallel-size 2 --context-parallel-size 2
    --pipeline-model-parallel-layout 'Ettttt|ttttt|ttttt|ttttt|ttttt|tttttt|tttttt|tttttL')
    recomputed=("${elementwise[@]}") ;;
  u1-a3b:1) layout=(--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 6
    --context-parallel-size 2) ;;
  u1-a3b:*) layout=(--tensor-model-parallel-size 2 --sequence-parallel
    --pipeline-model-parallel-size 2 --context-parallel-size 2
    --expert-model-parallel-size 4 --expert-tensor-parallel-size 1)
    recomputed=(--recompute-granularity full --recompute-method uniform --recompute-num-layers 1) ;;
esac

# Megatron asks for it where tensor or context parallelism runs on GPUs before Blackwell; CUDA reads it once, at start.
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
# Packs have ever other numbers of patches, which leaves holes in segments of fixed sizes.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
if [[ " $* " == *" --dry-run "* ]]; then  # one process looks for all, on a machine without GPUs too
  [ "$gpus" -gt 0 ] || set -- "$@" --transformer-impl transformer_engine
  gpus=${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 8))}
  export RANK=0 WORLD_SIZE=$((${NNODES:-1} * gpus))
fi
# Of two ways to say the same thing Megatron takes one, so that a flag takes the place of what is set here.
flags=" $* "
given() { [[ "$flags" == *" $1 "* || "$flags" == *" $1="* ]]; }
# Megatron-FSDP wants several connections instead.
if given --use-megatron-fsdp && [ "$CUDA_DEVICE_MAX_CONNECTIONS" = 1 ]; then unset CUDA_DEVICE_MAX_CONNECTIONS; fi
precision=()
[ "$gpus" -eq 0 ] || precision=(--bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
! given --fp16 || precision=("${precision[@]:1}")
length=(--train-iters "${ITERATIONS:-10000}")
! given --train-samples || length=()
batch=(--global-batch-size "${GLOBAL_BATCH:-128}")
! given --step-batch-size-schedule || batch=()
! { given --recompute-granularity || given --recompute-activations; } || recomputed=()

packs=(--train-data-path "$PACKS")
case $PACKS in *.yaml | *.yml) packs=(--mixture "$PACKS") ;; esac

start=(
  python -m neo_megatron.launch
  --nnodes "${NNODES:-1}" --node-rank "${NODE_RANK:-0}"
  --master-addr "${MASTER_ADDR:-localhost}" --master-port "${MASTER_PORT:-6000}"
  --nproc-per-node "${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 1))}"
)
[ -z "${RANK:-}" ] || start=(python)  # the scheduler starts every rank itself, as in slurm.sbatch

exec "${start[@]}" -m neo_megatron.pretrain_neo \
  --neo-model "$size" --training-stage "$stage" \
  "${packs[@]}" ${VALID_PACKS:+--valid-data-path "$VALID_PACKS"} \
  --micro-batch-size 1 ${batch[@]+"${batch[@]}"} ${length[@]+"${length[@]}"} \
  ${CHECKPOINT:+--pretrained-checkpoint "$CHECKPOINT"} --save "$OUTPUT" --load "$OUTPUT" \
  --tensorboard-dir "$OUTPUT/tensorboard" --log-interval 10 --log-throughput \
  ${layout[@]+"${layout[@]}"} ${recomputed[@]+"${recomputed[@]}"} ${precision[@]+"${precision[@]}"} "$@"
