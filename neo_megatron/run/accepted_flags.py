"""Flags of Megatron that a training of NEO takes, and for some of them which values, or which other flag they need."""

from argparse import Namespace
from collections.abc import Callable

from neo_megatron.run.flag_status import OnlyValues, OnlyWith, Status, Verdict


def _works(test: str, flags: str) -> Verdict:
    return Verdict(Status.WORKS, test, tuple(flags.split()))


def _on_gpu(what: str, flags: str) -> Verdict:
    return Verdict(Status.WORKS_ON_GPU, what, tuple(flags.split()))


def _no_effect(why: str, flags: str) -> Verdict:
    return Verdict(Status.NO_EFFECT, why, tuple(flags.split()))


# By the test that shows it.
WORKS = (
    _works(
        "tests/distributed/test_failures.py",
        """
        --distributed-timeout-minutes
        """,
    ),
    _works(
        "tests/distributed/test_evaluation.py",
        """
        --start-eval-at-iter --skip-train --full-validation --test-data-path
        """,
    ),
    _works(
        "tests/distributed/test_flags.py",
        """
        --no-initialization --use-cpu-initialization --fp16 --cross-entropy-loss-fusion
        --microbatch-group-size-per-virtual-pipeline-stage --hidden-dropout --init-method-std
        --embedding-init-method-std --distribute-saved-activations --recompute-modules
        --no-clone-scatter-output-in-embedding --mlp-chunks-for-training --adam-eps --sgd-momentum --profile
        --profile-step-start --profile-step-end --use-pytorch-profiler --pytorch-profiler-collect-shapes
        --pytorch-profiler-collect-callstack --pytorch-profiler-collect-chakra --profile-ranks
        --step-batch-size-schedule --check-weight-hash-across-dp-replicas-interval --train-samples
        --exit-duration-in-mins --manual-gc --manual-gc-interval --no-manual-gc-eval --iterations-to-skip
        --recompute-activations --no-check-for-nan-in-loss-and-grad --check-for-large-grads --no-bias-swiglu-fusion
        --no-bias-dropout-fusion --dump-param-to-param-group-map --seed --data-parallel-random-init --decoupled-lr
        --save-params-interval --save-wgrads-interval --exit-on-missing-checkpoint --no-ckpt-fully-parallel-save
        --ckpt-fully-parallel-load-exchange-algo --ckpt-assume-constant-structure
        --no-ckpt-load-validate-sharding-integrity --dist-ckpt-strictness
        --distrib-optim-fully-reshardable-mem-efficient --no-save-rng --no-load-rng --dist-ckpt-workers
        --grad-reduce-in-bf16 --loss-scale --initial-loss-scale --min-loss-scale --loss-scale-window --hysteresis
        --accumulate-allreduce-grads-in-fp32 --no-align-grad-reduce
        --distributed-timeout-seconds-after-init --disable-jit-fuser --ddp-num-buckets --ddp-bucket-size
        --ddp-pad-buckets-for-high-nccl-busbw --ddp-reduce-scatter-with-fp32-accumulation
        --ddp-param-name-patterns-for-fp32-local-accumulation --no-align-param-gather --eval-global-batch-size
        --eval-micro-batch-size --log-params-norm --log-throughput --log-progress --timing-log-level
        --timing-log-option --tensorboard-log-interval --tensorboard-queue-size --log-timers-to-tensorboard
        --no-log-loss-scale-to-tensorboard --log-validation-ppl-to-tensorboard --log-num-zeros-in-grad
        --no-barrier-with-level-1-timing --log-world-size-to-tensorboard --logging-level --rerun-mode --no-save-optim
        --no-load-optim
        """,
    ),
    _works(
        "tests/distributed/test_layouts.py",
        """
        --pipeline-model-parallel-size --sequence-parallel --context-parallel-size --bf16 --recompute-granularity
        --recompute-method --recompute-num-layers --micro-batch-size --global-batch-size --train-iters --save
        --pretrained-checkpoint --num-virtual-stages-per-pipeline-rank --overlap-grad-reduce --overlap-param-gather
        --use-distributed-optimizer --cp-comm-type --eval-iters --eval-interval --train-data-path --valid-data-path
        --num-workers --log-interval
        """,
    ),
    _works(
        "tests/distributed/test_fsdp.py",
        """
        --use-megatron-fsdp --data-parallel-sharding-strategy --suggested-communication-unit-size
        """,
    ),
    _works(
        "tests/distributed/test_experts.py",
        """
        --expert-model-parallel-size --expert-tensor-parallel-size --moe-router-load-balancing-type
        --moe-aux-loss-coeff --moe-token-dispatcher-type
        """,
    ),
    _works(
        "tests/distributed/test_muon.py",
        """
        --muon-momentum --muon-nesterov --muon-no-split-qkv --muon-scale-mode --muon-extra-scale-factor
        --muon-coefficient-type --muon-num-ns-steps --muon-fp32-matmul-prec --muon-tp-mode
        """,
    ),
    _works(
        "tests/distributed/test_pretrain.py",
        """
        --seq-length
        """,
    ),
    _works(
        "tests/distributed/test_run_checkpoints.py",
        """
        --tensor-model-parallel-size --exit-interval --override-opt-param-scheduler
        --use-checkpoint-opt-param-scheduler --save-interval --save-retain-interval --load --finetune --ckpt-step
        --ckpt-format --async-save --vocab-size --tensorboard-dir
        """,
    ),
    _works(
        "tests/distributed/test_stages.py",
        """
        --weight-decay --clip-grad --adam-beta1 --adam-beta2
        """,
    ),
    _works(
        "tests/examples/test_slurm.py",
        """
        --exit-signal
        """,
    ),
    _works(
        "tests/gpu/test_training.py",
        """
        --fp8-format --fp8-recipe --fp8-param-gather
        """,
    ),
    _works(
        "tests/model/test_flex_kernel.py",
        """
        --deterministic-mode --attention-backend
        """,
    ),
    _works(
        "tests/validation/test_parallelism.py",
        """
        --account-for-loss-in-pipeline-split --first-last-layers-bf16 --num-layers-at-end-in-bf16
        --decoder-first-pipeline-num-layers --decoder-last-pipeline-num-layers --pipeline-model-parallel-layout
        --num-layers-per-virtual-pipeline-stage --no-overlap-p2p-communication
        --account-for-embedding-in-pipeline-split
        """,
    ),
    _works(
        "tests/run/test_learning_rate.py",
        """
        --lr-decay-style --lr-wsd-decay-style --lr-decay-iters --lr-decay-samples --lr-wsd-decay-iters
        --lr-wsd-decay-samples --lr-warmup-fraction --lr-warmup-iters --lr-warmup-samples --lr-warmup-init
        --start-weight-decay --end-weight-decay --weight-decay-incr-style --lr --min-lr
        """,
    ),
    _works(
        "tests/run/test_training_arguments.py",
        """
        --num-layers --hidden-size --num-attention-heads --num-query-groups --ffn-hidden-size --kv-channels
        --norm-epsilon --transformer-impl --max-position-embeddings --untie-embeddings-and-output-weights --optimizer
        --dataloader-type --distributed-backend --wandb-project --wandb-exp-name --wandb-save-dir --wandb-entity
        --async-strategy --decoupled-min-lr
        """,
    ),
)

# By what acts on them.
WORKS_ON_GPU = (
    _on_gpu(
        "Transformer Engine: overlaps tensor-parallel traffic with products",
        """
        --tp-comm-overlap --tp-comm-overlap-rs-dgrad --tp-comm-bootstrap-backend --tp-comm-overlap-cfg
        --no-tp-comm-bulk-wgrad --no-tp-comm-bulk-dgrad --no-tp-comm-overlap-ag --no-tp-comm-overlap-rs
        --no-tp-comm-split-ag --no-tp-comm-split-rs
        """,
    ),
    _on_gpu(
        "Transformer Engine: activations and gradients of its layers, written to files",
        """
        --save-activations-interval --save-dgrads-interval
        """,
    ),
    _on_gpu(
        "Transformer Engine: FP8",
        """
        --fp8-margin --fp8-amax-history-len --fp8-amax-compute-algo --no-fp8-wgrad --reuse-grad-buf-for-mxfp8-param-ag
        --num-layers-at-start-in-bf16
        """,
    ),
    _on_gpu(
        "Transformer Engine: routers and the order of tokens of experts in one kernel each",
        """
        --moe-permute-fusion --moe-router-fusion
        """,
    ),
    _on_gpu(
        "Transformer Engine: random state",
        """
        --te-rng-tracker
        """,
    ),
    _on_gpu(
        "apex or Transformer Engine: optimizer state in few bits",
        """
        --use-precision-aware-optimizer --main-grads-dtype --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype
        """,
    ),
    _on_gpu(
        "apex or Transformer Engine: products that add to gradients",
        """
        --no-gradient-accumulation-fusion
        """,
    ),
    _on_gpu(
        "cuBLAS",
        """
        --disable-bf16-reduced-precision-matmul
        """,
    ),
    _on_gpu(
        "NCCL, SHARP and streams",
        """
        --pipeline-model-parallel-comm-backend --overlap-p2p-communication-warmup-flush
        --nccl-communicator-config-path --use-sharp --sharp-enabled-group --high-priority-stream-groups --use-nccl-ub
        --flight-recorder-dump-path --flight-recorder-trace-buffer-size --flight-recorder-include-stack-trace
        --no-flight-recorder-dump-on-timeout --no-flight-recorder-include-only-active
        --no-flight-recorder-extra-dump-on-exec
        """,
    ),
    _on_gpu(
        "the profiler of CUDA",
        """
        --nvtx-ranges --record-shapes
        """,
    ),
    _on_gpu(
        "test products that find a faulty GPU",
        """
        --gpu-sniff-test-interval
        """,
    ),
    _on_gpu(
        "waits for the GPU",
        """
        --train-sync-interval
        """,
    ),
    _on_gpu(
        "PyTorch's GPU memory",
        """
        --empty-unused-memory-level --log-memory-to-tensorboard --log-device-memory-used --log-memory-interval
        """,
    ),
    _on_gpu(
        "NVIDIA's management library",
        """
        --log-energy --log-straggler --straggler-ctrlr-port --straggler-minmax-count --disable-straggler-on-startup
        """,
    ),
    _on_gpu(
        "NVIDIA's resiliency extension",
        """
        --async-ckpt-cpu-priority --async-ckpt-io-priority --async-ckpt-use-cpu-shm
        """,
    ),
)

NO_EFFECT = (
    _no_effect(
        "deprecated in Megatron, which does it anyway",
        """
        --use-mcore-models --ckpt-fully-parallel-save --use-dist-ckpt --dist-ckpt-format --disable-msc
        """,
    ),
    _no_effect(
        "belongs to layers that NEO does not have",
        """
        --no-masked-softmax-fusion --no-bias-gelu-fusion --no-persist-layer-norm --no-rope-fusion
        --disable-bias-linear
        """,
    ),
    _no_effect(
        "NEO's softmax is always in float32",
        """
        --attention-softmax-in-fp32
        """,
    ),
    _no_effect(
        "NEO's loader never makes a dense mask",
        """
        --no-create-attention-mask-in-dataloader
        """,
    ),
    _no_effect(
        "NVIDIA's package is not public and never used",
        """
        --no-one-logger
        """,
    ),
    _no_effect(
        "Transformer Engine's experts are always computed together, the local ones never",
        """
        --moe-grouped-gemm
        """,
    ),
    _no_effect(
        "only --distrib-optim-fully-reshardable-mem-efficient has such groups, and needs them",
        """
        --disable-gloo-process-groups
        """,
    ),
    _no_effect(
        "always so in NEO",
        """
        --qk-layernorm --calculate-per-token-loss --group-query-attention --swiglu --exit-signal-handler
        --dist-ckpt-optim-fully-reshardable --ckpt-fully-parallel-load --use-persistent-ckpt-worker
        --no-stream-ckpt-dequant
        """,
    ),
)

ONLY_VALUES = (
    OnlyValues(
        "--optimizer",
        ("adam", "muon", "sgd"),
        "NEO has AdamW, Muon and SGD: choose --optimizer adam, muon or sgd; --use-distributed-optimizer shards",
    ),
    OnlyValues(
        "--muon-tp-mode",
        ("duplicated", "distributed"),
        "it would orthogonalize the part of a matrix that a rank holds, so that another --tensor-model-parallel-size "
        "trains otherwise: choose duplicated or distributed",
    ),
    OnlyValues("--muon-fp32-matmul-prec", ("medium", "high"), "PyTorch does not know it: choose medium or high"),
    OnlyValues(
        "--muon-coefficient-type",
        ("simple", "quintic", "polar_express", "cans", "aol", "deepseekv4"),
        "Emerging-Optimizers has no such coefficients: choose simple, quintic, polar_express, cans, aol or deepseekv4",
    ),
    OnlyValues(
        "--dataloader-type",
        ("external",),
        "NEO reads packs with a loader of its own, reshuffled every epoch: leave it out",
    ),
    OnlyValues(
        "--moe-router-load-balancing-type",
        ("none", "aux_loss", "seq_aux_loss"),
        "choose none, aux_loss or seq_aux_loss; a loss over the global batch is --balance-loss-coeff",
    ),
    OnlyValues(
        "--moe-token-dispatcher-type",
        ("alltoall", "allgather"),
        "the other one needs a library of its own: choose alltoall or allgather",
    ),
    OnlyValues(
        "--attention-backend",
        ("auto", "flash", "unfused"),
        "none of its kernels has NEO's mask: choose auto, flash or unfused",
    ),
    OnlyValues(
        "--transformer-impl",
        ("local", "transformer_engine"),
        "NEO's layers are Megatron's or Transformer Engine's: choose local or transformer_engine",
    ),
    OnlyValues(
        "--fp8-recipe",
        ("delayed", "tensorwise", "blockwise", "mxfp8"),
        "NEO has no recipe of its own: choose delayed, tensorwise or blockwise",
    ),
)


def _only_with(needed: str, where: Callable[[Namespace], object], flags: str) -> OnlyWith:
    return OnlyWith(needed, where, tuple(flags.split()))


ONLY_WITH = (
    _only_with(
        "--profile",
        lambda args: args.profile,
        """
        --profile-step-start --profile-step-end --profile-ranks --use-pytorch-profiler --nvtx-ranges --record-shapes
        """,
    ),
    _only_with(
        "--use-pytorch-profiler",
        lambda args: args.use_pytorch_profiler,
        """
        --pytorch-profiler-collect-shapes --pytorch-profiler-collect-callstack --pytorch-profiler-collect-chakra
        """,
    ),
    _only_with(
        "a --neo-model with experts",
        lambda args: args.num_experts,
        """
        --expert-model-parallel-size --expert-tensor-parallel-size --moe-router-load-balancing-type
        --moe-aux-loss-coeff --moe-token-dispatcher-type --moe-permute-fusion --moe-router-fusion
        """,
    ),
    _only_with("--optimizer sgd", lambda args: args.optimizer == "sgd", "--sgd-momentum"),
    _only_with(
        "--optimizer adam or muon",
        lambda args: args.optimizer in ("adam", "muon"),
        "--adam-beta1 --adam-beta2 --adam-eps",
    ),
    _only_with(
        "--optimizer muon",
        lambda args: args.optimizer == "muon",
        """
        --muon-momentum --muon-nesterov --muon-no-split-qkv --muon-scale-mode --muon-extra-scale-factor
        --muon-coefficient-type --muon-num-ns-steps --muon-fp32-matmul-prec --muon-tp-mode
        """,
    ),
    _only_with(
        "--lr-decay-style WSD",
        lambda args: args.lr_decay_style == "WSD",
        "--lr-wsd-decay-style --lr-wsd-decay-iters --lr-wsd-decay-samples",
    ),
    _only_with("--decoupled-lr", lambda args: args.decoupled_lr is not None, "--decoupled-min-lr"),
    _only_with("--manual-gc", lambda args: args.manual_gc, "--manual-gc-interval --no-manual-gc-eval"),
    _only_with("--fp16", lambda args: args.fp16, "--loss-scale --initial-loss-scale"),
    _only_with(
        "--fp16 with a dynamic loss scale",
        lambda args: args.fp16 and not args.loss_scale,
        "--min-loss-scale --loss-scale-window --hysteresis",
    ),
    _only_with(
        "--recompute-granularity selective",
        lambda args: args.recompute_granularity == "selective" or args.recompute_activations,
        "--recompute-modules",
    ),
    _only_with("--bf16", lambda args: args.bf16, "--grad-reduce-in-bf16"),
    _only_with(
        "--save",
        lambda args: args.save,
        """
        --save-interval --save-retain-interval --save-params-interval --save-activations-interval
        --save-wgrads-interval --save-dgrads-interval --async-save --log-progress --no-save-optim --no-save-rng
        --no-ckpt-fully-parallel-save --dist-ckpt-workers --ckpt-assume-constant-structure
        """,
    ),
    _only_with(
        "--async-save",
        lambda args: args.async_save,
        "--async-strategy --async-ckpt-cpu-priority --async-ckpt-io-priority --async-ckpt-use-cpu-shm",
    ),
    _only_with(
        "--load or --pretrained-checkpoint",
        lambda args: args.load or args.pretrained_checkpoint,
        """
        --ckpt-step --no-load-optim --no-load-rng --finetune --exit-on-missing-checkpoint
        --ckpt-fully-parallel-load-exchange-algo
        """,
    ),
    _only_with(
        "--valid-data-path",
        lambda args: args.valid_data_path,
        "--log-validation-ppl-to-tensorboard",
    ),
    _only_with(
        "--tensorboard-dir",
        lambda args: args.tensorboard_dir or args.wandb_project or args.mlflow_dir or args.save,
        """
        --tensorboard-log-interval --tensorboard-queue-size --log-timers-to-tensorboard
        --no-log-loss-scale-to-tensorboard --log-world-size-to-tensorboard
        """,
    ),
    _only_with("--wandb-project", lambda args: args.wandb_project, "--wandb-exp-name --wandb-save-dir --wandb-entity"),
    _only_with(
        "--overlap-grad-reduce",
        lambda args: args.overlap_grad_reduce,
        "--ddp-num-buckets --ddp-bucket-size --no-align-grad-reduce",
    ),
    _only_with("--overlap-param-gather", lambda args: args.overlap_param_gather, "--no-align-param-gather"),
    _only_with(
        "--use-distributed-optimizer",
        lambda args: args.use_distributed_optimizer,
        """
        --distrib-optim-fully-reshardable-mem-efficient --ddp-pad-buckets-for-high-nccl-busbw
        --ddp-reduce-scatter-with-fp32-accumulation
        """,
    ),
    _only_with(
        "--use-megatron-fsdp",
        lambda args: args.use_megatron_fsdp,
        "--data-parallel-sharding-strategy --suggested-communication-unit-size",
    ),
    _only_with("--fp8-format", lambda args: args.fp8, "--fp8-margin --fp8-amax-history-len --fp8-amax-compute-algo"),
    _only_with("--log-straggler", lambda args: args.log_straggler, "--straggler-ctrlr-port --straggler-minmax-count"),
    _only_with("--use-sharp", lambda args: args.use_sharp, "--sharp-enabled-group"),
    _only_with(
        "--use-precision-aware-optimizer",
        lambda args: args.use_precision_aware_optimizer,
        "--main-grads-dtype --main-params-dtype --exp-avg-dtype --exp-avg-sq-dtype",
    ),
)


def _flags(flags: str) -> tuple[str, ...]:
    return tuple(flags.split())


# Flags of other ways to shard, and flags that read gradients or weights where --use-megatron-fsdp has none.
NOT_WITH_FSDP = _flags(
    """
    --ddp-num-buckets --ddp-pad-buckets-for-high-nccl-busbw --ddp-reduce-scatter-with-fp32-accumulation
    --ddp-param-name-patterns-for-fp32-local-accumulation --distrib-optim-fully-reshardable-mem-efficient
    --grad-reduce-in-bf16 --check-for-large-grads --check-weight-hash-across-dp-replicas-interval
    --save-params-interval --save-wgrads-interval --save-dgrads-interval --log-params-norm --log-num-zeros-in-grad
    --data-parallel-random-init --dump-param-to-param-group-map --use-precision-aware-optimizer --use-nccl-ub
    """
)

# What Megatron builds for its other optimizers alone.
NOT_WITH_MUON = _flags(
    """
    --fp16 --fp8-format --use-megatron-fsdp --use-precision-aware-optimizer --dump-param-to-param-group-map
    --distrib-optim-fully-reshardable-mem-efficient
    """
)
