"""Data sets by name: which annotation file, which root of pictures, and how much of it.

A registry is a YAML file; relative paths in it count from its own directory:

    llava_pretrain:
      annotation_path: llava/blip_laion_cc_sbu_558k.json
      data_path: llava/images        # joined to the paths of pictures; empty: the paths are complete
      follow_links: true             # trust links in data_path that lead outside it; false by default
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import yaml

from neo_megatron.data.errors import DataError


@dataclass(frozen=True)
class Source:
    """One annotation file of a run.

    Args:
        name: part of the key of the draw, so that a data set is drawn the same whatever it is mixed with.
        annotations: the JSON or JSONL file.
        image_root: joined to the paths of pictures, none of which may leave it; "" where the paths are complete.
        share: how often a record is used on average; 1/2 takes every second, 2 takes all of them twice.
        follow_links: links in the root may lead outside it.
    """

    name: str
    annotations: str
    image_root: str = ""
    share: Fraction = Fraction(1)
    follow_links: bool = False

    def __post_init__(self) -> None:
        if not Path(self.annotations).is_file():
            raise DataError(f"data set {self.name}: the annotation file {self.annotations} does not exist; correct it")
        if self.image_root and not Path(self.image_root).is_dir():
            raise DataError(f"data set {self.name}: the image root {self.image_root} is no directory; correct it")


def data_list(names: Sequence[str], registry: str | Path = "registry.yaml") -> list[Source]:
    """The sources behind names such as ``"llava_pretrain"`` or ``"llava_pretrain%12.5"`` (percent, any above 0).

    Raises:
        DataError: for a name that the registry lacks, a percentage that is none, or a registry of another form.
    """
    entries = _read(Path(registry))
    folder = Path(registry).parent
    sources = []
    for text in names:
        name, share = split_share(text)
        if name not in entries:
            raise DataError(f"data set {name} is not in {registry}, which holds: {', '.join(sorted(entries))}")
        entry = entries[name]
        root = entry.get("data_path") or ""
        sources.append(
            Source(
                name=name,
                annotations=str(folder / entry["annotation_path"]),
                image_root=str(folder / root) if root else "",
                share=share,
                follow_links=entry.get("follow_links", False),
            )
        )
    return sources


def _read(registry: Path) -> dict[str, dict[str, str]]:
    if not registry.is_file():
        raise DataError(f"the registry {registry} does not exist; name a YAML file of data sets")
    try:
        entries = yaml.safe_load(registry.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"the registry {registry} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise DataError(f"the registry {registry} must map names of data sets to annotation_path and data_path")
    for name, entry in entries.items():
        keys = set(entry) if isinstance(entry, dict) else set()
        if "annotation_path" not in keys or keys - {"annotation_path", "data_path", "follow_links"}:
            raise DataError(
                f"data set {name} in {registry} must have annotation_path; it may have data_path and follow_links"
            )
        if not isinstance(entry["annotation_path"], str) or not isinstance(entry.get("data_path") or "", str):
            raise DataError(f"data set {name} in {registry}: annotation_path and data_path must be texts")
        if not isinstance(entry.get("follow_links", False), bool):
            raise DataError(f"data set {name} in {registry}: follow_links must be true or false")
        if not isinstance(name, str) or "%" in name:
            raise DataError(f"the name {name} in {registry} must be a text without %, which starts a percentage")
    return entries


def split_share(text: str) -> tuple[str, Fraction]:
    """``"name%12.5"`` -> ("name", 1/8): percent, any above 0; the share of a name alone is 1."""
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
