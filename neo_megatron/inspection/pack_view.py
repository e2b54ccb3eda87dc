"""HTML of a pack as the model sees it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import PurePath
from typing import Any

import numpy as np

from neo_megatron.inspection.charts import positions, runs, strip
from neo_megatron.inspection.images import ShownImage, images_of, jpeg_addresses, png_address
from neo_megatron.inspection.mask_image import mask_levels
from neo_megatron.inspection.token_text import Decode, token_texts, visible

KINDS = ("padding", "other", "trained", "image")
PADDING, OTHER, TRAINED, IMAGE = range(len(KINDS))
MASK_SIDE = 512
_MASK_COLOURS = ((0, 0, 0, 0), (47, 111, 178, 120), (47, 111, 178, 255))


@dataclass(frozen=True)
class Origin:
    """The source of a document of a pack."""

    source: str
    annotations: str
    record: int


@dataclass(frozen=True)
class Pack:
    """An item of `PackDataset` as arrays, [T] each but ``patches``; ``weight`` belongs to the token to predict."""

    tokens: np.ndarray
    positions: np.ndarray
    document: np.ndarray
    image: np.ndarray
    kinds: np.ndarray
    weight: np.ndarray
    patches: np.ndarray
    broken: Sequence[str]

    @classmethod
    def of_item(cls, item: dict[str, Any]) -> "Pack":
        document, image = item["document"].numpy(), item["image"].numpy()
        kinds = np.where(document < 0, PADDING, np.where(image >= 0, IMAGE, OTHER))
        weight = np.zeros(len(document), np.float32)
        said = item["target_index"].numpy() + 1
        kinds[said] = TRAINED
        weight[said] = item["target_weight"].numpy()
        tokens, places, patches = (item[key].numpy() for key in ("tokens", "positions_thw", "patches"))
        return cls(tokens, places, document, image, kinds, weight, patches, item["broken"])

    def count(self, kind: int) -> int:
        return int((self.kinds == kind).sum())


def pack_parts(pack: Pack, origins: Sequence[Origin], decode: Decode | None) -> dict[str, str]:
    """The parts of the page that show a pack, keyed by their names in the template."""
    images = images_of(pack.image, pack.positions, pack.patches)
    figures = [_image(*pair, number) for number, pair in enumerate(zip(images, jpeg_addresses(images), strict=True))]
    texts = token_texts(pack.tokens.tolist(), decode)
    documents = [
        _document(pack, start, end, origins[number], texts, figures)
        for start, end, number in runs(pack.document)
        if number >= 0
    ]
    levels = mask_levels(pack.document, pack.image, MASK_SIDE)
    return {
        "strip": strip(pack.kinds, pack.document, KINDS),
        "positions": positions(pack.positions, pack.document, pack.image),
        "mask": png_address(levels, _MASK_COLOURS),
        "mask_block": str(-(-len(pack.document) // len(levels))),
        "documents": "\n".join(documents) + _padding(pack),
        "broken": "".join(f'<p class="broken">{escape(sentence)}</p>' for sentence in pack.broken),
        "token_facts": _token_facts(pack, images, decode is not None),
    }


def _document(pack: Pack, start: int, end: int, origin: Origin, texts: Sequence[str], figures: Sequence[str]) -> str:
    number, trained = int(pack.document[start]), pack.kinds[start:end] == TRAINED
    weights = pack.weight[start:end][trained]
    facts = f"{end - start:,} tokens, {int(trained.sum()):,} trained on"
    facts += f", each weighing {weights[0]:.4g}" if len(weights) else ""
    where = f"{escape(PurePath(origin.annotations).name)}, record {origin.record:,}"
    body, place = [], start
    while place < end:
        if pack.image[place] >= 0:
            body.append(figures[pack.image[place]])
            place += int((pack.image[start:end] == pack.image[place]).sum())
            continue
        kind = " class=t" if pack.kinds[place] == TRAINED else ""
        shown = f" n={place}>{escape(visible(texts[place]))}" if texts[place] else f" n={place} part>·"
        body.append(f"<i{kind}{shown}</i>")
        place += 1
    return (
        f'<section class="document" id="document-{number}"><h3>{number + 1} <span>{escape(origin.source)}</span></h3>'
        f'<p class="soft" title="{escape(origin.annotations)}">{where} · {facts}</p>'
        f'<div class="tokens">{"".join(body)}</div></section>'
    )


def _image(image: ShownImage, address: str, number: int) -> str:
    height, width = image.pixels.shape[:2]
    caption = f"{image.rows} × {image.columns} = {image.rows * image.columns:,} tokens, {width} × {height} pixels"
    return (
        f'<span class="image">'
        f'<span class="frame" n={image.first_token} rows={image.rows} columns={image.columns}>'
        f'<img alt="image {number + 1} of the pack" width="{width}" height="{height}" src="{address}"><b></b></span>'
        f"<small>{caption}</small></span>"
    )


def _padding(pack: Pack) -> str:
    count = pack.count(PADDING)
    return f'<section class="document padding"><p>padding: {count:,}</p></section>' if count else ""


def _token_facts(pack: Pack, images: Sequence[ShownImage], has_text: bool) -> str:
    """Facts for the tooltip of every token, as JSON: numbers only, so that no text of the data is in a script."""
    facts = {
        "id": pack.tokens.tolist(),
        "t": pack.positions[:, 0].tolist(),
        "documents": [[start, number] for start, _, number in runs(pack.document)],
        "images": [image.first_token for image in images],
        "weights": [[start, end, float(f"{weight:.4g}")] for start, end, weight in _weight_runs(pack)],
        "text": has_text,
    }
    return json.dumps(facts, separators=(",", ":"))


def _weight_runs(pack: Pack) -> list[tuple[int, int, float]]:
    """(start, end, weight) of stretches of trained tokens of one weight."""
    trained = pack.kinds == TRAINED
    stretches = runs(np.where(trained, pack.document, -1))
    return [(start, end, float(pack.weight[start])) for start, end, number in stretches if number >= 0]
