"""Entries of manifests, with other numbers for each."""

import hashlib
from typing import Any

from neo_megatron.data.manifest_schema import expected_files


def shard_entry(number: int, version: int) -> dict[str, Any]:
    """The entry of a shard in a manifest of a version of the format."""
    name = f"{number:05d}"
    files = {
        file: {"bytes": 1000 * number + place, "sha256": hashlib.sha256(file.encode()).hexdigest()}
        for place, file in enumerate(sorted(expected_files(name, version)))
    }
    entry = {"name": name, "samples": number + 1, "pictures": 2 * number, "files": files}
    return entry | {"media": 3 * number} if version > 2 else entry
