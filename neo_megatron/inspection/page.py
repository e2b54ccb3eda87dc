"""Assembles the page: one HTML file that needs no other files and no network."""

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from neo_megatron.inspection.charts import histogram
from neo_megatron.inspection.pack_view import IMAGE, PADDING, TRAINED, Pack
from neo_megatron.inspection.statistics import SourceCounts, Statistics

_FOLDER = Path(__file__).parent
GENERATOR = b'<meta name="generator" content="neo_megatron">'
STYLE = _FOLDER / "style.css"


def page(title: str, pack: str, statistics: Statistics, manifest: dict[str, Any] | None, token_facts: str) -> str:
    """The complete page as HTML.

    Args:
        title: of the page.
        pack: the part that shows a pack; "" for a data set that is not packed.
        statistics: of the data set, or of an epoch of the packs.
        manifest: of the packs, if there are any.
        token_facts: JSON for the tooltips, "" without a pack.
    """
    script = ""
    if token_facts:
        script = (
            f'<script type="application/json" id="token-facts">{token_facts}</script>\n'
            f"<script>\n{(_FOLDER / 'page.js').read_text()}</script>"
        )
    return template(_FOLDER / "page.html").substitute(
        style=STYLE.read_text(encoding="utf-8"),
        title=escape(title),
        pack=pack,
        data_title="An epoch of these packs" if manifest else "The data set",
        data_text=_data_text(manifest),
        figures="\n".join(_figures(statistics, manifest)),
        length_text=_length_text(statistics.lengths),
        histogram=histogram(statistics.lengths, manifest["seq_length"] if manifest else None),
        source_rows="\n".join(_source_row(source, statistics.sources) for source in statistics.sources),
        rejects=rejects_table(statistics.rejected, statistics.examples),
        script=script,
    )


def pack_part(pack: Pack, parts: dict[str, str], number: int, epoch: int, seed: int) -> str:
    """The part of the page that shows a pack, from the result of `pack_parts`."""
    length, used = len(pack.tokens), len(pack.tokens) - pack.count(PADDING)
    documents, images = int(pack.document.max()) + 1, int(pack.image.max()) + 1
    block = int(parts["mask_block"])
    mask_text = "Every token is a point."
    if block > 1:
        mask_text = f"A point stands for {block} × {block} tokens: dark where all of them see, light where some do."
    trained, seen = pack.count(TRAINED), pack.count(IMAGE)
    return template(_FOLDER / "pack.html").substitute(
        parts,
        used=f"{used:,}",
        length=f"{length:,}",
        documents_text=f"{documents:,} conversation{'s' * (documents > 1)}",
        images_text=f"{images:,} image{'s' * (images != 1)}" if images else "no image",
        trained_text=f"{seen:,} tokens are images, {trained:,} are trained on."
        if images
        else f"{trained:,} are trained on.",
        number=number,
        epoch=epoch,
        seed=seed,
        mask_text=mask_text,
    )


def template(path: Path) -> Template:
    """Reads a template of this package."""
    return Template(path.read_text(encoding="utf-8"))


def _data_text(manifest: dict[str, Any] | None) -> str:
    if not manifest:
        return "Every sample once, as it is stored."
    return "Every sample as often as an epoch has it; another epoch has the same samples with other neighbours."


def figure(value: str, label: str) -> str:
    """A number with its label; both are HTML."""
    return f"<div><strong>{value}</strong>{label}</div>"


def _figures(statistics: Statistics, manifest: dict[str, Any] | None) -> list[str]:
    sources = statistics.sources
    tokens = sum(source.tokens for source in sources)
    totals = [
        figure(f"{sum(source.samples for source in sources):,}", "samples"),
        figure(f"{sum(source.images for source in sources):,}", "images"),
        figure(f"{tokens:,}", "tokens"),
        figure(_percent(sum(source.image_tokens for source in sources), tokens), "of them images"),
        figure(_percent(sum(source.trained_tokens for source in sources), tokens), "of them trained on"),
    ]
    if manifest:
        counts = manifest["counts"]
        room = counts["packs"] * manifest["seq_length"]
        totals.append(figure(f"{counts['packs']:,}", f"packs of {manifest['seq_length']:,} tokens"))
        totals.append(figure(f"{manifest['fill']:.2%}", f"filled; {room - counts['tokens']:,} tokens are padding"))
        if even := manifest["imbalance"]:
            for kind, drawn in even["drawn"].items():
                if not drawn:  # nothing of this kind to divide
                    continue
                text = f"largest over mean work of {even['ranks']} ranks, {escape(kind)}; {drawn:.3f} as drawn"
                totals.append(figure(f"{even['balanced'][kind]:.3f}", text))
    return totals


def _length_text(lengths: np.ndarray) -> str:
    samples, ends = int(lengths.sum()), np.cumsum(lengths)
    median, most = (int(np.searchsorted(ends, samples * share)) for share in (0.5, 0.95))
    mean = float(lengths @ np.arange(len(lengths))) / samples
    longest = int(np.flatnonzero(lengths)[-1])
    return (
        f"In tokens, on a logarithmic axis. Half of the samples have at most {median:,}, 95% at most {most:,}, the "
        f"longest has {longest:,}; the mean is {mean:,.0f}."
    )


def _source_row(source: SourceCounts, sources: Sequence[SourceCounts]) -> str:
    total = max(sum(other.tokens for other in sources), 1)
    largest = max(other.tokens for other in sources) or 1
    kinds = (("image", source.image_tokens), ("other", source.other_tokens), ("trained", source.trained_tokens))
    bars = "".join(
        f'<div style="width:{count / largest:.3%};background:var(--{kind})" title="{count:,}"></div>'
        for kind, count in kinds
    )
    return (
        f'<tr><td>{escape(source.name)}</td><td class="number">{source.samples:,}</td>'
        f'<td class="number narrow">{source.images:,}</td><td class="number">{source.tokens:,}</td>'
        f'<td class="number">{source.tokens / total:.1%}</td><td class="bars"><div class="share">{bars}</div></td></tr>'
    )


def rejects_table(rejected: Counter[str], examples: dict[str, list[dict[str, Any]]]) -> str:
    """Rejected samples by reason, with examples of each as in ``rejects.jsonl``."""
    if not rejected:
        return '<p class="soft">No sample was rejected.</p>'
    rows = []
    for reason, count in rejected.most_common():
        listed = "".join(
            f"<li>{escape(str(entry['file']))}, record {entry['record']}: {escape(str(entry['reason']))}</li>"
            for entry in examples.get(reason, [])
        )
        rows.append(f'<tr><td class="number">{count:,}</td><td>{escape(reason)}<ul>{listed}</ul></td></tr>')
    return (
        '<p class="soft">Rejected samples by reason, with the first few of each; all are in rejects.jsonl.</p>'
        f'<table><tr><th class="number">samples</th><th>reason</th></tr>{"".join(rows)}</table>'
    )


def _percent(part: int, total: int) -> str:
    return f"{part / max(total, 1):.1%}"
