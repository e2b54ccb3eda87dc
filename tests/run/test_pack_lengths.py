"""Packs of several lengths: which length each pack has, and flags and layouts that fit some lengths only."""

from argparse import Namespace

import pytest
import torch

from neo_megatron.errors import ConfigError
from neo_megatron.model.compiled import GRAPHS
from neo_megatron.planning.packs import measure_packs
from neo_megatron.run.pack_lengths import check_borders, length_at, longest_ahead

# Megatron builds flags in a way that argparse is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.type. is deprecated:DeprecationWarning")

LENGTHS = [[0, 16], [40, 36], [60, 24]]


def test_each_pack_has_the_length_of_its_phase():
    assert [length_at(LENGTHS, pack) for pack in (0, 39, 40, 59, 60, 1000)] == [16, 16, 36, 36, 24, 24]


@pytest.mark.parametrize(
    ("consumed", "packs", "first"),
    [(0, 100, 40), (0, 41, 40), (0, 40, 0), (39, 100, 40), (40, 100, 40), (50, 100, 50), (60, 100, 60), (8, 20, 8)],
)
def test_the_longest_packs_ahead_are_those_that_the_run_still_reads(consumed, packs, first):
    assert longest_ahead(LENGTHS, consumed, packs) == first


@pytest.mark.parametrize(
    ("size", "consumed", "packs", "pack"),
    [(4, 0, 100, None), (20, 0, 100, None), (8, 0, 100, 64), (16, 0, 100, 48), (16, 0, 40, None), (16, 56, 58, None)]
    + [(8, 44, 100, None), (8, 40, 100, 64), (30, 10, 60, None), (30, 10, 61, 70)],
)
def test_a_step_has_packs_of_one_length(size, consumed, packs, pack):
    """Counted from where the run starts, since an earlier start may have had other steps."""
    args = Namespace(pack_lengths=LENGTHS, global_batch_size=size, mixture="m.yaml")
    if pack is None:
        check_borders(args, consumed, packs)
    else:
        with pytest.raises(ConfigError, match=f"--mixture m.yaml: .*: begin them at pack {pack}$"):
            check_borders(args, consumed, packs)


@pytest.fixture
def mixture(bench, new_sample) -> str:
    """Packs of 96, then of 192, then of 90 tokens, as flags."""
    bench.preprocess([new_sample()])
    for length in (96, 192, 90):
        bench.pack(length, output=f"packs-{length}")
    file = bench.path / "mixture.yaml"
    file.write_text(
        "- {from: 0, shares: {packs-96: 1}}\n- {from: 8, shares: {packs-192: 1}}\n- {from: 16, shares: {packs-90: 1}}"
    )
    return f"--mixture {file} --train-iters 10"


def test_the_sequence_length_is_the_longest(parse, mixture, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    args = parse(mixture)
    assert args.pack_lengths == [[0, 96], [8, 192], [16, 90]] and args.seq_length == 192
    assert measure_packs(args.mixture).sequence_length == 192, "a pipeline is split for these"
    assert torch._dynamo.config.recompile_limit == 3 * GRAPHS, "PyTorch would stop to compile at the default"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--log-progress --save x",
            "--log-progress counts tokens by one length of packs, and --mixture .* has several",
        ),
        ("--context-parallel-size 2", "--context-parallel-size 2 needs a --seq-length that is a multiple of 4, not 90"),
    ],
)
def test_what_does_not_fit_every_length_is_one_sentence(parse, mixture, monkeypatch, flags, sentence):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=sentence):
        parse(f"{mixture} {flags}")
