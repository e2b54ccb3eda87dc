"""Which stream of packs each pack of a run comes from: exact shares, nothing repeated or left out, whatever changes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from neo_megatron.data.packs.mixture_schedule import MixtureSchedule, Phase, read_schedule
from neo_megatron.errors import DataError


def schedule(*phases: tuple[int, tuple[int, ...]]) -> MixtureSchedule:
    return MixtureSchedule("abcd"[: len(phases[0][1])], [Phase(*phase) for phase in phases])


def one_by_one(mixed: MixtureSchedule, packs: int) -> list[tuple[int, int]]:
    return [tuple(int(column[0]) for column in mixed.places(number, 1)) for number in range(packs)]


CHANGING = schedule((0, (7, 3, 0)), (25, (1, 1, 2)), (26, (0, 0, 1)), (90, (50, 30, 20)))


def test_every_stream_is_read_in_order_without_gaps():
    streams, numbers = CHANGING.places(0, 1000)
    for stream in range(3):
        chosen = numbers[streams == stream]
        assert np.array_equal(chosen, np.arange(len(chosen)))


def test_shares_are_exact_in_every_block_of_a_phase():
    streams, _ = CHANGING.places(0, 1000)
    for first in (0, 10):
        assert Counter(streams[first : first + 10].tolist()) == {0: 7, 1: 3}
    assert set(streams[26:90].tolist()) == {2}
    for first in range(90, 990, 100):
        assert Counter(streams[first : first + 100].tolist()) == {0: 50, 1: 30, 2: 20}


def test_any_pack_can_be_asked_for_alone():
    """So a resume anywhere gives the same packs, with the number of the pack as the only state."""
    streams, numbers = CHANGING.places(0, 300)
    assert one_by_one(CHANGING, 300) == list(zip(streams.tolist(), numbers.tolist(), strict=True))
    for first in (0, 9, 24, 26, 89, 133):
        some = CHANGING.places(first, 60)
        assert np.array_equal(some, (streams[first : first + 60], numbers[first : first + 60]))


def test_what_is_added_later_changes_nothing_before():
    """A user may add a phase, and a stream, while the run is anywhere before it; also within a block."""
    before = schedule((0, (7, 3, 0)))
    after = schedule((0, (7, 3, 0)), (137, (1, 1, 1)))
    assert np.array_equal(before.places(0, 137), after.places(0, 137))
    streams, numbers = after.places(137, 300)
    seen = Counter(before.places(0, 137)[0].tolist())
    assert [numbers[streams == stream].min() for stream in range(3)] == [seen[0], seen[1], 0]


def test_blocks_differ_and_shares_are_spread_within_them():
    streams, _ = schedule((0, (50, 50))).places(0, 1000)
    assert len({tuple(streams[first : first + 100]) for first in range(0, 1000, 100)}) == 10
    assert all(20 <= streams[first : first + 100][:50].sum() <= 36 for first in range(0, 1000, 100))


@pytest.fixture
def packs(bench, new_sample) -> Path:
    bench.preprocess([new_sample()])
    (bench.path / "twin").symlink_to(bench.pack(64))
    return bench.path / "packs"


def read(packs: Path, text: str) -> MixtureSchedule:
    file = packs.parent / "mixture.yaml"
    file.write_text(text)
    return read_schedule(file)


def test_a_file_is_read(packs):
    twin = packs.with_name("twin")
    text = "- {from: 0, shares: {packs: 0.7}}\n- from: 20\n  shares:\n    packs: 62.5\n    twin: 12.5\n"
    mixed = read(packs, text)
    assert mixed.locations == (str(packs), str(twin))
    assert mixed.phases == (Phase(0, (1, 0)), Phase(20, (5, 1)))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: [", "is not valid YAML"),
        ("{from: 0}", "must be a list of phases"),
        ("[]", "must be a list of phases"),
        ("- {from: 0}", "phase 1 must have from"),
        ("- {from: 0, shares: {packs: 1}, seed: 3}", "and nothing else"),
        ("- {from: 5, shares: {packs: 1}}", "phase 1 is from pack 5: the first phase is from 0"),
        ("- {from: 0, shares: {packs: 1}}\n- {from: 0, shares: {packs: 1}}", "phase 2 is from pack 0"),
        ("- {from: -1, shares: {packs: 1}}", "is from -1"),
        ("- {from: true, shares: {packs: 1}}", "is from True"),
        ("- {from: 0, shares: {}}", "must map directories"),
        ("- {from: 0, shares: {packs: 0}}", "'packs' has the share 0"),
        ("- {from: 0, shares: {packs: many}}", "'packs' has the share 'many'"),
        ("- {from: 0, shares: {packs: .nan}}", "has the share nan"),
        ("- {from: 0, shares: {packs: .inf}}", "has the share inf"),
        ("- {from: 0, shares: {shards: 1}}", "phase 1: .*shards holds shards"),
        ("- {from: 0, shares: {gone: 1}}", "gone does not exist"),
        ("- {from: 0, shares: {packs: 0.0000001, twin: 1000}}", "round them"),
        ("- {from: 0, shares: {packs: 1, ./packs: 2}}", "named twice"),
    ],
)
def test_a_mistake_is_one_sentence(packs, text, sentence):
    with pytest.raises(DataError, match=sentence) as caught:
        read(packs, text)
    assert "\n" not in str(caught.value) and "--mixture" in str(caught.value)
