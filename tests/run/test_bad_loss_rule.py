"""When a loss jumps, and how many steps are skipped in a row."""

import math
from argparse import Namespace

import numpy as np
import pytest

from neo_megatron.run.bad_loss_rule import (
    LOSSES,
    MOST_SKIPPED,
    is_sound,
    jump_of,
    may_skip,
    rule_refusals,
    state_of,
    took,
)


def rule(losses=(), **flags) -> Namespace:
    given = {"loss_jump": 6.0, "on_bad_loss": "skip", "skip_train": False, "check_for_nan_in_loss_and_grad": True}
    args = Namespace(**given | flags, **state_of(None))
    for loss in losses:
        took(args, loss)
    return args


def test_a_loss_is_compared_with_the_last_128():
    """Against NumPy; those before are forgotten."""
    losses = np.random.default_rng(0).normal(2, 0.1, 300)
    args = rule(losses.tolist())
    last = losses[-LOSSES:]
    edge = last.mean() + 6 * last.std()
    assert jump_of(args, edge - 1e-6) == "" and jump_of(args, 0.0) == ""
    assert jump_of(args, edge + 1e-6).startswith(f"the loss jumps to {edge:.4g}, more than 6 standard deviations")
    assert f"the last 128 ({last.mean():.4g} ± {last.std():.2g})" in jump_of(args, 9.0)


def test_nothing_jumps_before_half_as_many_are_known():
    args = rule([2.0 + number % 2 for number in range(LOSSES // 2 - 1)])
    assert jump_of(args, 100.0) == ""
    took(args, 2.0)
    assert jump_of(args, 100.0)


def test_steps_without_weight_are_not_counted():
    assert rule([1.0, math.nan, 2.0]).recent_losses == (1.0, 2.0)


def test_so_many_steps_are_skipped_in_a_row():
    args = rule()
    assert [may_skip(args) for _ in range(MOST_SKIPPED + 2)] == [True] * MOST_SKIPPED + [False] * 2
    took(args, 1.0)
    assert may_skip(args)
    stopping = rule(on_bad_loss="stop")
    assert not may_skip(stopping) and stopping.skipped_in_a_row == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"loss_jump": -1.0}, "--loss-jump -1.0 must be"),
        ({"loss_jump": math.nan}, "--loss-jump nan must be"),
        ({"skip_train": True}, "--skip-train only evaluates"),
        ({"skip_train": True, "loss_jump": 0.0}, "--skip-train only evaluates"),
        ({"check_for_nan_in_loss_and_grad": False}, "--no-check-for-nan-in-loss-and-grad turns off"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags, words):
    (sentence,) = rule_refusals(rule(**flags))
    assert words in sentence


def test_flags_that_work_are_not():
    assert not list(rule_refusals(rule())) and not list(rule_refusals(rule(loss_jump=0.0, on_bad_loss="stop")))


@pytest.mark.parametrize(
    "state",
    [
        *({"recent_losses": value} for value in (None, [1.0], (1,), (math.inf,), ("1",), (1.0,) * (LOSSES + 1))),
        *({"skipped_in_a_row": value} for value in (None, -1, True, 1.0)),
    ],
)
def test_a_state_that_no_run_has_saved_is_known(state):
    assert is_sound(Namespace()) and is_sound(rule([1.0, 2.0])) and not is_sound(Namespace(**state))
