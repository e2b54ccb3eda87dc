"""Meta files of InternVL, read as registries: a JSON object of data sets with ``root`` and ``annotation``."""

from fractions import Fraction
from typing import Any

from neo_megatron.errors import DataError

# The number of records is counted instead of believed.
_KEYS = {"root", "annotation", "repeat_time", "data_augment", "length"}


def is_meta(entries: dict[Any, Any]) -> bool:
    """Whether the contents of a registry are those of a meta file: every data set has an ``annotation``."""
    return bool(entries) and all(isinstance(entry, dict) and "annotation" in entry for entry in entries.values())


def entries_of_meta(entries: dict[Any, dict[str, Any]], path: str) -> dict[Any, dict[str, Any]]:
    """The entries of a registry for those of a meta file, with ``repeat_time`` as a fraction.

    Raises:
        DataError: a data set has a key or a value that is not supported.
    """
    return {name: _entry(entry, f"data set {name} in {path}") for name, entry in entries.items()}


def _entry(entry: dict[str, Any], where: str) -> dict[str, Any]:
    if unknown := sorted(map(str, entry.keys() - _KEYS)):
        raise DataError(
            f"{where} has {', '.join(unknown)}, which is not supported; a meta file has {', '.join(sorted(_KEYS))}"
        )
    if entry.get("data_augment", False) is not False:
        raise DataError(
            f"{where}: data_augment is not a property of a data set here; set it to false, and pass --min-jpeg-quality "
            "75 to the training, which compresses images again as InternVL does"
        )
    repeat = entry.get("repeat_time", 1)
    if isinstance(repeat, bool) or not isinstance(repeat, int | float) or not 0 < repeat < 1 << 31:
        raise DataError(f"{where}: repeat_time must be a number above 0, such as 0.5 or 2")
    # The fraction that was written, not that of its nearest floating-point number.
    return {
        "annotation_path": entry["annotation"],
        "data_path": entry.get("root"),
        "repeat_time": Fraction(str(repeat)),
    }
