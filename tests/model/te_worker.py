"""Compares the model of Transformer Engine's layers with the local one, on two processes without a GPU.

Started by `test_layer_specs.py` in processes of their own, since Megatron decides at import whether Transformer Engine
is there.
"""

import torch

from neo_megatron.megatron_compat import cpu_platform

cpu_platform.install()

import transformer_engine.pytorch as te
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories
from support.te_on_cpu import plain_arithmetic, pretended_hopper

from neo_megatron.model.config import NeoSizes
from neo_megatron.model.freeze import freeze_for_stage
from neo_megatron.model.micro_batch import model_inputs
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.model.transformer_config import NeoConfig
from neo_megatron.presets import SIZES

LENGTH, IMAGE_TOKENS = 32, 8
HIDDEN = SIZES["tiny"].hidden_size
MODELS = {"separate": SIZES["tiny"], "in-head": SIZES["tiny"].replace(attention_form="in-head")}
EXPERTS = MODELS["in-head"].replace(num_experts=4, experts_per_token=2, expert_ffn_hidden_size=64)
RECOMPUTATION = {
    "recompute_granularity": "selective",
    "recompute_modules": ["layernorm", "core_attn", "mlp_act", "qkv_heads"],
}


def build(
    sizes: NeoSizes, implementation: str, dtype: torch.dtype = torch.float32, fuse: bool = False, **settings
) -> NeoModel:
    config = NeoConfig.from_sizes(
        sizes,
        transformer_impl=implementation,
        gradient_accumulation_fusion=fuse,
        use_cpu_initialization=True,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        **settings,
    )
    return NeoModel(config)


def stored(model: NeoModel) -> dict:
    """Name in a checkpoint -> this rank's part of a parameter."""
    return {value.key: value.data for value in model.sharded_state_dict().values()}


def shapes(model: NeoModel) -> dict[str, tuple]:
    """Name in a checkpoint -> global shape; a factory stands for a matrix that is stored in pieces."""
    return {value.key: tuple(getattr(value, "global_shape", ())) for value in model.sharded_state_dict().values()}


def inputs(sequence_parallel: bool) -> dict[str, torch.Tensor]:
    """A pack of two documents, an image in the second, on both halves of the sequence."""
    draw, place = torch.Generator().manual_seed(1), torch.arange(LENGTH)
    image_tokens = torch.arange(12, 12 + IMAGE_TOKENS)
    packs = {
        "tokens": torch.randint(0, 500, (1, LENGTH), generator=draw),
        "positions_thw": place[None, :, None].expand(1, LENGTH, 3).to(torch.int32) % 12,
        "document": (place >= 9).to(torch.int32)[None],
        "image": torch.where((place >= 12) & (place < 12 + IMAGE_TOKENS), 0, -1).to(torch.int32)[None],
        "patches": torch.randint(0, 256, (IMAGE_TOKENS, 4, 768), generator=draw, dtype=torch.uint8),
        "image_token_index": image_tokens,
        "target_index": place[:-1],
        "targets": torch.randint(0, 500, (LENGTH - 1,), generator=draw),
    }
    rank, ranks = (torch.distributed.get_rank(), 2) if sequence_parallel else (0, 1)
    return model_inputs(packs, True, True, sequence_rank=rank, sequence_ranks=ranks)


def run(model: NeoModel, stage: int, sequence_parallel: bool) -> tuple[torch.Tensor, dict]:
    """The cross entropy, and the gradient of everything that trains by its name in a checkpoint."""
    freeze_for_stage(model, stage)
    model.zero_grad()
    inputs_of_products, saved = [], set()
    hooks = [
        layer.self_attention.linear_qk_hw.register_forward_pre_hook(
            lambda _, given: inputs_of_products.append(given[0])
        )
        for layer in model.decoder.layers
        if model.config.sizes.attention_form == "separate"  # the other form has one product, which gathers for itself
    ]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.add(x.untyped_storage()._cdata) or x, lambda x: x):
        loss = model(**inputs(sequence_parallel))
    for gathered in inputs_of_products if sequence_parallel else ():
        assert gathered.shape == (LENGTH, 1, HIDDEN) and gathered.untyped_storage()._cdata in saved
        assert gathered.untyped_storage().nbytes() == 0, "what was gathered outlives the forward"
    for hook in hooks:
        hook.remove()
    inputs_of_products.clear()
    loss.mean().backward()
    return loss.detach(), {name: p.grad for name, p in stored(model).items() if p.requires_grad}


def same_training(sizes: NeoSizes, tensor_parallel_size: int, sequence_parallel: bool, **recomputation) -> None:
    """The same losses and gradients in stage 1, where the fused norm and matrix are frozen, and in stage 2.

    Transformer Engine's model recomputes what `recomputation` says, the local one nothing.
    """
    local = build(sizes, "local", sequence_parallel=sequence_parallel)
    with pretended_hopper():
        model = build(sizes, "transformer_engine", sequence_parallel=sequence_parallel, **recomputation)
    attention = model.decoder.layers[0].self_attention
    alone = tensor_parallel_size == 1 or sizes.attention_form == "in-head"
    fused = te.LayerNormLinear if alone else te.Linear
    assert isinstance(attention.linear_qkv, fused)
    torch.manual_seed(torch.distributed.get_rank() % tensor_parallel_size)
    other = stored(model)
    with torch.no_grad():
        for name, parameter in stored(local).items():
            parameter += 0.02 * torch.randn_like(parameter) * (parameter.dim() > 1)
            other[name].copy_(parameter)
    for stage in (1, 2):
        expected, expected_gradients = run(local, stage, sequence_parallel)
        with plain_arithmetic():
            loss, gradients = run(model, stage, sequence_parallel)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in gradients.items():
            assert gradient.abs().sum() > 0, name
            close = {"rtol": 1e-4, "atol": 1e-4 * float(expected_gradients[name].abs().max())}
            torch.testing.assert_close(gradient, expected_gradients[name], **close, msg=lambda m, n=name: f"{n}: {m}")


def names_and_shapes(sizes: NeoSizes) -> None:
    local = build(sizes, "local", torch.bfloat16, fuse=True)  # without apex, whose kernel that would be
    blockwise = {"fp8": "e4m3", "fp8_recipe": "blockwise", "first_last_layers_bf16": True}
    for fp8 in ({}, {"fp8": "hybrid", "fp8_recipe": "delayed"}, blockwise, blockwise | RECOMPUTATION):
        with pretended_hopper():
            model = build(sizes, "transformer_engine", torch.bfloat16, fuse=True, **fp8)
        layer = model.decoder.layers[0]
        assert layer.mlp.linear_fc1.fuse_wgrad_accumulation and layer.self_attention.linear_qkv.fuse_wgrad_accumulation
        assert isinstance(layer.self_attention.linear_proj, te.Linear)
        assert isinstance(layer.mlp.linear_fc1, te.LayerNormLinear)
        # Kept in bf16 is what both products share and what Megatron can recompute; delayed scaling cannot.
        shared = model.config.tensor_model_parallel_size == 2 and fp8.get("fp8_recipe") != "delayed"
        if sizes.attention_form == "separate":
            assert isinstance(layer.self_attention.linear_qk_hw, te.Linear)
            assert layer.self_attention.linear_qk_hw.save_original_input == shared
        assert isinstance(model.decoder.final_layernorm, te.RMSNorm)
        assert shapes(model) == shapes(local), shapes(model).items() ^ shapes(local).items()
        # Images have any number of tokens and packs any number of trained positions: neither meets FP8's alignment.
        outside = [*model.embedding.modules(), *model.patch_embedding.modules(), *model.output_layer.modules()]
        assert not any(isinstance(m, te.module.base.TransformerEngineBaseModule) for m in outside)


def names_and_shapes_of_experts() -> None:
    """Transformer Engine computes experts together, the local layers one after another; a checkpoint is of either."""
    sequence_parallel = parallel_state.get_tensor_model_parallel_world_size() > 1
    local = build(EXPERTS, "local", torch.bfloat16, sequence_parallel=sequence_parallel)
    with pretended_hopper():
        model = build(EXPERTS, "transformer_engine", torch.bfloat16, sequence_parallel=sequence_parallel)
    assert type(model.decoder.layers[0].mlp.experts).__name__ == "TEGroupedMLP"
    of_either, of_local = shapes_in_file(model), shapes_in_file(local)
    assert of_either == of_local, {key: (of_either.get(key), of_local.get(key)) for key in of_either.keys() ^ of_local}


def shapes_in_file(model: NeoModel) -> dict[str, set[tuple]]:
    """Name in a checkpoint -> global shape, as it is once all factories have made their parts."""
    state = model.sharded_state_dict()
    apply_factories(state)
    found: dict[str, set[tuple]] = {}
    for part in nested_values(state):
        found.setdefault(part.key, set()).add(tuple(part.global_shape))
    return found


def gathered_norm_output_keeps_its_gradient() -> bool:
    """Whether Transformer Engine passes on the gradient of the gathered norm output; see `shared_input_linear.py`."""
    group = parallel_state.get_tensor_model_parallel_group()
    with pretended_hopper():
        layer = te.LayerNormLinear(
            16, 32, bias=False, normalization="RMSNorm", parallel_mode="column", tp_group=group, tp_size=2,
            sequence_parallel=True, return_layernorm_output=True, return_layernorm_output_gathered=True, device="cpu",
            params_dtype=torch.float32,
        )  # fmt: skip
    hidden = torch.randn(8, 1, 16, requires_grad=True)
    with plain_arithmetic():
        _, normalised = layer(hidden)
        normalised.square().sum().backward()
    return bool(hidden.grad.abs().sum() > 0)


torch.distributed.init_process_group("gloo")
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
names_and_shapes_of_experts()
for sizes in MODELS.values():
    names_and_shapes(sizes)
    same_training(sizes, 1, sequence_parallel=False, **RECOMPUTATION)
parallel_state.destroy_model_parallel()
parallel_state.initialize_model_parallel(2)
tensor_parallel.model_parallel_cuda_manual_seed(1, force_reset_rng=True)
names_and_shapes_of_experts()
for sizes in MODELS.values():
    names_and_shapes(sizes)
    same_training(sizes, 2, sequence_parallel=False, **RECOMPUTATION)
    same_training(sizes, 2, sequence_parallel=True)
    same_training(sizes, 2, sequence_parallel=True, **RECOMPUTATION)
assert not gathered_norm_output_keeps_its_gradient(), (
    "linear_qkv may share its gathered input now: see shared_input_linear.py"
)
print("same names, shapes, losses and gradients")
