"""Results of the runs: scores of arms over seeds, and whether the published orders hold."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from arms import ABLATIONS, Ablation

sys.path.insert(0, str(Path(__file__).parents[1] / "quickstart"))
from questions import KINDS, Question, read_questions
from training_runs import Curve, TrainingRun

# Student's t for intervals of 95 %, by degrees of freedom: with few seeds they are wide. From ten on the last is kept,
# which is on the safe side.
_T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Run:
    """An arm with one seed.

    Args:
        seed: of the start and of the order of packs.
        accuracy: share of right answers to the test questions, and of each kind of them.
        loss: mean cross entropy of the tokens of the answers to the test questions.
        curve: training loss by step, over both trainings.
    """

    seed: int
    accuracy: float
    by_kind: dict[str, float]
    loss: float
    curve: Curve

    @classmethod
    def read(cls, directory: Path, seed: int, questions: Sequence[Question]) -> "Run":
        """Reads the directory of a run."""
        answers = json.loads((directory / "answers.json").read_text())
        right = answers["right"]
        kinds = [question.kind for question in questions]
        by_kind = {
            kind: mean(correct for correct, other in zip(right, kinds, strict=True) if other == kind) for kind in KINDS
        }
        curve: Curve = []
        for part in ("shapes", "questions"):
            before = curve[-1][0] if curve else 0
            loss = TrainingRun.read(part, directory / part / "tensorboard").loss
            curve += [(before + step, value) for step, value in loss]
        return cls(seed, mean(right), by_kind, answers["loss"], curve)


@dataclass(frozen=True)
class Estimate:
    """A mean with the half width of its interval of 95 %; not a number for one value."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Of independent values, by Student's t."""
        if len(values) < 2:
            return cls(mean(values), math.nan)
        t = _T95.get(len(values) - 1, 2.262)
        return cls(mean(values), t * stdev(values) / math.sqrt(len(values)))


def verdict(better: Sequence[Run], worse: Sequence[Run]) -> tuple[Estimate, str]:
    """The difference of accuracy, seed by seed, and in a word whether the published order holds."""
    of_worse = {run.seed: run.accuracy for run in worse}
    difference = Estimate.of([run.accuracy - of_worse[run.seed] for run in better if run.seed in of_worse])
    if math.isnan(difference.half) or abs(difference.mean) <= difference.half:
        return difference, "not decided"
    return difference, "holds" if difference.mean > 0 else "does not hold"


def read_runs(output: Path, ablations: Sequence[Ablation] = ABLATIONS) -> dict[str, list[Run]]:
    """The finished runs of every arm, by its name."""
    questions = read_questions(output / "data" / "test.json")
    arms = {arm.name for ablation in ablations for arm in ablation.arms}
    return {
        name: [
            Run.read(path.parent, int(path.parent.name), questions)
            for path in sorted((output / "runs" / name).glob("*/answers.json"), key=lambda path: int(path.parent.name))
        ]
        for name in arms
    }


def table(ablation: Ablation, runs: dict[str, list[Run]]) -> list[list[str]]:
    """Rows of cells: a heading, then one row for each arm that has runs."""
    rows = [["arm", "seeds", "accuracy", *KINDS, "test loss"]]
    for arm in ablation.arms:
        if mine := runs[arm.name]:
            kinds = [f"{100 * mean(run.by_kind[kind] for run in mine):.1f}" for kind in KINDS]
            accuracy = Estimate.of([100 * run.accuracy for run in mine])
            loss = Estimate.of([run.loss for run in mine])
            rows.append([arm.name, str(len(mine)), shown(accuracy, 1), *kinds, shown(loss, 4)])
    return rows


def verdicts(ablation: Ablation, runs: dict[str, list[Run]]) -> list[list[str]]:
    """Rows of cells: two arms, the difference of their accuracies in points, and whether the published order holds."""
    rows = []
    for better, worse in ablation.better:
        if runs[better] and runs[worse]:
            difference, word = verdict(runs[better], runs[worse])
            points = Estimate(100 * difference.mean, 100 * difference.half)
            rows.append([f"{better} > {worse}", shown(points, 1), word])
    return rows


def shown(estimate: Estimate, digits: int) -> str:
    """As text: the mean, and the half width of the interval."""
    half = "" if math.isnan(estimate.half) else f" ± {estimate.half:.{digits}f}"
    return f"{estimate.mean:.{digits}f}{half}"
