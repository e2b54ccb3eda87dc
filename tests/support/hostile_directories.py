"""Mutations of directories of shards and packs: every kind of file, every key of a manifest, every field of an array.

Deterministic: the same directory gives the same mutations. `Mutation.true_checksums` ones are what a hostile writer
would leave, the others what copying or a disk does.
"""

import copy
import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neo_megatron.atomic_files import write_atomically
from neo_megatron.data.manifest import write_manifest


@dataclass(frozen=True)
class Mutation:
    """One change to a directory.

    Args:
        kind: of change; a sample has some of each.
        name: unique.
        apply: changes the directory.
        true_checksums: whether sizes and checksums are recomputed.
    """

    kind: str
    name: str
    apply: Callable[[Path], None]
    true_checksums: bool = False


def mutations(directory: Path) -> list[Mutation]:
    """All mutations of a directory of shards or packs."""
    found = [*_of_files(directory), *_of_manifest(directory), *_of_indices(directory), *_of_arrays(directory)]
    found += _of_numbers(directory)
    assert len({mutation.name for mutation in found}) == len(found)
    return found


def some_of(found: list[Mutation], each: int, seed: int = 0) -> list[Mutation]:
    """``each`` mutations of every kind."""
    drawn, kinds = random.Random(seed), {}
    for mutation in found:
        kinds.setdefault(mutation.kind, []).append(mutation)
    return [mutation for kind in kinds.values() for mutation in drawn.sample(kind, min(each, len(kind)))]


def rewrite(directory: Path, name: str, content: bytes) -> None:
    """Replaces a file, and its size and checksum in the manifest."""
    manifest = _manifest(directory)
    owners = [entry["files"] for entry in manifest.get("shards", [])] + [manifest["files"]]
    facts = write_atomically(directory / name, content)
    for files in owners:
        if name in files:
            files[name] = facts
    write_manifest(directory, manifest)


def _manifest(directory: Path) -> dict[str, Any]:
    manifest = json.loads((directory / "manifest.json").read_bytes())
    del manifest["sha256"]
    return manifest


def _files(directory: Path) -> list[str]:
    """The manifest, the files of the first shard, the list of rejects; or all files of packs."""
    return [path.name for path in sorted(directory.iterdir()) if not path.name.startswith("00001")]


# --- files -----------------------------------------------------------------------------------------------------------


def _bytes_changes(content: bytes, others: dict[str, bytes], seed: str) -> dict[str, bytes]:
    drawn = random.Random(seed)
    flipped = {}
    for place in {0, len(content) // 2, len(content) - 1, drawn.randrange(len(content) or 1)} if content else ():
        changed = bytearray(content)
        changed[place] ^= 1 << drawn.randrange(8)
        flipped[f"flip {place}"] = bytes(changed)
    return {
        "empty": b"",
        "truncate 1": content[:-1],
        "truncate half": content[: len(content) // 2],
        "truncate to 12": content[:12],
        "extend 1": content + b"\0",
        "extend 4096": content + bytes(4096),
        "zero": bytes(len(content)),
        "noise": drawn.randbytes(len(content)),
        **flipped,
        **{f"swap {name}": other for name, other in others.items()},
    }


def _of_files(directory: Path) -> Iterator[Mutation]:
    names = _files(directory)
    for number, name in enumerate(names):
        content = (directory / name).read_bytes()
        swaps = {names[number - 1], name.replace("00000", "00001")} - {name}
        others = {other: (directory / other).read_bytes() for other in sorted(swaps)}
        for change, changed in _bytes_changes(content, others, name).items():
            kind = change.split()[0]
            yield Mutation(kind, f"{name}: {change}", _writing(name, changed))
            if name != "manifest.json":
                yield Mutation(
                    f"{kind}, true checksum", f"{name}: {change}, true checksum", _rewriting(name, changed), True
                )
        for change, make in _PLACES.items():
            yield Mutation(change, f"{name}: {change}", _replacing(name, make))


def _writing(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: _replace(directory / name, lambda path: path.write_bytes(content))


def _rewriting(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, name, content)


def _replacing(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    return lambda directory: _replace(directory / name, make)


def _replace(path: Path, make: Callable[[Path], Any]) -> None:
    path.unlink()
    make(path)


def _to_itself(path: Path) -> None:
    other = path.with_name("loop")
    other.symlink_to(path.name)
    path.symlink_to(other.name)


_PLACES: dict[str, Callable[[Path], Any]] = {
    "delete": lambda path: None,
    "directory": lambda path: path.mkdir(),
    "link to a directory": lambda path: path.symlink_to("/etc"),
    "dangling link": lambda path: path.symlink_to("nowhere"),
    "link to itself": _to_itself,
    "long link": lambda path: path.symlink_to("x" * 300),
    "FIFO": lambda path: os.mkfifo(path),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to the terminal": lambda path: path.symlink_to("/dev/tty"),
    "sparse": lambda path: (path.touch(), os.truncate(path, 1 << 42)),
}

# --- manifests -------------------------------------------------------------------------------------------------------

_DELETED = object()
_DEEP: Any = []
for _ in range(300):
    _DEEP = [_DEEP]
_VALUES = {
    "missing": _DELETED,
    "null": None,
    "true": True,
    "a string": "x",
    "a number": 7,
    "a list": [],
    "an object": {},
    "a list of null": [None],
    "negative": -1,
    "zero": 0,
    "2**31": 1 << 31,
    "2**60": 1 << 60,
    "10**400": 10**400,
    "a fraction": 1.5,
    "1e308": 1e308,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "a deep list": _DEEP,
    "a long string": "9" * (1 << 20),
    "a path up": "../../../etc/passwd",
    "an absolute path": "/etc/passwd",
    "a NUL": "a\0b",
    "an unpaired surrogate": "\ud800",
    "an exponent": "1e1000000000",
    "nothing over nothing": "0/0",
}


def _keys(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Every key; of lists the first and the last element."""
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = [*enumerate(value)][:: max(len(value) - 1, 1)]
    else:
        return
    for key, entry in entries:
        yield (*path, key)
        yield from _keys(entry, (*path, key))


def changed_values(value: Any) -> Iterator[tuple[str, Any]]:
    """(what was changed, the value with one key missing or of another value), for every key of a JSON value."""
    for path in _keys(value):
        for name, other in _VALUES.items():
            changed = copy.deepcopy(value)
            _set(changed, path, other)
            yield f"{'.'.join(map(str, path))}: {name}", changed


def _of_manifest(directory: Path) -> Iterator[Mutation]:
    manifest = _manifest(directory)
    for path in _keys(manifest):
        for name, value in _VALUES.items():
            yield Mutation(f"key: {name}", f"{'.'.join(map(str, path))}: {name}", _setting(path, value), True)
    text = json.dumps(manifest).encode()
    texts = {
        "no JSON": b"{",
        "a list": b"[]",
        "deeper than any stack": b'{"a":' * 100_000,
        "deep and closed": text[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "an integer of 5,000 digits": text[:-1] + b', "x": 1' + b"0" * 5000 + b"}",
        "UTF-16": text.decode().encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf" + text,
        "no UTF-8": text[:-1] + b', "x": "\xff"}',
        "a key twice": text[:-1] + b', "version": 3}',
        "a key twice inside": text.replace(b'"counts": {', b'"counts": {"packs": 1, "packs": 2, ', 1),
        "an unknown version": text.replace(b'"version": 3', b'"version": 4'),
        "a version that is a fraction": text.replace(b'"version": 3', b'"version": 3.0'),
    }
    for name, changed in texts.items():
        yield Mutation("text of the manifest", f"manifest: {name}", _writing("manifest.json", changed))
    lists = {
        "twice": lambda entries: entries * 2,
        "reversed": lambda entries: entries[::-1],
        "without the first": lambda entries: entries[1:],
        "none": lambda entries: [],
    }
    for key in ("shards", "sources", "data"):
        for name, change in lists.items() if key in manifest else ():
            yield Mutation("list of the manifest", f"{key}: {name}", _changing((key,), change), True)
    for name in ("../00000", "/00000", "0", "000000", "00001.", "٠٠٠٠٠", "1" * 30) if "shards" in manifest else ():
        yield Mutation("name of a shard", f"shard {name!r}", _renaming(name), True)


def _at(manifest: Any, path: tuple) -> Any:
    for key in path:
        manifest = manifest[key]
    return manifest


def _setting(path: tuple, value: Any) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        manifest = _manifest(directory)
        _set(manifest, path, value)
        write_manifest(directory, manifest)

    return apply


def _set(manifest: Any, path: tuple, value: Any) -> None:
    owner = _at(manifest, path[:-1])
    if value is _DELETED:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value


def _changing(path: tuple, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda directory: _setting(path, change(_at(_manifest(directory), path)))(directory)


def _renaming(name: str) -> Callable[[Path], None]:
    def apply(directory: Path) -> None:
        manifest = _manifest(directory)
        entry = manifest["shards"][0]
        entry["name"] = name
        entry["files"] = {file.replace("00000", name, 1): facts for file, facts in entry["files"].items()}
        write_manifest(directory, manifest)

    return apply


# --- indices and arrays ----------------------------------------------------------------------------------------------

_HEADER = (("<8s", 0), ("<Q", 9), ("<B", 17), ("<Q", 18), ("<Q", 26))
_NUMBERS = (-(1 << 63), -1, 0, 1, 2, 3, (1 << 31) - 1, 1 << 40, 1 << 62, (1 << 63) - 1)


def _of_indices(directory: Path) -> Iterator[Mutation]:
    for name in _files(directory):
        if not name.endswith(".idx"):
            continue
        content = (directory / name).read_bytes()
        (count,) = struct.unpack_from("<Q", content, 18)
        places = [(form, place) for form, place in _HEADER]
        for row in (0, count - 1):
            places += [("<i", 34 + 4 * row), ("<q", 34 + 4 * count + 8 * row)]
        starts = 34 + 12 * count
        places += [("<q", place) for place in (starts, starts + 8, len(content) - 16, len(content) - 8)]
        for form, place in sorted(set(places), key=str):
            yield from _numbers("index", name, content, form, place)


def _numbers(kind: str, name: str, content: bytes, form: str, place: int) -> Iterator[Mutation]:
    """Each number that fits, at a place of a file."""
    for number in _NUMBERS:
        try:
            packed = number.to_bytes(8, "little", signed=True) if form == "<8s" else struct.pack(form, number)
        except struct.error:
            continue
        changed = content[:place] + packed + content[place + len(packed) :]
        if changed != content:
            label = f"{name}: {number} at {place} as {form}"
            yield Mutation(f"{kind} of {name}", label, _rewriting(name, changed), True)


class Unpickled:
    """Makes a file where it is unpickled."""

    path = "/nowhere"

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def _headers(content: bytes) -> dict[str, bytes]:
    """Other headers before the same values, and arrays of other types."""
    start = 10 + int.from_bytes(content[8:10], "little")
    text, values = content[10:start].decode(), content[start:]

    def with_text(header: str, version: bytes = b"\1\0") -> bytes:
        size = len(header).to_bytes(2 if version == b"\1\0" else 4, "little")
        return b"\x93NUMPY" + version + size + header.encode() + values

    shape = text[text.index("'shape': ") + 9 : text.rindex(")") + 1]
    described = text[: text.index("'fortran_order'")]
    return {
        "objects": with_text(f"{{'descr': '|O', 'fortran_order': False, 'shape': {shape}, }}\n")[: -len(values) or None]
        + pickle.dumps(Unpickled()),
        "other descr": with_text(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}\n"),
        "other byte order": with_text(text.replace("<", ">")),
        "Fortran order": with_text(text.replace("False", "True ")),
        "no shape": with_text(described + "'fortran_order': False, }\n"),
        **{
            f"shape {number}": with_text(f"{described}'fortran_order': False, 'shape': {lie}, }}\n")
            for number, lie in enumerate(
                ("(0,)", "(-1,)", "(1, 1)", f"({1 << 60},)", f"({10**30}, 2)", "()", "7", "(1e9,)")
            )
        },
        "code": with_text("__import__('os').system('false')"),
        "deep": with_text("(" * 3000 + ")" * 3000),
        "a long header": with_text(text.rstrip() + " " * 60_000 + "\n"),
        "version 2": with_text(text, b"\2\0"),
        "version 9": with_text(text, b"\x09\0"),
        "a header beyond the end": content[:8] + b"\xff\xff" + content[10:],
        "no header": content[:8] + b"\0\0" + content[10:],
    }


def _of_arrays(directory: Path) -> Iterator[Mutation]:
    for name in _files(directory):
        if name.endswith(".npy"):
            content = (directory / name).read_bytes()
            for change, changed in _headers(content).items():
                yield Mutation(f"header: {change}", f"{name}: header: {change}", _rewriting(name, changed), True)
            start = 10 + int.from_bytes(content[8:10], "little")
            dtype = np.load(directory / name).dtype
            fields = [(dtype[field], dtype.fields[field][1]) for field in dtype.names or ()] or [(dtype, 0), (dtype, 4)]
            rows = (len(content) - start) // (dtype.itemsize if dtype.names else 8)
            for kind, offset in fields:
                for row in sorted({0, rows - 1}):
                    place = start + row * (dtype.itemsize if dtype.names else 8) + offset
                    form = {"i4": "<i", "i8": "<q", "u8": "<Q"}[kind.str[1:]]
                    yield from _numbers(f"array {offset}", name, content, form, place)


def _of_numbers(directory: Path) -> Iterator[Mutation]:
    """Tokens and trained ranges."""
    for name in ("00000.tokens.bin", "00000.spans.bin"):
        if (directory / name).exists():
            content = (directory / name).read_bytes()
            for place in (0, 4, 8, len(content) // 8 * 4, len(content) - 8, len(content) - 4):
                yield from _numbers("values", name, content, "<i", place)
