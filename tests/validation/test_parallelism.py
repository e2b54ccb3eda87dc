"""A layout that cannot work ends at start in one sentence; one that can passes, and Megatron's own checks after it."""

import sys
from argparse import Namespace
from collections import defaultdict

import pytest

from neo_megatron.errors import ConfigError
from neo_megatron.run import pretraining, start_checks

# Megatron builds flags in a way that argparse is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.type. is deprecated:DeprecationWarning")

# NEO-2B: 16 query heads, 8 key-value heads, 12 + 28 layers, 151936 words.
RUN = "--neo-model neo-2b --seq-length 4096 --micro-batch-size 1 --global-batch-size 64 --train-iters 1"
TP, PP, CP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size"
CHUNKS, LAYERS_OF_CHUNK = "--num-virtual-stages-per-pipeline-rank", "--num-layers-per-virtual-pipeline-stage"
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
FP8 = "--bf16 --transformer-impl transformer_engine --fp8-format hybrid"
TENSORWISE = f"{FP8} --fp8-recipe tensorwise"
BLOCKWISE = f"{FP8.replace('hybrid', 'e4m3')} --fp8-recipe blockwise"
LAYERNORM = "--recompute-granularity selective --recompute-modules layernorm"
MOE, EXPERTS = "--recompute-granularity selective --recompute-modules", "--neo-model u1-a3b"
ZERO_3 = "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params"

REFUSED = [
    # Ranks.
    (6, f"{TP} 2 {PP} 2", "needs a multiple of 4 processes, not 6: start as many"),
    (8, f"{CP} 0", "--context-parallel-size 0: a parallel size is at least 1"),
    # Tensor and sequence parallelism.
    (3, f"{TP} 3", "--tensor-model-parallel-size 3 does not divide the 16 query heads"),
    (16, f"{TP} 16", "--tensor-model-parallel-size 16 does not divide the 8 key-value heads"),
    (8, f"{TP} 8 --vocab-size 151937", "does not divide the 151937 vocabulary rows"),
    (8, f"{TP} 8 --ffn-hidden-size 6148", "does not divide the 6148 channels of --ffn-hidden-size"),
    (1, "--sequence-parallel", "add --tensor-model-parallel-size 2"),
    (2, f"{TP} 2 --tp-comm-overlap", "add --sequence-parallel"),
    # Experts; the last of two flags counts.
    (1, f"{MOE} mlp {EXPERTS}", "--recompute-modules mlp is without effect in this --neo-model: choose moe"),
    (1, f"{MOE} moe", "--recompute-modules moe is without effect in this --neo-model: choose mlp"),
    (1, f"{MOE} mlp_act {EXPERTS}", "--recompute-modules mlp_act is for a --neo-model without experts"),
    (1, f"{MOE} mlp mlp_act", "--recompute-modules mlp recomputes what mlp_act does"),
    (1, f"{MOE} mlp_act {FP8} --fp8-recipe delayed", "mlp_act does not go with --fp8-recipe delayed"),
    (2, f"{MOE} qkv_heads {CP} 2", "qkv_heads frees nothing with --context-parallel-size"),
    (4, f"{BLOCKWISE} {TP} 4 --sequence-parallel {EXPERTS}", "and a rank has 192 channels of an expert"),
    # Megatron-FSDP; the last of two flags counts.
    (2, f"{ZERO_3.replace('optim_grads_params', 'no_shard')}", "no_shard shards nothing: choose optim, optim_grads or"),
    (4, f"{ZERO_3} {PP} 2", "--use-megatron-fsdp does not go with --pipeline-model-parallel-size"),
    (4, f"{ZERO_3} {TP} 2", "--use-megatron-fsdp does not go with --tensor-model-parallel-size"),
    (2, f"{ZERO_3} {EXPERTS}", "--use-megatron-fsdp does not go with a mixture of experts"),
    (2, f"{ZERO_3} {TENSORWISE}", "--use-megatron-fsdp does not go with FP8"),
    (2, f"{ZERO_3} --fp16", "--use-megatron-fsdp does not go with --fp16: choose --bf16"),
    (2, f"{ZERO_3} --optimizer sgd", "--use-megatron-fsdp does not go with --optimizer sgd: choose --optimizer adam"),
    (2, f"{ZERO_3} --log-params-norm", "--log-params-norm is not for --use-megatron-fsdp: leave one of them out"),
    # The sequence.
    (1, "--seq-length 65536", "--seq-length 65536 is more than --max-position-embeddings 40960"),
    (4, f"{CP} 4 --seq-length 4100", "needs a --seq-length that is a multiple of 8, not 4100"),
    (4, f"{TP} 4 --sequence-parallel --seq-length 4098", "needs a --seq-length that is a multiple of 4, not 4098"),
    (8, f"{TP} 4 {CP} 2 --sequence-parallel --seq-length 4100", "a --seq-length that is a multiple of 8, not 4100"),
    # Context parallelism.
    (2, f"{CP} 2 --cp-comm-type p2p", "--cp-comm-type p2p: NEO's mask has one way for all layers, a2a or allgather"),
    (2, f"{CP} 2 --cp-comm-type a2a allgather", "one way for all layers"),
    (16, f"{TP} 4 {CP} 4 --cp-comm-type a2a", "rank's 2 key-value heads cannot be divided evenly; choose --cp-comm"),
    (2, f"{CP} 2 --hierarchical-context-parallel-sizes 1 2", "--hierarchical-context-parallel-sizes 1 2: NEO's mask"),
    # The pipeline.
    (64, f"{PP} 64", "40 layers are too few for 64 pipeline stages"),
    (
        3,
        f"{PP} 3 --account-for-loss-in-pipeline-split",
        "--pipeline-model-parallel-size 3 does not divide the 41 layers",
    ),
    (4, f"{PP} 4 {LAYERS_OF_CHUNK} 4", "--num-layers-per-virtual-pipeline-stage 4 does not divide the 10 layers"),
    (4, f"{PP} 4 {LAYERS_OF_CHUNK} 5 {CHUNKS} 2", "say the same thing in two ways: give one"),
    (4, f"{PP} 4 {FIRST} 8 {LAST} 7", "leave 25 layers to the 2 pipeline stages between them"),
    (4, f"{PP} 4 {FIRST} 10 {LAYERS_OF_CHUNK} 5", "wants alike stages"),
    (4, f"{PP} 4 {FIRST} 7 {CHUNKS} 3", "--num-virtual-stages-per-pipeline-rank 3 does not divide the 7 layers"),
    (2, f"{PP} 2 --pipeline-model-parallel-layout Ettt|tttL", "it has 6 layers, the model has 40"),
    (4, f"{PP} 4 --pre-buffer-pipeline-stages 4", "both the pre-buffer and the post-LLM need at least one stage"),
    (4, f"{PP} 4 {CHUNKS} 2 --no-overlap-p2p-communication", "train wrongly: leave that flag out"),
    (2, f"{CHUNKS} 2", "virtual pipeline stages need a pipeline"),
    (
        4,
        f"{PP} 4 {CHUNKS} 2 --global-batch-size 6",
        "--global-batch-size 6 makes 6: choose one that makes a multiple of 4",
    ),
    (4, f"{PP} 4 {CHUNKS} 2 --global-batch-size 2", "--global-batch-size 2 makes 2: choose one"),
    # The batch.
    (
        4,
        "--global-batch-size 6",
        "--global-batch-size 6 is not a multiple of --micro-batch-size 1 times the 4",
    ),
    (4, "--micro-batch-size 3", "choose a multiple of 12"),
    (4, "--eval-global-batch-size 2", "--eval-global-batch-size 2 is not a multiple of"),
    # FP8.
    (1, "--bf16 --fp8-format hybrid --transformer-impl local", "needs --transformer-impl transformer_engine and a GPU"),
    (1, f"{FP8.replace('--bf16', '')}", "a model in bfloat16: add --bf16"),
    (1, f"{FP8} --first-last-layers-bf16", "does not go with --fp8-recipe delayed"),
    (1, f"{FP8} {LAYERNORM}", "--recompute-modules layernorm does not go with --fp8-recipe delayed"),
    (4, f"{TENSORWISE} {PP} 4 --first-last-layers-bf16 --num-layers-at-end-in-bf16 11", "more than the 10 layers of a"),
    (1, "--first-last-layers-bf16", "add --fp8-format hybrid"),
    (2, "--use-distributed-optimizer --fp8-param-gather", "add --fp8-format hybrid"),
    (1, f"{FP8} --fp8-recipe blockwise", "does not go with --fp8-format hybrid"),
    (1, f"{TENSORWISE.replace('hybrid', 'e4m3')}", "hybrid's e5m2: choose --fp8-format hybrid"),
    (
        2,
        f"{FP8} --fp8-param-gather --use-distributed-optimizer",
        "--fp8-param-gather does not go with --fp8-recipe delayed",
    ),
    (2, f"{TENSORWISE} --fp8-param-gather", "needs the float32 weights of --use-distributed-optimizer"),
    (
        2,
        f"{TENSORWISE} --fp8-param-gather --use-distributed-optimizer --training-stage 1",
        "would round the language model",
    ),
    (
        1,
        f"{FP8} --seq-length 4088",
        "x --micro-batch-size 1 over 1 rank is 4088: pack again with neo-megatron pack --seq-length 4096",
    ),
    (
        8,
        f"{TENSORWISE} {TP} 4 {CP} 2 --sequence-parallel --seq-length 4160",
        "over 8 ranks is 520: pack again with neo-megatron pack --seq-length 4224",
    ),
    (1, f"{FP8} --seq-length 4072 --micro-batch-size 2 --eval-micro-batch-size 1", "--eval-micro-batch-size 1 over"),
    (1, f"{FP8} --ffn-hidden-size 6152", "needs multiples of 16, and a rank has 6152 channels of --ffn-hidden-size"),
    (8, f"{BLOCKWISE} {TP} 8 --hidden-size 2112 --kv-channels 128", "needs multiples of 128, and a rank has 2112"),
    (4, f"{BLOCKWISE} {TP} 4 --ffn-hidden-size 6400", "choose a smaller --tensor-model-parallel-size, or --fp8-recipe"),
    # What goes with a layout.
    (2, "--overlap-param-gather", "needs --use-distributed-optimizer and --overlap-grad-reduce"),
    (1, "--recompute-granularity full", "add --recompute-method uniform --recompute-num-layers 1"),
    (1, "--recompute-activations --recompute-num-layers 1", "leave out --recompute-method and --recompute-num-layers"),
    (1, "--distribute-saved-activations", "needs --tensor-model-parallel-size of 2 or more"),
]

ACCEPTED = [
    (1, "", None),
    (1024, f"{TP} 8 {PP} 4 {CP} 2 --sequence-parallel --use-distributed-optimizer", "allgather"),
    (8, f"{CP} 8", "a2a"),
    (16, f"{TP} 4 {CP} 4", "allgather"),
    (3, f"{PP} 3 --global-batch-size 3", None),
    (3, f"{PP} 3 --account-for-embedding-in-pipeline-split --account-for-loss-in-pipeline-split", None),
    (4, f"{PP} 4 {CHUNKS} 2", None),
    (4, f"{PP} 4 {LAYERS_OF_CHUNK} 5", None),
    (4, f"{PP} 4 {FIRST} 6 {LAST} 6 {CHUNKS} 2", None),
    (4, f"{PP} 4 --pre-buffer-pipeline-stages 1", None),
    (2, f"{TP} 2 --distribute-saved-activations --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1", None),
    (2, "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather", None),
    (1, f"{FP8} --training-stage 1", None),
    (2, f"{TENSORWISE} --fp8-param-gather --use-distributed-optimizer", None),
    (8, f"{BLOCKWISE} --first-last-layers-bf16 {TP} 8 --sequence-parallel {LAYERNORM}", None),
    (4, f"{BLOCKWISE} {TP} 2 --sequence-parallel --expert-model-parallel-size 2 {EXPERTS}", None),
    (4, f"{BLOCKWISE} {TP} 4 --sequence-parallel --expert-tensor-parallel-size 1 {EXPERTS}", None),
    (8, f"{BLOCKWISE} {TP} 8 --neo-model u1-8b --kv-channels 64", None),
    (1, f"{TENSORWISE} --seq-length 4088 --micro-batch-size 2 --eval-micro-batch-size 2", None),
]  # fmt: skip


@pytest.fixture
def parse(monkeypatch):
    """Arguments that `pretrain_neo` parses from a command line, with the environment of rank 0 of so many processes."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training import global_vars
    from megatron.training.argument_utils import ArgumentGroupFactory

    # Megatron parses its own source for the texts of --help, which takes a second.
    monkeypatch.setattr(ArgumentGroupFactory, "_get_field_docstrings", lambda factory, dataclass: defaultdict(str))

    # A machine with GPUs has the packages that the flags need.
    monkeypatch.setattr(start_checks, "_check_packages", lambda args: {"transformer_engine"})

    def parse_arguments(processes: int, flags: str) -> Namespace:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr(sys, "argv", ["pretrain_neo", *RUN.split(), *flags.split()])
        return pretraining.parse_arguments()

    yield parse_arguments
    if global_vars._GLOBAL_SIGNAL_HANDLER:
        global_vars._GLOBAL_SIGNAL_HANDLER.release()
    global_vars.destroy_global_vars()
    unset_num_microbatches_calculator()


@pytest.mark.parametrize("processes, flags, sentence", REFUSED)
def test_impossible_layouts_end_in_one_sentence(parse, processes, flags, sentence):
    with pytest.raises(ConfigError) as refused:
        parse(processes, flags)
    assert sentence in str(refused.value)


@pytest.mark.parametrize("processes, flags, way", ACCEPTED)
def test_possible_layouts_pass(parse, processes, flags, way):
    args = parse(processes, flags)
    assert way is None or args.cp_comm_type == [way]
