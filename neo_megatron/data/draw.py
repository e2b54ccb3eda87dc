"""Random orders that depend on their key alone: the same for any machine, library version and number of workers."""

import hashlib
import json

import numpy as np


def permutation(count: int, *key: int | str) -> np.ndarray:
    """An order of ``count`` things: int64 ``[count]``, a function of ``key`` and nothing else.

    Built from the raw output of a bit generator, which NumPy keeps unchanged between versions (NEP 19), unlike that of
    ``Generator.permutation``.
    """
    digest = hashlib.sha256(json.dumps(key).encode()).digest()
    raw = np.random.PCG64(int.from_bytes(digest)).random_raw(count)
    return np.argsort(raw, kind="stable")
