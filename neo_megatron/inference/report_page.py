"""The HTML page of an evaluation, with scores and worst answers; it needs no other files and no network."""

import random
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from html import escape
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from neo_megatron.data.image import decode
from neo_megatron.data.memory_limit import limited_memory
from neo_megatron.data.prepare.stored_file import image_bytes
from neo_megatron.data.tags import IMAGE_TAG, split_tags
from neo_megatron.errors import RejectedSample
from neo_megatron.inference.evaluation import Evaluation, Scores
from neo_megatron.inspection.images import ShownImage, jpeg_addresses
from neo_megatron.inspection.page import STYLE, figure, rejects_table, template
from neo_megatron.inspection.statistics import EXAMPLES
from neo_megatron.inspection.token_text import visible

CASES = 100
IMAGES_PER_CASE = 4
IMAGE_SIDE = 480  # pixels


def page(evaluation: Evaluation, model: str, cases: int = CASES) -> str:
    """The complete page as HTML.

    Args:
        model: its name on the page.
        cases: how many answers are shown at most.
    """
    total = evaluation.total
    wrong = [line for line in evaluation.lines if not line["exact_match"]]
    shown = worst_cases(wrong, cases)
    examples: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for entry in evaluation.rejects:
        examples[entry["kind"]] += [entry] if len(examples[entry["kind"]]) < EXAMPLES else []
    return template(Path(__file__).with_name("report_page.html")).substitute(
        style=STYLE.read_text(encoding="utf-8"),
        model=escape(model),
        exact_match=f"{total.exact_match:.1%}",
        questions=f"{total.questions:,}",
        anls=f"{total.anls:.3f}",
        figures="\n".join(_figures(evaluation, len(wrong))),
        rows="\n".join(_row(name, scores) for name, scores in evaluation.data_sets.items()),
        cases_text=_cases_text(len(shown), len(wrong)),
        cases="\n".join(_cases(shown)),
        rejects=rejects_table(Counter(entry["kind"] for entry in evaluation.rejects), examples),
    )


def worst_cases(wrong: Sequence[dict[str, Any]], cases: int) -> list[dict[str, Any]]:
    """The answers of lowest ANLS; ties are drawn, deterministically."""
    return sorted(random.Random(0).sample(wrong, len(wrong)), key=lambda line: line["anls"])[:cases]


def _figures(evaluation: Evaluation, wrong: int) -> list[str]:
    total = evaluation.total
    return [
        figure(f"{total.questions:,}", "questions"),
        figure(f"{total.questions - wrong:,}", "answered exactly"),
        figure(f"{sum(0 < line['anls'] < 1 for line in evaluation.lines):,}", "answered nearly, ANLS between 0 and 1"),
        figure(f"{total.cut:,}", "answers cut at the limit of tokens"),
        figure(f"{len(evaluation.rejects):,}", "samples rejected, not asked"),
    ]


def _row(name: str, scores: Scores) -> str:
    bars = "".join(f'<div class="score" style="width:{part:.2%}"></div>' for part in (scores.exact_match, scores.anls))
    return (
        f'<tr><td>{escape(name)}</td><td class="number">{scores.questions:,}</td>'
        f'<td class="number">{scores.exact_match:.1%}</td><td class="number">{scores.anls:.3f}</td>'
        f'<td class="bars">{bars}</td></tr>'
    )


def _cases_text(shown: int, wrong: int) -> str:
    if not wrong:
        return "No answer was wrong."
    if shown == wrong:
        return f"All {wrong:,} answers that were not exactly right, the lowest ANLS first."
    return f"{shown:,} of {wrong:,} answers that were not exactly right, of the lowest ANLS."


def _cases(lines: Sequence[dict[str, Any]]) -> list[str]:
    """All cards; their images share one limit of bytes."""
    images = [[thumbnail(path) for path in line["pictures"][:IMAGES_PER_CASE]] for line in lines]
    found = [ShownImage(pixels, 0) for of_line in images for pixels in of_line if isinstance(pixels, np.ndarray)]
    addresses = iter(jpeg_addresses(found))
    cards = []
    for line, of_line in zip(lines, images, strict=True):
        parts = [
            f'<img alt="an image of the question" src="{next(addresses)}">'
            if isinstance(pixels, np.ndarray)
            else f"<small>{escape(pixels)}</small>"
            for pixels in of_line
        ]
        more = len(line["pictures"]) - len(of_line)
        parts += [f"<small>and {more} more images</small>"] if more else []
        cards.append(_card(line, "".join(parts)))
    return cards


def _card(line: dict[str, Any], images: str) -> str:
    said = escape(visible(line["prediction"])) or "(nothing)"
    cut = "" if line["finished"] else " … (cut)"
    right = " · ".join(dict.fromkeys(escape(visible(reference)) for reference in line["references"]))
    names = ", ".join(PurePath(path).name for path in line["pictures"][:IMAGES_PER_CASE])
    return (
        f'<div class="case">{images}<p>{question_text(line)}</p><p class="said">{said}{cut}</p>'
        f"<p>right: {right}</p><small>ANLS {line['anls']:.2f} · {place_text(line)}"
        f"{' · ' + escape(names) if names else ''}</small></div>"
    )


def question_text(line: dict[str, Any]) -> str:
    """The question of a line as HTML, without the tags of its images."""
    pieces = enumerate(split_tags(line["question"]))
    question = "".join(piece for number, piece in pieces if number % 2 == 0 or piece != IMAGE_TAG).strip()
    return escape(visible(question))


def place_text(line: dict[str, Any]) -> str:
    """The place of a line's question in the data, as HTML."""
    place = f"{line['data_set']}: {PurePath(line['file']).name}, record {line['record']:,}"
    place += "" if line["element"] is None else f", sample {line['element']}"
    return f"{escape(place)}, turn {line['turn']}"


def thumbnail(path: str) -> np.ndarray | str:
    """A thumbnail of an image, or why it cannot be shown: the file may be gone by now."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            with limited_memory():
                image = decode(image_bytes(path), path)
    except RejectedSample as rejected:
        return rejected.sentence
    image.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    return np.asarray(image)
