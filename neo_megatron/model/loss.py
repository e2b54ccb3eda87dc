"""The loss: weighted cross entropy over trained positions, normalised over the global batch.

    loss = sum_i w_i * nll_i / sum_i w_i      over all micro-batches and all data-parallel ranks

Megatron's `calculate_per_token_loss` does this for weights of one: its schedule sums an integer count of tokens,
and `finalize_model_grads` divides the gradients by the count of the global batch. NEO's weights are fractions, so the
sum of weights is kept here and passed to the same `finalize_model_grads` in place of the count.
"""

import torch
from megatron.core.distributed import finalize_model_grads
from torch import Tensor


class WeightedLoss:
    """Reduces the losses of a micro-batch and remembers the sum of weights until the gradients are finalised."""

    def __init__(self) -> None:
        self._weight_sum: Tensor | None = None

    def __call__(self, weight_M: Tensor, nll_M: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Result of a loss function as Megatron's schedules take it.

        Args:
            weight_M: float32 ``[M]``, weight of each trained position; M may be 0.
            nll_M: float32 ``[M]``, cross entropy of each trained position.

        Returns:
            The weighted sum (to differentiate), the number of trained positions, and, to log, sum and weight.
        """
        loss, weight = (weight_M * nll_M).sum(), weight_M.sum()
        if torch.is_grad_enabled():
            # A loss that is not finite makes the sum NaN, and so the gradients of all ranks: a check of them finds it.
            weight = weight + 0 * loss.detach()
            self._weight_sum = weight if self._weight_sum is None else self._weight_sum + weight
        # Summed in float64, so that the logged loss does not depend on how the batch was divided. (No part of `loss`,
        # which the schedule scales in place.)
        report = torch.stack(((weight_M.double() * nll_M.detach().double()).sum(), weight_M.double().sum()))
        # Filled on the device; `torch.tensor` would copy the number and synchronise.
        count = torch.full((), nll_M.numel(), dtype=torch.int, device=nll_M.device)
        return loss, count, {"lm loss": report}

    def finalize_model_grads(self, model: list[torch.nn.Module], num_tokens: Tensor, **groups) -> None:
        """Reduces the gradients as Megatron does and divides them by the global sum of weights.

        Only the last pipeline stage holds a sum; Megatron broadcasts it to the others. A sum is never between 0 and 1:
        one trained sample alone adds at least 1 in every weighting, so Megatron's guard against 0 changes nothing else.
        """
        weight_sum, self._weight_sum = self._weight_sum, None
        if weight_sum is None:
            weight_sum = torch.zeros((), dtype=torch.float32, device=num_tokens.device)
        finalize_model_grads(model, weight_sum, **groups)
