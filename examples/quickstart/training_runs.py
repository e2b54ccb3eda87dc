"""Reads the TensorBoard files of training runs, and draws their curves as SVG."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

POINTS = 160
WIDTH, HEIGHT, LEFT, BOTTOM = 460, 250, 40, 34
DELTAS = ("permuted", "blank")
TICKS = [digit * 10.0**power for power in range(-5, 3) for digit in (1, 3)]

Curve = list[tuple[float, float]]
"""(step, value) in the order of the steps."""


@dataclass(frozen=True)
class TrainingRun:
    """A run of `pretrain_neo`.

    Args:
        name: heading of its curve.
        settings: Megatron's arguments, as text.
        loss, held_out: of the training packs of each step, and of held-out packs at each evaluation.
        deltas: at each evaluation the relative rise of the loss with images of other samples, and with blank ones.
    """

    name: str
    settings: dict[str, str]
    loss: Curve
    held_out: Curve
    deltas: tuple[Curve, Curve]

    @classmethod
    def read(cls, name: str, directory: Path) -> "TrainingRun":
        """Reads a `--tensorboard-dir`; 0 in `size_guidance` keeps every step."""
        events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        scalars = set(events.Tags()["scalars"])
        curves = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)] if tag in scalars else []
            for tag in ("lm loss", "lm loss validation", *(f"looking/delta-{name} validation" for name in DELTAS))
        }
        suffix = "/text_summary"
        settings = {
            tag.removesuffix(suffix): events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
            for tag in events.Tags()["tensors"]
            if tag.endswith(suffix)
        }
        loss, held_out, *deltas = curves.values()
        return cls(name, settings, loss, held_out, (deltas[0], deltas[1]))


def thinned(curve: Curve, points: int = POINTS) -> Curve:
    """At most ``points`` means, each over the same number of neighbouring steps."""
    size = math.ceil(len(curve) / points)
    parts = [curve[start : start + size] for start in range(0, len(curve), size or 1)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def loss_curves(runs: Sequence[TrainingRun]) -> list[str]:
    """One SVG for each run, all with the same vertical axis."""
    curves = [(thinned(run.loss), run.held_out) for run in runs]
    losses = [loss for pair in curves for curve in pair for _, loss in curve if loss > 0]
    # With a margin, so that a constant curve has an axis too.
    low, high = math.log10(min(losses)) - 0.15, math.log10(max(losses)) + 0.15
    ticks = [tick for tick in TICKS if low <= math.log10(tick) <= high]
    return [
        _svg(
            {
                kind: [point for point in curve if point[1] > 0]
                for kind, curve in zip(("loss", "held-out"), pair, strict=True)
            },
            ticks,
            lambda value: (math.log10(value) - low) / (high - low),
        )
        for pair in curves
    ]


def looking_curves(runs: Sequence[TrainingRun]) -> list[str]:
    """One SVG for each run that was evaluated on images: how much its loss rises, on an axis of its own."""
    drawn = []
    for run in runs:
        values = [value for curve in run.deltas for _, value in curve]
        if not values:
            continue
        low, high = min(0.0, *values), max(0.0, *values)
        high += 0.05 * (high - low) or 1.0
        step = 10.0 ** math.floor(math.log10(high - low))
        step *= 2 if (high - low) / step > 4 else 1 if (high - low) / step > 2 else 0.5
        ticks = [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
        curves = {"held-out": run.deltas[0], "blank": run.deltas[1]}
        drawn.append(_svg(curves, ticks, lambda value, low=low, high=high: (value - low) / (high - low)))
    return drawn


def _svg(curves: dict[str, Curve], ticks: Sequence[float], height: Callable[[float], float]) -> str:
    """Curves by their class; evaluations have dots.

    Args:
        ticks: values of the vertical axis that are marked.
        height: of a value, from 0 at the bottom to 1.
    """
    last = max(step for curve in curves.values() for step, _ in curve)

    def across(step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - 8) * step / last, 1)

    def down(value: float) -> float:
        return round(8 + (HEIGHT - BOTTOM - 8) * (1 - height(value)), 1)

    parts = []
    for tick in ticks:
        y = down(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for step in (0, last // 2, last):
        anchor = "end" if step == last else "middle"
        parts.append(f'<text x="{across(step)}" y="{HEIGHT - BOTTOM + 20}" text-anchor="{anchor}">{step:g}</text>')
    for kind, curve in curves.items():
        points = " ".join(f"{across(step)},{down(value)}" for step, value in curve)
        parts.append(f'<polyline class="{kind}" points="{points}"/>')
        if kind != "loss":
            parts += [
                f'<circle class="{kind} dot" cx="{across(step)}" cy="{down(value)}" r="3"/>' for step, value in curve
            ]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
