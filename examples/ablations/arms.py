"""The ablations: groups of arms, each a change of the quickstart's model or of the packs that it reads."""

from dataclasses import dataclass, field
from typing import Any

DEPTHS = (0, 1, 2, 3, 4)
LAYERS = 5  # pre-buffer and language model together, where depths are compared


@dataclass(frozen=True)
class Arm:
    """One way to build and train the model.

    Args:
        name: of its directory and in the table; arms of several groups with one name are one arm.
        sizes: changed fields of the preset `tiny`.
        mask: "mixed", in which an image sees itself in both directions, or "causal".
        positions: "native" (t, h, w), "t" (h and w are 0) or "sequence" (h and w are 0, and t counts every token).
        pre_buffer: layers in front of a language model that was trained on texts before, and is frozen as in training
            stage 1; ``None`` trains everything from a random start.
        flags: further flags of the training.
    """

    name: str
    sizes: dict[str, Any] = field(default_factory=dict)
    mask: str = "mixed"
    positions: str = "native"
    pre_buffer: int | None = None
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ablation:
    """Arms that differ in one thing.

    Args:
        name: for `--only`.
        question: what is compared, as a title.
        published: the order that NEO's paper gives (arXiv 2510.14979, table 3 and figure 5), in words; empty where it
            has none.
        better: pairs of arms, the one that is better as published first.
        arms: all of them, in the order of the table.
    """

    name: str
    question: str
    published: str
    better: tuple[tuple[str, str], ...]
    arms: tuple[Arm, ...]


NEO = Arm("NEO 1.0")
EXPERTS = dict(num_experts=8, experts_per_token=2, expert_ffn_hidden_size=128)
MUON = ("--optimizer", "muon", "--muon-momentum", "0.95", "--muon-nesterov", "--muon-extra-scale-factor", "0.6")

ABLATIONS = (
    Ablation(
        "mask",
        "Attention within an image: in both directions, or causal",
        "mixed > causal",
        (("NEO 1.0", "causal mask"),),
        (NEO, Arm("causal mask", mask="causal")),
    ),
    Ablation(
        "positions",
        "Positions: native, t alone, or one for every token",
        "native > 1D",
        (("NEO 1.0", "positions in sequence"), ("NEO 1.0", "positions t")),
        (NEO, Arm("positions t", positions="t"), Arm("positions in sequence", positions="sequence")),
    ),
    Ablation(
        "theta",
        "Rotary base of rows and columns: 1e4 or 1e6",
        "1e4 > 1e6",
        (("NEO 1.0", "theta_hw 1e6"),),
        (NEO, Arm("theta_hw 1e6", sizes={"rope_theta_hw": 1e6})),
    ),
    Ablation(
        "depth",
        f"Pre-buffer layers in front of a frozen language model, {LAYERS} layers together",
        "rises, then flattens",
        tuple((f"pre-buffer {depth + 1}", f"pre-buffer {depth}") for depth in DEPTHS[:-1]),
        tuple(Arm(f"pre-buffer {depth}", pre_buffer=depth) for depth in DEPTHS),
    ),
    Ablation(
        "form",
        "Attention form: separate (NEO 1.0) or in-head (SenseNova-U1)",
        "",
        (),
        (NEO, Arm("in-head", sizes={"attention_form": "in-head"})),
    ),
    Ablation(
        "experts",
        "Dense, or 8 experts of which a token goes to 2, of the same active size",
        "",
        (),
        (NEO, Arm("experts", sizes=EXPERTS, flags=("--balance-loss-coeff", "0.05"))),
    ),
    Ablation(
        "optimizer",
        "AdamW, or Muon for matrices and AdamW for the rest",
        "",
        (),
        (NEO, Arm("Muon", flags=MUON)),
    ),
)
