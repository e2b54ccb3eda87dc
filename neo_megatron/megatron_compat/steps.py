"""Megatron's training step, patched to read less and to wait less, on a GPU too.

* Gradients are not divided by the weight of the global batch in a pass of their own over all of them. Clipping
  multiplies this rank's shard of them anyway, with a GPU even by 1, and the division becomes a part of that factor.
* Their norm is read before the weights change, so that a hook can end a step whose numbers are bad. Megatron itself
  looks at every bucket of gradients within the backward, with two waits for the GPU each.
* Whether a signal has arrived is one number for all ranks. Megatron gathers a number of each rank, and waits for each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import clip_grads, optimizer
from megatron.core.optimizer.optimizer import ChainedOptimizer
from megatron.training import dist_signal_handler, training
from torch import Tensor
from torch.distributed.tensor import DTensor

from neo_megatron.megatron_compat.hooks import require_lines

_LINES = {
    training: (
        "    while rerun_state_machine.should_run_forward_backward(data_iterator):\n",
        "        return {}, True, should_checkpoint, should_exit, exit_code, None, None, 0\n",
        "            ) = train_step(\n                forward_step_func, train_data_iterator, model, optimizer,",
        "        if any(signal_handler.signals_received()):\n",
    ),
    optimizer: (
        "        grad_norm = self.get_grad_norm()\n        should_skip_update = False\n",
        "            if optimizer.config.clip_grad > 0.0:\n                if main_params:\n"
        "                    clip_grad_by_total_norm_fp32(\n",
        "        found_inf_flag = self.prepare_grads()\n",
    ),
    clip_grads: ("    clip_coeff = max_norm / (total_norm + 1.0e-6)\n",),
    DistributedDataParallel: ("            buffer.scale_gradients(scaling_factor)\n",),
    dist_signal_handler: ("        all_received = all_gather_item(\n",),
}
_scale, _prepare, _norm = (
    DistributedDataParallel.scale_gradients,
    ChainedOptimizer.prepare_grads,
    ChainedOptimizer.get_grad_norm,
)


@dataclass
class _Gradients:
    """The state of the gradients of the step at work.

    Attributes:
        clips: whether clipping will multiply them, so that they are not scaled before.
        scale: the factor that they still lack, on their device.
        factor: the same as a number, once the norm was read.
        look: is given their norm, NaN for gradients that overflowed in float16, and may raise.
    """

    clips: bool = False
    scale: Tensor | None = None
    factor: float = 1.0
    look: Callable[[float], None] = lambda norm: None


_gradients = _Gradients()


@cache
def patch_steps(step: Callable[..., Any]) -> None:
    """Makes Megatron take its training steps by ``step(compute, data_iterator, model)``.

    ``compute(data_iterator)`` is Megatron's step, with what it returns. Instead of that, ``step`` returns `end_of_run`
    to end the run, or `skipped_step`.
    """
    for owner, lines in _LINES.items():
        require_lines(owner, lines)
    megatrons = training.train_step

    @wraps(megatrons)
    def train_step(forward_step, data_iterator, model, *rest, **more):
        def compute(data_iterator):
            return megatrons(forward_step, data_iterator, model, *rest, **more)

        return step(compute, data_iterator, model)

    training.train_step = train_step
    DistributedDataParallel.scale_gradients = _scale_gradients
    ChainedOptimizer.prepare_grads = _prepare_grads
    ChainedOptimizer.get_grad_norm = _get_grad_norm
    optimizer.clip_grad_by_total_norm_fp32 = _clip
    dist_signal_handler.DistributedSignalHandler.signals_received = _signals_received


def begin(clips: bool, look: Callable[[float], None]) -> None:
    """Begins a run. See `_Gradients` for the arguments."""
    _gradients.clips, _gradients.look, _gradients.scale, _gradients.factor = clips, look, None, 1.0


def end_of_run(save: bool) -> tuple[Any, ...]:
    """The result of Megatron's step that tells it to end the run with exit code 1 before the weights change."""
    return {}, True, save, True, 1, None, None, 0


def skipped_step() -> tuple[Any, ...]:
    """The result of Megatron's step that tells it to count the step as skipped, after which training goes on."""
    return {}, 1, False, False, 0, None, None, None


def pending_scale() -> Tensor | None:
    """The factor that the gradients of this step still lack; ``None`` if they are scaled."""
    return _gradients.scale


def _scale_gradients(model: DistributedDataParallel, scaling_factor: Tensor) -> None:
    if _gradients.clips:
        _gradients.scale = scaling_factor
    else:
        _scale(model, scaling_factor)


def _prepare_grads(chain: ChainedOptimizer) -> bool:
    overflow = _prepare(chain)
    if overflow:
        _gradients.look(math.nan)
    return overflow


@torch.no_grad()
def _get_grad_norm(chain: ChainedOptimizer) -> float:
    norm, scale = _norm(chain), _gradients.scale
    _gradients.factor, _gradients.scale = 1.0, None
    if torch.is_tensor(norm) and scale is not None:  # waits once
        norm, _gradients.factor = torch.stack((norm.flatten()[0], scale.flatten()[0])).tolist()
    else:
        norm, _gradients.factor = float(norm), 1.0 if scale is None else float(scale)
    norm *= _gradients.factor
    _gradients.look(norm)
    return norm


def _clip(
    parameters: list[Tensor] | Tensor, max_norm: float, total_norm: float, use_decoupled_grad: bool = False
) -> None:
    """As Megatron's, with what is left of the scaling.

    Args:
        total_norm: of the gradients as they will be scaled.
    """
    name = "decoupled_grad" if use_decoupled_grad else "grad"
    gradients = [getattr(parameter, name, None) for parameter in parameters]
    gradients = [local_part(gradient).detach() for gradient in gradients if gradient is not None]
    factor = _gradients.factor * min(1.0, max_norm / (total_norm + 1.0e-6))
    if gradients and factor != 1.0:
        overflow = torch.zeros(1, dtype=torch.int, device="cuda")
        clip_grads.multi_tensor_applier(clip_grads.multi_tensor_scale_impl, overflow, [gradients, gradients], factor)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor of Megatron-FSDP, and any other tensor itself; without communication."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _signals_received(handler: dist_signal_handler.DistributedSignalHandler) -> list[bool]:
    """Whether any rank was signalled, once; Megatron asks for `any` of the list."""
    received = torch.tensor([handler._signal_received], dtype=torch.int32, device=dist_signal_handler.get_device())
    torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
    return [bool(received.item())]
