"""Figures of the page as inline SVG; their colours are those of the style sheet."""

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

WIDTH = 1000


def runs(values: np.ndarray) -> list[tuple[int, int, int]]:
    """(start, end, value) of each stretch of equal values."""
    edges = np.concatenate([[0], np.flatnonzero(np.diff(values)) + 1, [len(values)]]).tolist()
    return [(start, end, int(values[start])) for start, end in zip(edges, edges[1:], strict=False) if end > start]


def strip(kinds: np.ndarray, document: np.ndarray, classes: Sequence[str]) -> str:
    """A pack from left to right: a band of its tokens, coloured by kind, over a band of its documents.

    Args:
        kinds: int [T], numbers into ``classes``, names of CSS classes.
        document: int32 [T], -1 for padding.
    """
    scale = WIDTH / len(kinds)
    parts = [_rectangle(a * scale, b * scale, 0, 34, classes[kind]) for a, b, kind in runs(kinds)]
    label_width = 9 * len(str(document.max() + 1))
    for start, end, number in runs(document):
        if number < 0:
            continue
        parts.append(
            f'<a href="#document-{number}">{_rectangle(start * scale, end * scale, 40, 16, f"turn{number % 2}")}</a>'
        )
        if (end - start) * scale > label_width:
            parts.append(f'<text x="{(start + end) * scale / 2:.1f}" y="52" class="middle">{number + 1}</text>')
    return _svg(58, parts, "the pack from left to right: kinds of tokens, and documents")


def positions(positions_thw: np.ndarray, document: np.ndarray, image: np.ndarray) -> str:
    """t, h and w along a pack, int32 [T, 3], over the extents of its images and the bounds of its documents."""
    scale, height, gap, parts = WIDTH / len(document), 64, 22, []
    total, used = 3 * (height + gap), int((document >= 0).sum())
    for axis, name in enumerate("thw"):
        bottom = (axis + 1) * (height + gap)
        for start, end, number in runs(image):
            if number >= 0:
                parts.append(_rectangle(start * scale, end * scale, bottom - height, height, "shade"))
        for start, _, _ in runs(document)[1:]:
            parts.append(f'<path class="bound" d="M{start * scale:.1f} {bottom - height}V{bottom}"/>')
        values = positions_thw[:used, axis]
        top = max(int(values.max(initial=0)), 1)
        for start, end, _ in runs(document[:used]):
            corners = _corners(values[start:end])
            points = (
                f"{(start + place) * scale:.1f} {bottom - value * (height - 4) / top:.1f}" for place, value in corners
            )
            parts.append(f'<path class="axis-{name}" d="M{"L".join(points)}"/>')
        parts.append(f'<path class="grid" d="M0 {bottom}H{WIDTH}"/>')
        parts.append(f'<text x="0" y="{bottom - height - 6}">{name}: 0 to {int(values.max(initial=0)):,}</text>')
    return _svg(total + 2, parts, "t, h and w of every token along the pack")


def _corners(values: np.ndarray) -> list[tuple[int, int]]:
    """(position, value) of a curve where its slope changes, and at its ends."""
    slopes = np.diff(values)
    places = np.concatenate([[0], np.flatnonzero(np.diff(slopes)) + 1, [len(values) - 1]])
    return [(place, int(values[place])) for place in np.unique(places).tolist()]


def histogram(lengths: np.ndarray, limit: int | None) -> str:
    """Samples by their tokens, on a logarithmic axis; a line at ``limit``, the length of a pack.

    Args:
        lengths: int64 [longest + 1], samples of each length.
    """
    present = np.flatnonzero(lengths)
    low, high = int(present[0]), max(int(present[-1]), limit or 0)
    edges = np.unique(np.geomspace(low, high + 1, 49).astype(np.int64))
    counts = np.add.reduceat(np.append(lengths, np.zeros(max(0, high + 2 - len(lengths)), np.int64)), edges)[:-1]
    height, top = 190, int(counts.max())

    def place(length: float) -> float:
        return WIDTH * np.log(length / low) / np.log((high + 1) / low)

    parts = []
    for start, end, count in zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True):
        tokens = f"{start:,}" if end == start + 1 else f"{start:,} to {end - 1:,}"
        bar = _rectangle(place(start) + 0.5, place(end) - 0.5, height - count * 160 / top, count * 160 / top, "bar")
        parts.append(bar.replace("/>", f"><title>{count:,} samples of {tokens} tokens</title></rect>"))
    parts.append(f'<path class="grid" d="M0 {height}H{WIDTH}"/>')
    for power in range(32):
        if low <= 2**power <= high:
            x = min(max(place(2**power), 14), WIDTH - 18)  # keep the labels at both ends inside
            parts.append(f'<text x="{x:.1f}" y="{height + 16}" class="middle">{2**power:,}</text>')
    if limit:
        parts.append(f'<path class="limit" d="M{place(limit):.1f} 14V{height}"/>')
        parts.append(f'<text x="{place(limit) - 6:.1f}" y="24" class="end">a pack: {limit:,}</text>')
    return _svg(height + 24, parts, "number of samples by their tokens")


def curves(steps: Sequence[int], values: Mapping[str, Sequence[float]], label: str) -> str:
    """Lines over steps, from 0 to 1, with a point at each step.

    Args:
        values: name of a CSS class -> the line, of which each step has a value.
    """
    width, height = 400, 150
    left, right, top, bottom = 28, width - 14, 8, height - 20
    first, last = steps[0], steps[-1]

    def place(step: int) -> float:
        return (left + right) / 2 if first == last else left + (right - left) * (step - first) / (last - first)

    parts = []
    for share in (0.0, 0.5, 1.0):
        y = bottom - share * (bottom - top)
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" class="end">{share:g}</text>')
    for name, line in values.items():
        points = [(place(step), bottom - value * (bottom - top)) for step, value in zip(steps, line, strict=True)]
        parts.append(f'<path class="curve {name}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in points)}"/>')
        parts += [
            f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>step {step:,}: {value:.3f}</title></circle>'
            for (x, y), step, value in zip(points, steps, line, strict=True)
        ]
    for step, anchor in {last: "end", first: "middle" if first == last else ""}.items():
        parts.append(f'<text x="{place(step):.1f}" y="{height - 4}" class="{anchor}">step {step:,}</text>')
    return _svg(height, parts, label, width)


def _rectangle(left: float, right: float, top: float, height: float, kind: str) -> str:
    """A rectangle at least half a pixel wide, so that a single token stays visible."""
    width = max(right - left, 0.5)
    return f'<rect class="{kind}" x="{left:.2f}" y="{top:.2f}" width="{width:.2f}" height="{height:.2f}"/>'


def _svg(height: int, parts: Sequence[str], label: str, width: int = WIDTH) -> str:
    body = "".join(parts)
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
