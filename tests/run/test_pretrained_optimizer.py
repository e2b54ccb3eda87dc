"""Optimizer state that cannot be taken over is refused in a sentence; `test_stages.py` takes it over."""

from argparse import Namespace

import pytest

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.errors import ConfigError
from neo_megatron.run.pretrained_optimizer import take_over_state


def test_a_checkpoint_without_state_ends_in_a_sentence(golden, tmp_path):
    convert_hf_to_megatron(golden / "ckpt_untied", tmp_path / "converted")
    with pytest.raises(ConfigError, match="has no optimizer state .converted, or saved with --no-save-optim"):
        take_over_state(Namespace(config=Namespace(optimizer="adam")), [], tmp_path / "converted")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("", "needs --pretrained-checkpoint"),
        ("--pretrained-checkpoint {start} --optimizer sgd", "takes over the state of --optimizer adam or muon"),
    ],
)
def test_flags_that_leave_nothing_to_take_over_are_refused(parse, golden, tmp_path, flags, sentence):
    convert_hf_to_megatron(golden / "ckpt_untied", tmp_path / "start")
    flags = flags.format(start=tmp_path / "start")
    with pytest.raises(ConfigError, match=sentence):
        parse(f"--train-iters 4 --pretrained-optimizer {flags}")


def test_state_of_another_checkpoint_may_be_asked_for(parse, golden, tmp_path):
    convert_hf_to_megatron(golden / "ckpt_untied", tmp_path / "start")
    assert parse(
        f"--train-iters 4 --pretrained-optimizer --pretrained-checkpoint {tmp_path}/start"
    ).pretrained_optimizer
