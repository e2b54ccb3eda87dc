"""Megatron's and torch's reading of checkpoints, patched so that no pickle of a checkpoint can run anything."""

from io import BytesIO
from typing import Any

from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

from neo_megatron.checked_pickles import load_allowed
from neo_megatron.errors import DataError


def load_bytes(planner: DefaultLoadPlanner, item: ReadItem, value: BytesIO) -> None:
    """Unpickles an object, such as the state of a random number generator; torch would build any object.

    Raises:
        DataError: it is damaged, or holds more than Megatron allows.
    """
    key = item.dest_index.fqn
    try:
        loaded: Any = load_allowed(value)
    except Exception as error:  # damaged bytes can make a pickle raise anything
        what = str(error).split("\n")[0]
        raise DataError(f"the checkpoint's {key} holds more than Megatron allows ({what}): copy it again") from error
    if planner.flatten_state_dict:
        set_element(planner.original_state_dict, planner.mappings[key], loaded)
    else:
        planner.state_dict[key] = loaded


PATCHES = ((DefaultLoadPlanner, "load_bytes", load_bytes),)
