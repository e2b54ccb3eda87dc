"""A histogram of lengths -> patterns of packs.

Lengths are small integers, so the search works on their histogram (Krell et al. 2021, arXiv 2107.02027): its cost does
not grow with the number of samples. Which samples fill a pattern is redrawn in every epoch: `pack_index.py`.
"""

from dataclasses import dataclass

import numpy as np


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
