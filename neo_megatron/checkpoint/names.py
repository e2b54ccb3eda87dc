"""The table of all tensors: Hugging Face name, Megatron name, how both forms differ, and how TP splits them.

Conversion in both directions, the initialisation from Qwen3, the planner's counts and the tests derive from it.
Megatron keeps one tensor where Hugging Face keeps several (query, key and value; gate and up), so a row names one
Megatron tensor and its Hugging Face parts. Each part is a view of the Megatron tensor: converting moves values
around and computes none, so a round trip is bit-equal.

Shape suffixes: V vocabulary, H hidden, F feed-forward, E patch-embedding width, G key-value groups, d head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import TYPE_CHECKING, Literal

from neo_megatron.errors import CheckpointError
from neo_megatron.model.config import NeoSizes

if TYPE_CHECKING:  # the planner counts without torch
    from torch import Tensor

Shape = tuple[int, ...]

PATCH_EMBEDDING = "vision_model.embeddings."
DECODER = "language_model.model."
LM_HEAD = "language_model.lm_head.weight"
WORD_EMBEDDING = DECODER + "embed_tokens.weight"

type _Views = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Start:
    """Initialization of a tensor that no checkpoint provides: NEO's published rules.

    Args:
        kind: ``normal`` with the standard deviation ``number``, ``uniform`` within ``number``, all ``constant``
            ``number``, a ``copy`` of the Hugging Face tensor ``of``, or ``rows and columns`` of it: first and third
            quarter of every head's rows, for h and again for w.
    """

    kind: Literal["normal", "uniform", "constant", "copy", "rows and columns"]
    number: float = 0.0
    of: str = ""

    def __str__(self) -> str:
        if self.kind == "normal":
            return f"drawn from N(0, {self.number})"
        if self.kind == "uniform":
            return f"drawn evenly from within {self.number:.4g}"
        return f"all {self.number:g}" if self.kind == "constant" else f"{self.kind} of {self.of}"


_NORMAL, _ONES = Start("normal", 0.02), Start("constant", 1.0)


@dataclass(frozen=True)
class HfTensor:
    """One Hugging Face tensor.

    Args:
        shape: as it is stored.
        start: what it is where neither a NEO nor a Qwen3 gives it.
        qwen3: name in the Qwen3 that NEO starts from; ``None`` for what NEO adds.
        channels: which channels of a head of that tensor, and in which order, by `qwen3_channels`; empty for a tensor
            that is taken as it is.
    """

    shape: Shape
    start: Start
    qwen3: str | None
    channels: tuple[int, ...] = ()


@dataclass(frozen=True)
class TensorRow:
    """One Megatron tensor and the Hugging Face tensors it is made of.

    Args:
        megatron: key in the torch_dist checkpoint.
        megatron_shape: global shape there, whatever the layout of the run that saved it.
        hf: Hugging Face name -> tensor, in the order of ``views``.
        views: the Megatron tensor -> a view for each Hugging Face tensor, its values in the order in which Hugging Face
            stores them; some have one more dimension, for the groups that lie apart.
        tensor_parallel_dim: dimension that tensor parallelism splits; ``None`` when every rank holds all of it.
        layer: number of the decoder layer it belongs to; ``None`` outside of them.
        trained_in_stage_1: whether stage 1 trains it.
        expert: whether its first dimension are experts, which expert parallelism splits.
    """

    megatron: str
    megatron_shape: Shape
    hf: dict[str, HfTensor]
    views: _Views
    tensor_parallel_dim: int | None
    layer: int | None = None
    trained_in_stage_1: bool = False
    expert: bool = False

    def split(self, tensor: Tensor) -> list[Tensor]:
        """The Megatron tensor -> Hugging Face parts."""
        return [view.reshape(part.shape) for view, part in zip(self.views(tensor), self.hf.values(), strict=True)]


@cache
def tensor_table(sizes: NeoSizes) -> tuple[TensorRow, ...]:
    """The rows of a complete model, in the order of Megatron's modules."""
    rows = [*_stem_rows(sizes)]
    for layer in range(sizes.num_layers):
        rows += _LayerRows(sizes, layer).rows()
    norm = HfTensor((sizes.hidden_size,), _ONES, qwen3_name(DECODER + "norm.weight"))
    rows.append(_same("decoder.final_layernorm.weight", DECODER + "norm.weight", norm))
    if not sizes.tie_word_embeddings:
        head = HfTensor((sizes.vocab_size, sizes.hidden_size), Start("copy", of=WORD_EMBEDDING), qwen3_name(LM_HEAD))
        rows.append(_same("output_layer.weight", LM_HEAD, head, split_dim=0))
    return tuple(rows)


def hf_tensors(sizes: NeoSizes) -> dict[str, HfTensor]:
    """Hugging Face name -> tensor of a complete checkpoint; ``lm_head`` is absent where it is the embedding."""
    return {name: tensor for row in tensor_table(sizes) for name, tensor in row.hf.items()}


def hf_shapes(sizes: NeoSizes) -> dict[str, Shape]:
    """Hugging Face name -> shape of a complete checkpoint; ``lm_head`` is absent where it is the embedding."""
    return {name: tensor.shape for name, tensor in hf_tensors(sizes).items()}


def qwen3_name(name: str) -> str:
    """Qwen3's name of a tensor outside the layers."""
    return name.removeprefix("language_model.")


def check_shapes(
    found: dict[str, Shape], expected: dict[str, Shape], where: str, allow_missing: Sequence[str] = ()
) -> list[str]:
    """Refuses a checkpoint that lacks a tensor, has one too many or one of another shape, and names it.

    Args:
        allow_missing: patterns as of the shell (``*_hw.weight``) of names that may be missing.

    Returns:
        The missing names that a pattern allows, in the order of ``expected``.

    Raises:
        CheckpointError: one sentence with ``where``, at most five names of each kind, and what to do.
    """
    absent = [name for name in expected if name not in found]
    allowed = [name for name in absent if any(fnmatchcase(name, pattern) for pattern in allow_missing)]
    complaints = []
    if missing := sorted(set(absent) - set(allowed)):
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
        raise CheckpointError(f"{where} {'; '.join(complaints)}: give the checkpoint that belongs to these model sizes")
    return allowed


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _stem_rows(sizes: NeoSizes) -> list[TensorRow]:
    H, E, patch, merge = sizes.hidden_size, sizes.patch_embedding_size, sizes.patch_size, sizes.merge_size
    words = HfTensor((sizes.vocab_size, H), _NORMAL, qwen3_name(WORD_EMBEDDING))
    return [
        _same("embedding.word_embeddings.weight", WORD_EMBEDDING, words, split_dim=0),
        *_convolution_rows("patch_projection", "patch_embedding", (E, 3, patch, patch), channels_last=False),
        # The four patches of a merged cell lie one after another, so a row of the matrix runs over (dy, dx, channel).
        *_convolution_rows("merge_projection", "dense_embedding", (H, E, merge, merge), channels_last=True),
    ]


class _LayerRows:
    """The rows of one decoder layer."""

    def __init__(self, sizes: NeoSizes, layer: int) -> None:
        self._sizes, self._layer = sizes, layer
        self._qwen3_layer = layer - sizes.pre_buffer_layers
        self._hf = f"{DECODER}layers.{layer}."

    def rows(self) -> list[TensorRow]:
        sizes = self._sizes
        H, d, G = sizes.hidden_size, sizes.head_dim, sizes.num_query_groups
        queries, query_rows = sizes.num_attention_heads // G, sizes.num_attention_heads * d
        attention, part = "self_attention.", self._part
        # In the form "in-head" the channels of Qwen3's heads are shared out; values stay as they are.
        channels = qwen3_channels(sizes)
        qkv = part("self_attn.q_proj", (query_rows, H), channels=channels)
        qkv |= part("self_attn.k_proj", (G * d, H), channels=channels) | part("self_attn.v_proj", (G * d, H))
        return [
            self._norm(attention + "linear_qkv.layer_norm_weight", "input_layernorm", H),
            self._row(attention + "linear_qkv.weight", qkv, partial(_groups, G, (queries * d, d, d)), 0),
            self._row(attention + "linear_proj.weight", part("self_attn.o_proj", (H, query_rows)), _whole, 1),
            *self._rows_of_form[sizes.attention_form](self),
            *(self._experts() if sizes.num_experts else self._dense()),
        ]

    def _dense(self) -> Iterator[TensorRow]:
        H, F, part = self._sizes.hidden_size, self._sizes.ffn_hidden_size, self._part
        gate_up = part("mlp.gate_proj", (F, H)) | part("mlp.up_proj", (F, H))
        yield self._norm("mlp.linear_fc1.layer_norm_weight", "post_attention_layernorm", H)
        # Over TP a rank holds a piece of gate and the same piece of up; the saved key has gate's rows, then up's.
        yield self._row("mlp.linear_fc1.weight", gate_up, lambda tensor: tensor.split(F), 0)
        yield self._row("mlp.linear_fc2.weight", part("mlp.down_proj", (H, F)), _whole, 1)

    def _experts(self) -> Iterator[TensorRow]:
        """Megatron stores all experts of a layer as one tensor, with a first dimension for their number."""
        H, F, E = self._sizes.hidden_size, self._sizes.expert_ffn_hidden_size, self._sizes.num_experts
        yield self._norm("pre_mlp_layernorm.weight", "post_attention_layernorm", H)
        yield self._row("mlp.router.weight", self._part("mlp.gate", (E, H)), _whole, None)
        gate_up: dict[str, HfTensor] = {}
        down: dict[str, HfTensor] = {}
        for expert in range(E):
            name = f"mlp.experts.{expert}."
            gate_up |= self._part(name + "gate_proj", (F, H)) | self._part(name + "up_proj", (F, H))
            down |= self._part(name + "down_proj", (H, F))
        key = "mlp.experts.experts."
        halves = partial(_halves_of_experts, F)
        yield self._row(key + "linear_fc1.weight", gate_up, halves, 1, (E, 2 * F, H), expert=True)
        yield self._row(key + "linear_fc2.weight", down, lambda tensor: tensor.unbind(), 2, (E, H, F), expert=True)

    def _separate(self) -> Iterator[TensorRow]:
        """Projections of h and w, and a norm for each axis."""
        sizes = self._sizes
        H, d, G = sizes.hidden_size, sizes.head_dim, sizes.num_query_groups
        queries = sizes.num_attention_heads // G
        # The post-LLM computes on text what Qwen3 computed: its new keys are zero.
        query, key = _NORMAL, _NORMAL
        if self._qwen3_layer >= 0:
            query, key = Start("rows and columns", of=f"{self._hf}self_attn.q_proj.weight"), Start("constant", 0.0)
        qk_hw = self._part("self_attn.q_proj_hw", (sizes.num_attention_heads * d, H), query, new=True)
        qk_hw |= self._part("self_attn.k_proj_hw", (G * d, H), key, new=True)
        yield self._row("self_attention.linear_qk_hw.weight", qk_hw, partial(_groups, G, (queries * d, d)), 0)
        for qk in "qk":
            yield self._norm(f"self_attention.{qk}_layernorm.weight", f"self_attn.{qk}_norm", d)
        for axis in "hw":
            for qk in "qk":
                name = f"{qk}_layernorm_{axis}.weight"
                yield self._norm(f"self_attention.{name}", f"self_attn.{qk}_norm_{axis}", d // 2, new=True)

    def _in_head(self) -> Iterator[TensorRow]:
        """A norm for t, and one for h and w together; both from Qwen3's norm of queries or keys."""
        channels = qwen3_channels(self._sizes)
        half = len(channels) // 2
        for axes, taken in (("", channels[:half]), ("_hw", channels[half:])):
            for qk in "qk":
                qwen3 = f"self_attn.{qk}_norm"
                parts = self._part(f"{qwen3}{axes}", (half,), _ONES, channels=taken, qwen3=qwen3)
                yield self._row(f"self_attention.{qk}_layernorm{axes}.weight", parts, _whole, None)

    _rows_of_form = {"separate": _separate, "in-head": _in_head}

    def _part(
        self,
        name: str,
        shape: Shape,
        start: Start = _NORMAL,
        new: bool = False,
        channels: tuple[int, ...] = (),
        qwen3: str = "",
    ) -> dict[str, HfTensor]:
        """A Hugging Face tensor of this layer; in Qwen3 it has the same name unless ``qwen3`` gives another."""
        from_qwen3 = (
            None if new or self._qwen3_layer < 0 else f"model.layers.{self._qwen3_layer}.{qwen3 or name}.weight"
        )
        return {f"{self._hf}{name}.weight": HfTensor(shape, start, from_qwen3, channels)}

    def _row(
        self,
        megatron: str,
        parts: dict[str, HfTensor],
        views: _Views,
        split_dim: int | None,
        shape: Shape | None = None,
        expert: bool = False,
    ) -> TensorRow:
        """A row whose parts lie one under the other, unless it has a ``shape`` of its own."""
        shapes = [tensor.shape for tensor in parts.values()]
        shape = shape or (sum(shape[0] for shape in shapes), *shapes[0][1:])
        trained = self._qwen3_layer < 0 or any(
            f"{megatron}.".startswith(f"{name}.") for name in self._sizes.form.trained_in_stage_1
        )
        key = f"decoder.layers.{self._layer}.{megatron}"
        return TensorRow(key, shape, parts, views, split_dim, self._layer, trained, expert)

    def _norm(self, megatron: str, name: str, width: int, new: bool = False) -> TensorRow:
        return self._row(megatron, self._part(name, (width,), _ONES, new), _whole, None)


def qwen3_channels(sizes: NeoSizes) -> tuple[int, ...]:
    """Channels of a query or key head of Qwen3 in the order in which a NEO of these sizes has them; empty if the same.

    Qwen3 rotates channel i together with i + D/2, by the i-th frequency of D/2. In the form ``in-head`` t gets every
    other pair, which keeps its frequency, and h and w in turn get one of the pairs between; each part of a head rotates
    its own halves. No formula is published; this one loses no channel.
    """
    if sizes.attention_form == "separate":
        return ()
    half = sizes.head_dim // 2
    axes = [range(0, half, 2), range(1, half, 4), range(3, half, 4)]
    return tuple(channel for axis in axes for channel in (*axis, *(pair + half for pair in axis)))


def _whole(tensor: Tensor) -> Sequence[Tensor]:
    return [tensor]


def _groups(groups: int, rows: Sequence[int], tensor: Tensor) -> Sequence[Tensor]:
    """Rows sorted by key-value group, so that a TP rank's contiguous slice holds complete groups of heads."""
    return tensor.view(groups, sum(rows), -1).split(rows, dim=1)


def _halves_of_experts(rows: int, tensor: Tensor) -> Sequence[Tensor]:
    """Gate and up of the first expert, of the second, and so on."""
    return [half for expert in tensor.unbind() for half in expert.split(rows)]


def _same(megatron: str, hf: str, tensor: HfTensor, split_dim: int | None = None, trained: bool = False) -> TensorRow:
    return TensorRow(megatron, tensor.shape, {hf: tensor}, _whole, split_dim, trained_in_stage_1=trained)


def _convolution_rows(megatron: str, hf: str, shape: Shape, channels_last: bool) -> Iterator[TensorRow]:
    """A convolution whose stride is its size, as the matrix product it is; every rank holds all of the small matrix."""
    out, channels, height, width = shape
    fan_in = math.prod(shape[1:])
    start = Start("uniform", 1 / math.sqrt(fan_in))  # PyTorch draws both weight and bias of a convolution so

    def views(matrix: Tensor) -> Sequence[Tensor]:
        if channels_last:
            return [matrix.view(out, height, width, channels).permute(0, 3, 1, 2)]
        return [matrix.view(shape)]

    megatron, hf = f"patch_embedding.{megatron}.", f"{PATCH_EMBEDDING}{hf}."
    weight = {hf + "weight": HfTensor(shape, start, None)}
    yield TensorRow(megatron + "weight", (out, fan_in), weight, views, None, trained_in_stage_1=True)
    yield _same(megatron + "bias", hf + "bias", HfTensor((out,), start, None), trained=True)
