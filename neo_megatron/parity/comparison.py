"""Two runs of one pack, part by part: how far apart they are, and whether that is rounding."""

from dataclasses import dataclass

from torch import Tensor

# float32 over many layers rounds to a few millionths; another formula or another weight is at least a thousand times
# further away.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Difference:
    """How far one part's outputs are apart.

    Args:
        part: name, as in `models.py`.
        largest: largest absolute difference.
        relative: largest length of a token's difference, in lengths of that token's own values, so that tokens with
            huge activations, as trained models have, do not hide the others.
    """

    part: str
    largest: float
    relative: float

    @property
    def agrees(self) -> bool:
        return self.relative <= TOLERANCE  # False for NaN


def compare(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[Difference]:
    """Both runs have the same parts; rows are tokens."""
    differences = []
    for part, value in one.items():
        apart = (value - other[part]).double()
        relative = apart.norm(dim=-1) / value.double().norm(dim=-1)
        differences.append(Difference(part, apart.abs().max().item(), relative.max().item()))
    return differences


def describe(differences: list[Difference], pre_buffer_layers: int) -> str:
    """A line for every part."""
    lines = [f"{'part':<24}{'largest difference':>20}{'relative, by token':>20}"]
    for difference in differences:
        part = difference.part
        if part.startswith("layer "):
            part += " (pre-buffer)" if int(part.removeprefix("layer ")) < pre_buffer_layers else ""
        mark = "" if difference.agrees else "  <- differs"
        lines.append(f"{part:<24}{difference.largest:>20.2e}{difference.relative:>20.2e}{mark}")
    return "\n".join(lines)
