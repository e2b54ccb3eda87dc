"""Transformer Engine's layers in bf16 and FP8 against the local ones in float32; and a step that never waits."""

from pathlib import Path

import pytest
import torch
from gpu.conftest import relative_error, to_gpu, waiting_refused
from torch import Tensor

from neo_megatron.benchmarks.gpu_packs import draw_packs
from neo_megatron.presets import SIZES
from neo_megatron.validation.fp8 import fp8_format

# Features that all recipes take: multiples of 128.
TRAINED = SIZES["tiny"].replace(
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=4,
    head_dim=64,
    vocab_size=1024,
    patch_embedding_size=128,
    image_start_token_id=1022,
    image_context_token_id=1023,
)
# Relative errors of the logits and of all gradients taken together, and the cosine of each gradient by itself. bf16
# rounds to 2^-9. FP8 rounds what goes into a product to 2^-4 forward and 2^-3 backward, through four layers of which
# each adds to the stream; the same roundings done in PyTorch on a CPU gave errors of 0.10 and 0.19 and cosines of 0.90
# and more, and with the first and the last layer in bf16 0.06, 0.11 and 0.98.
BF16_BOUNDS, FP8_BOUNDS, FP8_INSIDE_BOUNDS = (2e-2, 4e-2, 0.99), (0.15, 0.28, 0.85), (0.085, 0.16, 0.95)


def build(implementation: str, dtype: torch.dtype, **settings):
    from neo_megatron.model.neo_model import NeoModel
    from neo_megatron.model.transformer_config import NeoConfig

    config = NeoConfig.from_sizes(
        TRAINED,
        transformer_impl=implementation,
        gradient_accumulation_fusion=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        **settings,
    )
    return NeoModel(config).cuda()


@pytest.fixture(scope="module")
def checkpoint(one_gpu, tmp_path_factory) -> Path:
    """Random weights that bfloat16 has, so that only arithmetic differs."""
    from megatron.core import dist_checkpointing

    model = build("local", torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    directory = tmp_path_factory.mktemp("weights")
    dist_checkpointing.save(model.sharded_state_dict(), str(directory))
    return directory


def loaded(checkpoint: Path, implementation: str, dtype: torch.dtype, **settings):
    from megatron.core import dist_checkpointing

    model = build(implementation, dtype, **settings)
    wanted = model.sharded_state_dict()
    read = dist_checkpointing.load(dict(wanted), str(checkpoint))
    model.load_state_dict({name: read[name] for name in wanted}, strict=True)
    return model


def pack(seed: int = 0) -> dict[str, Tensor]:
    """Of 512 tokens, with images: a collated pack."""
    (drawn,) = draw_packs(TRAINED, 512, 1, seed, shrunk=4)
    return drawn


def inputs_of(drawn: dict[str, Tensor]) -> dict[str, Tensor]:
    from neo_megatron.model.micro_batch import model_inputs

    return to_gpu(model_inputs(drawn, first_stage=True, last_stage=True))


def backward(model, drawn: dict[str, Tensor]) -> None:
    (model(**inputs_of(drawn)) * drawn["target_weight"].cuda()).sum().backward()


def outputs_and_gradients(model, drawn: dict[str, Tensor], passes: int = 1) -> tuple[Tensor, dict[tuple, Tensor]]:
    """Logits, and gradients keyed by (name, place) in a checkpoint; scales learn from earlier passes."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    for _ in range(passes):
        model.zero_grad()
        model.set_is_first_microbatch()  # as at the start of a step: weights are rounded again
        backward(model, drawn)
    with torch.no_grad():
        logits = model(**{k: v for k, v in inputs_of(drawn).items() if k not in ("target_index", "targets")})
    for parameter in model.parameters():
        parameter.data = parameter.grad
    state = model.sharded_state_dict()
    apply_factories(state)
    parts = [part for part in nested_values(state) if isinstance(part, ShardedTensor)]
    return logits, {(part.key, part.global_offset): part.data.float() for part in parts}


def check(actual: tuple[Tensor, dict], expected: tuple[Tensor, dict], bounds: tuple[float, float, float]) -> None:
    error = relative_error(actual[0], expected[0])
    assert error < bounds[0], f"logits: relative error {error:.2e}"
    assert actual[1].keys() == expected[1].keys()
    for key, value in expected[1].items():
        assert actual[1][key].isfinite().all(), key
        cosine = torch.cosine_similarity(actual[1][key].flatten(), value.flatten(), dim=0)
        assert cosine > bounds[2], f"{key}: cosine {cosine:.3f}"
    together = [torch.cat([gradients[key].flatten() for key in expected[1]]) for _, gradients in (actual, expected)]
    error = relative_error(*together)
    assert error < bounds[1], f"gradients: relative error {error:.2e}"


@pytest.fixture(scope="module")
def in_float32(checkpoint):
    return outputs_and_gradients(loaded(checkpoint, "local", torch.float32), pack())


def test_bf16_against_float32(transformer_engine, checkpoint, in_float32, poisoned):
    model = loaded(checkpoint, "transformer_engine", torch.bfloat16)
    poisoned()
    check(outputs_and_gradients(model, pack()), in_float32, BF16_BOUNDS)


@pytest.fixture(scope="module")
def in_bf16(transformer_engine, checkpoint):
    return outputs_and_gradients(loaded(checkpoint, "transformer_engine", torch.bfloat16), pack())


def test_fp8_against_bf16(recipe, checkpoint, in_bf16, poisoned):
    model = loaded(checkpoint, "transformer_engine", torch.bfloat16, fp8=fp8_format(recipe), fp8_recipe=recipe)
    poisoned()
    check(outputs_and_gradients(model, pack(), passes=3), in_bf16, FP8_BOUNDS)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"], indirect=True)
def test_fp8_with_first_and_last_layers_in_bf16(recipe, checkpoint, in_bf16, poisoned):
    """Delayed scaling has no such layers."""
    settings = {"fp8": fp8_format(recipe), "fp8_recipe": recipe, "first_last_layers_bf16": True}
    model = loaded(checkpoint, "transformer_engine", torch.bfloat16, **settings)
    poisoned()
    check(outputs_and_gradients(model, pack()), in_bf16, FP8_INSIDE_BOUNDS)
    assert [layer.mlp.linear_fc1.fp8 for layer in model.decoder.layers] == [False, True, True, False]


def test_local_bf16_against_float32(checkpoint, in_float32):
    """The layers of a machine without Transformer Engine."""
    check(outputs_and_gradients(loaded(checkpoint, "local", torch.bfloat16), pack()), in_float32, BF16_BOUNDS)


@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_a_step_never_waits_for_the_gpu(gpu, checkpoint, implementation, request):
    from neo_megatron.model.micro_batch import model_inputs, to_device

    if implementation == "transformer_engine":
        request.getfixturevalue("transformer_engine")
    model = loaded(checkpoint, implementation, torch.bfloat16)
    for seed in range(3):
        backward(model, pack(seed))  # compiles
    drawn = {name: value.pin_memory() if torch.is_tensor(value) else value for name, value in pack(3).items()}
    torch.cuda.synchronize()
    with waiting_refused():
        inputs = to_device(model_inputs(drawn, first_stage=True, last_stage=True), gpu)
        weight = drawn["target_weight"].to(gpu, non_blocking=True)
        (model(**inputs) * weight).sum().backward()
