"""Records attention during generation: for each generated token one row of weights per layer, and no more.

transformers chooses its attention kernel from a registry. The one registered here attends as `sdpa` does and keeps, of
each call, the weights of the last query: with a cache that is the query from which the next token is generated. An
image of four megapixels has 4,096 tokens; all the weights of one layer would be 4,096 times as many.
"""

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

KERNEL = "sdpa_keeping_last_row"
_TENSOR_BYTES = 600  # estimate for a tensor object without its values


class AttentionRows:
    """The rows of one answer.

    Args:
        columns: positions in the prompt of the tokens that the rows cover: those of the image.
        layers: of the model.
    """

    def __init__(self, columns: Tensor, layers: int) -> None:
        self._columns = columns
        self._rows: list[list[Tensor]] = [[] for _ in range(layers)]
        self.forgotten = False

    @property
    def bytes(self) -> int:
        """Estimated memory of the rows."""
        return sum(row.nbytes + _TENSOR_BYTES for rows in self._rows for row in rows)

    def forget(self) -> None:
        """Frees the rows; from then on those of every layer are empty."""
        self.forgotten = True
        self._rows = [[] for _ in self._rows]

    def add(self, layer: int, weights_K: Tensor) -> None:
        if self.forgotten or not len(self._columns):
            return
        self._rows[layer].append(weights_K[self._columns.to(weights_K.device)])

    def of_layer(self, layer: int) -> Tensor:
        """float32 `[tokens, columns]` on the CPU: attention of each generated token to the columns.

        Row n is that of the query from which the n-th token was generated, the mean over the heads.
        """
        rows = self._rows[layer]
        return torch.stack(rows).cpu() if rows else torch.empty(0, len(self._columns))


class AttentionWatch:
    """Records the rows of a model's answers, without changing the answers.

    Args:
        model: a NEO. One per process, because transformers registers the kernel globally.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers = model.config.llm_config.num_hidden_layers
        self._rows: AttentionRows | None = None
        AttentionInterface.register(KERNEL, self._attend)
        model.set_attn_implementation(KERNEL)

    def begin(self, columns: Tensor) -> AttentionRows:
        """The rows of the next answer, filled while it is generated; its prompt must be a batch of one."""
        self._rows = AttentionRows(columns, self._layers)
        return self._rows

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        **others: object,
    ) -> tuple[Tensor, None]:
        if self._rows is not None:
            self._rows.add(module.layer, last_row(query, key, attention_mask, scaling))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **others)


def last_row(query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float) -> Tensor:
    """Attention weights `[K]` of the last query, mean over the heads, in float32.

    Args:
        query: `[1, heads, L, width]`; key: `[1, groups, K, width]`.
        attention_mask: boolean `[1, 1, L, K]`, True where a query sees a key.
        scaling: of the scores.
    """
    groups, width = key.shape[1], key.shape[-1]
    last = query[0, :, -1].float().view(groups, -1, width)
    scores = last @ key[0].float().transpose(1, 2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask[0, 0, -1], float("-inf"))
    return scores.softmax(dim=-1).mean(dim=(0, 1))
