"""Loading a checkpoint builds no objects but tensors and those that Megatron itself saves."""

import io
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

from neo_megatron.checked_pickles import load_allowed
from neo_megatron.checkpoint.dcp_metadata import pieces_make_up
from neo_megatron.errors import DataError
from neo_megatron.megatron_compat.loading import load_bytes


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def saved(value) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def test_no_object_of_a_checkpoint_runs_anything(tmp_path):
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    item = SimpleNamespace(dest_index=SimpleNamespace(fqn="rng_state/shard_0_1"))
    with pytest.raises(DataError, match="rng_state/shard_0_1 holds more than Megatron allows"):
        load_bytes(planner, item, saved([Evil(tmp_path / "made")]))
    assert not (tmp_path / "made").exists() and not planner.state_dict
    state = np.random.RandomState(1).get_state()
    load_bytes(planner, item, saved([{"np_rng_state": state, "torch_rng_state": torch.get_rng_state()}]))
    loaded = planner.state_dict["rng_state/shard_0_1"][0]
    assert np.array_equal(loaded["np_rng_state"][1], state[1])


def test_damaged_objects_are_refused_in_one_sentence():
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    item = SimpleNamespace(dest_index=SimpleNamespace(fqn="rng_state"))
    with pytest.raises(DataError, match="rng_state holds more than"):
        load_bytes(planner, item, io.BytesIO(b"none"))
    assert load_allowed(saved([1, "a"])) == [1, "a"]


@pytest.mark.parametrize(
    ("pieces", "complete"),
    [
        ([((0, 0), (4, 6))], True),
        ([((0, 0), (2, 6)), ((2, 0), (2, 3)), ((2, 3), (2, 3))], True),
        ([((3, 0), (1, 6)), ((0, 0), (3, 6))], True),
        ([((1, 0), (2, 6)), ((0, 0), (1, 6)), ((1, 0), (1, 6))], False),
        ([((0, 0), (2, 6)), ((0, 0), (2, 6))], False),  # twice the same, and nothing of the rest
        ([((0, 0), (2, 6)), ((1, 0), (2, 6))], False),
        ([((0, 0), (2, 6))], False),
        ([((0, 0), (4, 6)), ((4, 0), (1, 6))], False),
        ([((0, 0), (4, 6)), ((2, 2), (0, 3))], True),
        ([], False),
    ],
)
def test_pieces_cover_a_tensor_once(pieces, complete):
    assert pieces_make_up((4, 6), pieces) is complete
