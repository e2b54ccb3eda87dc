"""Rules of Megatron-FSDP, shared by a start and the planner."""

from collections.abc import Iterator


def fully_sharded_refusals(
    strategy: str, pipeline: int, tensor: int, experts: bool, fp8: bool, fp16: bool = False, sgd: bool = False
) -> Iterator[str]:
    """Sentences on what `--use-megatron-fsdp` does not go with.

    Its device mesh has no pipeline. Its unscaling in float16 reads gradients of parameters that a rank holds no row
    of. Tensor parallelism, experts and FP8 have not been tested with it.

    Args:
        strategy: ``--data-parallel-sharding-strategy``.
        pipeline, tensor: parallel sizes.
    """
    if strategy == "no_shard":
        yield (
            "--data-parallel-sharding-strategy no_shard shards nothing: choose optim, optim_grads or "
            "optim_grads_params (ZeRO-1, 2 or 3), or leave out --use-megatron-fsdp"
        )
    for given, what, instead in (
        (pipeline > 1, "--pipeline-model-parallel-size", "--use-distributed-optimizer with it"),
        (tensor > 1, "--tensor-model-parallel-size", "--use-distributed-optimizer with it"),
        (experts, "a mixture of experts", "--use-distributed-optimizer with it"),
        (fp8, "FP8", "--use-distributed-optimizer with it, or bfloat16"),
        (fp16, "--fp16", "--bf16"),
        (sgd, "--optimizer sgd", "--optimizer adam"),
    ):
        if given:
            yield f"--use-megatron-fsdp does not go with {what}: choose {instead}"
