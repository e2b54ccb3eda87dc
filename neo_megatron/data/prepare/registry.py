"""Reads a registry of data sets: the annotation files of each, its image root, and how much of it is used.

A registry is a YAML file; relative paths in it count from its own directory:

    llava_pretrain:
      annotation_path: llava/blip_laion_cc_sbu_558k.json   # a file, a glob or a directory, or an address of one
      data_path: llava/images        # the image root, joined to paths in records; without it, paths are complete
      follow_links: true             # trust links in data_path that lead outside of it; false by default
      schema: messages               # the form of the records; recognised from the first ones by default
      columns: {messages: dialog}    # optional: key of the records for a field of the schema
      image_placeholder: "[IMG]"     # optional: text that is the place of an image
    captions:
      annotation_path: captions
      schema: caption
      caption_prompts: prompts.txt   # optional: in place of --caption-prompts
    spatial:
      annotation_path: spatial.jsonl
      min_pixels: 691200             # optional, in place of the flags: min_pixels, max_pixels, video_fps, max_frames,
      max_pixels: 691200             # video_text, video_min_pixels, video_max_pixels and max_document_tokens
    my_data:
      annotation_path: my_data.jsonl
      transform: my_package.my_module:my_function   # in place of a schema

A meta file of InternVL (`internvl_meta`) is read too.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from neo_megatron.data.config import MediaOptions, PreprocessConfig
from neo_megatron.data.manifest_schema import check_media
from neo_megatron.data.prepare.annotation_files import check_annotation_file
from neo_megatron.data.prepare.input_files import annotation_files
from neo_megatron.data.prepare.internvl_meta import entries_of_meta, is_meta
from neo_megatron.data.prepare.schemas.options import REGISTRY_KEYS, SchemaOptions, registry_options
from neo_megatron.errors import DataError
from neo_megatron.paths import Kind, Wanted, WrongPath, check_path, wrong_kind
from neo_megatron.storage.base import is_remote
from neo_megatron.storage.open import concurrently, read_source, source_state
from neo_megatron.storage.source_files import MissingObject

_MEDIA_KEYS = tuple(field.name for field in fields(MediaOptions))
_OPTIONAL_KEYS = ("data_path", "follow_links", *REGISTRY_KEYS, *_MEDIA_KEYS)
_KEYS = {"annotation_path", *_OPTIONAL_KEYS}
_MAX_REGISTRY_BYTES = 64 << 20
_MERGE = "tag:yaml.org,2002:merge"  # `<<: *base` may occur several times


@dataclass(frozen=True)
class Source:
    """One annotation file of a run; the files of a data set have one name and follow each other.

    Args:
        name: of the data set: part of the key of the draw, so that the same records are drawn whatever the data set is
            mixed with.
        annotations: path or address of the file, of any `FileKind`.
        image_root: path or address, joined to the paths of images, which must not leave it; "" if they are complete.
        share: how often a record is used on average; 1/2 takes half of the records, 2 takes all of them twice.
        follow_links: links in the root may lead outside of it.
        schema: the form of its records.
        media: settings of images and videos of its own.
        version: of an object, when the source was made: readers end when it has another one. "" for a local file.

    Raises:
        WrongPath: a path does not exist or is of another kind.
        DataError: the annotation file is not read, or JSON that is not what its name says.
    """

    name: str
    annotations: str
    image_root: str = ""
    share: Fraction = Fraction(1)
    follow_links: bool = False
    schema: SchemaOptions = SchemaOptions()
    media: MediaOptions = MediaOptions()
    version: str = ""

    def __post_init__(self) -> None:
        if self.version:  # a copy of a source that was checked
            return
        check_path(self.annotations, Wanted.ANNOTATIONS, f"data set {self.name}:")
        if is_remote(self.annotations):
            object.__setattr__(self, "version", _version(self.annotations, f"data set {self.name}:"))
        check_annotation_file(str(self.annotations))
        if self.image_root:
            check_path(self.image_root, Wanted.IMAGE_ROOT, f"data set {self.name}: image root")
        if is_remote(self.image_root) and self.follow_links:
            raise DataError(
                f"data set {self.name}: the image root {self.image_root} is object storage, which has no links; leave "
                "out --follow-links (follow_links: true in a registry)"
            )

    def settings(self, of_run: PreprocessConfig) -> PreprocessConfig:
        """The settings of a run with those that the data set has of its own.

        Raises:
            DataError: they do not fit each other.
        """
        own = self.media.entry()
        try:
            return replace(of_run, **own)
        except DataError as error:
            given = ", ".join(f"{name} {value}" for name, value in own.items())
            raise DataError(f"data set {self.name}, which has {given} in place of the flags: {error}") from error


def _version(address: str, where: str) -> str:
    try:
        return source_state(address).version
    except MissingObject as error:
        raise WrongPath(f"{where} {wrong_kind(address, Kind.MISSING, Wanted.ANNOTATIONS)}") from error


def sources_of_files(files: Sequence[str], **fields: Any) -> list[Source]:
    """The sources of the files of one data set, with the same other fields; objects are checked at the same time.

    Raises:
        WrongPath, DataError: as `Source`.
    """
    return concurrently(lambda file: Source(annotations=file, **fields), files)


def data_list(
    names: Sequence[str], registry: str | Path = "registry.yaml", shared: SchemaOptions | None = None
) -> list[Source]:
    """The sources of names such as ``"llava_pretrain"`` or ``"llava_pretrain%12.5"`` (percent, any above 0).

    Args:
        names: of data sets, each with its share.
        registry: the file.
        shared: its ``prompts`` and ``max_document_tokens`` are those of data sets that have none of their own.

    Raises:
        DataError: a name is not in the registry, a percentage is not valid, or the registry has another form.
    """
    entries = _read(str(registry))
    folder = str(registry).rpartition("/")[0] if is_remote(registry) else Path(registry).parent
    sources: list[Source] = []
    for text in names:
        name, share = split_share(text)
        if any(source.name == name for source in sources):
            raise DataError(
                f"data set {name} is named twice; name it once, with the sum of its shares: {name}%200 uses it twice"
            )
        if name not in entries:
            raise DataError(
                f"data set {name} is not in {registry}; add it there, or choose from: {', '.join(sorted(entries))}"
            )
        entry, where = entries[name], f"data set {name} in {registry}"
        root = entry.get("data_path") or ""
        sources += sources_of_files(
            annotation_files(_resolved(folder, entry["annotation_path"]), f"data set {name}:"),
            name=name,
            image_root=_resolved(folder, root) if root else "",
            share=share * entry.get("repeat_time", 1),
            follow_links=entry.get("follow_links", False),
            schema=registry_options(entry, where, partial(_resolved, folder), shared or SchemaOptions()),
            media=_media(entry, where),
        )
    return sources


def _resolved(folder: str | Path, path: str) -> str:
    """A path of a registry, which may be relative to its directory; absolute paths and addresses stay as they are."""
    if is_remote(path) or os.path.isabs(path):
        return path
    return f"{folder}/{path}" if is_remote(folder) else str(Path(folder) / path)


class _UniqueKeyLoader(yaml.SafeLoader):
    """Rejects a mapping in which a key occurs twice; YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode) and key_node.tag != _MERGE:
                key, line = self.construct_object(key_node), key_node.start_mark.line + 1
                if key in lines:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key!r} is in line {lines[key]} and again in line {line}; rename or remove one"
                    )
                lines[key] = line
        return super().construct_mapping(node, deep)


def _read(registry: str) -> dict[str, dict[str, Any]]:
    check_path(registry, Wanted.REGISTRY, "the registry")
    try:
        content = read_source(registry, _MAX_REGISTRY_BYTES)
    except MissingObject as error:
        raise WrongPath(f"the registry {wrong_kind(registry, Kind.MISSING, Wanted.REGISTRY)}") from error
    if len(content) > _MAX_REGISTRY_BYTES:
        raise DataError(f"the registry {registry} has over {_MAX_REGISTRY_BYTES >> 20} MiB; name a file of data sets")
    try:
        entries = yaml.load(content.decode(), _UniqueKeyLoader)  # noqa: S506 - a subclass of the safe loader
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"the registry {registry} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise DataError(f"the registry {registry} must map names of data sets to annotation_path and data_path")
    known = _KEYS
    if is_meta(entries):
        entries, known = entries_of_meta(entries, registry), _KEYS | {"repeat_time"}
    for name, entry in entries.items():
        keys = set(entry) if isinstance(entry, dict) else set()
        if "annotation_path" not in keys or keys - known:
            raise DataError(
                f"data set {name} in {registry} must have annotation_path and may have "
                f"{', '.join(_OPTIONAL_KEYS[:-1])} and {_OPTIONAL_KEYS[-1]}; correct its keys"
            )
        if not isinstance(entry["annotation_path"], str) or not isinstance(entry.get("data_path") or "", str):
            raise DataError(f"data set {name} in {registry}: annotation_path and data_path must be strings")
        if not isinstance(entry.get("follow_links", False), bool):
            raise DataError(f"data set {name} in {registry}: follow_links must be true or false")
        if not isinstance(name, str) or "%" in name:
            raise DataError(f"the name {name} in {registry} must be a string without %, which starts a percentage")
    return entries


def _media(entry: Mapping[str, Any], where: str) -> MediaOptions:
    own = {key: entry[key] for key in _MEDIA_KEYS if entry.get(key) is not None}
    try:
        check_media(own)
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    return MediaOptions(**own)


def split_share(text: str) -> tuple[str, Fraction]:
    """Splits ``"name%12.5"`` into ("name", 1/8); the share of a name alone is 1.

    Raises:
        DataError: the percentage is not a number above 0.
    """
    name, percent, share = text.rpartition("%")
    if not percent:
        return text, Fraction(1)
    try:
        fraction = Fraction(share) / 100
    except (ValueError, ZeroDivisionError):
        fraction = Fraction(0)
    if fraction <= 0:
        raise DataError(f"{text}: what follows % must be a percentage above 0, such as 50, 12.5 or 200")
    return name, fraction


def split_path_share(text: str) -> tuple[str, Fraction]:
    """As :func:`split_share`, for a path that may have a % itself: one that exists as it is written has no share."""
    in_a_directory = "/" in text.rpartition("%")[2]
    return (text, Fraction(1)) if in_a_directory or Path(text).exists() else split_share(text)
