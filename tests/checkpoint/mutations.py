"""Mutations of a checkpoint's directory: every key of its JSON, every file, and tokenizers that misbehave.

The same for the same directory; a mutation changes a copy in place.
"""

import json
import os
import random
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from metadata_mutations import HARMLESS, metadata_mutations

MISSING = object()
VALUES = {
    "missing": MISSING,
    "null": None,
    "string": "text",
    "list": [1, 2],
    "object": {"a": 1},
    "true": True,
    "negative": -1,
    "zero": 0,
    "huge": 10**30,
    "1e10": 1e10,
    "ten billion": 10**10,
    "NaN": float("nan"),
    "infinite": float("inf"),
    "deep": "@DEEP@",
    "digits": "@DIGITS@",
    "surrogate": "\ud800",
    "control": "\x1b[2J\n",
    "long": "x" * 1_000_000,
}
RAW = {'"@DEEP@"': "[" * 100_000 + "]" * 100_000, '"@DIGITS@"': "1" * 5000}
BIG_TABLES = {"vocab", "merges", "added_tokens_decoder", "weight_map"}


class Mutation(NamedTuple):
    """A change to a directory; ``refused`` if no reader may accept the result."""

    name: str
    file: str
    apply: Callable[[Path], Any]
    refused: bool = False


def mutations(directory: Path) -> list[Mutation]:
    found = [*_of_keys(directory), *_of_files(directory)]
    if (directory / "tokenizer.json").exists():
        found += _of_tokenizers()
    for metadata in directory.glob("*/.metadata"):
        release = metadata.parent.name
        for name, change in metadata_mutations().items():
            change = partial(_in_release, release, change)
            found.append(Mutation(name, name, change, name not in HARMLESS))
    return found


def _in_release(release: str, change: Callable[[Path], None], root: Path) -> None:
    change(root / release)


def _of_keys(directory: Path) -> Iterator[Mutation]:
    for path in sorted(directory.rglob("*.json")):
        file = str(path.relative_to(directory))
        contents = json.loads(path.read_text())
        for keys in _places(contents, few=path.name in ("vocab.json", "added_tokens.json")):
            for kind, value in VALUES.items():
                name = f"{file}: {'.'.join(map(str, keys))} {kind}"
                yield Mutation(
                    name, file, lambda root, file=file, keys=keys, value=value: _set(root / file, keys, value)
                )


def _places(value: Any, keys: tuple[Any, ...] = (), few: bool = False) -> Iterator[tuple[Any, ...]]:
    """Every key, and of tables and lists of many alike the first."""
    if keys:
        yield keys
    if isinstance(value, dict):
        for key in list(value)[: 1 if few or (keys and keys[-1] in BIG_TABLES) else None]:
            yield from _places(value[key], (*keys, key))
    elif isinstance(value, list) and value:
        yield from _places(value[0], (*keys, 0))


def _set(path: Path, keys: tuple[Any, ...], value: Any) -> None:
    contents = json.loads(path.read_text())
    inner = contents
    for key in keys[:-1]:
        inner = inner[key]
    if value is MISSING:
        del inner[keys[-1]]
    else:
        inner[keys[-1]] = value
    text = json.dumps(contents)
    for mark, raw in RAW.items():
        text = text.replace(mark, raw)
    path.write_text(text)


def _of_files(directory: Path) -> Iterator[Mutation]:
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            file = str(path.relative_to(directory))
            for kind, (change, refused) in _CHANGES.items():
                yield Mutation(
                    f"{file} {kind}", file, lambda root, file=file, change=change: change(root / file), refused
                )


def _bytes(change: Callable[[bytearray, random.Random], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content = change(content, random.Random(path.name)) or content
        path.write_bytes(content)

    return apply


def _flip(content: bytearray, choose: random.Random, first: int | None = None) -> None:
    for _ in range(3):
        content[choose.randrange(min(first or len(content), len(content)))] ^= 1 << choose.randrange(8)


def _zero(content: bytearray, choose: random.Random) -> None:
    begin = choose.randrange(len(content))
    content[begin : begin + 64] = bytes(len(content[begin : begin + 64]))


def _instead(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.unlink()
        make(path)

    return apply


def _outside(path: Path) -> None:
    target = path.parents[1] / f"outside-{path.name}"
    shutil.move(path, target)
    path.symlink_to(target)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    socket.socket(socket.AF_UNIX).bind(path.name)
    os.chdir(here)


_CHANGES: dict[str, tuple[Callable[[Path], Any], bool]] = {
    "cut in half": (_bytes(lambda it, _: it[: len(it) // 2]), False),
    "cut by a byte": (_bytes(lambda it, _: it[:-1]), False),
    "longer": (_bytes(lambda it, _: it + b"\0" * 100), False),
    "flipped at the beginning": (_bytes(lambda it, choose: _flip(it, choose, 64)), False),
    "flipped early": (_bytes(lambda it, choose: _flip(it, choose, 2000)), False),
    "flipped": (_bytes(_flip), False),
    "zeros in it": (_bytes(_zero), False),
    "zeros": (_bytes(lambda it, _: bytes(len(it))), False),
    "empty": (lambda path: path.write_bytes(b""), False),
    "deleted": (Path.unlink, False),
    "a directory": (_instead(Path.mkdir), True),
    "a link to a directory": (_instead(lambda path: path.symlink_to(path.parent)), True),
    "a link to nothing": (_instead(lambda path: path.symlink_to("nothing")), True),
    "a link to itself": (_instead(lambda path: path.symlink_to(path.name)), True),
    "a link outside": (_outside, True),
    "a FIFO": (_instead(os.mkfifo), True),
    "a device": (_instead(lambda path: path.symlink_to("/dev/zero")), True),
    "a terminal": (_instead(lambda path: path.symlink_to("/dev/tty")), True),
    "a socket": (_instead(_socket), True),
}

_DOUBLING = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
_PARTS: dict[str, tuple[tuple[str, ...], Any]] = {
    "a normalizer that doubles 60 times": (("normalizer",), {"type": "Sequence", "normalizers": [_DOUBLING] * 60}),
    "a normalizer that grows": (
        ("normalizer",),
        {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1_000_000},
    ),
    "a normalizer of every place": (
        ("normalizer",),
        {"type": "Sequence", "normalizers": [{"type": "Replace", "pattern": {"Regex": ""}, "content": "aaaa"}] * 30},
    ),
    "a normalizer in front": (("normalizer",), {"type": "Prepend", "prepend": "x" * 10_000_000}),
    "a normalizer of unknown type": (("normalizer",), {"type": "Explode"}),
    "a precompiled normalizer": (("normalizer",), {"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "a decoder that doubles 60 times": (("decoder",), {"type": "Sequence", "decoders": [_DOUBLING] * 60}),
    "a model of words": (("model",), {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
    "a model of unknown type": (("model", "type"), "Explode"),
    "an id of four billion": (("model", "vocab", "!"), 2**32 - 1),
    "a negative id": (("model", "vocab", "!"), -1),
    "an added token of four billion": (("added_tokens", 0, "id"), 2**32 - 1),
    "a negative added token": (("added_tokens", 0, "id"), -1),
    "an added token without text": (("added_tokens", 0, "content"), ""),
    "an added token that is a string": (("added_tokens", 0), "x"),
    "padding to a trillion": (
        ("padding",),
        {
            **{"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
        },
    ),
    "merges of nothing": (("merges",), [["no", "such"]]),
}
_ENDLESS = ("(a*)*$", "(a|aa)+$", "((a+)+)+b", "(?=(a+)+b)", r"(.*.*.*.*.*.*=)+", r"(\p{L}+)+\p{N}", "(x+x+)+y", "")


def _of_tokenizers() -> Iterator[Mutation]:
    parts = dict(_PARTS)
    for number, pattern in enumerate(_ENDLESS):
        split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        parts[f"an endless expression {number}"] = ("pre_tokenizer",), split
        parts[f"an endless replacement {number}"] = (
            ("normalizer",),
            {"type": "Replace", "pattern": {"Regex": pattern}, "content": "a"},
        )
    for name, (keys, value) in parts.items():
        keys = ("model", *keys) if keys == ("merges",) else keys
        yield Mutation(
            f"tokenizer.json with {name}",
            "tokenizer.json",
            lambda root, keys=keys, value=value: _set(root / "tokenizer.json", keys, value),
            True,
        )


def label(mutation: Mutation) -> str:
    return re.sub(r"\W+", "-", mutation.name)
