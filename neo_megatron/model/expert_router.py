"""The router of a mixture of experts: Megatron's, with the balance loss of SenseNova-U1 and figures for the log.

For the tokens of one modality m (image tokens, or text) in one layer, with E experts of which a token goes to k:

    f_e = tokens that go to e / (k n),   P_e = mean probability of e over all experts,   loss_m = E sum_e f_e P_e

    balance loss = sum over layers of (loss_image + loss_text)

Sums and n are those of a micro-batch on all ranks, padding left out; f has no gradient. Source: SenseNova-U1's training
code (arXiv 2605.12500). Over several micro-batches of a step it is averaged by their loss weights, as the cross entropy
is. Megatron's own losses, which every data-parallel rank has of its own packs, are averaged so too.

Shape suffixes: N tokens of this rank, E experts.
"""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

MODALITIES = ("text", "image")  # their numbers are `Tokens.modality`


@dataclass(frozen=True)
class Tokens:
    """The tokens of a micro-batch, as the routers need to know them.

    Args:
        modality: int8 ``[N]``, in the order of the router's tokens: 0 text, 1 image token, -1 padding.
        loss_weights: float32 ``[2]``, sums of the loss weights of this micro-batch: of the packs of this rank, over its
            context-parallel ranks, and of all packs; ``None`` where nothing trains.
    """

    modality: Tensor
    loss_weights: Tensor | None = None


class ExpertRouter(TopKRouter):
    """Softmax over all experts in float32, and the k largest.

    Attributes:
        counted: float64 ``[2, 2E + 2]``, for each modality, of all training tokens of this rank since it was last
            ``None``: tokens of each expert, sums of probabilities, tokens, and their entropy in nats.
    """

    tokens: Tokens | None = None
    counted: Tensor | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        weights, chosen = super().routing(logits, padding_mask)
        if self.topk == 1 and self.config.sizes.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        if not (self.training and torch.is_grad_enabled() and self.tokens):
            return weights, chosen
        probability_NE = logits.flatten(0, -2).float().softmax(dim=-1)
        of_modality = torch.stack([self.tokens.modality == number for number in range(len(MODALITIES))]).float()
        probabilities = of_modality @ probability_NE  # [2, E], and the only part with a gradient
        with torch.no_grad():
            entropy_N = torch.special.entr(probability_NE).sum(dim=-1, keepdim=True)
            sums = of_modality @ torch.cat((chosen.float(), entropy_N.new_ones(entropy_N.shape), entropy_N), dim=-1)
            counts, tokens, entropy = sums.split((self.num_experts, 1, 1), dim=-1)
            more = torch.cat((counts, probabilities, tokens, entropy), dim=-1).double()
            self.counted = more if self.counted is None else self.counted + more
        if self.config.balance_loss_coeff:
            loss = self._balance_loss(counts, tokens, probabilities) * self.config.balance_loss_coeff
            weights = MoEAuxLossAutoScaler.apply(weights, loss * self.tokens.loss_weights[1])
        return weights, chosen

    def _balance_loss(self, counts: Tensor, tokens: Tensor, probabilities: Tensor) -> Tensor:
        """This rank's part of the loss; the parts of all ranks sum to it."""
        everywhere = torch.cat((counts, tokens), dim=-1)
        torch.distributed.all_reduce(everywhere, group=self.tp_dp_cp_group)
        counts, tokens = everywhere.split((self.num_experts, 1), dim=-1)
        # A modality without tokens counts 0.
        return self.num_experts * (counts / self.topk * probabilities / tokens.square().clamp(min=1)).sum()

    def attach_and_log_load_balancing_loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Megatron's, whose gradients are divided by the number of tokens; NEO's are divided by the loss weights."""
        weight = self.tokens.loss_weights[0] / self.tp_cp_group.size()
        return super().attach_and_log_load_balancing_loss(*args, **{**kwargs, "valid_token_count": weight})


class ExpertLayer(TransformerLayer):
    """A decoder layer with experts, whose router learns of the tokens before it runs, also when it is recomputed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.mlp.router.tokens = kwargs["packed_seq_params"].tokens
        return super().forward(*args, **kwargs)


def balance_of(counted: Tensor, experts: int) -> dict[str, Tensor]:
    """Figures of routers for the log.

    Args:
        counted: ``[..., 2, 2E + 2]``, sums of `ExpertRouter.counted` over ranks.

    Returns:
        Name -> ``[..., 2]``, not a number where a modality has no tokens: the load of the busiest expert over the mean,
        the mean entropy of the probabilities over the largest that is possible, the share of experts without a token,
        and the balance loss.
    """
    counts, probabilities, tokens, entropy = counted.split((experts, experts, 1, 1), dim=-1)
    load = counts / counts.mean(dim=-1, keepdim=True)
    return {
        "balance loss": (load * probabilities / tokens).sum(dim=-1),
        "load imbalance": load.amax(dim=-1),
        "router entropy": (entropy / tokens).squeeze(-1) / torch.tensor(float(experts)).log(),
        "dead experts": (counts == 0).double().mean(dim=-1) + 0 * load[..., 0],
    }
