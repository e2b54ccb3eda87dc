"""How the records of a data set are read: its schema, the names of its columns, placeholders and transform."""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neo_megatron.data.manifest_schema import MAX_SEQUENCE_LENGTH
from neo_megatron.data.tags import IMAGE_TAG, VIDEO_TAG
from neo_megatron.errors import DataError
from neo_megatron.storage.open import read_source

AUTO, NEO = "auto", "neo"
# The shortest packs of the published training stages: a piece of this length fits into all of them.
MAX_DOCUMENT_TOKENS = 8192
_MAX_PROMPTS_BYTES = 1 << 24
_MAX_CHARACTERS = 1000
_TEXT_KEYS = ("schema", "image_placeholder", "transform", "caption_prompts")
REGISTRY_KEYS = (*_TEXT_KEYS, "columns", "max_document_tokens")


@dataclass(frozen=True)
class SchemaOptions:
    """How the records of one data set become records of the published form.

    Args:
        name: of the schema; "auto" recognises it from the first records.
        columns: (our name of a field, the key of the records that holds it).
        image_placeholder: text in the turns of users that is the place of an image; "" for the tag ``<image>``.
        transform: ``package.module:function`` that is used in place of a schema; "" for none.
        transform_sha256: of the source file of the function, once it was found.
        prompts: one of them asks for each caption; without any, a caption is a document.
        max_document_tokens: a longer document is split.

    Raises:
        DataError: a value cannot be used; the text names the flag.
    """

    name: str = AUTO
    columns: tuple[tuple[str, str], ...] = ()
    image_placeholder: str = ""
    transform: str = ""
    transform_sha256: str = ""
    prompts: tuple[str, ...] = ()
    max_document_tokens: int = MAX_DOCUMENT_TOKENS

    def __post_init__(self) -> None:
        if not 2 <= self.max_document_tokens <= MAX_SEQUENCE_LENGTH:
            raise DataError(
                f"--max-document-tokens must be from 2 to {MAX_SEQUENCE_LENGTH}, not {self.max_document_tokens}"
            )
        texts = (self.name, self.image_placeholder, self.transform, *(text for pair in self.columns for text in pair))
        if long := next((text for text in texts if len(text) > _MAX_CHARACTERS), None):
            raise DataError(f"{long[:40]!r}... has more than {_MAX_CHARACTERS} characters; give a shorter name")
        if any(tag in self.image_placeholder for tag in (IMAGE_TAG, VIDEO_TAG)):
            raise DataError(
                f"--image-placeholder {self.image_placeholder} has a tag of this project, which needs no option; "
                "leave the option out"
            )
        if len({ours for ours, _ in self.columns}) < len(self.columns):
            raise DataError("--columns names a field twice; name each field once")
        if self.transform and (self.name not in (AUTO, NEO) or self.columns or self.image_placeholder):
            raise DataError(
                f"--transform {self.transform} returns records of the published form; leave out --schema, --columns "
                "and --image-placeholder (in a registry: schema, columns and image_placeholder)"
            )

    def entry(self) -> dict[str, Any]:
        """All that decides the bytes of shards, for its source in a manifest; empty for the published form."""
        if self in (SchemaOptions(), SchemaOptions(NEO)):
            return {}
        prompts = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest() if self.prompts else ""
        found = {
            "schema": self.name,
            "columns": dict(self.columns),
            "image_placeholder": self.image_placeholder,
            "transform": self.transform,
            "transform_sha256": self.transform_sha256,
            "caption_prompts_sha256": prompts,
            "max_document_tokens": self.max_document_tokens,
        }
        return {key: value for key, value in found.items() if value}


def registry_options(
    entry: Mapping[str, Any], where: str, resolved: Callable[[str], str], shared: SchemaOptions
) -> SchemaOptions:
    """The options of an entry of a registry.

    Args:
        entry: `REGISTRY_KEYS`, each optional, and other keys.
        where: the data set and the registry, for messages.
        resolved: a path in the registry -> the path or address from here.
        shared: its prompts and its length of documents are used where the entry has none.

    Raises:
        DataError: a value is of another type, or cannot be used.
    """
    found = {key: entry[key] for key in REGISTRY_KEYS if entry.get(key) is not None}
    columns = found.pop("columns", {})
    document_tokens = found.pop("max_document_tokens", shared.max_document_tokens)
    if not all(isinstance(value, str) for value in found.values()):
        raise DataError(f"{where}: {', '.join(_TEXT_KEYS[:-1])} and {_TEXT_KEYS[-1]} must be strings")
    if type(document_tokens) is not int:
        raise DataError(f"{where}: max_document_tokens must be an integer")
    if not isinstance(columns, dict) or not all(isinstance(text, str) for pair in columns.items() for text in pair):
        raise DataError(f"{where}: columns must map names of fields to keys of the records, such as text: caption_en")
    prompts = found.get("caption_prompts", "")
    if prompts and found.get("schema") != "caption":
        raise DataError(f"{where}: caption_prompts goes with schema: caption; add that, or leave it out")
    try:
        return SchemaOptions(
            found.get("schema", AUTO),
            tuple(columns.items()),
            found.get("image_placeholder", ""),
            found.get("transform", ""),
            prompts=read_prompts(resolved(prompts)) if prompts else shared.prompts,
            max_document_tokens=document_tokens,
        )
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def read_prompts(path: str | Path) -> tuple[str, ...]:
    """The prompts of a text file, one a line; blank lines are skipped.

    Raises:
        DataError: the file is too large, not UTF-8, has no prompts, or a prompt has a tag.
    """
    content = read_source(str(path), _MAX_PROMPTS_BYTES)
    if len(content) > _MAX_PROMPTS_BYTES:
        raise DataError(f"{path} has more than {_MAX_PROMPTS_BYTES >> 20} MiB; give a text file with one prompt a line")
    try:
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 ({error}); give a text file with one prompt a line") from error
    for number, line in enumerate(lines, start=1):
        if IMAGE_TAG in line or VIDEO_TAG in line:
            raise DataError(f"{path}, line {number}: the image stands in front of the prompt; remove the tag")
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise DataError(f"{path} has no prompts; write one prompt a line")
    return prompts
