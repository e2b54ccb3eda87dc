"""Weights in `pytorch_model.bin` or shards of it, read only with `--allow-pickle`.

A pickle can run anything, unless it may build nothing but tensors, which is what `weights_only` means.
"""

import os
from pathlib import Path

import torch
from torch import Tensor

from neo_megatron.checked_files import check_file
from neo_megatron.checkpoint.hf_directory import DTYPE_NAMES, INDEX, WEIGHTS, SafetensorsDirectory, read_index
from neo_megatron.checkpoint.streaming import copy_exactly
from neo_megatron.errors import CheckpointError

PICKLED_WEIGHTS, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


class PickledDirectory(SafetensorsDirectory):
    """As `SafetensorsDirectory`, for pickled weights; values stay on the disk until they are read.

    Raises:
        CheckpointError: no weights; a file that is broken, holds anything but tensors, or is older than PyTorch 1.6;
            an index that points outside the directory.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._tensors: dict[str, Tensor] = {}
        for path in self._files():
            for name, tensor in _load(path).items():
                if not isinstance(name, str) or not isinstance(tensor, Tensor):
                    raise CheckpointError(
                        f"{path}: {name!r} is not a tensor: give a file that holds a state_dict alone"
                    )
                # A file of bytes can claim a shape of terabytes by strides of zero.
                if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
                    raise CheckpointError(f"{path}: {name} does not hold all of its values: save it as a plain tensor")
                if name in self._tensors:
                    raise CheckpointError(f"{path}: tensor {name} is also in another file of the directory: delete one")
                self._tensors[name] = tensor
        if not self._tensors:
            raise CheckpointError(f"{self.directory}: no tensors in its files: copy or download it again")
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name].contiguous()

    def read_into(self, name: str, view: Tensor) -> None:
        copy_exactly(view, self.read(name).view(-1)[: view.numel()].view(view.shape))

    def same_values(self, *names: str) -> bool:
        return torch.equal(*(self._tensors[name] for name in names))

    def dtype(self, name: str) -> torch.dtype:
        dtype = self._tensors[name].dtype
        if dtype not in DTYPE_NAMES:
            known = ", ".join(map(str, DTYPE_NAMES))
            raise CheckpointError(f"{self.directory}: {name} is stored as {dtype}: store it as one of {known}")
        return dtype

    def _files(self) -> list[Path]:
        single = self.directory / PICKLED_WEIGHTS
        if os.path.lexists(single):
            return [single]
        names = read_index(self.directory / PICKLED_INDEX, ".bin").values()
        return [self.directory / name for name in sorted(set(names))]


def open_weights(directory: str | Path, allow_pickle: bool = False) -> SafetensorsDirectory:
    """The safetensors of a directory; without any, and only if allowed, its pickled weights.

    Raises:
        CheckpointError: as either class; there are only pickled weights, which are not allowed.
    """
    directory = Path(directory)
    safe = any(os.path.lexists(directory / name) for name in (WEIGHTS, INDEX))
    pickled = any(os.path.lexists(directory / name) for name in (PICKLED_WEIGHTS, PICKLED_INDEX))
    if safe or not pickled:
        return SafetensorsDirectory(directory)
    if not allow_pickle:
        raise CheckpointError(
            f"{directory}: its weights are pickled, and a pickle can run anything: give a directory with safetensors, "
            "or --allow-pickle to load nothing but tensors from it"
        )
    return PickledDirectory(directory)


def _load(path: Path) -> dict[str, Tensor]:
    check_file(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes can make a pickle raise anything
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise CheckpointError(
            f"{path}: no plain state_dict of PyTorch 1.6 or later ({reason}): save it as safetensors where you trust it"
        ) from error
    if not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: holds a {type(tensors).__name__}: give a file that holds a state_dict alone")
    return tensors
