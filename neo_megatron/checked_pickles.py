"""Unpickles checkpoint files safely: only tensors, plain values and the classes that Megatron itself allows."""

import argparse
import warnings
from typing import Any, BinaryIO

import torch


def load_allowed(file: BinaryIO) -> Any:
    """Loads a file of `torch.save` that holds only tensors, plain values and classes that Megatron itself allows.

    Raises:
        pickle.UnpicklingError: it holds anything else.
    """
    # Only training writes classes of Megatron, whose import takes seconds.
    named = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - {"argparse.Namespace"}
    with torch.serialization.safe_globals([argparse.Namespace, *(_megatron_classes() if named else [])]):
        file.seek(0)
        return torch.load(file, weights_only=True)


def _megatron_classes() -> list[Any]:
    with warnings.catch_warnings():
        # It warns about optional packages that conversion does not use.
        warnings.simplefilter("ignore")
        from megatron.core.safe_globals import SAFE_GLOBALS
    return SAFE_GLOBALS
