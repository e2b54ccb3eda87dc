"""Reads the TensorBoard files of training runs, and draws their loss curves as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

POINTS = 160
WIDTH, HEIGHT, LEFT, BOTTOM = 460, 250, 40, 34
TICKS = [digit * 10.0**power for power in range(-5, 3) for digit in (1, 3)]

Curve = list[tuple[float, float]]
"""(step, loss) in the order of the steps."""


@dataclass(frozen=True)
class TrainingRun:
    """A run of `pretrain_neo`.

    Args:
        name: heading of its curve.
        settings: Megatron's arguments, as text.
        loss, held_out: of the training packs of each step, and of held-out packs at each evaluation.
    """

    name: str
    settings: dict[str, str]
    loss: Curve
    held_out: Curve

    @classmethod
    def read(cls, name: str, directory: Path) -> "TrainingRun":
        """Reads a `--tensorboard-dir`; 0 in `size_guidance` keeps every step."""
        events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        scalars = set(events.Tags()["scalars"])
        curves = {
            tag: [(event.step, event.value) for event in events.Scalars(tag)] if tag in scalars else []
            for tag in ("lm loss", "lm loss validation")
        }
        suffix = "/text_summary"
        settings = {
            tag.removesuffix(suffix): events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
            for tag in events.Tags()["tensors"]
            if tag.endswith(suffix)
        }
        return cls(name, settings, curves["lm loss"], curves["lm loss validation"])


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
    return [_svg(*pair, low, high) for pair in curves]


def _svg(loss: Curve, held_out: Curve, low: float, high: float) -> str:
    last = max(step for step, _ in (*loss, *held_out))

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - 8) * step / last
        y = 8 + (HEIGHT - BOTTOM - 8) * (high - math.log10(value)) / (high - low)
        return round(x, 1), round(y, 1)

    def line(kind: str, curve: Curve) -> str:
        points = " ".join("{},{}".format(*place(*point)) for point in curve if point[1] > 0)
        return f'<polyline class="{kind}" points="{points}"/>'

    parts = []
    for tick in TICKS:
        if low <= math.log10(tick) <= high:
            _, y = place(0, tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - 8}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for step in (0, last // 2, last):
        x, _ = place(step, 1)
        anchor = "end" if step == last else "middle"
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 20}" text-anchor="{anchor}">{step:g}</text>')
    parts += [line("loss", loss), line("held-out", held_out)]
    parts += ['<circle class="dot" cx="{}" cy="{}" r="3"/>'.format(*place(*point)) for point in held_out]
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'
