"""Mixes directories of packs by shares that change at given packs of a run.

A schedule is a YAML file; relative paths in it count from its own directory:

    - from: 0                                    # the number of a pack of the run
      shares: {packs/web: 70, packs/docs: 30}    # shares count relative to their sum
    - from: 20000
      shares: {packs/web: 50, packs/docs: 30, packs/code: 20}

Each directory is a stream of its own: pack after pack of its epochs. The schedule only says from which stream a pack of
the run comes, so a stream goes on where it was when shares change or directories are added: no sample is repeated or
left out before its epoch ends. Packs of a phase have one length; another phase may have another. A phase is a row of
blocks of as many packs as its shares, in whole numbers, add up to: each stream has exactly its share of a block, in an
order drawn from the phase and the block alone.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm
from pathlib import Path

import numpy as np
import yaml

from neo_megatron.data.packs.index import PackIndex
from neo_megatron.data.permutation import permutation
from neo_megatron.data.shards.mixture import check_layouts
from neo_megatron.errors import DataError
from neo_megatron.paths import Kind, Wanted, WrongPath, check_path, wrong_kind
from neo_megatron.storage.base import is_remote, join
from neo_megatron.storage.open import read_source
from neo_megatron.storage.source_files import MissingObject

# Packs after which shares are met exactly; finer shares would take longer than a run.
MAX_BLOCK = 1 << 20
_MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Phase:
    """Packs of a run from ``start`` to the start of the next phase.

    Args:
        start: number of its first pack.
        counts: packs of each stream in a block, 0 for a stream that is not used.
    """

    start: int
    counts: tuple[int, ...]

    @property
    def block(self) -> int:
        """Packs of a block."""
        return sum(self.counts)

    def order(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The stream of each pack of a block, and how many of that stream precede it there: int64 [packs] each."""
        return _order(self, block)

    def taken(self, packs: int) -> np.ndarray:
        """How many of the first packs of the phase come from each stream: int64 [streams]."""
        blocks, rest = divmod(packs, self.block)
        counts = blocks * np.array(self.counts, np.int64)
        return counts + np.bincount(self.order(blocks)[0][:rest], minlength=len(self.counts)) if rest else counts


@lru_cache(maxsize=64)
def _order(phase: Phase, block: int) -> tuple[np.ndarray, np.ndarray]:
    sizes = np.array(phase.counts, np.int64)
    labels = np.repeat(np.arange(len(sizes)), sizes)[permutation(phase.block, "mixture", phase.start, block)]
    earlier = np.empty(len(labels), np.int64)
    earlier[np.argsort(labels, kind="stable")] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return labels, earlier


class MixtureSchedule:
    """The phases of a run over streams of packs.

    Args:
        locations: of the streams, in the order in which they first occur.
        phases: in order; the first starts at pack 0.
    """

    def __init__(self, locations: Sequence[str], phases: Sequence[Phase]) -> None:
        self.locations = tuple(locations)
        self.phases = tuple(phases)
        self._starts = np.array([phase.start for phase in phases], np.int64)
        before = [np.zeros(len(locations), np.int64)]
        for phase, following in zip(phases, phases[1:], strict=False):
            before.append(before[-1] + phase.taken(following.start - phase.start))
        self._before = before

    def places(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The stream, and the number within it, of consecutive packs of the run: int64 [count] each."""
        streams, numbers = np.empty(count, np.int64), np.empty(count, np.int64)
        done = 0
        while done < count:
            at = first + done
            number = int(np.searchsorted(self._starts, at, side="right")) - 1
            phase = self.phases[number]
            block, offset = divmod(at - phase.start, phase.block)
            size = min(count - done, phase.block - offset)
            if number + 1 < len(self.phases):
                size = min(size, self.phases[number + 1].start - at)
            labels, earlier = (column[offset : offset + size] for column in phase.order(block))
            base = self._before[number] + block * np.array(phase.counts, np.int64)
            streams[done : done + size] = labels
            numbers[done : done + size] = base[labels] + earlier
            done += size
        return streams, numbers


def read_schedule(file: str | Path) -> MixtureSchedule:
    """Reads a schedule.

    Raises:
        DataError: it is not valid; the text names the phase and the remedy.
    """
    check_path(file, Wanted.MIXTURE, "--mixture")
    try:
        content = read_source(str(file), _MAX_BYTES)
    except MissingObject as error:
        raise WrongPath(f"--mixture {wrong_kind(str(file), Kind.MISSING, Wanted.MIXTURE)}") from error
    if len(content) > _MAX_BYTES:
        raise DataError(f"--mixture {file} has over {_MAX_BYTES >> 20} MiB; give a list of phases")
    folder = os.path.dirname(file)
    try:
        entries = yaml.safe_load(content.decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"--mixture {file} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, list) or not entries:
        raise DataError(f"--mixture {file} must be a list of phases, each with from (a pack) and shares")
    locations: dict[str, None] = {}
    shares: list[tuple[int, dict[str, Fraction]]] = []
    for number, entry in enumerate(entries, start=1):
        start, given = _entry(entry, f"--mixture {file}: phase {number}", folder)
        if start != 0 and not shares or shares and start <= shares[-1][0]:
            raise DataError(
                f"--mixture {file}: phase {number} is from pack {start}: the first phase is from 0, and each later one "
                "from a later pack"
            )
        shares.append((start, given))
        locations |= dict.fromkeys(given)
    phases = [
        Phase(start, _counts([given.get(location, Fraction(0)) for location in locations], f"--mixture {file}"))
        for start, given in shares
    ]
    return MixtureSchedule(list(locations), phases)


def _entry(entry: object, where: str, folder: str) -> tuple[int, dict[str, Fraction]]:
    if not isinstance(entry, dict) or entry.keys() != {"from", "shares"}:
        raise DataError(f"{where} must have from (a pack) and shares, and nothing else")
    start, given = entry["from"], entry["shares"]
    if type(start) is not int or start < 0:
        raise DataError(f"{where} is from {start!r}: give the number of a pack, 0 or more")
    if not isinstance(given, dict) or not given:
        raise DataError(f"{where} must map directories of packs to their shares")
    shares: dict[str, Fraction] = {}
    for name, share in given.items():
        if not isinstance(name, str) or type(share) not in (int, float) or not 0 < share < 1e9:
            raise DataError(f"{where}: {name!r} has the share {share!r}: give a number above 0, such as 70 or 0.5")
        location = join(folder, name) if is_remote(folder) or is_remote(name) else os.path.normpath(join(folder, name))
        if location in shares:
            raise DataError(f"{where}: {location} is named twice; name it once, with the sum of its shares")
        check_path(location, Wanted.PACKS, f"{where}:")
        shares[location] = Fraction(str(share))
    return start, shares


def _counts(shares: Sequence[Fraction], where: str) -> tuple[int, ...]:
    """The smallest whole numbers in the proportion of the shares."""
    scale = lcm(*(share.denominator for share in shares))
    counts = [int(share * scale) for share in shares]
    smallest = gcd(*counts)
    counts = [count // smallest for count in counts]
    if sum(counts) > MAX_BLOCK:
        raise DataError(
            f"{where}: the shares are met exactly only after {sum(counts)} packs, more than {MAX_BLOCK}: round them"
        )
    return tuple(counts)


def open_streams(location: str | Path) -> tuple[list[PackIndex], MixtureSchedule | None]:
    """The packs at a location: of one directory, or of a schedule, which is a ``.yaml`` or ``.yml`` file.

    Raises:
        DataError: packs cannot be opened, those of a schedule differ in tokenizer or chat layout, or those of a phase
            differ in length.
    """
    if not str(location).endswith((".yaml", ".yml")):
        return [PackIndex.open(location)], None
    schedule = read_schedule(location)
    streams = [PackIndex.open(place) for place in schedule.locations]
    first = streams[0]
    for number, phase in enumerate(schedule.phases, start=1):
        one, *others = _of_phase(streams, phase)
        for other in others:
            if other.sequence_length != one.sequence_length:
                raise DataError(
                    f"--mixture {location}: phase {number}: {one.location} has packs of {one.sequence_length} tokens, "
                    f"{other.location} of {other.sequence_length}: pack one of them again, which does not tokenize "
                    "again, or give it a phase of its own"
                )
    for other in streams[1:]:
        if other.data.tokenizer != first.data.tokenizer:
            raise DataError(
                f"--mixture {location}: {first.location} and {other.location} were made with different tokenizers; "
                "preprocess one of them again"
            )
    check_layouts([stream.data for stream in streams], f"--mixture {location}: ")
    return streams, schedule


def pack_lengths(streams: Sequence[PackIndex], schedule: MixtureSchedule | None) -> tuple[tuple[int, int], ...]:
    """(first pack of the run, tokens of a pack) for the first packs and for every change of the length, in order.

    Args:
        streams, schedule: of `open_streams`.
    """
    if schedule is None:
        return ((0, streams[0].sequence_length),)
    lengths: list[tuple[int, int]] = []
    for phase in schedule.phases:
        length = _of_phase(streams, phase)[0].sequence_length
        if not lengths or lengths[-1][1] != length:
            lengths.append((phase.start, length))
    return tuple(lengths)


def longest_packs(lengths: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The first of `pack_lengths` with the most tokens."""
    return max(lengths, key=lambda entry: entry[1])


def _of_phase(streams: Sequence[PackIndex], phase: Phase) -> list[PackIndex]:
    return [stream for stream, count in zip(streams, phase.counts, strict=True) if count]
