"""Plots the recorded curves of the runs of the comparison, and writes them as a table."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = list[tuple[float, float]]
"""(step, value) in the order of the steps."""

COLOURS = ("#c0392b", "#1f6fb2", "#b7791f", "#6b7280")
WIDTH, HEIGHT, LEFT, TOP, GAP, ROW = 330, 210, 44, 62, 16, 310


@dataclass(frozen=True)
class Recorded:
    """The curves of a run.

    Args:
        name: of the way to start.
        clip_grad: norm to which gradients were clipped; 0 for no clipping.
        total, keys, to_clip: norms of the gradient: of all parameters, of the new keys, and before the final clipping.
        loss, text: loss of the training packs of each step, and of held-out text.
    """

    name: str
    clip_grad: float
    total: Curve
    keys: Curve
    to_clip: Curve
    loss: Curve
    text: Curve

    @classmethod
    def read(cls, name: str, clip_grad: float, directory: Path) -> "Recorded":
        """Reads the files that a run wrote."""
        norms = [json.loads(line) for line in (directory / "norms.jsonl").read_text().splitlines()]
        events = EventAccumulator(str(directory), size_guidance={"scalars": 0}).Reload()
        loss, text = (
            [(event.step, event.value) for event in events.Scalars(tag)] for tag in ("lm loss", "lm loss validation")
        )
        of = {kind: [(n + 1, record[kind]) for n, record in enumerate(norms)] for kind in ("total", "keys", "to_clip")}
        return cls(name, clip_grad, **of, loss=loss, text=list(dict(text).items()))


def smooth(curve: Curve, steps: int = 5) -> Curve:
    """Running means over the last ``steps`` steps."""
    values = [value for _, value in curve]
    means = [sum(values[max(0, n - steps + 1) : n + 1]) / min(n + 1, steps) for n in range(len(values))]
    return [(step, mean) for (step, _), mean in zip(curve, means, strict=True)]


def table(runs: Sequence[Recorded]) -> str:
    """A Markdown table of the gradient of the first step, the clipping, and the losses at some steps."""
    lines = [
        "| start | gradient norm of step 1 | without the new keys | clip factor of step 1 | steps clipped below 0.1 | "
        "training loss at 5 | at 20 | at 50 | at 200 | text loss at 10 | at 50 | at 200 |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        loss, text = dict(smooth(run.loss)), dict(run.text)
        factors = [min(1, run.clip_grad / norm) if run.clip_grad else 1 for _, norm in run.to_clip]
        (_, total), (_, keys) = run.total[0], run.keys[0]
        cells = [
            run.name,
            f"{total:,.1f}",
            f"{math.sqrt(total**2 - keys**2):,.1f}",
            f"{factors[0]:.2g}",
            f"{sum(factor < 0.1 for factor in factors)}",
            *(f"{loss[step]:.3f}" for step in (5, 20, 50, 200)),
            *(f"{text[step]:.3f}" for step in (10, 50, 200)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[tuple[str, Sequence[Recorded]]]) -> str:
    """A self-contained SVG with a row of panels for each title and its runs."""
    parts = [part for number, row in enumerate(rows) for part in _row(number * ROW, *row)]
    width, height = 3 * WIDTH + 2 * GAP + 10, len(rows) * ROW
    style = "text{font:12px sans-serif;fill:#333}path{fill:none;stroke-width:1.4}.grid{stroke:#ddd;stroke-width:1}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">'
        f'<style>{style}</style><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _row(top: int, title: str, runs: Sequence[Recorded]) -> list[str]:
    """Panels for gradient norm, training loss and held-out text loss, under the title and the names of the runs."""
    panels = [
        ("gradient norm, before it is clipped to 1", [run.to_clip for run in runs], [10.0**n for n in range(-1, 5)]),
        ("loss of training packs, mean of 5 steps", [smooth(run.loss) for run in runs], [0.5, 0.7, 1, 1.5, 2, 3]),
        ("loss of held-out texts", [run.text for run in runs], [0.6, 0.65, 0.7, 0.8, 0.9, 1.1]),
    ]
    parts = [f'<text x="{LEFT}" y="{top + 18}" style="font-weight:bold">{escape(title)}</text>']
    for number, run in enumerate(runs):
        x = LEFT + 300 + number * 170
        parts.append(f'<path stroke="{COLOURS[number]}" d="M{x} {top + 14}h22"/>')
        parts.append(f'<text x="{x + 28}" y="{top + 18}">{escape(run.name.split(",")[0])}</text>')
    for number, panel in enumerate(panels):
        parts.append(_panel(number * (WIDTH + GAP), top + TOP, *panel))
    return parts


def _panel(left: int, top: int, title: str, curves: Sequence[Curve], ticks: Sequence[float]) -> str:
    """A panel with a logarithmic vertical axis."""
    values = [value for curve in curves for _, value in curve]
    low, high = math.log(min(values)) - 0.03, math.log(max(values)) + 0.03
    last = max(curve[-1][0] for curve in curves)

    def place(step: float, value: float) -> tuple[float, float]:
        x = left + LEFT + (WIDTH - LEFT) * step / last
        return round(x, 1), round(top + HEIGHT * (high - math.log(value)) / (high - low), 1)

    parts = [f'<text x="{left + LEFT}" y="{top - 12}">{escape(title)}</text>']
    for tick in ticks:
        if low <= math.log(tick) <= high:
            _, y = place(0, tick)
            parts.append(f'<path class="grid" d="M{left + LEFT} {y}H{left + WIDTH}"/>')
            parts.append(f'<text x="{left + LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for step in (0, 50, 100, 150, 200):
        x, _ = place(step, values[0])
        parts.append(f'<text x="{x}" y="{top + HEIGHT + 18}" text-anchor="middle">{step}</text>')
    for colour, curve in zip(COLOURS, curves, strict=False):
        points = " ".join("{},{}".format(*place(*point)) for point in curve)
        parts.append(f'<path stroke="{colour}" d="M{points}"/>')
    return "".join(parts)
