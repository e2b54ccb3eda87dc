"""Random orders that depend on their key alone: the same for any machine, library version and number of workers."""

import hashlib
import json

import numpy as np

# With fewer than eight, the permutations of four items are not equally likely.
_ROUNDS = 8
_GOLDEN = 0x9E3779B97F4A7C15


def permutation(count: int, *key: int | str) -> np.ndarray:
    """A permutation of ``count`` items: int64 ``[count]``, a function of ``key`` alone.

    Built from the raw output of a bit generator, which NumPy keeps unchanged between versions (NEP 19), unlike that of
    ``Generator.permutation``.
    """
    raw = np.random.PCG64(int.from_bytes(_digest(key))).random_raw(count)
    return np.argsort(raw, kind="stable")


def key_of(*key: int | str) -> int:
    """64 bits of the hash of a key, for `shuffled`."""
    return int.from_bytes(_digest(key)[:8], "little")


def shuffled(index: np.ndarray, count: np.ndarray | int, key: np.ndarray | int) -> np.ndarray:
    """Images of ``index`` under a permutation of ``range(count)`` that is never materialised: int64 ``[n]``.

    Any single position costs the same, so nothing has to be drawn or stored for a hundred million samples. The
    bijection works on the smallest power of two that holds ``count``; values outside of the range are mapped again
    until they fall inside (cycle walking; Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"), at most
    two steps on average.

    Args:
        index: int ``[n]``, each below its ``count``.
        count: int ``[n]`` or one number, sizes of the permutations.
        key: uint64 ``[n]`` or one number; different keys give different permutations.
    """
    index, count, key = np.broadcast_arrays(index, count, np.asarray(key, np.uint64))
    bits = np.ceil(np.log2(np.maximum(count, 1))).astype(np.uint64)
    constants = [mix(key + np.uint64(_GOLDEN * number % 2**64)) for number in range(1, 2 * _ROUNDS + 1)]
    result = index.astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        result[walking] = _step(result[walking], bits[walking], [constant[walking] for constant in constants])
        walking = walking[result[walking] >= count[walking].astype(np.uint64)]
    return result.astype(np.int64)


def _step(x: np.ndarray, bits: np.ndarray, constants: list[np.ndarray]) -> np.ndarray:
    """A bijection of ``bits``-bit numbers: multiplying by odd numbers mixes upwards, shifting mixes downwards."""
    mask = (np.uint64(1) << bits) - np.uint64(1)
    half = (bits + np.uint64(1)) >> np.uint64(1)
    for factor, summand in zip(constants[::2], constants[1::2], strict=True):
        x = (x * (factor | np.uint64(1)) + summand) & mask
        x = x ^ (x >> half)
    return x


def mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _digest(key: tuple[int | str, ...]) -> bytes:
    return hashlib.sha256(json.dumps(key).encode()).digest()
