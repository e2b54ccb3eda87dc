"""Rules of `--recompute-modules`."""

from collections.abc import Collection, Iterator


def recomputation_refusals(
    modules: Collection[str], experts: bool, context_ranks: int, fp8_recipe: str | None
) -> Iterator[str]:
    """A sentence for every module that cannot be recomputed, or to no effect.

    Args:
        modules: of `--recompute-modules`, under `--recompute-granularity selective`.
        experts: the model is a mixture of experts.
        fp8_recipe: ``None`` without FP8.
    """
    mlp, other = ("moe", "mlp") if experts else ("mlp", "moe")
    if other in modules:
        yield f"--recompute-modules {other} is without effect in this --neo-model: choose {mlp}"
    if "mlp_act" in modules:
        if experts:
            yield "--recompute-modules mlp_act is for a --neo-model without experts: choose moe"
        if "mlp" in modules:
            yield "--recompute-modules mlp recomputes what mlp_act does, and more: leave one of them out"
        if fp8_recipe == "delayed":
            yield (
                "--recompute-modules mlp_act does not go with --fp8-recipe delayed: choose --fp8-recipe tensorwise or "
                "blockwise, or recompute other modules"
            )
    if "qkv_heads" in modules and context_ranks > 1:
        yield (
            "--recompute-modules qkv_heads frees nothing with --context-parallel-size, under which attention keeps the "
            "heads that were exchanged: leave it out"
        )
