"""Tallies of the samples that preprocessing keeps: images, ignored keys, placeholders that stayed text."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from neo_megatron.data.prepare.record_keys import ignored_keys
from neo_megatron.data.prepare.records import Sample, blank_answer
from neo_megatron.data.rejects import place_of

# Keys may be made up for each record, so names beyond this number are counted together.
MAX_NAMES = 64
OTHERS = "(other names)"
_NAME_LENGTH = 80


@dataclass
class Noticed:
    """Tallies of kept samples, of a slice of records or of all slices together in their order.

    Args:
        with_images: samples with an image or a frame of a video.
        empty_answers: samples with a blank answer to train on.
        ignored_keys: samples by key that was not read, keys of turns as ``conversations[].key``.
        placeholders: by placeholder of another project: ``samples``; ``file``, ``record``, ``element`` of the first.
        surplus_tags: samples with more ``<image>`` tags than images, which stay text in layout u1.
    """

    with_images: int = 0
    empty_answers: int = 0
    ignored_keys: dict[str, int] = field(default_factory=dict)
    placeholders: dict[str, dict[str, Any]] = field(default_factory=dict)
    surplus_tags: int = 0

    def note(self, sample: Sample, written: object, images: Sequence[Any], place: dict[str, Any]) -> None:
        """Counts a kept sample; ``place`` is its ``file``, ``record`` and ``element``."""
        self.with_images += bool(images)
        self.empty_answers += blank_answer(sample) is not None
        self.surplus_tags += sample.surplus_tags > 0
        for key in ignored_keys(written):
            self._add_key(key[:_NAME_LENGTH], 1)
        if sample.placeholder:
            self._add_placeholder(sample.placeholder[:_NAME_LENGTH], {"samples": 1, **place})

    def add(self, later: "Noticed") -> None:
        """Adds the tallies of the next slice."""
        self.with_images += later.with_images
        self.empty_answers += later.empty_answers
        self.surplus_tags += later.surplus_tags
        for key, count in later.ignored_keys.items():
            self._add_key(key, count)
        for name, entry in later.placeholders.items():
            self._add_placeholder(name, entry)

    def counts(self) -> dict[str, Any]:
        """The entries of the manifest under ``counts``."""
        entries = asdict(self)
        return {
            "samples_with_images": entries["with_images"],
            "empty_answers": entries["empty_answers"],
            "ignored_keys": dict(sorted(entries["ignored_keys"].items())),
            "foreign_placeholders": dict(sorted(entries["placeholders"].items())),
            **({"surplus_tags": self.surplus_tags} if self.surplus_tags else {}),  # manifests of neo1_0 never have it
        }

    def sentences(self) -> list[str]:
        """Messages for the user about keys that were not read, and placeholders and tags that stay text."""
        lines = []
        if self.ignored_keys:
            named = ", ".join(f"{key!r} in {count}" for key, count in sorted(self.ignored_keys.items()))
            lines.append(f"ignored keys of samples kept, which nothing reads: {named}")
        if self.surplus_tags:
            lines.append(
                f"warning: {self.surplus_tags} samples have more <image> tags than images; the last tags of each stay "
                "text"
            )
        for name, found in sorted(self.placeholders.items()):
            where = place_of(found["file"], found["record"], found["element"])
            lines.append(
                f"warning: {name!r} stays text in {found['samples']} samples without <image> tags "
                f"(the first: {where}); if it is the place of an image, write <image> instead, or pass "
                "--image-placeholder"
            )
        return lines

    def _add_key(self, key: str, count: int) -> None:
        key = _name_within(key, self.ignored_keys)
        self.ignored_keys[key] = self.ignored_keys.get(key, 0) + count

    def _add_placeholder(self, name: str, entry: dict[str, Any]) -> None:
        name = _name_within(name, self.placeholders)
        known = self.placeholders.setdefault(name, {**entry, "samples": 0})
        known["samples"] += entry["samples"]


def _name_within(name: str, known: dict[str, Any]) -> str:
    return name if name in known or len(known) < MAX_NAMES else OTHERS
