"""FlexAttention on packs of many documents and images against dense float32, forward and backward."""

import math

import pytest
import torch
from gpu.conftest import relative_error
from support.random_packs import random_packs
from torch import Tensor

from neo_megatron.model.mask import AttentionRule

LENGTH, PACKS, HEADS, GROUPS = 1024, 2, 4, 2
# Relative error of the output and of gradients.
BOUNDS = {torch.bfloat16: (1e-2, 2e-2), torch.float32: (1e-5, 2e-5)}


@pytest.fixture
def rule(gpu) -> AttentionRule:
    return rule_of_seed(0)


def rule_of_seed(seed: int) -> AttentionRule:
    packs = random_packs(LENGTH, PACKS + seed)
    return AttentionRule(packs.document_BT[-PACKS:].cuda(), packs.image_BT[-PACKS:].cuda())


def draw(dtype: torch.dtype, head_dim: int) -> list[Tensor]:
    """Query, key, value and a gradient of the output; drawn again at every call."""
    shapes = ((HEADS, 2 * head_dim), (GROUPS, 2 * head_dim), (GROUPS, head_dim))
    tensors = [torch.randn(LENGTH, PACKS, *shape, device="cuda", dtype=dtype).requires_grad_() for shape in shapes]
    return [*tensors, torch.randn(LENGTH, PACKS, HEADS * head_dim, device="cuda", dtype=dtype)]


def dense(rule: AttentionRule, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> list[Tensor]:
    """Output and gradients by the definition, in float64."""
    q, k, v = (x.detach().double().permute(1, 2, 0, 3).requires_grad_() for x in (query, key, value))
    repeated = [x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v)]
    score = q @ repeated[0].mT / math.sqrt(value.shape[-1])
    weight = score.masked_fill(~rule.dense()[:, None], -math.inf).softmax(dim=-1)
    out = (weight @ repeated[1]).permute(2, 0, 1, 3)
    grads = torch.autograd.grad(out.flatten(2), (q, k, v), gradient.double())
    return [out.flatten(2), *(grad.permute(2, 0, 1, 3) for grad in grads)]


def ours(mask, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> list[Tensor]:
    from neo_megatron.model.core_attention import attend

    out = attend(query, key, value, mask, 1 / math.sqrt(value.shape[-1]))
    return [out, *torch.autograd.grad(out, (query, key, value), gradient)]


def build(rule: AttentionRule, dtype: torch.dtype, head_dim: int, backend: str = "auto"):
    from megatron.core.transformer.enums import AttnBackend

    from neo_megatron.model.core_attention import build_mask

    return build_mask(rule, dtype, (2 * head_dim, head_dim), AttnBackend[backend])


# Heads of NEO; float32 compiles for longer, and tests/kernels has its numbers for NEO's heads.
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 128), (torch.float32, 64)], ids=str)
def test_forward_and_backward_equal_the_definition(rule, poisoned, dtype, head_dim):
    mask = build(rule, dtype, head_dim)
    for seed in range(3):  # the first call compiles
        torch.manual_seed(seed)
        inputs = draw(dtype, head_dim)
        poisoned()
        check(ours(mask, *inputs), dense(rule, *inputs), dtype)


def check(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    bounds = [BOUNDS[dtype][0], *[BOUNDS[dtype][1]] * 3]
    for name, left, right, bound in zip(("out", "dQ", "dK", "dV"), actual, expected, bounds, strict=True):
        assert left.isfinite().all(), name
        error = relative_error(left, right)
        assert error < bound, f"{name}: relative error {error:.2e}"


def test_unfused_kernel_equals_the_definition(rule, poisoned):
    inputs = draw(torch.bfloat16, 128)
    mask = build(rule, torch.bfloat16, 128, "unfused")
    poisoned()
    check(ours(mask, *inputs), dense(rule, *inputs), torch.bfloat16)


def test_flash_attention_4_equals_the_definition(rule, poisoned):
    from neo_megatron.model.core_attention import _flash_attention_4

    if not _flash_attention_4():
        pytest.skip("FlashAttention 4 is not installed")
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("FlashAttention 4 has NEO's heads on sm_90 only")
    inputs = draw(torch.bfloat16, 128)
    mask = build(rule, torch.bfloat16, 128, "flash")
    poisoned()
    check(ours(mask, *inputs), dense(rule, *inputs), torch.bfloat16)


def test_other_packs_cause_no_recompilation(rule):
    ours(build(rule, torch.bfloat16, 128), *draw(torch.bfloat16, 128))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 4):
            ours(build(rule_of_seed(seed), torch.bfloat16, 128), *draw(torch.bfloat16, 128))
