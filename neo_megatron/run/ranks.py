"""Work that one rank does for all: reading metadata on each of thousands would keep a shared file system busy."""

from collections.abc import Callable
from typing import Any

import torch

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
