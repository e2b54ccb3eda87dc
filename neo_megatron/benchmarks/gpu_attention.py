"""Our attention on a pack of the length mix and on one causal document, compared to library kernels on the latter."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from neo_megatron.benchmarks.gpu_packs import draw_packs
from neo_megatron.benchmarks.gpu_timing import CAUSAL, PACKED, Report, device_and_dtype, kernel_seconds
from neo_megatron.benchmarks.gpu_window import SEED
from neo_megatron.errors import ConfigError
from neo_megatron.model.block_mask import computed_pairs
from neo_megatron.model.config import NeoSizes
from neo_megatron.model.core_attention import AttentionMask, FlexMask, attend, build_mask, check_backend
from neo_megatron.model.mask import AttentionRule
from neo_megatron.planning.flops import attention_core_flops
from neo_megatron.planning.packs import measure_items

LIBRARIES = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention 2 in PyTorch": SDPBackend.FLASH_ATTENTION,
    "PyTorch's memory-efficient kernel": SDPBackend.EFFICIENT_ATTENTION,
}


def measure_attention(report: Report, sizes: NeoSizes, length: int, shrunk: int) -> None:
    """Our kernel on a pack of the mix and on one causal document, and library kernels on the latter."""
    (pack,) = draw_packs(sizes, length, 1, SEED, shrunk)
    inputs = AttentionInputs.draw(sizes, length)
    document, image = (pack[name].to(inputs.query.device) for name in ("document", "image"))
    one = torch.zeros_like(document)
    masks = {
        PACKED: (AttentionRule(document, image), measure_items([pack]).mean_keys),
        CAUSAL: (AttentionRule(one, one - 1), (length + 1) / 2),
    }
    for name, (rule, mean_keys) in masks.items():
        for backend in (AttnBackend.auto, AttnBackend.flash) if inputs.query.is_cuda else (AttnBackend.auto,):
            report(_ours(inputs, name, rule, mean_keys, backend))
    if inputs.query.is_cuda:
        for name, backend in LIBRARIES.items():
            for padded in (False, True):
                report(_library(inputs, name, backend, padded))


@dataclass(frozen=True)
class AttentionInputs:
    """Random queries, keys and values as `attend` takes them, and a gradient of its output."""

    sizes: NeoSizes
    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.sizes.head_dim)

    @classmethod
    def draw(cls, sizes: NeoSizes, length: int) -> "AttentionInputs":
        torch.manual_seed(SEED)
        device, dtype = device_and_dtype()
        heads, groups, (width, d) = sizes.num_attention_heads, sizes.num_query_groups, sizes.attention_widths
        query, key, value = (
            torch.randn(length, 1, count, channels, device=device, dtype=dtype, requires_grad=True)
            for count, channels in ((heads, width), (groups, width), (groups, d))
        )
        gradient = torch.randn(length, 1, heads * d, device=device, dtype=dtype)
        return cls(sizes, query, key, value, gradient)


def _ours(
    inputs: AttentionInputs, name: str, rule: AttentionRule, mean_keys: float, backend: AttnBackend
) -> dict[str, Any]:
    query, key, value = tensors = inputs.query, inputs.key, inputs.value
    kernel = f"ours, --attention-backend {backend.name}"

    def build() -> AttentionMask:
        return build_mask(rule, query.dtype, inputs.sizes.attention_widths, backend)

    try:
        check_backend(backend)
        mask = build()
    except ConfigError as error:
        return _refused(inputs, kernel, name, error)
    try:
        forward, both = _forward_and_both(
            lambda: attend(query, key, value, mask, inputs.scale), tensors, inputs.gradient
        )
    except Exception as error:  # compilers raise any exception; the other kernels still have to be measured
        return _refused(inputs, kernel, name, error)
    figures = _figures(inputs, kernel, name, mean_keys, forward, both) | {"mask_seconds": kernel_seconds(build)}
    if isinstance(mask, FlexMask):
        figures["pairs_computed"] = int(computed_pairs(mask.blocks)) / (len(query) * mean_keys)
    return figures


def _library(inputs: AttentionInputs, name: str, backend: SDPBackend, padded: bool) -> dict[str, Any]:
    """One of SDPA's kernels on a causal mask, its key-value heads repeated beforehand, which costs it nothing here."""
    sizes, length = inputs.sizes, len(inputs.query)
    repeats = sizes.num_attention_heads // sizes.num_query_groups
    value = pad(inputs.value, (0, sizes.query_key_dim - sizes.head_dim)) if padded else inputs.value
    name = f"{name}, V padded to {sizes.query_key_dim}" if padded else name
    query, key, value = tensors = [
        x.detach().repeat_interleave(times, dim=2).permute(1, 2, 0, 3).contiguous().requires_grad_()
        for x, times in ((inputs.query, 1), (inputs.key, repeats), (value, repeats))
    ]

    def kernel() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, is_causal=True, scale=inputs.scale)

    try:
        forward, both = _forward_and_both(kernel, tensors, torch.randn_like(value))
    except RuntimeError as error:  # it does not support these widths; another one may
        return _refused(inputs, name, CAUSAL, error)
    return _figures(inputs, name, CAUSAL, (length + 1) / 2, forward, both)


def _refused(inputs: AttentionInputs, kernel: str, mask: str, error: Exception) -> dict[str, Any]:
    sentence = (str(error).splitlines() or [type(error).__name__])[0]
    return {"kernel": kernel, "mask": mask, "length": len(inputs.query), "refused": sentence[:120]}


def _forward_and_both(kernel: Callable[[], Tensor], inputs: Sequence[Tensor], gradient: Tensor) -> tuple[float, float]:
    """Seconds of the forward without a graph, and of forward and backward."""
    with torch.no_grad():
        forward = kernel_seconds(kernel)
    return forward, kernel_seconds(lambda: torch.autograd.grad(kernel(), inputs, gradient))


def _figures(
    inputs: AttentionInputs, kernel: str, mask: str, mean_keys: float, forward: float, both: float
) -> dict[str, Any]:
    """Rates from the operations that the mask needs, whatever the kernel computes in addition."""
    length = len(inputs.query)
    flops = length * attention_core_flops(inputs.sizes, mean_keys)
    return {
        "kernel": kernel,
        "mask": mask,
        "length": length,
        "rate_forward": flops.forward / forward,
        "rate_backward": flops.backward / max(both - forward, 1e-9),
        "rate": flops.model / both,
    }
