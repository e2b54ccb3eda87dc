"""Flags of Megatron for other models than NEO, and for other work than training one: they end the start.

Each entry reads after the flag and a colon: why it is refused, and what to do instead.
"""

from neo_megatron.run.flag_status import rejected

REJECTED = (
    rejected(
        "experts belong to the sizes of a model: give a --neo-model that has them, such as u1-a3b",
        """
        --num-experts --moe-ffn-hidden-size --moe-router-topk --moe-router-pre-softmax
        """,
    ),
    rejected(
        "NEO's experts are a Qwen3-MoE's, none shared and no token dropped: leave it out",
        """
        --moe-shared-expert-intermediate-size --moe-shared-expert-gate --moe-shared-expert-overlap
        --moe-shared-expert-glu-interleave-size --moe-enable-routing-replay --moe-router-padding-for-quantization
        --moe-router-padding-for-fp8 --moe-router-num-groups --moe-router-group-topk --moe-router-topk-scaling-factor
        --moe-router-score-function --moe-router-dtype --moe-router-enable-expert-bias --moe-router-bias-update-rate
        --moe-router-quantile-balancing-ema --moe-router-force-load-balancing --moe-router-force-biased
        --moe-single-grouped-weight --moe-single-grouped-bias --moe-z-loss-coeff --moe-input-jitter-eps
        --moe-enable-deepep --moe-flex-dispatcher-backend --moe-permute-fusion-into-hybridep
        --moe-hybridep-pad-uneven-dispatch-inputs --moe-per-layer-logging --moe-expert-capacity-factor
        --moe-pad-expert-input-to-capacity --moe-pad-experts-for-cuda-graph-inference --moe-token-drop-policy
        --moe-layer-recompute --moe-apply-probs-on-input --moe-latent-size --moe-flex-dispatcher-num-sms
        --moe-deepep-num-sms --moe-hybridep-num-sms --moe-hybridep-num-blocks-permute
        --moe-hybridep-num-blocks-unpermute --moe-hybridep-num-sms-preprocessing --moe-ncclep-static-shape
        --moe-ncclep-zero-copy --moe-mlp-glu-interleave-size --moe-expert-rank-capacity-factor --moe-paged-stash
        --moe-paged-stash-page-size --moe-paged-stash-buffer-size-factor-cuda --moe-paged-stash-buffer-size-factor-cpu
        --moe-layer-freq --moe-use-upcycling --moe-upcycling-granularity --moe-routing-trace-path
        --moe-routing-trace-max-training-iters --moe-routing-trace-capture-logits
        --moe-routing-trace-capture-hidden-states --moe-routing-trace-dump-weights
        --expert-tensor-parallel-num-weight-shards --overlap-moe-expert-parallel-comm
        --overlap-dispatch-backward-with-experts-wgrad --ep-overlap-early-attn-memory-release
        --high-priority-a2a-comm-stream --use-grouped-gemm-for-dense-mlp --use-grouped-gemm-for-shared-expert
        --use-fused-weighted-squared-relu --save-tokens-per-expert-interval
        """,
    ),
    rejected(
        "NEO predicts one token at a time, without MTP layers: leave it out",
        """
        --mtp-standalone --mtp-num-layers --mtp-loss-scaling-factor --mtp-use-repeated-layer --mtp-detach-heads
        --mtp-hybrid-override-pattern
        """,
    ),
    rejected(
        "NEO's attention over t, h and w is its own: leave it out",
        """
        --softmax-type --window-size --window-attn-skip-freq --attention-output-gate --add-qkv-bias --qk-l2-norm
        --qk-clip --qk-clip-alpha --qk-clip-threshold --apply-query-key-layer-scaling --multi-latent-attention
        --experimental-attention-variant --linear-attention-freq --dsa-indexer-n-heads --dsa-indexer-head-dim
        --dsa-indexer-topk --dsa-indexer-topk-freq --dsa-indexer-skip-topk-offset --dsa-indexer-loss-coeff
        --dsa-indexer-use-sparse-loss --dsa-kernel-backend --dsa-indexer-rope-interleaved --dsa-indexer-k-norm-epsilon
        --dsa-indexer-k-norm-fp32 --linear-conv-kernel-dim --linear-key-head-dim --linear-value-head-dim
        --linear-num-key-heads --linear-num-value-heads --log-max-attention-logit --attention-dropout
        --use-kitchen-attention --kitchen-attention-backend --flash-attention-version
        --no-dsa-indexer-rotate-activation --no-dsa-indexer-scoring-relu
        """,
    ),
    rejected(
        "NEO's attention has no latent projections: leave it out",
        """
        --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim --rotary-scaling-factor --mscale
        --mscale-all-dim --cache-mla-latents --mla-down-proj-fusion
        """,
    ),
    rejected(
        "NEO rotates over t, h and w with the bases in the config.json of --neo-model: leave it out, or give a "
        "--neo-model that has others",
        """
        --position-embedding-type --use-rotary-position-embeddings --rotary-interleaved --rotary-base --rotary-percent
        --rotary-seq-len-interpolation-factor --rope-type --rope-scaling-factor --use-rope-scaling --no-rope-freq
        --no-position-embedding --mrope-section --yarn-original-max-position-embeddings --yarn-beta-fast
        --yarn-beta-slow --yarn-correction-range-round-to-int --no-yarn-correction-range-round-to-int
        --relative-attention-num-buckets --relative-attention-max-distance
        """,
    ),
    rejected(
        "NEO's layers are Qwen3's, with RMSNorm and SwiGLU: leave it out",
        """
        --normalization --apply-layernorm-1p --apply-residual-connection-post-layernorm --glu-linear-offset
        --activation-func-clamp-value --openai-gelu --squared-relu --quick-geglu --onnx-safe --bert-no-binary-head
        --use-te-activation-func --use-mup --mup-width-mult --mup-base-hidden-size --mup-embedding-mult
        --mup-output-mult --mup-base-head-dim --mup-attn-scale-power
        """,
    ),
    rejected(
        "NEO is one decoder of layers of one kind: leave it out; --num-layers and --neo-model set its sizes",
        """
        --encoder-num-layers --decoder-num-layers --heterogeneous-layers-config-path
        --heterogeneous-layers-config-encoded-json --is-hybrid-model --mamba-state-dim --mamba-head-dim
        --mamba-num-groups --mamba-num-heads --mamba-training-ssm-states-dtype --mamba-inference-conv-states-dtype
        --mamba-inference-ssm-states-dtype --disable-mamba-mem-eff-path --hybrid-layer-pattern
        --hybrid-override-pattern --spec
        """,
    ),
    rejected(
        "a run is configured by flags, presets and the config.json of --neo-model: give those",
        """
        --yaml-cfg
        """,
    ),
    rejected(
        "a run takes its sizes from --neo-model and its settings from the command line: give the flags of the run "
        "that saved",
        """
        --use-checkpoint-args --use-mp-args-from-checkpoint-args
        """,
    ),
    rejected(
        "NEO has no reinforcement learning: leave it out",
        """
        --perform-rl-step --rl-prompts-per-eval --rl-generation-lag --rl-submission-granularity
        --rl-consumption-granularity --rl-default-temperature --rl-default-top-p --rl-default-top-k
        --rl-offload-optimizer-during-inference --rl-kv-cache-management-mode --rl-persist-cuda-graphs
        --rl-partial-rollouts --rl-inference-logprobs-is-correction --rl-importance-sampling-truncation-coef
        --rl-use-sequence-packing --rl-sequence-packing-max-sequences-per-bin --rl-sequence-packing-algo
        --rl-training-cuda-graphs --rl-inference-tensor-model-parallel-size
        --rl-inference-pipeline-model-parallel-size --rl-inference-expert-model-parallel-size
        --rl-inference-expert-tensor-model-parallel-size --rl-inference-model-unified-memory-level
        --rl-offload-inference-model-weights-when-idle --rl-verify-model-weights-swap --rl-skip-bos-token --rl-profile
        --rl-profile-dir --rl-inference-parsers --grpo-prompts-per-step --grpo-group-size --grpo-iterations
        --grpo-clamp-eps-lower --grpo-clamp-eps-upper --grpo-kl-beta --grpo-entropy-term-weight
        --grpo-filter-groups-with-same-reward --langrl-env-config --refit-method
        """,
    ),
    rejected(
        "NEO trains here; neo-megatron generate and neo-megatron evaluate ask a model: leave it out",
        """
        --inference-cuda-graph-scope --inference-fuse-tp-communication --inference-disable-triton-nvls-kernels
        --inference-grouped-gemm-backend --inference-moe-disable-fused-quant-kernels
        --inference-moe-token-dispatcher-type --inference-rng-tracker --inference-batch-times-seqlen-threshold
        --inference-max-requests --inference-max-seq-length --inference-dynamic-batching
        --inference-dynamic-batching-buffer-size-gb --inference-dynamic-batching-paused-buffer-size-gb
        --inference-dynamic-batching-mamba-memory-ratio --inference-dynamic-batching-block-size
        --inference-dynamic-batching-max-requests --inference-dynamic-batching-max-tokens
        --inference-dynamic-batching-num-cuda-graphs --inference-dynamic-batching-track-paused-request-events
        --inference-dynamic-batching-track-generated-token-events --inference-cuda-graph-all-prefills
        --inference-cuda-graph-max-tokens --inference-dynamic-batching-unified-memory-level
        --inference-dynamic-batching-prefix-caching --inference-dynamic-batching-prefix-caching-eviction-policy
        --inference-dynamic-batching-prefix-caching-coordinator-policy
        --inference-dynamic-batching-prefix-caching-routing-alpha --inference-dynamic-batching-prefix-caching-mamba-gb
        --inference-dynamic-batching-cuda-graph-mixed-prefill-count
        --inference-dynamic-batching-cuda-graph-sizing-distribution --inference-dynamic-batching-sampling-backend
        --inference-dynamic-batching-async-sched-mode --inference-dynamic-batching-logprobs-mode
        --inference-logging-step-interval --inference-text-gen-server-logging --inference-wandb-logging
        --inference-coordinator-port --inference-use-synchronous-zmq-collectives --inference-disable-ep-consensus
        --inference-shards --flash-decode --batch-invariant-mode --symmetric-ar-type --nccl-all-reduce-for-prefill
        --mlp-chunks-for-prefill --max-tokens-to-oom --output-bert-embeddings --bert-embedder-type
        --use-legacy-static-engine --decode-only-cuda-graphs --enable-chunked-prefill --num-speculative-tokens
        --use-same-sampling-seed-across-dp-ranks
        """,
    ),
    rejected(
        "it belongs to Megatron's BERT, ICT and retrieval models: leave it out",
        """
        --ict-head-size --biencoder-projection-dim --biencoder-shared-query-context-model --ict-load --bert-load
        --titles-data-path --query-in-block-prob --use-one-sent-docs --evidence-data-path
        --retriever-report-topk-accuracies --retriever-score-scaling --block-data-path --embedding-path
        --indexer-batch-size --indexer-log-interval
        """,
    ),
    rejected(
        "it belongs to Megatron's vision classifiers; NEO's image sizes are set by neo-megatron preprocess: leave it "
        "out",
        """
        --num-classes --img-h --img-w --num-channels --patch-dim --classes-fraction --data-per-class-fraction
        --no-data-sharding --head-lr-mult --vision-pretraining --vision-pretraining-type --vision-backbone-type
        --swin-backbone-type --mask-type --mask-factor --iter-per-epoch --dino-local-img-size
        --dino-local-crops-number --dino-head-hidden-size --dino-bottleneck-size --dino-freeze-last-layer
        --dino-norm-last-layer --dino-warmup-teacher-temp --dino-teacher-temp --dino-warmup-teacher-temp-epochs
        """,
    ),
)
