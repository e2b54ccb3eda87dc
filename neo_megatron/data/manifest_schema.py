"""The schema of manifests and of the state of unfinished shards: every key, its type and its range.

A checksum proves that a manifest is as it was written, not that a correct program wrote it. After this check a reader
may rely on types and ranges; whether numbers are true is found when the files are opened, or by `verify`.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from fractions import Fraction
from typing import Any, get_args, get_type_hints

from neo_megatron.data.config import MediaOptions, PreprocessConfig
from neo_megatron.errors import DataError

REJECTS = "rejects.jsonl"
PACK_ARRAYS = ("units.npy", "patterns.npy", "runs.npy")
SEQUENCE_KINDS = ("tokens", "spans", "pictures")
# A pack has several arrays of this length; no GPU holds longer ones.
MAX_SEQUENCE_LENGTH = 1 << 24

_MAX_COUNT = 1 << 53
_MAX_ROWS = (1 << 31) - 1  # of a shard, whose files number samples with 32 bits
_MAX_TEXT = 1 << 13
_MAX_SHARE = 1 << 31
_MAX_DIGITS = 64
_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHARE = re.compile(rf"\d{{1,{_MAX_DIGITS}}}(/\d{{1,{_MAX_DIGITS}}})?", re.ASCII)

_Check = Callable[[Any], None]


class _WrongValue(Exception):
    """A value that a manifest cannot have.

    Attributes:
        what: is wrong with it.
        keys: under which it is, innermost first.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what
        self.keys: list[str] = []

    def __str__(self) -> str:
        where = "".join(reversed(self.keys)).lstrip(".")
        return f"{where} {self.what}" if where else f"it {self.what}"


def check_manifest(manifest: dict[str, Any], kind: str) -> None:
    """Checks the form of a manifest whose ``format`` and ``version`` are known.

    Args:
        kind: "neo-shards" or "neo-packs".

    Raises:
        ValueError: with the key and what is wrong with its value.
    """
    try:
        (_check_shards if kind == "neo-shards" else _check_packs)(manifest)
    except _WrongValue as wrong:
        raise ValueError(str(wrong)) from wrong


def check_outcome(outcome: Any, number: int, version: int) -> None:
    """Checks the outcome of slice ``number``, a file of unfinished shards.

    Args:
        version: of the shard format.

    Raises:
        ValueError: with the key and what is wrong with its value.
    """
    try:
        _OUTCOME(outcome)
        if outcome["next"]["number"] != number + 1:
            raise _WrongValue(f"is of slice {outcome['next']['number'] - 1}")
        if outcome["shard"] is not None:
            _at("shard", lambda shard: _check_shard(shard, number - 1, version), outcome["shard"])
            if int(outcome["shard"]["name"]) != number:
                raise _WrongValue(f"has the shard {outcome['shard']['name']}")
    except _WrongValue as wrong:
        raise ValueError(str(wrong)) from wrong


def check_plan(plan: Any) -> None:
    """Checks the form of ``run.json``, which is then compared with the plan of the run that continues.

    Raises:
        ValueError: with the key and what is wrong with its value.
    """
    try:
        _PLAN(plan)
    except _WrongValue as wrong:
        raise ValueError(str(wrong)) from wrong


def check_media(own: Any) -> None:
    """Checks the types of the fields of `MediaOptions` that a data set has of its own.

    Raises:
        ValueError: with the field and what is wrong with its value.
    """
    try:
        _object({}, _MEDIA, closed=True)(own)
    except _WrongValue as wrong:
        raise ValueError(str(wrong)) from wrong


def expected_files(shard: str, version: int) -> set[str]:
    """Names of the files of a shard in a version of the format."""
    pairs = {f"{shard}.{kind}.{suffix}" for kind in SEQUENCE_KINDS for suffix in ("bin", "idx")}
    arrays = ("grids", "samples", "media") if version > 2 else ("grids", "samples")
    return pairs | {f"{shard}.{kind}.npy" for kind in arrays}


def _shown(value: Any) -> str:
    """A value for a message; containers are named by their type, because printing a deeply nested one would fail."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _integer(least: int, most: int) -> _Check:
    def check(value: Any) -> None:
        if type(value) is not int or not least <= value <= most:
            raise _WrongValue(f"is {_shown(value)}, not an integer from {least} to {most}")

    return check


def _number(value: Any) -> None:
    # The range is checked on the value itself, because a larger integer cannot be converted to a float.
    if type(value) not in (int, float) or not -_MAX_COUNT <= value <= _MAX_COUNT:
        raise _WrongValue(f"is {_shown(value)}, not a finite number")


def _any_text(value: Any) -> None:
    if not isinstance(value, str):
        raise _WrongValue(f"is {_shown(value)}, not a string")


def _text(value: Any) -> None:
    _any_text(value)
    if len(value) > _MAX_TEXT:
        raise _WrongValue(f"is a string of {len(value)} characters, more than {_MAX_TEXT}")


def _flag(value: Any) -> None:
    if not isinstance(value, bool):
        raise _WrongValue(f"is {_shown(value)}, not true or false")


def _choice(*values: str) -> _Check:
    def check(value: Any) -> None:
        if not isinstance(value, str) or value not in values:
            raise _WrongValue(f"is {_shown(value)}, not {' or '.join(values)}")

    return check


def _checksum(value: Any) -> None:
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise _WrongValue(f"is {_shown(value)}, not a SHA-256 checksum")


def _share(value: Any) -> None:
    """A fraction as ``str`` writes it. Exponents, which `Fraction` reads too, could take any amount of memory."""
    if not isinstance(value, str) or not _SHARE.fullmatch(value):
        raise _WrongValue(f"is {_shown(value)}, not a fraction such as 1/2")
    above, below = map(int, (*value.split("/"), "1")[:2])
    if not 0 < above <= below * _MAX_SHARE:
        raise _WrongValue(f"is {_shown(value)}, not a fraction above 0, at most {_MAX_SHARE}")


def _due(value: Any) -> None:
    if value != "0":
        _share(value)
        if Fraction(value) >= 1:
            raise _WrongValue(f"is {_shown(value)}, not a fraction below 1")


def _held_out(value: Any) -> None:
    if value is None:
        return
    _share(value)
    if Fraction(value) >= 1:
        raise _WrongValue(f"is {_shown(value)}, not a fraction below 1")


def _location(value: Any) -> None:
    """A path relative to the directory of the manifest, or an address of object storage."""
    _text(value)
    try:
        encoded = os.fsencode(value)
    except UnicodeEncodeError:
        encoded = b"\0"
    if not value or b"\0" in encoded or len(encoded) >= 4096:
        raise _WrongValue(f"is {_shown(value)}, which is not a path")
    if value.startswith("/"):
        raise _WrongValue(f"is {_shown(value)}, not a path relative to this directory")


def _optional(check: _Check) -> _Check:
    """Accepts null too."""
    return lambda value: None if value is None else check(value)


def _list_of(check: _Check, least: int = 0) -> _Check:
    def check_all(value: Any) -> None:
        if not isinstance(value, list) or len(value) < least:
            raise _WrongValue(f"is {_shown(value)}, not a list{f' of at least {least}' if least else ''}")
        for number, entry in enumerate(value):
            try:
                check(entry)
            except _WrongValue as wrong:
                wrong.keys.append(f"[{number}]")
                raise

    return check_all


def _mapping_of(check: _Check) -> _Check:
    """An object with any keys."""

    def check_all(value: Any) -> None:
        if not isinstance(value, dict):
            raise _WrongValue(f"is {_shown(value)}, not an object")
        for key, entry in value.items():
            _text(key)
            _at(key, check, entry)

    return check_all


def _object(
    required: Mapping[str, _Check], optional: Mapping[str, _Check] | None = None, closed: bool = False
) -> _Check:
    """An object with the given keys; a ``closed`` one has no others."""
    others = optional or {}

    def check_all(value: Any) -> None:
        if not isinstance(value, dict):
            raise _WrongValue(f"is {_shown(value)}, not an object")
        for key, check in required.items():
            if key not in value:
                raise _WrongValue(f"lacks {key!r}")
            _at(key, check, value[key])
        for key, check in others.items():
            if key in value:
                _at(key, check, value[key])
        if closed and (unknown := value.keys() - required.keys() - others.keys()):
            raise _WrongValue(f"has the unknown key {_shown(min(unknown))}")

    return check_all


def _at(key: str, check: _Check, value: Any) -> None:
    try:
        check(value)
    except _WrongValue as wrong:
        wrong.keys.append(f".{key[:60]}")
        raise


_COUNT = _integer(0, _MAX_COUNT)
_ROWS = _integer(0, _MAX_ROWS)
_FILE = _object({"bytes": _COUNT, "sha256": _checksum})


def _files(value: Any, expected: set[str]) -> None:
    if not isinstance(value, dict):
        raise _WrongValue(f"is {_shown(value)}, not an object")
    if value.keys() != expected:
        name = min(value.keys() ^ expected)
        raise _WrongValue(f"{'lacks the file' if name in expected else 'has the unknown file'} {_shown(name)}")
    for name, file in value.items():
        _at(name, _FILE, file)


def _checks_of_settings() -> dict[str, _Check]:
    checks: dict[Any, _Check] = {int: _integer(-_MAX_COUNT, _MAX_COUNT), float: _number}
    return {
        name: checks.get(hint) or _choice(*get_args(hint)) for name, hint in get_type_hints(PreprocessConfig).items()
    }


_CONFIG = _checks_of_settings()
_MEDIA = {field.name: _CONFIG[field.name] for field in fields(MediaOptions)}


def _settings(value: Any) -> None:
    """The fields of `PreprocessConfig`; those that were added in later versions may be missing."""
    required = {"image_store": _CONFIG["image_store"]}
    _object(required, _CONFIG, closed=True)(value)
    _usable(value)


def _usable(settings: dict[str, Any]) -> None:
    try:
        PreprocessConfig(**settings)
    except DataError as error:
        raise _WrongValue(f"cannot be used: {error}") from error


def settings_of_sources(manifest: dict[str, Any]) -> list[PreprocessConfig]:
    """The settings of each source of a checked manifest of shards: those of the run, and those of its own."""
    return [PreprocessConfig(**_settings_of(manifest["settings"], source)) for source in manifest["sources"]]


def _settings_of(settings: dict[str, Any], source: dict[str, Any]) -> dict[str, Any]:
    return settings | {name: source[name] for name in _MEDIA if name in source}


_IDS = ("image_context", "image_start", "image_end", "turn_start", "turn_end", "pad")


def _tokenizer(value: Any) -> None:
    ids = _object(dict.fromkeys(_IDS, _ROWS), closed=True)
    _object({"sha256": _checksum, "size": _ROWS, "ids": ids}, closed=True)(value)
    if max(value["ids"].values()) >= value["size"]:
        raise _WrongValue("has an id that is not below its size")
    if len({value["ids"][name] for name in _IDS[:3]}) < 3:
        raise _WrongValue("has the same id for several of <IMG_CONTEXT>, <img> and </img>")


_SOURCE = _object(
    {"name": _text, "annotations": _text},
    {
        **{"image_root": _text, "share": _share, "follow_links": _flag},
        **dict.fromkeys(("schema", "image_placeholder", "transform"), _text),
        "columns": _mapping_of(_text),
        **dict.fromkeys(("transform_sha256", "caption_prompts_sha256"), _checksum),
        "max_document_tokens": _integer(2, _MAX_COUNT),
        **_MEDIA,
    },
)
_PLACEHOLDER = _object({"samples": _COUNT, "file": _text, "record": _COUNT, "element": _optional(_COUNT)})
_NOTICED = {"ignored_keys": _mapping_of(_COUNT), "placeholders": _mapping_of(_PLACEHOLDER)}
_SHARD = _object({"name": _text, "samples": _ROWS, "pictures": _ROWS}, {"media": _ROWS})
_SHARDS = _object(
    {
        "settings": _settings,
        "tokenizer": _tokenizer,
        "sources": _list_of(_SOURCE, least=1),
        "counts": _object(
            {
                **dict.fromkeys(("records_read", "samples_read", "samples_kept", "samples_rejected"), _COUNT),
                "pictures": _COUNT,
                "rejected_by_reason": _mapping_of(_COUNT),
            },
            {
                "samples_with_images": _COUNT,
                "empty_answers": _COUNT,
                "surplus_tags": _COUNT,
                "ignored_keys": _mapping_of(_COUNT),
                "foreign_placeholders": _mapping_of(_PLACEHOLDER),
            },
        ),
        "shards": _list_of(_SHARD),
        "files": lambda value: _files(value, {REJECTS}),
    }
)


def _check_shards(manifest: dict[str, Any]) -> None:
    _SHARDS(manifest)
    for number, source in enumerate(manifest["sources"]):
        _at(f"sources[{number}]", _usable, _settings_of(manifest["settings"], source))
    last = -1
    for number, entry in enumerate(manifest["shards"]):
        try:
            _check_shard(entry, last, manifest["version"])
        except _WrongValue as wrong:
            wrong.keys.append(f"shards[{number}]")
            raise
        last = int(entry["name"])


def _check_shard(entry: dict[str, Any], last: int, version: int) -> None:
    name = entry["name"]
    # Only ASCII digits, so a name never leads out of the directory; ascending, so no name occurs twice.
    if not (name.isascii() and name.isdigit() and len(name) < 19 and name == f"{int(name):05d}"):
        raise _WrongValue(f"has the name {_shown(name)}, which is not the name of a shard")
    if int(name) <= last:
        raise _WrongValue(f"has the name {name}, which is not after {last:05d}")
    for key in ("media", "files") if version > 2 else ("files",):
        if key not in entry:
            raise _WrongValue(f"lacks {key!r}")
    _files(entry["files"], expected_files(name, version))


_REJECT = _object(
    {"file": _any_text, "record": _COUNT, "element": _optional(_COUNT), "kind": _text, "reason": _any_text}
)
_OUTCOME = _object(
    {
        "next": _object(
            {**dict.fromkeys(("number", "source", "part", "first", "offset"), _COUNT), "due": _due}, closed=True
        ),
        **dict.fromkeys(("bytes", "records", "samples"), _COUNT),
        "rejects": _list_of(_REJECT),
        "shard": _optional(_SHARD),
        "noticed": _object(
            {**dict.fromkeys(("with_images", "empty_answers"), _COUNT), **_NOTICED},
            {"surplus_tags": _COUNT},
            closed=True,
        ),
    },
    closed=True,
)
_PLAN = _object(
    {
        "settings": _mapping_of(lambda value: None),
        "sources": _list_of(_object({"annotations": _any_text})),
        "tokenizer": _mapping_of(lambda value: None),
    }
)
_WORK = _object({"attention": _number, "pictures": _number})
_PACKS = _object(
    {
        "seq_length": _integer(2, MAX_SEQUENCE_LENGTH),
        "held_out": _held_out,
        "data": _list_of(
            _object({"shards": _location, "sha256": _checksum, "share": _share, "samples": _COUNT, "tokens": _COUNT}),
            least=1,
        ),
        "counts": _object(
            {
                **dict.fromkeys(("samples_read", "samples_packed", "samples_rejected", "tokens"), _COUNT),
                "packs": _integer(1, _MAX_COUNT),
            }
        ),
        "fill": _number,
        "imbalance": _optional(_object({"ranks": _ROWS, "packs_per_rank": _ROWS, "drawn": _WORK, "balanced": _WORK})),
        "files": lambda value: _files(value, {*PACK_ARRAYS, REJECTS}),
    },
    {
        "seed": _integer(-(1 << 63), (1 << 64) - 1),
        "split": _optional(
            _object(
                {"by": _choice("path", "content")},
                dict.fromkeys(("records", "linked_records", "largest_group", "kept_in_training"), _COUNT),
            )
        ),
    },
)


def _check_packs(manifest: dict[str, Any]) -> None:
    _PACKS(manifest)
    if manifest["version"] > 2 and manifest["held_out"] and not manifest.get("split"):
        raise _WrongValue("has held-out records but lacks 'split'")
