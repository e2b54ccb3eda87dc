"""Writes the page of the ablations: curves and tables."""

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from arms import ABLATIONS, Ablation
from results import Run, table, verdicts

COLOURS = ("#2f6fb2", "#c2553a", "#2a8a5f", "#8a5fb5", "#a8801c")
WIDTH, HEIGHT, LEFT, BOTTOM, POINTS = 640, 260, 44, 30, 160
TICKS = [digit * 10.0**power for power in range(-5, 2) for digit in (1, 2, 5)]


def page(runs: dict[str, list[Run]], steps: int) -> str:
    """The complete page, as HTML.

    Args:
        runs: finished ones by the name of their arm.
        steps: of a run.
    """
    parts = [section(ablation, runs) for ablation in ABLATIONS if any(runs[arm.name] for arm in ablation.arms)]
    return Template((Path(__file__).parent / "page.html").read_text()).substitute(
        steps=f"{steps:,}", sections="\n".join(parts)
    )


def section(ablation: Ablation, runs: dict[str, list[Run]]) -> str:
    """One ablation: its curves, its table, and whether the published order holds."""
    arms = [(arm.name, runs[arm.name]) for arm in ablation.arms if runs[arm.name]]
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for (name, _), colour in zip(arms, COLOURS, strict=False)
    )
    heading, *rows = table(ablation, runs)
    parts = [
        f"<h2>{escape(ablation.question)}</h2>",
        f'<div class="legend">{legend}</div>',
        curves([mine for _, mine in arms]),
        _table(heading, rows),
    ]
    if ablation.published:
        parts.append(f"<p>Published: {escape(ablation.published)}. Here, in points of accuracy, seed by seed:</p>")
        parts.append(_table(["order", "difference", "this order"], verdicts(ablation, runs)))
    return "\n".join(parts)


def curves(arms: Sequence[Sequence[Run]]) -> str:
    """Training losses as SVG on a logarithmic axis: for each arm the mean of its seeds, and their range as a band."""
    bands = [_band(mine) for mine in arms]
    values = [value for band in bands for _, low, _, high in band for value in (low, high)]
    bottom, top = math.log(min(values)) - 0.05, math.log(max(values)) + 0.05
    last = max(band[-1][0] for band in bands)

    def place(step: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT) * step / last
        return f"{x:.1f},{(HEIGHT - BOTTOM) * (top - math.log(value)) / (top - bottom):.1f}"

    parts = []
    for tick in TICKS:
        if bottom <= math.log(tick) <= top:
            y = place(0, tick).split(",")[1]
            parts.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for step in (0, last // 2, last):
        x = place(step, values[0]).split(",")[0]
        anchor = "end" if step == last else "middle"
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 20}" text-anchor="{anchor}">{step:g}</text>')
    for band, colour in zip(bands, COLOURS, strict=False):
        outline = [place(step, high) for step, _, _, high in band]
        outline += [place(step, low) for step, low, _, _ in reversed(band)]
        parts.append(f'<polygon fill="{colour}" opacity="0.18" points="{" ".join(outline)}"/>')
        line = " ".join(place(step, middle) for step, _, middle, _ in band)
        parts.append(f'<polyline stroke="{colour}" points="{line}"/>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="training loss by step">{"".join(parts)}</svg>'


def _band(runs: Sequence[Run]) -> list[tuple[float, float, float, float]]:
    """(step, smallest, mean, largest) over seeds, each a mean of neighbouring steps."""
    length = min(len(run.curve) for run in runs)
    size = math.ceil(length / POINTS)
    band = []
    for start in range(0, length, size):
        part = range(start, min(start + size, length))
        means = [sum(run.curve[number][1] for number in part) / len(part) for run in runs]
        step = sum(runs[0].curve[number][0] for number in part) / len(part)
        band.append((step, min(means), sum(means) / len(means), max(means)))
    return band


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(heading, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
