"""The planner's operations against those that torch counts in the forward and backward of a real model."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from neo_megatron.model import native_attention
from neo_megatron.model.freeze import freeze_for_stage
from neo_megatron.model.mask import AttentionRule
from neo_megatron.model.neo_model import NeoModel
from neo_megatron.model.transformer_config import NeoConfig
from neo_megatron.planning.flops import attention_core_flops, head_flops, layer_flops, model_flops
from neo_megatron.planning.workload import Workload, mean_keys
from neo_megatron.presets import SIZES

TOKENS, IMAGE_TOKENS, TRAINED = 32, 8, 12


def attention_over_all_pairs(query, key, value, *_unused, scale, **_also):
    """Softmax attention written out, ``[S, B, heads, channels]``: two matrix products over every pair."""
    heads = query.shape[2] // key.shape[2]
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    key, value = (x.repeat_interleave(heads, dim=1) for x in (key, value))
    scores = (query @ key.transpose(-1, -2) * scale).softmax(-1)
    return (scores @ value).permute(2, 0, 1, 3).flatten(2)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "form",
    [
        dict(attention_form="separate"),
        dict(attention_form="in-head"),
        dict(attention_form="in-head", num_experts=8, experts_per_token=2, expert_ffn_hidden_size=40),
    ],
    ids=["separate", "in-head", "experts"],
)
def test_a_real_model_counts_as_planned(stage, form, megatron, monkeypatch):
    sizes = SIZES["tiny"].replace(hidden_size=48, ffn_hidden_size=80, num_attention_heads=4, post_llm_layers=3, **form)
    monkeypatch.setattr(native_attention, "attend", attention_over_all_pairs)
    config = NeoConfig.from_sizes(sizes, transformer_impl="local", gradient_accumulation_fusion=False)
    model = NeoModel(config)
    freeze_for_stage(model, stage)
    inputs = {
        "tokens": torch.zeros(1, TOKENS, dtype=torch.int64),
        "positions_thw": torch.zeros(1, TOKENS, 3, dtype=torch.int32),
        "document": torch.zeros(1, TOKENS, dtype=torch.int32),
        "image": -torch.ones(1, TOKENS, dtype=torch.int32),
        "patches": torch.zeros(IMAGE_TOKENS, 4, 768, dtype=torch.uint8),
        "image_token_index": torch.arange(IMAGE_TOKENS),
        "image_token_position": torch.zeros(IMAGE_TOKENS, 2, dtype=torch.int32),
        "target_index": torch.arange(TRAINED),
        "targets": torch.zeros(TRAINED, dtype=torch.int64),
    }
    with FlopCounterMode(display=False) as forward:
        loss = model(**inputs).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()

    workload = Workload(TOKENS, mean_keys=TOKENS, image_share=IMAGE_TOKENS / TOKENS, trained_share=TRAINED / TOKENS)
    planned = model_flops(sizes, stage, workload).total(sizes) * TOKENS
    assert forward.get_total_flops() == planned.forward
    # This attention keeps its scores, so that nothing is computed twice.
    assert backward.get_total_flops() == planned.backward


def test_a_frozen_weight_has_no_gradient():
    sizes = SIZES["neo-2b"]
    layer, frozen_layer = (layer_flops(sizes, mean_keys=1000, frozen=frozen) for frozen in (False, True))
    assert layer.forward == frozen_layer.forward and layer.backward == 2 * layer.forward
    ffn_and_projections = 2 * (3 * 2048 * 6144 + 2048 * 32 * 128 + 16 * 128 * 2048)
    assert layer.backward - frozen_layer.backward == ffn_and_projections
    assert head_flops(sizes, frozen=True).backward == head_flops(sizes).forward


def test_only_the_experts_of_a_token_work_on_it():
    sizes = SIZES["u1-a3b"]
    layer, frozen_layer = (layer_flops(sizes, mean_keys=0, frozen=frozen) for frozen in (False, True))
    attention, router, experts = 2048 * 128 * (32 + 2 * 4 + 32), 128 * 2048, 8 * 3 * 2048 * 768
    assert layer.forward == 2 * (attention + router + experts) and layer.backward == 2 * layer.forward
    # In stage 1 the attention trains, and Megatron's router computes a gradient that is not used.
    assert layer.backward - frozen_layer.backward == 2 * experts


def test_the_backward_of_attention_has_seven_products():
    core = attention_core_flops(SIZES["neo-2b"], mean_keys=1)
    scores, values = 256, 128
    assert core.forward == 2 * 16 * (scores + values)
    # The products of the kernel's template, by the width that they add up or write.
    for_queries, for_keys_and_values = [scores, values, scores], [scores, values, values, scores]
    assert core.training == core.forward + 2 * 16 * sum(for_queries + for_keys_and_values)
    assert core.model == 3 * core.forward  # MFU is not counted from what is computed twice


def test_mean_keys_counts_the_pairs_of_the_mask():
    document = torch.tensor([[0] * 7 + [1] * 12])
    image = torch.tensor([[-1, 0, 0, 0, -1, -1, -1, -1, -1, 1, 1, 1, 1, 2, 2, 2, 2, -1, -1]])
    pairs = AttentionRule(document, image).dense().sum().item()
    assert mean_keys([7, 12], [3, 4, 4]) == pairs / 19
