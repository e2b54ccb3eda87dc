"""The fields that a schema reads from a raw record; all other keys stay in the record and are classified as usual."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neo_megatron.data.prepare.record_keys import IMAGE_KEYS, VIDEO_KEYS, as_list, is_empty
from neo_megatron.errors import Reason, RejectedSample


@dataclass(frozen=True)
class Origin:
    """The place of a sample, from which a prompt is drawn.

    Args:
        seed: of the run.
        data_set: its name.
        file: the name of the annotation file, without its directory, which may move.
        record: number in the file.
        element: in a list-packed record, else ``None``.
    """

    seed: int = 0
    data_set: str = ""
    file: str = ""
    record: int = 0
    element: int | None = None


class Fields:
    """The keys of a raw record, looked up under the names of a schema.

    Args:
        record: as it was read.
        columns: (our name of a field, the key that holds it).
    """

    def __init__(self, record: Mapping[str, Any], columns: Sequence[tuple[str, str]] = ()) -> None:
        self._record, self._columns = record, dict(columns)
        self._read: set[str] = set()

    def take(self, field: str, *others: str) -> Any:
        """The value of a field, which may have other names; ``None`` if it is missing or empty.

        Raises:
            RejectedSample: two of the names have different values.
        """
        keys = [self._columns[field]] if field in self._columns else [field, *others]
        self._read.update(keys)
        found = [(key, self._record[key]) for key in keys if not is_empty(self._record.get(key))]
        for key, value in found[1:]:
            if as_list(value) != as_list(found[0][1]):
                raise RejectedSample(
                    Reason.MALFORMED,
                    f"{found[0][0]!r} and {key!r} differ; choose one with --columns {field}={found[0][0]} "
                    f"(in a registry: columns)",
                )
        return found[0][1] if found else None

    def take_text(self, field: str, *others: str) -> str:
        """As `take`, for a string; "" if it is missing or empty.

        Raises:
            RejectedSample: it is something else.
        """
        value = self.take(field, *others)
        if value is not None and not isinstance(value, str):
            raise RejectedSample(Reason.MALFORMED, f"{self.key(field)!r} must be a string, not {_kind(value)}")
        return value or ""

    def take_list(self, field: str, *others: str) -> list:
        """As `take`, for a list; ``[]`` if it is missing or empty.

        Raises:
            RejectedSample: it is something else.
        """
        value = self.take(field, *others)
        if value is not None and not isinstance(value, list):
            raise RejectedSample(Reason.MALFORMED, f"{self.key(field)!r} must be a list, not {_kind(value)}")
        return value or []

    def take_images(self, field: str = "image", *others: str) -> list:
        """The image files, under any of the usual keys or of the others: paths, or what the reader of a file made."""
        value = self.take(field, *IMAGE_KEYS, *others)
        return [] if value is None else as_list(value)

    def key(self, field: str) -> str:
        """The key under which a field is expected, for messages."""
        return self._columns.get(field, field)

    def keys(self) -> str:
        """The keys of the record that have a value, for messages."""
        named = ", ".join(repr(key) for key, value in self._record.items() if not is_empty(value))
        return f"its keys are {named:.200}" if named else "it has no keys"

    def rest(self) -> dict[str, Any]:
        """The keys that nothing has read."""
        return {key: value for key, value in self._record.items() if key not in self._read}

    def published(self, turns: list[dict], images: list | None = None, videos: list | None = None) -> dict[str, Any]:
        """A record of the published form with these turns and files, and with the keys that nothing has read.

        Raises:
            RejectedSample: the record has turns, or files, under another key too.
        """
        record = self.rest()
        if not is_empty(record.get("conversations")):
            raise RejectedSample(Reason.MALFORMED, "the record also has 'conversations'; keep one of the two")
        for name, keys, files in (("image", IMAGE_KEYS, images), ("video", VIDEO_KEYS, videos)):
            if not files:
                continue
            if other := next((key for key in keys if not is_empty(record.get(key))), None):
                raise RejectedSample(
                    Reason.UNSUPPORTED_KEY,
                    f"the {name}s are listed elsewhere, so {other!r} is not read; remove the key",
                )
            record = {key: value for key, value in record.items() if key not in keys} | {name: files}
        return record | {"conversations": turns}

    def ignore(self, *keys: str) -> None:
        """Takes keys that are known to say nothing about the content."""
        self._read.update(keys)


def _kind(value: object) -> str:
    named = {"list": "a list", "dict": "an object"}
    return named.get(type(value).__name__, type(value).__name__)
