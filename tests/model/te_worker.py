"""Builds the model from Transformer Engine's layers on a machine without a GPU and compares it with the local one.

TE modules can be constructed without CUDA when torch claims a Hopper GPU; no kernel of theirs can run. Started by
`test_layer_specs.py` in a process of its own, since Megatron decides at import whether Transformer Engine is there.
"""

import contextlib
import types
from unittest import mock

import torch

from neo_megatron import cpu_platform

cpu_platform.install()

import transformer_engine.pytorch as te
from megatron.core import parallel_state, tensor_parallel

from neo_megatron.model.freeze import freeze_for_stage
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.model.transformer_config import NeoConfig
from neo_megatron.presets import SIZES


@contextlib.contextmanager
def pretended_hopper():
    """torch.cuda answers the questions that Transformer Engine asks while it builds modules."""
    properties = types.SimpleNamespace(
        name="Hopper", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30
    )
    answers = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_device_capability": lambda *_, **__: (9, 0),
        "get_device_properties": lambda *_, **__: properties,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        yield


def build(implementation: str, **settings) -> NeoModel:
    config = NeoConfig.from_sizes(
        SIZES["tiny"],
        transformer_impl=implementation,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        params_dtype=torch.bfloat16,
        bf16=True,
        **settings,
    )
    return NeoModel(config)


def shapes(model: NeoModel) -> dict[str, tuple]:
    """Name in a checkpoint -> global shape; a factory stands for a matrix that is stored in pieces."""
    return {value.key: tuple(getattr(value, "global_shape", ())) for value in model.sharded_state_dict().values()}


store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)

local = build("local")
with pretended_hopper():
    model = build("transformer_engine")
    layer = model.decoder.layers[0]
    assert isinstance(layer.self_attention.linear_qkv, te.Linear)
    assert isinstance(layer.self_attention.linear_qk_hw, te.Linear)
    assert isinstance(layer.self_attention.linear_proj, te.Linear)
    assert isinstance(layer.mlp.linear_fc1, te.LayerNormLinear)
    assert isinstance(layer.self_attention.q_layernorm_h, te.RMSNorm)
    assert isinstance(model.decoder.final_layernorm, te.RMSNorm)
    assert shapes(model) == shapes(local), shapes(model).items() ^ shapes(local).items()
    freeze_for_stage(model, 1)
    freeze_for_stage(local, 1)
    trained, local_trained = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (model, local))
    assert trained == local_trained
    build("transformer_engine", fp8="hybrid")
print("same names, shapes and stages")
