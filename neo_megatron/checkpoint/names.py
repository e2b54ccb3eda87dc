"""ONE table: every tensor's Hugging Face name, its Megatron name, how the two forms differ, how it is split over TP.

Conversion in both directions, the initialisation from Qwen3 and the tests derive from it. Megatron keeps one tensor
where Hugging Face keeps several (query, key and value; gate and up), so a row names one Megatron tensor and the list of
its Hugging Face parts. Merging and splitting move whole values around and compute nothing: a round trip is bit-equal.

Shape suffixes: V vocabulary, H hidden, F feed-forward, E patch-embedding width, G key-value groups, d head dim.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from neo_megatron.model.config import NeoSizes

Shape = tuple[int, ...]

PATCH_EMBEDDING = "vision_model.embeddings."
DECODER = "language_model.model."
LM_HEAD = "language_model.lm_head.weight"
WORD_EMBEDDING = DECODER + "embed_tokens.weight"


@dataclass(frozen=True)
class TensorRow:
    """One Megatron tensor and the Hugging Face tensors it is made of.

    Args:
        megatron: key in the torch_dist checkpoint.
        megatron_shape: global shape there, whatever the layout of the run that saved it.
        hf: Hugging Face name -> shape, in the order in which ``merge`` takes and ``split`` gives the parts.
        merge: Hugging Face parts -> the Megatron tensor.
        split: the Megatron tensor -> Hugging Face parts.
        tensor_parallel_dim: dimension that tensor parallelism splits; ``None`` when every rank holds all of it.
    """

    megatron: str
    megatron_shape: Shape
    hf: dict[str, Shape]
    merge: Callable[[list[Tensor]], Tensor]
    split: Callable[[Tensor], list[Tensor]]
    tensor_parallel_dim: int | None


def tensor_table(sizes: NeoSizes) -> tuple[TensorRow, ...]:
    """The rows of a whole model, in the order of the forward pass."""
    rows = [*_stem_rows(sizes)]
    for layer in range(sizes.num_layers):
        rows += _layer_rows(sizes, layer)
    rows.append(_same("decoder.final_layernorm.weight", DECODER + "norm.weight", (sizes.hidden_size,)))
    if not sizes.tie_word_embeddings:
        rows.append(_same("output_layer.weight", LM_HEAD, (sizes.vocab_size, sizes.hidden_size), split_dim=0))
    return tuple(rows)


def hf_shapes(sizes: NeoSizes) -> dict[str, Shape]:
    """Hugging Face name -> shape of a whole checkpoint; ``lm_head`` is absent where it is the embedding."""
    return {name: shape for row in tensor_table(sizes) for name, shape in row.hf.items()}


def check_shapes(found: dict[str, Shape], expected: dict[str, Shape], where: str) -> None:
    """Refuses a checkpoint that lacks a tensor, has one too many or one of another shape, and names it.

    Raises:
        ValueError: one sentence with ``where``, at most five names of each kind, and what to do.
    """
    complaints = []
    if missing := sorted(expected.keys() - found.keys()):
        complaints.append(f"lacks {_some(missing)}")
    if unexpected := sorted(found.keys() - expected.keys()):
        complaints.append(f"has the unexpected {_some(unexpected)}")
    wrong = [
        f"{name} of shape {list(found[name])} instead of {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    if wrong:
        complaints.append(f"has {_some(wrong)}")
    if complaints:
        raise ValueError(f"{where} {'; '.join(complaints)}: give the checkpoint that belongs to these model sizes")


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _stem_rows(sizes: NeoSizes) -> list[TensorRow]:
    H, E, patch, merge = sizes.hidden_size, sizes.patch_embedding_size, sizes.patch_size, sizes.merge_size
    return [
        _same("embedding.word_embeddings.weight", WORD_EMBEDDING, (sizes.vocab_size, H), split_dim=0),
        _convolution_row("patch_projection", "patch_embedding", (E, 3, patch, patch), channels_last=False),
        _same("patch_embedding.patch_projection.bias", PATCH_EMBEDDING + "patch_embedding.bias", (E,)),
        # The four patches of a merged cell lie behind one another, so a row of the matrix runs over (dy, dx, channel).
        _convolution_row("merge_projection", "dense_embedding", (H, E, merge, merge), channels_last=True),
        _same("patch_embedding.merge_projection.bias", PATCH_EMBEDDING + "dense_embedding.bias", (H,)),
    ]


def _layer_rows(sizes: NeoSizes, layer: int) -> list[TensorRow]:
    H, F, d, G = sizes.hidden_size, sizes.ffn_hidden_size, sizes.head_dim, sizes.num_query_groups
    queries = sizes.num_attention_heads // G
    megatron, hf = f"decoder.layers.{layer}.", f"{DECODER}layers.{layer}."
    attention, self_attn, mlp = megatron + "self_attention.", hf + "self_attn.", hf + "mlp."

    def projection(name: str, rows: int) -> tuple[str, Shape]:
        return f"{self_attn}{name}.weight", (rows, H)

    query_rows = sizes.num_attention_heads * d
    qkv = dict([projection("q_proj", query_rows), projection("k_proj", G * d), projection("v_proj", G * d)])
    qk_hw = dict([projection("q_proj_hw", query_rows), projection("k_proj_hw", G * d)])
    gate_up = {f"{mlp}{name}_proj.weight": (F, H) for name in ("gate", "up")}
    norms = [
        _same(f"{attention}{qk}_layernorm{axis}.weight", f"{self_attn}{qk}_norm{axis}.weight", (width,))
        for qk in "qk"
        for axis, width in (("", d), ("_h", d // 2), ("_w", d // 2))
    ]
    return [
        _same(f"{attention}linear_qkv.layer_norm_weight", hf + "input_layernorm.weight", (H,)),
        _grouped_row(f"{attention}linear_qkv.weight", qkv, heads_per_group=(queries, 1, 1), sizes=sizes),
        _grouped_row(f"{attention}linear_qk_hw.weight", qk_hw, heads_per_group=(queries, 1), sizes=sizes),
        *norms,
        _same(f"{attention}linear_proj.weight", f"{self_attn}o_proj.weight", (H, query_rows), split_dim=1),
        _same(f"{megatron}mlp.linear_fc1.layer_norm_weight", hf + "post_attention_layernorm.weight", (H,)),
        # Over TP each rank holds a piece of gate and the same piece of up; the saved key has gate's rows, then up's.
        TensorRow(f"{megatron}mlp.linear_fc1.weight", (2 * F, H), gate_up, torch.cat, lambda t: list(t.split(F)), 0),
        _same(f"{megatron}mlp.linear_fc2.weight", f"{mlp}down_proj.weight", (H, F), split_dim=1),
    ]


def _same(megatron: str, hf: str, shape: Shape, split_dim: int | None = None) -> TensorRow:
    return TensorRow(megatron, shape, {hf: shape}, lambda parts: parts[0], lambda tensor: [tensor], split_dim)


def _grouped_row(
    megatron: str, parts: dict[str, Shape], heads_per_group: tuple[int, ...], sizes: NeoSizes
) -> TensorRow:
    """Rows sorted by key-value group, so that a TP rank's contiguous slice holds whole groups with all their heads."""
    G, d, H = sizes.num_query_groups, sizes.head_dim, sizes.hidden_size
    shape = (G * sum(heads_per_group) * d, H)

    def merge(tensors: list[Tensor]) -> Tensor:
        by_group = [t.view(G, heads * d, H) for t, heads in zip(tensors, heads_per_group, strict=True)]
        return torch.cat(by_group, dim=1).view(shape)

    def split(tensor: Tensor) -> list[Tensor]:
        by_group = tensor.view(G, -1, H).split([heads * d for heads in heads_per_group], dim=1)
        return [part.reshape(-1, H) for part in by_group]

    return TensorRow(megatron, shape, parts, merge, split, 0)


def _convolution_row(megatron: str, hf: str, shape: Shape, channels_last: bool) -> TensorRow:
    """A convolution whose stride is its size, as the matrix product it is; every rank holds the small matrix whole."""
    out, channels, height, width = shape

    def merge(tensors: list[Tensor]) -> Tensor:
        kernel = tensors[0].permute(0, 2, 3, 1) if channels_last else tensors[0]
        return kernel.reshape(out, -1)

    def split(matrix: Tensor) -> list[Tensor]:
        if channels_last:
            return [matrix.view(out, height, width, channels).permute(0, 3, 1, 2).contiguous()]
        return [matrix.view(shape)]

    hf_name, megatron_name = f"{PATCH_EMBEDDING}{hf}.weight", f"patch_embedding.{megatron}.weight"
    return TensorRow(megatron_name, (out, math.prod(shape[1:])), {hf_name: shape}, merge, split, None)
