"""Tells the kind of an annotation file by its first bytes."""

from enum import StrEnum

from neo_megatron.errors import DataError
from neo_megatron.packages import install, is_installed
from neo_megatron.storage.open import source_head

HEAD_BYTES = 512
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_COMPRESSED_SUFFIXES = (".gz", ".zst", ".zstd")


class FileKind(StrEnum):
    """The kinds of annotation files that are read; the value is for messages."""

    JSON = "JSON"
    GZIP = "JSON compressed with gzip"
    ZSTD = "JSON compressed with Zstandard"
    PARQUET = "Parquet"
    ARROW_FILE = "an Arrow file"
    ARROW_STREAM = "an Arrow stream"
    TAR = "a tar archive"


# (offset, magic bytes, kind).
_MAGIC = (
    (0, _GZIP, FileKind.GZIP),
    (0, _ZSTD, FileKind.ZSTD),
    (0, b"PAR1", FileKind.PARQUET),
    (0, b"ARROW1\0\0", FileKind.ARROW_FILE),
    (0, b"\xff\xff\xff\xff", FileKind.ARROW_STREAM),
    (257, b"ustar", FileKind.TAR),
)
COMPRESSED = frozenset({FileKind.GZIP, FileKind.ZSTD})
_NEED_PYARROW = frozenset({FileKind.ZSTD, FileKind.PARQUET, FileKind.ARROW_FILE, FileKind.ARROW_STREAM})


def kind_of_bytes(head: bytes) -> FileKind:
    """The kind by the first `HEAD_BYTES` of a file; JSON for everything that is no other kind."""
    return next((kind for offset, magic, kind in _MAGIC if head[offset:].startswith(magic)), FileKind.JSON)


def kind_of_file(path: str) -> FileKind:
    """The kind of the file at a path or an address."""
    return kind_of_bytes(source_head(path, HEAD_BYTES))


def check_readable(path: str, kind: FileKind) -> None:
    """Checks that the package which reads a kind is installed.

    Raises:
        DataError: the text has the command that installs it.
    """
    if kind in _NEED_PYARROW and not is_installed("pyarrow"):
        raise DataError(f"{path} is {kind}, which needs PyArrow: {install('pyarrow')}")


def has_lines(path: str) -> bool:
    """Whether the name of a JSON file, compressed or not, says that it has one record a line."""
    return plain_name(path).endswith(".jsonl")


def plain_name(path: str) -> str:
    """A path without the suffix of its compression."""
    return path.removesuffix(compressed_suffix(path))


def compressed_suffix(path: str) -> str:
    """The suffix of a path that says how it is compressed; "" without one."""
    return next((suffix for suffix in _COMPRESSED_SUFFIXES if path.endswith(suffix)), "")
