"""Functions of the user's own that turn a raw record into records of the published form."""

import dataclasses
import hashlib
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neo_megatron.errors import DataError, Reason, RejectedSample

_NAME = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", re.ASCII)
_LARGEST = 1 << 24  # bytes of a source file
_imported: dict[str, str] = {}  # module -> SHA-256 of the source from which this process has it


def source_sha256(transform: str) -> str:
    """SHA-256 of the source file of ``package.module:function``.

    Raises:
        DataError: the name is not of this form, or the module is not found or not a Python file.
    """
    return hashlib.sha256(_source(transform).read_bytes()).hexdigest()


def load_transform(transform: str, sha256: str) -> Callable[[Any], Any]:
    """The function ``package.module:function``.

    Args:
        transform: its name.
        sha256: of its source file, as `source_sha256` found it when the run began.

    Raises:
        DataError: it cannot be imported, or its source is another one, or this process has imported another one.
    """
    if source_sha256(transform) != sha256:
        raise DataError(f"--transform {transform}: its source file has changed; run the command again")
    module, _, name = transform.partition(":")
    if module in sys.modules and _imported.get(module, sha256) != sha256:
        raise DataError(f"--transform {transform}: its source file has changed since it was imported; restart Python")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # whatever the user's module does when it is imported
        raise DataError(
            f"--transform {transform} cannot be imported: {_sentence(error)}; correct the module"
        ) from error
    _imported[module] = sha256
    if not callable(function):
        raise DataError(f"--transform {transform}: {module} does not have a function {name}; correct the name")
    return function


def transformed(function: Callable[[Any], Any], name: str, record: Any) -> list[Any]:
    """The records, at least one, that a transform makes of a raw record.

    Raises:
        RejectedSample: the raw record is not an object, or the function made no record, failed, or returned something
            that is not a record.
    """
    if not isinstance(record, dict):
        raise RejectedSample(Reason.MALFORMED, f"a record must be an object, not {type(record).__name__}")
    try:
        found = function(record)
    except Exception as error:
        raise RejectedSample(Reason.MALFORMED, f"{name} failed with {_sentence(error)}") from error
    records = found if isinstance(found, list) else [found]
    if found is None or not records:
        raise RejectedSample(Reason.MALFORMED, f"{name} returned no record")
    for entry in records:
        _check_plain(entry, name)
    return records


def _check_plain(entry: Any, name: str) -> None:
    """Rejects values that JSON does not have; a file in place of a path is an instance of a data class."""
    if not isinstance(entry, dict):
        raise RejectedSample(
            Reason.MALFORMED, f"{name} returned {type(entry).__name__}, not an object or a list of them"
        )
    try:
        json.dumps(entry, default=_file)
    except (TypeError, ValueError, RecursionError) as error:
        raise RejectedSample(
            Reason.MALFORMED, f"{name} returned a record that is not JSON: {_sentence(error)}"
        ) from error
    turns = entry.get("conversations")
    for holder in (entry, *(turns if isinstance(turns, list) else [])):
        if isinstance(holder, dict) and not all(isinstance(key, str) for key in holder):
            raise RejectedSample(Reason.MALFORMED, f"{name} returned a record with a key that is not a string")


def _file(value: Any) -> str:
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        raise TypeError(f"it has a {type(value).__name__}")
    return ""


def _source(transform: str) -> Path:
    if not _NAME.fullmatch(transform):
        raise DataError(f"--transform {transform} must have the form package.module:function")
    if os.getcwd() not in sys.path:  # a command's own directory is on the path instead of the current one
        sys.path.append(os.getcwd())
    module = transform.partition(":")[0]
    try:
        spec = importlib.util.find_spec(module)
    except Exception as error:  # a parent package is imported to find its module
        raise DataError(f"--transform {transform} cannot be imported: {_sentence(error)}; correct its name") from error
    origin = Path(spec.origin) if spec and spec.origin else None
    if origin is None or origin.suffix != ".py" or not origin.is_file() or origin.stat().st_size > _LARGEST:
        raise DataError(
            f"--transform {transform}: {module} is not a Python file on the path; run the command in the directory "
            "that has it, or set PYTHONPATH (with --engine ray, to a directory that all machines share)"
        )
    return origin


def _sentence(error: BaseException) -> str:
    """The kind and text of an exception in one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}".encode(errors="replace").decode()[:300]
