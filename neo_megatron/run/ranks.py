"""One rank reads for all (metadata read by thousands would keep a file system busy), and sums over all ranks."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from torch import Tensor

from neo_megatron.errors import ConfigError, NeoError


def rank_and_ranks() -> tuple[int, int]:
    """This rank and the number of ranks; (0, 1) without a process group."""
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def on_rank_0(action: Callable[[], Any]) -> Any:
    """Runs an action on rank 0 and gives its result or error to all: ranks may see a shared file system differently.

    Raises:
        ConfigError: as the action raises; also if a file could not be changed.
    """
    rank, ranks = rank_and_ranks()
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = action()
        except (NeoError, OSError) as error:
            outcome[1] = str(error)
    if ranks > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1]:
        raise ConfigError(outcome[1])
    return outcome[0]


def sums_of_layers(of_layers: Mapping[int, Tensor | None], *shape: int) -> Tensor:
    """Sums of the tables of all ranks of a model: float64 ``[layers, ...]``. Collective.

    Args:
        of_layers: by the number of the layer, the table of this rank, or ``None`` for one of zeros.
        shape: of the result.
    """
    sums = torch.zeros(*shape, dtype=torch.float64, device="cuda")
    for number, table in of_layers.items():
        if table is not None:
            sums[number] = table
    for group in (
        parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_group(),
    ):
        torch.distributed.all_reduce(sums, group=group)
    return sums
