"""64-bit identities of image files, video files and texts, by which a split keeps records of one file together."""

import hashlib
import json
import os
from collections.abc import Iterable
from typing import Any


def identity_of_path(path: str) -> int:
    """Identity of a file by its absolute path, in which links are resolved, or by its address."""
    return _number(hashlib.sha256(os.fsencode(path)))


def identity_of_content(data: Any) -> int:
    """Identity of a file by its bytes."""
    return _number(hashlib.sha256(data))


def identity_of_file(path: str) -> int:
    """Identity of a file by its bytes, read in blocks.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return identity_of_stream(file)


def identity_of_stream(stream: Any) -> int:
    """Identity of a file by its bytes, from an open binary file."""
    return _number(hashlib.file_digest(stream, "sha256"))


def identity_of_texts(texts: Iterable[str]) -> int:
    """Identity of a conversation without media by the texts of its turns."""
    return _number(hashlib.sha256(json.dumps(list(texts)).encode()))


def _number(digest: Any) -> int:
    return int.from_bytes(digest.digest()[:8], "little")
