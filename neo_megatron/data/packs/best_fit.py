"""Best-fit packing on a histogram of lengths, which gives patterns of packs.

Lengths are small integers, so the search works on their histogram (Krell et al. 2021, arXiv 2107.02027): its cost does
not grow with the number of samples. The samples that fill a pattern are redrawn in every epoch, see `index.py`.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pattern:
    """``packs`` packs that hold the same lengths; ``runs`` are (length, number of units of it) in one of them."""

    packs: int
    runs: tuple[tuple[int, int], ...]


def best_fit(histogram: np.ndarray) -> list[Pattern]:
    """Packs the longest units first, each into the fullest pack with room for it; equal packs are filled together.

    Args:
        histogram: int64 [capacity + 1], number of units of each length; there are no units of length 0.
    """
    capacity = len(histogram) - 1
    # classes[room]: patterns whose packs have so many tokens of room left; has_room marks rooms that have patterns.
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
    """Puts up to ``left`` units into the packs of a pattern, filling one before the next; returns how many fit."""
    times = room // length
    full, rest = divmod(min(left, pattern.packs * times), times)
    for packs, count in ((full, times), (1 if rest else 0, rest), (pattern.packs - full - bool(rest), 0)):
        if packs:
            runs = (*pattern.runs, (length, count)) if count else pattern.runs
            classes[room - count * length].append(Pattern(packs, runs))
            has_room[room - count * length] = 1
    return full * times + rest
