"""Attention kernels with one interface: FlexAttention on a GPU, tiles of matrix products on a CPU.

A mask is built once per micro-batch from the rule in `mask.py`; its form decides the kernel. Queries and keys may be
wider than values, which all kernels take as they are.

On a GPU `--attention-backend` chooses, a flag of Megatron's:

    auto      FlexAttention in block sizes that the device holds; SDPA where there are none (the default)
    flash     FlexAttention over FlashAttention 4, which must be installed; compute capability 9.0 only
    unfused   SDPA with a dense mask: memory and work grow with the square of the pack

Shape suffixes: S sequence, B packs, N query heads, G key-value heads, X channels of queries and keys, D of values.
"""

import importlib.util
import logging
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from neo_megatron.errors import ConfigError
from neo_megatron.model import flex_kernel
from neo_megatron.model.block_mask import SeenKeys, computed_pairs
from neo_megatron.model.compiled import compiled
from neo_megatron.model.cpu_kernels.tiled_attention import TiledAttention, TiledMask
from neo_megatron.model.flex_kernel import FLEX_BLOCK, KIB, Widths
from neo_megatron.model.mask import AttentionRule
from neo_megatron.packages import install

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlexMask:
    """Blocks for FlexAttention, and its ``kernel_options``.

    Args:
        repeated: whether the kernel needs key heads repeated for query heads, as FlashAttention 4 does in its backward
            where values are narrower than keys.
    """

    seen: SeenKeys
    blocks: BlockMask
    options: dict[str, Any] = field(default_factory=dict)
    repeated: bool = False


AttentionMask = TiledMask | FlexMask | Tensor


def check_backend(backend: AttnBackend) -> None:
    """Raises ConfigError if a backend has no kernel for NEO's mask, is not installed, or is not deterministic."""
    if backend not in (AttnBackend.auto, AttnBackend.flash, AttnBackend.unfused):
        raise ConfigError(
            f"--attention-backend {backend.name}: none of its kernels has NEO's mask; choose auto, flash or unfused"
        )
    if backend == AttnBackend.flash and not _flash_attention_4():
        raise ConfigError(f"--attention-backend flash needs FlashAttention 4: {install('flash_attn')}, or choose auto")
    if backend == AttnBackend.flash and torch.are_deterministic_algorithms_enabled():
        raise ConfigError(
            "--deterministic-mode: FlashAttention 4 has no deterministic backward; choose --attention-backend auto"
        )


def build_mask(
    rule: AttentionRule,
    dtype: torch.dtype,
    widths: tuple[int, int] = (256, 128),
    backend: AttnBackend = AttnBackend.auto,
    kernel_options: dict[str, int] | None = None,
) -> AttentionMask:
    """The mask of a micro-batch in the form that its device's kernel takes, for queries and keys of this type.

    Args:
        widths: channels of a query or key head, and of a value head: they decide what a GPU can hold.
        backend: see above; a CPU has one kernel.
        kernel_options: of FlexAttention, in place of those that `flex_kernel` chooses for the device.

    Raises:
        ConfigError: FlashAttention 4 has no kernel for these heads on this device.
    """
    device = rule.document_BT.device
    if not rule.document_BT.is_cuda:
        return TiledMask.from_rule(rule, torch.promote_types(dtype, torch.float32))
    keys = rule.document_BT.shape[1]
    options: dict[str, Any] | None = None
    block_size = FLEX_BLOCK
    if backend == AttnBackend.flash:
        options, block_size = {"BACKEND": "FLASH"}, _flash_block(device, widths)
    elif backend == AttnBackend.auto:
        options = kernel_options or _options_of(device, widths, dtype.itemsize)
    if options is None:
        return rule.dense()[:, None]
    seen = SeenKeys.of(rule)
    repeated = backend == AttnBackend.flash and widths[0] != widths[1]
    return FlexMask(seen, seen.blocks(keys, block_size), options, repeated)


def attention_pairs(mask: AttentionMask) -> Tensor:
    """Pairs of query and key that the kernel computes for a head, and those of them that the rule allows.

    FlexAttention and the tiles of a CPU compute all pairs of blocks that are seen in full or in part, SDPA computes all
    pairs. Blocks without an allowed pair are never computed, so a ratio of blocks would always be 1.

    Returns:
        float64 ``[2]`` on the mask's device, without synchronising with it.
    """
    if isinstance(mask, TiledMask):
        return torch.tensor(mask.pairs, dtype=torch.float64)  # type: ignore[attr-defined]
    if isinstance(mask, Tensor):
        allowed = mask.sum(dtype=torch.float64)
        return torch.stack((torch.full_like(allowed, mask.numel()), allowed))
    return torch.stack((computed_pairs(mask.blocks), mask.seen.pairs)).double()


def attend(query_SBNX: Tensor, key_SBGX: Tensor, value_SBGD: Tensor, mask: AttentionMask, scale: float) -> Tensor:
    """Softmax attention with grouped queries -> ``[S, B, N * D]``; the names of the arguments are their shapes."""
    if isinstance(mask, TiledMask):
        return TiledAttention.apply(query_SBNX, key_SBGX, value_SBGD, mask, scale).flatten(2)
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBNX, key_SBGX, value_SBGD))
    if isinstance(mask, Tensor) or mask.repeated:
        # SDPA's kernels for masks, too, take as many key heads as query heads.
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    if isinstance(mask, Tensor):
        context = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    else:
        context = _compiled_flex_attention()(
            query, key, value, block_mask=mask.blocks, scale=scale, enable_gqa=True, kernel_options=mask.options
        )
    return context.permute(2, 0, 1, 3).flatten(2)


@cache
def _compiled_flex_attention():
    # Uncompiled, FlexAttention materialises the full score matrix.
    return compiled(flex_attention)


@cache
def _options_of(device: torch.device, widths: tuple[int, int], number_bytes: int) -> dict[str, Any] | None:
    """Kernel options of FlexAttention on this device; None, and a warning in the log, if it cannot run there."""
    properties = torch.cuda.get_device_properties(device)
    memory = properties.shared_memory_per_block_optin
    options = flex_kernel.kernel_options(Widths(*widths, number_bytes), (properties.major, properties.minor), memory)
    if options is None:
        logger.warning(
            "%s has %d KiB of shared memory for a block of threads, too little for FlexAttention with heads of %d: "
            "attention runs in SDPA, whose memory and work grow with the square of the pack",
            properties.name,
            memory // KIB,
            widths[0],
        )
    return options


@cache
def _flash_block(device: torch.device, widths: tuple[int, int]) -> tuple[int, int]:
    """Query and key rows of a block of the mask for FlashAttention 4 4.0.0b36: its backward's tiles divide them.

    With blocks it has, for heads of 256 and 128, kernels of both directions on sm_90 only: on sm_100 wider heads than
    128 are those of DeepSeek or of 256 both, on sm_120 the backward takes no mask, and on sm_8x there is none.
    """
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if capability != (9, 0) or max(widths) > 256 or 128 < widths[0] <= 192:
        raise ConfigError(
            f"--attention-backend flash: FlashAttention 4 has no kernel for NEO's mask with heads of {widths[0]} and "
            f"{widths[1]} on {properties.name} (compute capability {properties.major}.{properties.minor}; it needs "
            "9.0): choose --attention-backend auto"
        )
    return (128, 64) if widths[0] > 128 else (128, 128)


def _flash_attention_4() -> bool:
    return importlib.util.find_spec("flash_attn") is not None and (
        importlib.util.find_spec("flash_attn.cute") is not None
    )
