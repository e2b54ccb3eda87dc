"""Lengths -> packs of whole samples.

Lengths are small integers, so the search works on their histogram (Krell et al. 2021, arXiv 2107.02027): its cost does
not grow with the number of samples. Which samples go where is then a sort and copies of ranges.
"""

from dataclasses import dataclass

import numpy as np

from neo_megatron.data.draw import permutation


@dataclass(frozen=True)
class Pattern:
    """``packs`` packs that hold the same lengths; ``runs`` are (length, how many of it) in one of them."""

    packs: int
    runs: tuple[tuple[int, int], ...]


def best_fit(histogram: np.ndarray) -> list[Pattern]:
    """Longest first, each into the fullest pack that still takes it, a whole class of equal packs at a time.

    Args:
        histogram: int64 [capacity + 1], how many units have each length; none has length 0.
    """
    capacity = len(histogram) - 1
    # classes[room]: packs that are alike and have that much room left; has_room marks those that are not empty.
    classes: list[list[Pattern]] = [[] for _ in range(capacity + 1)]
    has_room = bytearray(capacity + 1)
    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            room = has_room.find(1, length)
            if room < 0:
                room, pattern = capacity, Pattern(-(-left // (capacity // length)), ())
            else:
                pattern = classes[room].pop()
                has_room[room] = bool(classes[room])
            left -= _fill(pattern, room, length, left, classes, has_room)
    return [pattern for alike in classes for pattern in alike]


def _fill(
    pattern: Pattern, room: int, length: int, left: int, classes: list[list[Pattern]], has_room: bytearray
) -> int:
    """Puts up to ``left`` units into the packs of a pattern, filling one before the next; how many it took."""
    times = room // length
    full, rest = divmod(min(left, pattern.packs * times), times)
    for packs, count in ((full, times), (1 if rest else 0, rest), (pattern.packs - full - bool(rest), 0)):
        if packs:
            runs = (*pattern.runs, (length, count)) if count else pattern.runs
            classes[room - count * length].append(Pattern(packs, runs))
            has_room[room - count * length] = 1
    return full * times + rest


def pack(lengths: np.ndarray, groups: np.ndarray, capacity: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs every sample exactly once.

    Args:
        lengths: int [n], at most ``capacity``.
        groups: int64 [n], ascending; samples of one group stay in one pack where they fit.
        capacity: tokens of a pack.
        seed: decides which of the samples of equal length meet, and the order of the packs.

    Returns:
        int64 [n] sample numbers, pack behind pack, and int64 [packs + 1] where each begins.
    """
    first, unit_lengths = _units(lengths, groups, capacity)
    patterns = best_fit(np.bincount(unit_lengths, minlength=capacity + 1))
    # Units by length; within a length in a random order.
    order = permutation(len(first), seed, "units")
    order = order[np.argsort(unit_lengths[order], kind="stable")]
    next_of_length = np.searchsorted(unit_lengths[order], np.arange(capacity + 2))

    units = np.empty(len(first), np.int64)
    units_per_pack, filled = [np.empty(0, np.int64)], 0
    for pattern in patterns:
        width = sum(times for _, times in pattern.runs)
        rows = units[filled : filled + pattern.packs * width].reshape(pattern.packs, width)
        column = 0
        for length, times in pattern.runs:
            start = next_of_length[length]
            next_of_length[length] = end = start + pattern.packs * times
            rows[:, column : column + times] = order[start:end].reshape(pattern.packs, times)
            column += times
        filled += rows.size
        units_per_pack.append(np.full(pattern.packs, width))
    pack_sizes = np.concatenate(units_per_pack)
    shuffled = permutation(len(pack_sizes), seed, "packs")
    units = units[_ranges(_starts(pack_sizes)[shuffled], pack_sizes[shuffled])]

    unit_sizes = np.diff(np.append(first, len(lengths)))
    samples = _ranges(first[units], unit_sizes[units])
    last_unit = np.cumsum(pack_sizes[shuffled])
    offsets = np.concatenate([[0], np.cumsum(unit_sizes[units])[last_unit - 1]]).astype(np.int64)
    return samples, offsets


def _units(lengths: np.ndarray, groups: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """What is packed as a whole: groups that fit, and the parts of the others. (first sample [u], length [u])"""
    first = np.flatnonzero(np.diff(groups, prepend=-1))
    totals = np.add.reduceat(lengths.astype(np.int64), first) if len(first) else np.empty(0, np.int64)
    ends = np.append(first[1:], len(lengths))
    extra = [np.empty(0, np.int64)]
    for group in np.flatnonzero(totals > capacity):
        # As many neighbours as fit stay together.
        used = 0
        for sample in range(first[group], ends[group]):
            if used + lengths[sample] > capacity:
                extra.append(np.array([sample]))
                used = 0
            used += int(lengths[sample])
    first = np.sort(np.concatenate([first, *extra]))
    totals = np.add.reduceat(lengths.astype(np.int64), first) if len(first) else np.empty(0, np.int64)
    return first, totals


def _starts(sizes: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes


def _ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """``start, start + 1, ...`` of every range, behind one another."""
    return np.arange(sizes.sum()) + np.repeat(starts - _starts(sizes), sizes)
