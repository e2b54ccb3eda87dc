"""Opens the packs of a data set for one sequence length: the samples of any pack of any epoch, by random access.

On disk are patterns (which lengths share a pack) and units (samples that are packed together) sorted by length. An
epoch shuffles the units of each length among the places for that length, and then the packs. Both permutations can be
evaluated at single positions (`permutation.shuffled`), so in every epoch samples meet new neighbours while packs stay
equally full, nothing is drawn in advance, and the only state is the number of the pack.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neo_megatron.data.manifest import read_manifest
from neo_megatron.data.manifest_schema import MAX_SEQUENCE_LENGTH, PACK_ARRAYS
from neo_megatron.data.permutation import key_of, shuffled
from neo_megatron.data.shards.arrays import array_of
from neo_megatron.data.shards.mixture import Mixture
from neo_megatron.errors import DamagedFile, DataError, damaged_file
from neo_megatron.storage.base import join, read_ahead
from neo_megatron.storage.open import open_directory

FORMAT, VERSION = "neo-packs", 3
READABLE = (2, VERSION)  # version 2 split off held-out records by the names of their images
UNITS, PATTERNS, RUNS = PACK_ARRAYS
# A `units.Units` on disk: ``cells`` are image tokens.
UNIT = np.dtype([("first", "<i8"), ("samples", "<i4"), ("cells", "<i4"), ("squares", "<i8")])
PATTERN = np.dtype([("packs", "<i8"), ("runs", "<i8")])
RUN = np.dtype([("length", "<i8"), ("count", "<i8")])
_AGAIN = "copy it again, or pack again"


@dataclass(frozen=True)
class Drawn:
    """Packs of an epoch: ``units`` int64 [n], pack by pack, and ``offsets`` int64 [packs + 1] at which each begins."""

    units: np.ndarray
    offsets: np.ndarray


class PackTable:
    """Patterns and units as arrays, and the arithmetic from a place in an epoch to the units of a pack.

    Args:
        units: ``UNIT`` [U], by length ascending.
        patterns: ``PATTERN`` [P]: number of packs that are alike, and number of runs that describe one of them.
        runs: ``RUN`` [R]: a length, and the number of units of it in each pack of the pattern.
        location: of the index, for messages.
        sequence_length: tokens of a pack.
        samples: number of samples, which units refer to; ``None`` if it is not known.

    Raises:
        DataError: the arrays do not fit each other; from methods: a unit is not valid. Units are checked when they are
            drawn, because there may be gigabytes of them.
    """

    def __init__(
        self,
        units: np.ndarray,
        patterns: np.ndarray,
        runs: np.ndarray,
        location: str = "",
        sequence_length: int = MAX_SEQUENCE_LENGTH,
        samples: int | None = None,
    ) -> None:
        check_patterns(patterns, runs, len(units), location, sequence_length)
        self.units = units
        self._location, self._sequence_length, self._samples = location, sequence_length, samples
        self._first_pack = np.concatenate([[0], np.cumsum(patterns["packs"])])
        self._first_run = np.concatenate([[0], np.cumsum(patterns["runs"])])
        self._run_length, self._run_count = runs["length"], runs["count"]
        self._width = np.diff(np.concatenate([[0], np.cumsum(runs["count"])])[self._first_run])
        used = np.repeat(patterns["packs"], patterns["runs"]) * runs["count"]  # units of each run in all packs
        by_length = np.argsort(runs["length"], kind="stable")
        before = np.cumsum(used[by_length]) - used[by_length]
        lengths, first, which = np.unique(runs["length"][by_length], return_index=True, return_inverse=True)
        self._class_start = np.empty(len(runs), np.int64)  # of the run's length, among the units
        self._class_start[by_length] = before[first][which]
        self._rank = np.empty(len(runs), np.int64)  # of the run's first unit, within its length
        self._rank[by_length] = before - before[first][which]
        sizes = np.bincount(which, weights=used[by_length], minlength=len(lengths)).astype(np.int64)
        self._class_size = np.empty(len(runs), np.int64)
        self._class_size[by_length] = sizes[which]

    def __len__(self) -> int:
        """Packs of an epoch."""
        return int(self._first_pack[-1])

    def draw(self, seed: int, epoch: int, places: np.ndarray) -> Drawn:
        """The packs at the given places of an epoch, int64 [packs]."""
        pack = shuffled(places, len(self), key_of(seed, epoch, "packs"))
        pattern = np.searchsorted(self._first_pack, pack, side="right") - 1
        # One entry for each run of each pack, then one for each unit of the run.
        of_pack, run = _expand(np.diff(self._first_run)[pattern], self._first_run[pattern])
        count = self._run_count[run]
        first = self._rank[run] + (pack - self._first_pack[pattern])[of_pack] * count
        of_run, rank = _expand(count, first)
        run = run[of_run]
        keys = np.uint64(key_of(seed, epoch, "units")) + self._run_length[run].astype(np.uint64)
        units = self._class_start[run] + shuffled(rank, self._class_size[run], keys)
        return Drawn(units, np.concatenate([[0], np.cumsum(self._width[pattern])]))

    def read_ahead(self, drawn: Drawn) -> None:
        """Starts to read from disk the units that `samples` and `costs` will need."""
        read_ahead(self.units, drawn.units)

    def samples(self, units: np.ndarray) -> np.ndarray:
        """The samples of units, int64 [n]."""
        chosen = self.rows(units)
        return _expand(chosen["samples"].astype(np.int64), chosen["first"])[1]

    def costs(self, drawn: Drawn) -> np.ndarray:
        """Attention work of each pack (sum over documents of tokens squared) and its image tokens: int64 [packs, 2]."""
        chosen = self.rows(drawn.units)
        work = np.stack([chosen["squares"], chosen["cells"].astype(np.int64)], axis=1)
        return np.add.reduceat(work, drawn.offsets[:-1], axis=0)

    def rows(self, units: np.ndarray) -> np.ndarray:
        """``UNIT`` [n], the units of the given numbers. Raises DamagedFile for one that is not valid."""
        chosen, length = self.units[units], self._sequence_length
        first, samples, last = chosen["first"], chosen["samples"].astype(np.int64), self._samples
        wrong = (first < 0) | (samples < 1) | (samples > length) | (chosen["cells"] < 0) | (chosen["cells"] > length)
        wrong |= (chosen["squares"] < 1) | (chosen["squares"] > length**2)
        if last is not None:
            wrong |= first > last - samples
        if wrong.any():
            number = int(units[wrong.argmax()])
            what = f"unit {number} has {self.units[number].tolist()} (first sample, samples, image tokens, squares)"
            raise damaged_file(join(self._location, UNITS), f"{what}, which is not within the data or a pack", _AGAIN)
        return chosen


def check_patterns(patterns: np.ndarray, runs: np.ndarray, units: int, location: str, sequence_length: int) -> None:
    """Checks that patterns and runs describe packs with the given number of units. Raises DamagedFile."""

    def damaged(file: str, what: str) -> DamagedFile:
        return damaged_file(join(location, file), what, _AGAIN)

    if len(runs) and (runs["length"].min() < 1 or runs["length"].max() > sequence_length):
        raise damaged(RUNS, f"a length is below 1, or more than the {sequence_length} tokens of a pack")
    if len(runs) and (runs["count"].min() < 1 or runs["count"].max() > sequence_length):
        raise damaged(RUNS, f"a pack does not have from 1 to {sequence_length} units of a length")
    # Checked before summing, which could overflow: no number exceeds that of all units.
    if not len(patterns) or min(patterns["packs"].min(), patterns["runs"].min()) < 1:
        raise damaged(PATTERNS, "it has no pattern, or one without packs or runs")
    if max(patterns["packs"].max(), patterns["runs"].max()) > max(units, len(runs)):
        raise damaged(PATTERNS, f"it has packs or runs for more than the {units} existing units")
    if patterns["runs"].sum() != len(runs):
        raise damaged(PATTERNS, "the patterns do not fit the runs")
    filled = np.add.reduceat(runs["length"] * runs["count"], np.cumsum(patterns["runs"]) - patterns["runs"])
    if filled.max() > sequence_length:
        raise damaged(RUNS, f"a pack has {filled.max()} tokens, more than the {sequence_length} of a pack")
    places = (np.repeat(patterns["packs"], patterns["runs"]) * runs["count"].astype(np.float64)).sum()
    if places != units:
        raise damaged(PATTERNS, f"its packs have places for {places:.0f} units, but there are {units}")


class PackIndex:
    """A directory of packs with the data sets that it was packed from.

    Attributes:
        sequence_length: tokens of a pack, including padding.
        manifest: of the packs.
        table: the units of each pack.
        data: the samples.
    """

    def __init__(self, location: str, manifest: dict[str, Any], table: PackTable, data: Mixture) -> None:
        self.location = location
        self.sequence_length: int = manifest["seq_length"]
        self.manifest = manifest
        self.table = table
        self.data = data

    def __len__(self) -> int:
        """Packs of an epoch."""
        return len(self.table)

    def samples(self, seed: int, epoch: int, place: int) -> np.ndarray:
        """Global sample numbers of a pack, int64 [n]."""
        return self.table.samples(self.table.draw(seed, epoch, np.array([place])).units)

    @classmethod
    def open(cls, location: str | Path) -> "PackIndex":
        """Opens a local directory or ``s3://bucket/prefix``.

        Raises:
            DataError: it is damaged, or its data sets are not the ones that it was packed from.
        """
        manifest = read_manifest(location, FORMAT, *READABLE)
        data = Mixture([join(location, entry["shards"]) for entry in manifest["data"]])
        for shards, entry in zip(data.sets, manifest["data"], strict=True):
            if shards.fingerprint != entry["sha256"]:
                raise DataError(f"{shards.location} is not the data set that {location} was packed from; pack it again")
        table = open_table(location, manifest["files"], manifest["seq_length"], len(data))
        if len(table) != manifest["counts"]["packs"]:
            raise DataError(f"{location} is damaged: its files do not fit each other; copy it again, or pack again")
        return cls(str(location), manifest, table, data)

    def __reduce__(self) -> tuple:
        """Lets another process open it again, because pickling would copy gigabytes of mapped arrays."""
        return PackIndex.open, (self.location,)


def open_table(
    location: str | Path,
    files: dict[str, dict[str, Any]],
    sequence_length: int = MAX_SEQUENCE_LENGTH,
    samples: int | None = None,
) -> PackTable:
    """Maps the three arrays of an index.

    Args:
        location: of the index.
        files: entries of its manifest.
        sequence_length, samples: see `PackTable`.

    Raises:
        DataError: a file is missing or damaged, or the arrays do not fit each other.
    """
    return PackTable(*read_arrays(location, files), str(location), sequence_length, samples)


def read_arrays(location: str | Path, files: dict[str, dict[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mapped arrays ``UNIT`` [U], ``PATTERN`` [P] and ``RUN`` [R]. Raises DataError for a damaged file."""
    directory = open_directory(location)
    units, patterns, runs = (
        array_of(directory.map(name, files[name]["bytes"]), dtype, None, join(location, name), _AGAIN)
        for name, dtype in ((UNITS, UNIT), (PATTERNS, PATTERN), (RUNS, RUN))
    )
    return units, patterns, runs


def _expand(sizes: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joins ranges, given by sizes and starts; returns, for each value, the number of its range, and the value."""
    of = np.repeat(np.arange(len(sizes)), sizes)
    return of, np.arange(len(of)) + (starts - (np.cumsum(sizes) - sizes))[of]
