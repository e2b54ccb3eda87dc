"""The page of a run that is followed: one HTML file that needs no other files and no network."""

import base64
from collections.abc import Collection, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from neo_megatron.follow.output import best_steps
from neo_megatron.inference.metrics import normalised, without_thinking
from neo_megatron.inference.report_page import place_text, question_text, thumbnail
from neo_megatron.inspection.charts import curves
from neo_megatron.inspection.images import ShownImage, jpeg_addresses, png_address
from neo_megatron.inspection.page import STYLE, template
from neo_megatron.inspection.token_text import visible

CHANGES = 60
TABLE_SETS = 4
"""Most data sets that have columns in the table; the charts have all."""
_HEAT = [(210, 40, 20, round(150 * level / 255)) for level in range(256)]

Line = dict[str, Any]
"""A line of ``answers.jsonl``."""


def page(
    run: str,
    rows: Sequence[Mapping[str, Any]],
    exported: Collection[int],
    answers: Sequence[Sequence[Line]],
    attention: Mapping[int, Sequence[Mapping[str, Any]]],
) -> str:
    """The complete page as HTML.

    Args:
        run: its name on the page.
        rows: the lines of ``scores.jsonl``, at least one.
        exported: steps whose export is kept.
        answers: of the last two steps, or of the only one.
        attention: the first step and the newest -> what `attention_maps` gave.
    """
    newest, steps = rows[-1], [row["step"] for row in rows]
    (best,) = best_steps(rows, 1)
    changed = changed_answers(*answers) if len(answers) > 1 else []
    names = list(newest["data_sets"])
    return template(Path(__file__).with_name("page.html")).substitute(
        style=STYLE.read_text(encoding="utf-8"),
        run=escape(visible(run)),
        exact_match=f"{newest['exact_match']:.1%}",
        newest=f"{newest['step']:,}",
        sets=f"{len(names):,} data set{'s' * (len(names) != 1)}",
        anls=f"{newest['anls']:.3f}",
        checkpoints=f"{len(rows):,} checkpoint{'s' * (len(rows) != 1)}",
        best=f"{best:,}",
        best_match=f"{max(row['exact_match'] for row in rows):.1%}",
        mean_chart=_chart(steps, rows, "mean over data sets"),
        set_charts=_set_charts(steps, rows, names),
        set_heads="".join(f'<th class="number">{escape(visible(name))}</th>' for name in _columns(names)),
        rows="\n".join(_row(row, names, exported, newest["step"], best) for row in reversed(rows)),
        lmms_eval=_lmms_eval(rows[-2:]),
        changes_text=_changes_text(len(changed), steps),
        changes="\n".join(_cards(changed[:CHANGES], steps[-2:])),
        maps_text=_maps_text(attention),
        maps="\n".join(_maps(attention)),
    )


def changed_answers(before: Sequence[Line], after: Sequence[Line]) -> list[tuple[Line, Line]]:
    """Pairs of different answers to the same question: first those that became wrong, then those that became right."""
    earlier = {_place(line): line for line in before}
    pairs = [(earlier[_place(line)], line) for line in after if _place(line) in earlier]
    pairs = [(old, new) for old, new in pairs if _plain(old["prediction"]) != _plain(new["prediction"])]
    return sorted(pairs, key=lambda pair: _KINDS.index((pair[0]["exact_match"], pair[1]["exact_match"])))


_KINDS = [(True, False), (False, True), (False, False), (True, True)]  # right before, right after


def _place(line: Line) -> tuple[Any, ...]:
    return tuple(line[key] for key in ("data_set", "file", "record", "element", "turn"))


def _plain(prediction: str) -> str:
    return normalised(without_thinking(prediction))


def _chart(steps: Sequence[int], scores: Sequence[Mapping[str, Any]], label: str) -> str:
    lines = {"near": [one["anls"] for one in scores], "match": [one["exact_match"] for one in scores]}
    return curves(steps, lines, f"exact match and ANLS over steps, {label}")


def _set_charts(steps: Sequence[int], rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """A chart for each data set where there are several; one alone is the mean."""
    if len(names) == 1:
        return ""
    charts = [
        f"<div><h3>{escape(visible(name))}</h3>{_chart(steps, [row['data_sets'][name] for row in rows], name)}</div>"
        for name in names
    ]
    return f'<div class="sets">{"".join(charts)}</div>'


def _lmms_eval(rows: Sequence[Mapping[str, Any]]) -> str:
    """The scores of lmms-eval at the last two steps, if there are any."""
    newest = rows[-1].get("lmms_eval", {})
    if not newest:
        return ""
    heads = "".join(f'<th class="number">step {row["step"]:,}</th>' for row in rows)
    lines = []
    for task, metrics in newest.items():
        for metric in metrics:
            values = [row.get("lmms_eval", {}).get(task, {}).get(metric) for row in rows]
            cells = "".join(f'<td class="number">{"" if value is None else f"{value:.4g}"}</td>' for value in values)
            lines.append(f"<tr><td>{escape(visible(task))}</td><td>{escape(visible(metric))}</td>{cells}</tr>")
    return f"<h2>lmms-eval</h2>\n<table><tr><th>task</th><th>metric</th>{heads}</tr>{''.join(lines)}</table>"


def _columns(names: Sequence[str]) -> Sequence[str]:
    return names if 1 < len(names) <= TABLE_SETS else []


def _row(row: Mapping[str, Any], names: Sequence[str], exported: Collection[int], newest: int, best: int) -> str:
    step = row["step"]
    cells = [row["exact_match"], row["anls"], *(row["data_sets"][name]["exact_match"] for name in _columns(names))]
    texts = [f"{value:.3f}" if number == 1 else f"{value:.1%}" for number, value in enumerate(cells)]
    numbers = "".join(f'<td class="number">{text}</td>' for text in texts)
    marks = [word for word, is_it in (("newest", step == newest), ("best", step == best)) if is_it]
    where = f"exports/step-{step}" if step in exported else "not kept"
    return (
        f"<tr{' class=newest' * (step == newest)}><td>{step:,}{' · ' * bool(marks)}{', '.join(marks)}</td>{numbers}"
        f"<td>{where}</td></tr>"
    )


def _changes_text(count: int, steps: Sequence[int]) -> str:
    if len(steps) == 1:
        return "There is one checkpoint yet: the next one is compared with it."
    between = f"from step {steps[-2]:,} to step {steps[-1]:,}"
    if not count:
        return f"No answer changed {between}."
    shown = f"The first {CHANGES:,} of {count:,}" if count > CHANGES else f"{count:,}"
    return f"{shown} that changed {between}: first those that became wrong, then those that became right, then others."


def _cards(pairs: Sequence[tuple[Line, Line]], steps: Sequence[int]) -> list[str]:
    """A card for each pair; their images share one limit of bytes."""
    images = [thumbnail(new["pictures"][0]) if new["pictures"] else "" for _, new in pairs]
    addresses = iter(jpeg_addresses([ShownImage(one, 0) for one in images if isinstance(one, np.ndarray)]))
    cards = []
    for (old, new), image in zip(pairs, images, strict=True):
        if isinstance(image, np.ndarray):
            shown = f'<img alt="the image of the question" src="{next(addresses)}">'
        else:
            shown = f"<small>{escape(image)}</small>" if image else ""
        more = len(new["pictures"]) - 1
        shown += f"<small>and {more:,} more images</small>" if more > 0 else ""
        said = "".join(
            f'<p><small>step {step:,}</small><span class="{"right" if line["exact_match"] else "wrong"}">'
            f"{_text(line['prediction'])}</span></p>"
            for step, line in zip(steps, (old, new), strict=True)
        )
        right = " · ".join(dict.fromkeys(escape(visible(reference)) for reference in new["references"]))
        cards.append(
            f'<div class="case">{shown}<p>{question_text(new)}</p>{said}<p>expected: {right}</p>'
            f"<small>{place_text(new)}</small></div>"
        )
    return cards


def _text(prediction: str) -> str:
    return escape(visible(prediction)) or "(nothing)"


def _maps_text(attention: Mapping[int, Sequence[Mapping[str, Any]]]) -> str:
    steps = sorted(attention)
    if not any(attention.values()):
        return "No question is about one image."
    which = f"step {steps[0]:,} and step {steps[-1]:,}" if len(steps) > 1 else f"step {steps[0]:,}"
    return (
        f"The same questions at {which}: red where the tokens of the answer look, as a mean over tokens, heads and "
        "layers; the strongest red is the largest value of a map. The share is that of all attention that goes to the "
        "image."
    )


def _maps(attention: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[str]:
    """A card for each sample, with a map for each step."""
    steps = sorted(attention)
    cards = []
    for of_steps in zip(*(attention[step] for step in steps), strict=False):
        maps = "".join(_map(step, one) for step, one in zip(steps, of_steps, strict=True))
        newest = of_steps[-1]
        right = " · ".join(dict.fromkeys(escape(visible(reference)) for reference in newest["references"]))
        cards.append(
            f'<div class="case"><p>{question_text(dict(newest))}</p><div class="pair">{maps}</div>'
            f"<p>expected: {right}</p><small>{escape(visible(newest['data_set']))}</small></div>"
        )
    return cards


def _map(step: int, sample: Mapping[str, Any]) -> str:
    levels = np.frombuffer(base64.b64decode(sample["levels"]), np.uint8).reshape(sample["grid"])
    return (
        f'<div><div class="map"><img alt="the image as the model reads it" src="{escape(sample["image"])}">'
        f'<img class="heat" alt="attention at step {step:,}" src="{png_address(levels, _HEAT)}"></div>'
        f"<p><small>step {step:,}, {sample['share']:.1%} to the image</small>{_text(sample['answer'])}</p></div>"
    )
