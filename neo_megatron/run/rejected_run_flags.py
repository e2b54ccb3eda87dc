"""Flags of Megatron for runs that end the start: they would be ignored or crash, or NEO has a way of its own.

Each entry reads after the flag and a colon: why it is refused, and what to do instead.
"""

from neo_megatron.run.flag_status import rejected

REJECTED = (
    rejected(
        "micro-batches have as many image tokens as their packs, so that no CUDA graph fits two of them: leave it out",
        """
        --enable-cuda-graph --external-cuda-graph --cuda-graph-warmup-steps --cuda-graph-impl --cuda-graph-scope
        --cuda-graph-modules
        """,
    ),
    rejected(
        "activations are saved by recomputing, not by offloading: use --recompute-granularity",
        """
        --cpu-offloading-num-layers --cpu-offloading-retain-pinned-cpu-buffers --fine-grained-activation-offloading
        --fine-grained-offloading-max-inflight-offloads --offload-modules --min-offloaded-tensor-size
        --delay-offload-until-cuda-graph --delta-offload-bytes-across-pp-ranks --activation-offload-fraction
        """,
    ),
    rejected(
        "Megatron offloads an optimizer only with Transformer Engine or apex, and NEO cannot take over such a state: "
        "leave it out, and shard it with --use-distributed-optimizer",
        """
        --optimizer-cpu-offload --optimizer-offload-fraction --use-torch-optimizer-for-cpu-offload
        --overlap-cpu-optimizer-d2h-h2d --no-pin-cpu-grads --no-pin-cpu-params
        """,
    ),
    rejected(
        "NEO has AdamW, Muon and SGD, and --optimizer muon has AdamW for all but matrices: leave it out",
        """
        --muon-scalar-optimizer --lion-beta1 --lion-beta2
        """,
    ),
    rejected(
        "it is for an earlier way to shard Muon, of which no run of NEO has been tried: leave it out",
        """
        --no-use-layer-wise-param-layout
        """,
    ),
    rejected(
        "PyTorch's FSDP is not for NEO: use --use-megatron-fsdp with --data-parallel-sharding-strategy",
        """
        --use-torch-fsdp2 --torch-fsdp2-no-reshard-after-forward
        """,
    ),
    rejected(
        "--use-megatron-fsdp keeps float32 weights and sums gradients in float32, as runs without it do: leave it out",
        """
        --megatron-fsdp-main-params-dtype --megatron-fsdp-main-grads-dtype --megatron-fsdp-grad-comm-dtype
        """,
    ),
    rejected(
        "no run of NEO with --use-megatron-fsdp has tried it: leave it out",
        """
        --megatron-fsdp-enable-fine-grained-param-gather --megatron-fsdp-max-pool-double-buffer
        --fsdp-manual-registration --fsdp-double-buffer --fsdp-db-use-persist-buf-on-alloc-fail
        --outer-dp-sharding-strategy
        --keep-fp8-transpose-cache --enable-full-sharding-in-hsdp --create-all-gather-group
        --init-model-with-meta-device --no-gradient-reduce-div-fusion --no-strict-fsdp-dtensor-load
        --disable-symmetric-registration
        """,
    ),
    rejected(
        "weights are sharded by --tensor-model-parallel-size alone: leave it out",
        """
        --tensor-parallel-num-weight-shards
        """,
    ),
    rejected(
        "NEO's layers have no such variant: leave it out",
        """
        --delay-wgrad-compute --defer-embedding-wgrad-compute --wgrad-deferral-limit --fused-residual-rmsnorm
        --use-transformer-engine-op-fuser --fp16-lm-cross-entropy --fp8-output-proj --te-precision-config-file
        --cross-entropy-fusion-impl --config-logger-dir
        """,
    ),
    rejected(
        "FP4 is not for NEO: use --fp8-format",
        """
        --fp4-format --fp4-recipe --fp4-quantizer-factory --fp4-param-gather
        """,
    ),
    rejected(
        "NEO's quantization is that of --fp8-recipe: leave it out",
        """
        --fp8-quantizer-factory --fp8-interval
        """,
    ),
    rejected(
        "it needs a PyTorch built for it: leave it out",
        """
        --use-ring-exchange-p2p
        """,
    ),
    rejected(
        "it has no effect in Megatron: leave it out",
        """
        --max-seqlen-per-dp-cp-rank --exit-signal-handler-for-dataloader --test-mode --lazy-mpu-init --use-flash-attn
        --memory-snapshot-path --dist-ckpt-save-pre-mcore-014
        """,
    ),
    rejected(
        "NEO's mask splits packs by --cp-comm-type a2a or allgather alone: leave it out",
        """
        --hybrid-context-parallel --hierarchical-context-parallel-sizes
        """,
    ),
    rejected(
        "Megatron starts no recording for a model like NEO, and the snapshots would have no history: use --profile "
        "--use-pytorch-profiler, or neo-megatron plan",
        """
        --record-memory-history
        """,
    ),
    rejected(
        "Megatron has replaced it by --step-batch-size-schedule '0:64 1B:128' (tokens:packs) with --train-samples: "
        "use that",
        """
        --rampup-batch-size
        """,
    ),
    rejected(
        "it would train on smaller batches than asked for: leave it out, and choose a --global-batch-size that "
        "divides by --micro-batch-size times the data-parallel ranks",
        """
        --decrease-batch-size-if-needed
        """,
    ),
    rejected(
        "a run has one set of packs: begin the next phase as a run of its own, with --pretrained-checkpoint and "
        "--pretrained-optimizer",
        """
        --phase-transition-iterations
        """,
    ),
    rejected(
        "it would end a run without saving; a run saves and exits on --exit-signal: leave it out",
        """
        --exit-signal-handler-for-training
        """,
    ),
    rejected(
        "Megatron would leave out the norms of h and w: leave it out; no norm decays",
        """
        --apply-wd-to-qk-layernorm --no-weight-decay-cond-type
        """,
    ),
    rejected(
        "Megatron 0.19.2 cannot start with it: use --init-method-std",
        """
        --init-method-xavier-uniform
        """,
    ),
    rejected(
        "the other group is that of experts: leave it out",
        """
        --ckpt-fully-parallel-save-process-group --ckpt-fully-parallel-load-process-group
        """,
    ),
    rejected(
        "it is for Megatron's rerun state machine, which NEO keeps off; --rerun-mode says what a bad number leads to: "
        "leave it out",
        """
        --error-injection-rate --error-injection-type
        """,
    ),
    rejected(
        "the norm of the gradients is read before the weights change, to keep bad numbers out of them, and a CUDA "
        "graph cannot wait for that: leave it out",
        """
        --optimizer-cuda-graph
        """,
    ),
    rejected(
        "Megatron no longer has it: use --micro-batch-size and --global-batch-size",
        """
        --batch-size
        """,
    ),
    rejected(
        "Megatron no longer has it: use --lr-warmup-fraction or --lr-warmup-iters",
        """
        --warmup
        """,
    ),
    rejected(
        "Megatron no longer has it: use --tensor-model-parallel-size",
        """
        --model-parallel-size
        """,
    ),
    rejected(
        "Megatron no longer has it: use --recompute-granularity",
        """
        --checkpoint-activations
        """,
    ),
    rejected(
        "what trains is set by --training-stage; to evaluate alone use --skip-train: leave it out",
        """
        --freeze-all-layers
        """,
    ),
    rejected(
        "a run resumes from --save alone: use a smaller --save-interval, with --save-total-limit and --async-save",
        """
        --non-persistent-save-interval --non-persistent-ckpt-type --non-persistent-global-ckpt-dir
        --non-persistent-local-ckpt-dir --non-persistent-local-ckpt-algo --replication --replication-jump
        --replication-factor
        """,
    ),
    rejected(
        "checkpoints are converted by neo-megatron convert, and change their layout whenever they are loaded: "
        "leave it out",
        """
        --ckpt-convert-format --ckpt-convert-save --ckpt-convert-update-legacy-dist-opt-format
        --auto-detect-ckpt-format
        """,
    ),
    rejected(
        "NEO verifies every checkpoint before it is loaded, with checksums of its own: leave it out",
        """
        --verify-integrity
        """,
    ),
    rejected(
        "a run resumes from the iteration that it saved; --finetune starts at 0: leave it out",
        """
        --override-ckpt-iteration
        """,
    ),
    rejected(
        "with --pretrained-checkpoint weights are taken as they are, and --pretrained-optimizer takes their float32 "
        "masters as well: use that",
        """
        --load-main-params-from-ckpt
        """,
    ),
    rejected(
        "packs are made by neo-megatron preprocess and neo-megatron pack: give --train-data-path PACKS (and "
        "--valid-data-path, --test-data-path)",
        """
        --data-path --split --data-args-path --per-split-data-args-path --per-dataset-sequences-path --mock-data
        """,
    ),
    rejected(
        "NEO reads packs with a loader of its own: leave it out",
        """
        --dataloader-fast-cache-load --dataloader-defer-npy-index-mmap --dataloader-inter-document-masking
        --data-cache-path --no-mmap-bin-files --sample-rate --mask-prob --short-seq-prob --num-dataset-builder-threads
        --mid-level-dataset-surplus --allow-ambiguous-pad-tokens --fim-data --fim-rate --fim-spm-rate
        --fim-split-sample --fim-fragment-rate --fim-no-prefix --fim-prefix-token --fim-middle-token
        --fim-suffix-token --fim-pad-token --fim-eod-token
        """,
    ),
    rejected(
        "object storage is cached in NEO_CACHE_DIR: set that variable",
        """
        --object-storage-cache-path
        """,
    ),
    rejected(
        "what trains is in the packs, and every sample has its own positions and mask: leave it out",
        """
        --reset-position-ids --reset-attention-mask --eod-mask-loss --sft --sft-tokenizer-prompt-format
        """,
    ),
    rejected(
        "the length is that of the packs: leave it out, or give --seq-length",
        """
        --encoder-seq-length --decoder-seq-length
        """,
    ),
    rejected(
        "there is one set of packs for validation: pack several together with neo-megatron pack --data A B, or "
        "evaluate them one by one with --skip-train",
        """
        --multiple-validation-sets --validation-set-names
        """,
    ),
    rejected(
        "text is tokenized by neo-megatron preprocess --tokenizer, and the vocabulary is that of --neo-model: leave "
        "it out",
        """
        --tokenizer-type --tokenizer-model --tokenizer-metadata --tokenizer-special-tokens
        --tokenizer-sentencepiece-legacy --tokenizer-hf-no-use-fast --tokenizer-hf-no-include-special-tokens
        --vocab-file --merge-file --vocab-extra-ids --tiktoken-pattern --tiktoken-num-special-tokens
        --no-tokenizer-sentencepiece-ignore-extra-whitespaces --trust-remote-code --null-tokenizer-eod-id
        --null-tokenizer-pad-id --chat-template --no-use-tokenizer-model-from-checkpoint-args
        """,
    ),
    rejected(
        "the vocabulary is that of the checkpoint, to the row: leave it out, or grow it with neo-megatron convert "
        "qwen3-to-neo --tokenizer",
        """
        --padded-vocab-size --no-pad-vocab-size --make-vocab-size-divisible-by
        """,
    ),
    rejected(
        "NVIDIA's autoresume is not public: use examples/slurm.sbatch, which queues a job again",
        """
        --adlr-autoresume --adlr-autoresume-interval
        """,
    ),
    rejected(
        "NVIDIA's package is not public: leave it out",
        """
        --one-logger-project --one-logger-run-name --one-logger-async --app-tag-run-name --app-tag-run-version
        --run-workload-inspector-server
        """,
    ),
    rejected(
        "logits are neither saved nor distilled from: leave it out",
        """
        --logits-save-top-k --logits-save-top-p --logits-save-top-p-min-k --logits-save-dir --logits-save-dtype
        --logits-load-dir --logits-load-decode-threads --logits-load-prefetch-factor --logits-load-msc-prefetch-depth
        --logits-load-kd-loss-alpha --logits-load-ignore-errors
        """,
    ),
    rejected(
        "a run that ends is started again: by examples/slurm.sbatch, or by torchrun --max-restarts",
        """
        --inprocess-restart --inprocess-max-iterations --inprocess-monitor-thread-interval
        --inprocess-monitor-process-interval --inprocess-progress-watchdog-interval --inprocess-heartbeat-interval
        --inprocess-soft-timeout --inprocess-hard-timeout --inprocess-heartbeat-timeout --inprocess-barrier-timeout
        --inprocess-completion-timeout --inprocess-last-call-wait --inprocess-termination-grace-time
        --inprocess-granularity --inprocess-active-world-size --inprocess-empty-cuda-cache --enable-ft-package
        --calc-ft-timeouts --ft-num-warmup-iters
        """,
    ),
    rejected(
        "faults are for testing Megatron: leave it out",
        """
        --fault-injector-ranks --fault-injector-num-ranks --fault-injector-fault-types
        --fault-injector-fault-probabilities --fault-injector-fault-delay --fault-injector-delay-start-iteration
        --fault-injector-mtti-seconds --fault-injector-offset-seconds --fault-injector-seed
        """,
    ),
    rejected(
        "it compares losses with the largest of the first 100: give --loss-jump, which compares with the last 128",
        """
        --check-for-spiky-loss
        """,
    ),
    rejected(
        "s3:// and msc:// addresses of shards and packs need no flag, and checkpoints are saved to a mounted file "
        "system: leave it out",
        """
        --enable-msc
        """,
    ),
    rejected(
        "NEO uses nothing that is experimental in Megatron: leave it out",
        """
        --enable-experimental
        """,
    ),
    rejected(
        "a run needs its process groups: leave it out; --dry-run checks a run of any size on one process",
        """
        --fake-process-group
        """,
    ),
    rejected(
        "gradients are divided by the weights of the global batch, after their sum: leave it out",
        """
        --ddp-average-in-collective
        """,
    ),
    rejected(
        "Megatron cannot save a distributed checkpoint with it: leave it out",
        """
        --overlap-param-gather-with-optimizer-step
        """,
    ),
    rejected(
        "each rank is told its own by LOCAL_RANK, which the launcher sets: leave it out",
        """
        --local-rank
        """,
    ),
    rejected(
        "its float32 would meet weights in bfloat16 or float16: leave it out",
        """
        --fp32-residual-connection
        """,
    ),
    rejected(
        "it places ranks another way, which NEO's planner and tests do not know: leave it out",
        """
        --use-tp-pp-dp-mapping --num-distributed-optimizer-instances
        """,
    ),
    rejected(
        "iterations to skip are given by --iterations-to-skip: use that",
        """
        --result-rejected-tracker-filename
        """,
    ),
)
