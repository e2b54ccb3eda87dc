"""Stage 1 trains the parameters that the paper says, and fails if a module's name no longer fits."""

import re

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch.utils.flop_counter import FlopCounterMode

from neo_megatron.model.freeze import describe_trainable, freeze_for_stage

# What trains of a post-LLM layer.
NATIVE = {
    "separate": r"self_attention\.(linear_qk_hw|[qk]_layernorm_[hw])\.weight",
    "in-head": r"self_attention\.(linear_qkv|linear_proj|[qk]_layernorm(_hw)?)\.weight",
}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "expert_ffn_hidden_size": 16}


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("form", "experts", "in_layer", "trained"),
    [("separate", {}, 13, 5), ("in-head", {}, 10, 6), ("in-head", EXPERTS, 8 + 1 + 2 * 4, 6)],
)
def test_stage_1_trains_the_front_end_and_the_native_parts_of_the_post_llm(build, form, experts, in_layer, trained):
    """Routers and experts only in the pre-buffer."""
    model = build(attention_form=form, **experts)
    freeze_for_stage(model, 1)
    expected = {
        name
        for name, _ in model.named_parameters()
        if name.startswith("patch_embedding.")
        or re.match(r"decoder\.layers\.[01]\.", name)  # all of the pre-buffer
        or re.match(rf"decoder\.layers\.[23]\.{NATIVE[form]}$", name)
    }
    assert trainable(model) == expected
    # 2 projections with bias; all tensors of a pre-buffer layer; some of a post-LLM layer.
    assert len(expected) == 4 + 2 * in_layer + 2 * trained
    assert "embedding.word_embeddings.weight" not in expected and "output_layer.weight" not in expected


@pytest.mark.parametrize("stage", [2, 3])
def test_later_stages_train_everything(build, stage):
    model = build()
    freeze_for_stage(model, 1)
    freeze_for_stage(model, stage)
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_a_name_that_matches_nothing_is_an_error(build):
    model = build()
    attention = model.decoder.layers[3].self_attention
    attention.renamed = attention.q_layernorm_w
    del attention.q_layernorm_w
    with pytest.raises(LookupError, match="q_layernorm_w.*no such parameters"):
        freeze_for_stage(model, 1)


def test_the_list_counts_what_trains(build):
    model = build()
    freeze_for_stage(model, 1)
    text = describe_trainable(model)
    every = sum(p.numel() for p in model.parameters())
    some = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert re.search(rf"{some:,} of +{every:,}  all", text)
    assert re.search(r" 0 of +[\d,]+  post_llm.mlp.linear_fc1.weight", text)


def test_frozen_parameters_get_no_gradient(build, text_inputs):
    model = build()
    freeze_for_stage(model, 1)
    model(**text_inputs(list(range(8))), target_index=torch.arange(7), targets=torch.arange(1, 8)).sum().backward()
    for name, parameter in model.named_parameters():
        # A batch without images still gives the patch embedding gradients, of zero: Megatron's buckets wait for them.
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize("distributed", [False, True])
def test_frozen_parameters_have_no_main_gradient_and_no_optimizer_state(build, distributed):
    model = build()
    freeze_for_stage(model, 1)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
    wrapped = DistributedDataParallel(model.config, settings, model)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3, use_distributed_optimizer=distributed), [wrapped])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if hasattr(p, "main_grad")} == trained.keys()
    numbers = sum(p.numel() for p in trained.values())
    padding = 64 * len(trained) + 1024 if distributed else 0  # shards and buckets begin at round addresses
    assert numbers <= sum(buffer.grad_data.numel() for buffer in wrapped.buffers) <= numbers + padding
    wrapped.zero_grad_buffer()
    optimizer.step()
    moments = [state for one in optimizer.chained_optimizers for state in one.optimizer.state.values()]
    assert sum(state["exp_avg"].numel() for state in moments) == numbers
    assert sum(state["exp_avg_sq"].numel() for state in moments) == numbers


def test_frozen_weights_have_no_product_in_the_backward(build, text_inputs):
    """Operations that stage 1 saves: a row times a matrix, two operations a weight, for each frozen matrix."""
    tokens, trained = 8, 7
    targets = {"target_index": torch.arange(trained), "targets": torch.ones(trained, dtype=torch.int64)}
    counted = {}
    for stage in (1, 2):
        model = build()
        freeze_for_stage(model, stage)
        loss = model(**text_inputs(list(range(tokens))), **targets).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        counted[stage] = counter.get_total_flops()
        if stage == 1:
            frozen = {n: p.numel() for n, p in model.named_parameters() if p.dim() == 2 and not p.requires_grad}
    head = frozen.pop("output_layer.weight")
    frozen.pop("embedding.word_embeddings.weight")  # looked up, not multiplied
    assert counted[2] - counted[1] == 2 * tokens * sum(frozen.values()) + 2 * trained * head
