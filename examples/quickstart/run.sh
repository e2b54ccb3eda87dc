#!/usr/bin/env bash
# Runs the complete pipeline on real images, on two CPU cores or on GPUs: a small NEO learns to answer questions about
# unseen images, and answers them as a Hugging Face checkpoint.
#     usage: [LAYOUT=pp2|tp2|cp2|dp2] [VARIANT=neo|u1] [SEED=N] bash examples/quickstart/run.sh
#
# Everything is written to examples/quickstart/out, which every run empties first; the report is out/report.html.
# On two machines that share this directory: NNODES=2, NODE_RANK=0 or 1, MASTER_ADDR and MASTER_PORT, on machine 0 first.
# It prepares the data, exports and evaluates; the other one trains with it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

# ---- settings ------------------------------------------------------------------------------------------------------
# pp2: the pre-buffer on a pipeline stage of its own; dp2: data parallelism, the fastest here; tp2: tensor parallelism,
# whose communication makes it about twice as slow on a CPU; cp2: context parallelism.
LAYOUT=${LAYOUT:-pp2}
# neo: attention as in NEO 1.0; u1: as in SenseNova-U1, with the same number of layers and channels.
VARIANT=${VARIANT:-neo}
SEED=${SEED:-1234}              # of the model's start and the order of packs
PIXELS=16384                    # of an image: 128 x 128, 16 tokens
VOCABULARY=512                  # tokens
QUESTIONS_PER_SAMPLE=1          # more share the tokens of an image
SEQUENCE=256                    # tokens of a pack
PACKS_PER_STEP=8                # --global-batch-size
PACKS_AT_ONCE=2                 # --micro-batch-size
INIT_STD=0.1                    # about 1/sqrt(hidden size): so small a model learns shapes many times faster than at 0.02
# A first run on the questions about shapes, a second on all questions with the first ones mixed in: colours are so much
# easier that together with them, from a random start, shapes would hardly be learnt in minutes.
SHAPES=(shapes)
SHAPE_STEPS=${SHAPE_STEPS:-350}
QUESTIONS=(questions shapes)
QUESTION_STEPS=${QUESTION_STEPS:-1300}
LEARNING_RATE=5e-4
# --------------------------------------------------------------------------------------------------------------------

here=examples/quickstart
out=$here/out
start=$SECONDS
NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0}

headline() { printf '\n\033[1m== %s\033[0m\n' "$1"; }

# step TITLE COMMAND...: a headline, the command, and its seconds for the table at the end
step() {
  local title=$1 began=$SECONDS
  shift
  headline "$title"
  "$@"
  printf '%s\t%s\n' "$title" $((SECONDS - began)) >>"$out/seconds.tsv"
}

# train NAME PACKS STEPS [flags]: the console shows where training stands, $out/NAME/logs has all
train() {
  local name=$1 packs=$2 steps=$3
  shift 3
  python -m neo_megatron.launch "${start_ranks[@]}" --nproc-per-node "$processes" -m neo_megatron.pretrain_neo \
    --neo-model "$out/model" ${layout[@]+"${layout[@]}"} ${device[@]+"${device[@]}"} \
    --train-data-path "$packs" --valid-data-path "$out/packs/test" --seq-length "$SEQUENCE" \
    --micro-batch-size "$PACKS_AT_ONCE" --global-batch-size "$PACKS_PER_STEP" --num-workers 0 \
    --train-iters "$steps" --init-method-std "$INIT_STD" --seed "$SEED" \
    --lr "$LEARNING_RATE" --min-lr 5e-5 --lr-warmup-fraction 0.05 \
    --log-interval 10 --eval-interval 400 --eval-iters 2 --save "$out/$name" --save-interval "$steps" \
    --tensorboard-dir "$out/$name/tensorboard" "$@"
}

preprocess_and_pack() {
  local name=$1
  shift
  neo-megatron preprocess --registry "$out/registry.yaml" --datasets "$@" --tokenizer "$out/tokenizer" \
    --output "$out/shards/$name" --min-pixels "$PIXELS" --max-pixels "$PIXELS" --image-store encoded \
    --records-per-shard 2048 --on-error fail
  neo-megatron pack --data "$out/shards/$name" --output "$out/packs/$name" --seq-length "$SEQUENCE" --on-error fail
}

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
processes=2 device=()
if [ "$gpus" -gt 0 ]; then
  # The fused kernels of apex and Transformer Engine are not installed by this script.
  device=(--bf16 --transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm
    --no-masked-softmax-fusion --no-rope-fusion)
fi
case $LAYOUT in
  pp2) layout=(--pipeline-model-parallel-size 2 --pre-buffer-pipeline-stages 1) ;;
  tp2) layout=(--tensor-model-parallel-size 2 --sequence-parallel) ;;
  cp2) layout=(--context-parallel-size 2) ;;
  dp2) layout=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather) ;;
  *) echo "LAYOUT=$LAYOUT: must be pp2, tp2, cp2 or dp2" >&2 && exit 2 ;;
esac
case $VARIANT in
  neo) form=separate ;;
  u1) form=in-head ;;
  *) echo "VARIANT=$VARIANT: must be neo or u1" >&2 && exit 2 ;;
esac
start_ranks=(--standalone)
case $NNODES in
  1)
    [ "$NODE_RANK" = 0 ] || { echo "NODE_RANK=$NODE_RANK is for NNODES=2: give both" >&2 && exit 2; }
    [ "$gpus" -ne 1 ] || { processes=1 layout=() LAYOUT="one GPU"; }
    ;;
  2)
    case $NODE_RANK in 0 | 1) ;; *) echo "NODE_RANK=$NODE_RANK: must be 0 or 1" >&2 && exit 2 ;; esac
    processes=1
    start_ranks=(--nnodes 2 --node-rank "$NODE_RANK")
    start_ranks+=(--master-addr "${MASTER_ADDR:?of machine 0}" --master-port "${MASTER_PORT:-6000}")
    ;;
  *) echo "NNODES=$NNODES: must be 1 or 2" >&2 && exit 2 ;;
esac

if [ "$NODE_RANK" -eq 0 ]; then
  rm -rf "$out"
  mkdir -p "$out/shards" "$out/packs"
fi
export OMP_NUM_THREADS=1

headline "Python environment"
. tools/environment.sh quickstart
echo "using $PYTHON"
export PATH="${PYTHON%/*}:$PATH"

train_on_shapes() { train train-shapes "$out/packs/shapes" "$SHAPE_STEPS"; }
train_on_questions() {
  train train-questions "$out/packs/questions" "$QUESTION_STEPS" --pretrained-checkpoint "$out/train-shapes"
}

if [ "$NODE_RANK" -ne 0 ]; then
  headline "Waiting for machine 0 to prepare the data"
  until [ -e "$out/prepared" ]; do sleep 1; done
  headline "Training"
  train_on_shapes
  train_on_questions
  exit
fi
printf '%s\t%s\n' "Python environment" $((SECONDS - start)) >"$out/seconds.tsv"

step "Annotations and tokenizer" python $here/prepare_data.py --output "$out" --pixels "$PIXELS" \
  --vocabulary "$VOCABULARY" --questions-per-sample "$QUESTIONS_PER_SAMPLE" --attention-form "$form"
step "Shards and packs of shapes" preprocess_and_pack shapes "${SHAPES[@]}"
step "Shards and packs of questions" preprocess_and_pack questions "${QUESTIONS[@]}"
step "Shards and packs of test questions" preprocess_and_pack test test
touch "$out/prepared"
step "Training on shapes ($LAYOUT)" train_on_shapes
step "Training on questions ($LAYOUT)" train_on_questions
rm "$out/prepared"
step "Export to Hugging Face form" neo-megatron convert megatron-to-hf --megatron "$out/train-questions" \
  --tokenizer "$out/tokenizer" --output "$out/neo"
step "Answering the test questions" neo-megatron evaluate --model "$out/neo" --registry "$out/registry.yaml" \
  --datasets test --batch-size 128 --max-new-tokens 12 --output "$out/evaluation"
step "Report" python $here/report.py --data "$out"

headline "Seconds"
awk -F'\t' '{ printf "%6d  %s\n", $2, $1 }' "$out/seconds.tsv"
printf '%6d  %s\n' $((SECONDS - start)) "in all"
