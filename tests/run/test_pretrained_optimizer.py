"""Optimizer state that cannot be taken over is refused in a sentence; `test_stages.py` takes it over."""

from argparse import Namespace

import pytest

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.errors import ConfigError
from neo_megatron.run.pretrained_optimizer import check_flags, take_over_state


def test_a_checkpoint_without_state_ends_in_a_sentence(golden, tmp_path):
    convert_hf_to_megatron(golden / "ckpt_untied", tmp_path / "converted")
    with pytest.raises(ConfigError, match="has no optimizer state .converted, or saved with --no-save-optim"):
        take_over_state(None, [], tmp_path / "converted")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ({"pretrained_checkpoint": None}, "needs --pretrained-checkpoint"),
        ({"optimizer": "sgd"}, "takes over the state of --optimizer adam"),
    ],
)
def test_flags_that_leave_nothing_to_take_over_are_refused(flags, sentence):
    fine = {"pretrained_optimizer": True, "pretrained_checkpoint": "stage1", "optimizer": "adam"}
    check_flags(Namespace(**fine))
    with pytest.raises(ConfigError, match=sentence):
        check_flags(Namespace(**{**fine, **flags}))
