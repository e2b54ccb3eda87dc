"""Rejects settings that FP8 cannot work with, for `parallelism.check_layout`: one sentence with flags and remedy each.

Transformer Engine quantizes the products of the decoder's layers. Their sizes must be multiples of what its
kernels take: tokens and features of 16, features of 128 under the blockwise recipe (a block of a weight is 128 x 128),
both of 32 under mxfp8. The patch embedding, the word embedding and the head are not modules of Transformer Engine: how
many tokens an image has and how many positions are trained does not matter.
"""

from argparse import Namespace
from collections.abc import Iterator

from neo_megatron.model.attention_forms import FORMS


def check_fp8(args: Namespace) -> Iterator[str]:
    """A sentence for everything that rules out ``--fp8-format``; `args` as Megatron parsed them."""
    if not args.fp8:
        for flag, given in {
            "--fp8-param-gather": args.fp8_param_gather,
            "--first-last-layers-bf16": args.first_last_layers_bf16,
        }.items():
            if given:
                yield f"{flag} is for training in FP8: add --fp8-format hybrid, or leave it out"
        return
    if args.transformer_impl == "local":
        yield (
            f"--fp8-format {args.fp8} needs --transformer-impl transformer_engine and a GPU with FP8 (Hopper or "
            "later): add it, or leave --fp8-format out"
        )
    if not args.bf16:
        yield f"--fp8-format {args.fp8} quantizes the products of a model in bfloat16: add --bf16"
    yield from _recipe(args)
    yield from _parameters(args)
    yield from _tokens(args)
    yield from _features(args)


def token_alignment(recipe: str) -> int:
    """The number of tokens in a product must be a multiple of this."""
    return 32 if recipe == "mxfp8" else 16


def feature_alignment(recipe: str) -> int:
    """Both sides of a rank's part of a weight must be multiples of this."""
    return 128 if recipe == "blockwise" else token_alignment(recipe)


def fp8_format(recipe: str) -> str:
    """The value of ``--fp8-format`` for a recipe: Transformer Engine's own default."""
    return "e4m3" if recipe in ("blockwise", "mxfp8") else "hybrid"


def _recipe(args: Namespace) -> Iterator[str]:
    if args.fp8 != (chosen := fp8_format(args.fp8_recipe)):
        yield (
            f"--fp8-recipe {args.fp8_recipe} does not go with --fp8-format {args.fp8}: gradients need the bits of e4m3 "
            f"where each block has a scale, and elsewhere the range of hybrid's e5m2: choose --fp8-format {chosen}"
        )
    if args.fp8_recipe == "delayed":
        if args.first_last_layers_bf16:
            yield (
                "--first-last-layers-bf16 does not go with --fp8-recipe delayed, which scales all layers together: "
                "choose --fp8-recipe tensorwise or blockwise, or leave it out"
            )
        if args.recompute_granularity == "selective" and "layernorm" in (args.recompute_modules or ()):
            yield (
                "--recompute-modules layernorm does not go with --fp8-recipe delayed: choose --fp8-recipe tensorwise "
                "or blockwise, or recompute other modules"
            )
    if args.first_last_layers_bf16:
        most = args.num_layers // args.pipeline_model_parallel_size
        for place in ("start", "end"):
            count = getattr(args, f"num_layers_at_{place}_in_bf16")
            if not 0 <= count <= most:
                yield (
                    f"--num-layers-at-{place}-in-bf16 {count} is more than the {most} layers of a pipeline stage: "
                    "choose fewer"
                )


def _parameters(args: Namespace) -> Iterator[str]:
    if not args.fp8_param_gather:
        return
    if not args.use_distributed_optimizer:
        yield "--fp8-param-gather needs the float32 weights of --use-distributed-optimizer: add it"
    if args.fp8_recipe == "delayed":
        yield (
            "--fp8-param-gather does not go with --fp8-recipe delayed, which would round the weights of a checkpoint "
            "with a scale of 1, small ones to zero: choose --fp8-recipe tensorwise or blockwise, or leave it out"
        )
    if args.training_stage == 1:
        yield (
            "--fp8-param-gather would round the language model to FP8 in --training-stage 1, which freezes it and so "
            "keeps no float32 copy of it: leave it out"
        )


def _tokens(args: Namespace) -> Iterator[str]:
    multiple = token_alignment(args.fp8_recipe)
    shares = args.context_parallel_size * (args.tensor_model_parallel_size if args.sequence_parallel else 1)
    batches = {"": args.micro_batch_size, "eval-": args.eval_micro_batch_size}
    for prefix, size in batches.items():
        tokens = args.seq_length * size // shares if args.seq_length and size else 0
        if tokens % multiple:
            yield (
                f"--fp8-recipe {args.fp8_recipe} needs a multiple of {multiple} tokens on a rank; --seq-length "
                f"{args.seq_length} x --{prefix}micro-batch-size {size} over {shares} "
                f"{'ranks' if shares > 1 else 'rank'} is {tokens}: pack again with neo-megatron pack --seq-length "
                f"{_above(args.seq_length, multiple * shares)}"
            )


def _features(args: Namespace) -> Iterator[str]:
    multiple, tensor = feature_alignment(args.fp8_recipe), args.tensor_model_parallel_size
    heads, groups = args.num_attention_heads // tensor, args.num_query_groups // tensor
    sides = {
        "channels of --hidden-size": args.hidden_size,
        "channels of --ffn-hidden-size": args.ffn_hidden_size // tensor,
        "channels of the query heads": heads * args.kv_channels,
        "rows of linear_qkv": (heads + 2 * groups) * args.kv_channels,
    }
    if args.neo_sizes["num_experts"]:
        del sides["channels of --ffn-hidden-size"]
        width = args.neo_sizes["expert_ffn_hidden_size"]
        sides["channels of an expert"] = width // (args.expert_tensor_parallel_size or tensor)
    if FORMS[args.neo_sizes["attention_form"]].products == 2:
        sides["rows of linear_qk_hw"] = (heads + groups) * args.kv_channels
    for what, count in sides.items():
        if count % multiple:
            smaller = "a smaller --tensor-model-parallel-size" if tensor > 1 else "another model"
            other = ", or --fp8-recipe tensorwise" if multiple > 16 else ""
            yield (
                f"--fp8-recipe {args.fp8_recipe} needs multiples of {multiple}, and a rank has {count} {what}: "
                f"choose {smaller}{other}"
            )


def _above(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
