"""The directory that `neo-megatron follow` writes: exports, evaluations, attention, and the scores of all steps.

A checkpoint is done when its evaluation is complete, which is written last. Everything else follows from the
evaluations, so that a kill at any moment loses no more than the stage it hits.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from neo_megatron.atomic_files import is_partial, json_line, write_atomically
from neo_megatron.errors import DataError
from neo_megatron.follow.lmms_eval import lmms_eval_results
from neo_megatron.inference.answer_run import ANSWERS, PROGRESS
from neo_megatron.inference.evaluate import SCORES as EVALUATION_SCORES
from neo_megatron.locks import lock
from neo_megatron.paths import output_place

STATE, SCORES, PAGE = "follow.json", "scores.jsonl", "page.html"
_STEP = re.compile(r"step-(0|[1-9][0-9]*)")
_PARTIAL, _DELETING = ".partial", ".deleting"


class FollowOutput:
    """A locked output directory. Use it in a ``with`` statement.

    Args:
        directory: new, or one that this command has written before.

    Raises:
        DataError: another process writes to it; it holds other files; it is a link that leads nowhere.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory = output_place(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self._lock = lock(directory, directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._begin()
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> "FollowOutput":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def _begin(self) -> None:
        """Refuses a directory of other files, and removes what a killed process has left."""
        state = self.directory / STATE
        names = [name for name in os.listdir(self.directory) if not is_partial(name)]
        if names and not state.exists():
            raise DataError(f"{self.directory} is not empty; choose another --output")
        if not state.exists():  # first, so that the directory is known again after a kill
            write_atomically(state, json_line({}))
        for folder in (self.directory, self.directory / "attention"):
            for left in folder.glob(f"*{_PARTIAL}"):
                left.unlink()
        for ending in (_PARTIAL, _DELETING):
            for left in (self.directory / "exports").glob(f"step-*{ending}"):
                shutil.rmtree(left)
        for name in ("exports", "evaluations", "attention"):
            (self.directory / name).mkdir(exist_ok=True)

    def claim(self, plan: dict[str, Any]) -> None:
        """Records what decides the answers, so that the scores of all steps can be compared.

        Args:
            plan: keyed by the words of the error message about a difference.

        Raises:
            DataError: earlier evaluations had another plan.
        """
        path = self.directory / STATE
        before = json.loads(path.read_bytes())
        plan = json.loads(json_line(plan))
        for key in plan | before if before else ():
            if plan.get(key) != before.get(key):
                raise DataError(
                    f"{self.directory} has evaluations with another {key}; repeat their command to continue, or choose "
                    "another --output"
                )
        if not before:
            write_atomically(path, json_line(plan, indent=1))

    def export_of(self, step: int) -> Path:
        return self.directory / "exports" / f"step-{step}"

    def evaluation_of(self, step: int) -> Path:
        return self.directory / "evaluations" / f"step-{step}"

    def lmms_eval_of(self, step: int) -> Path:
        return self.directory / "lmms-eval" / f"step-{step}"

    def attention_of(self, step: int) -> Path:
        return self.directory / "attention" / f"step-{step}.json"

    def exported(self) -> list[int]:
        """Steps whose export is there, oldest first."""
        return self._steps("exports", lambda path: path.is_dir())

    def evaluated(self) -> list[int]:
        """Steps whose evaluation is complete, oldest first."""
        return self._steps("evaluations", lambda path: (path / ANSWERS).exists() and not (path / PROGRESS).exists())

    def _steps(self, folder: str, is_there: Callable[[Path], bool]) -> list[int]:
        found = [(path, _STEP.fullmatch(path.name)) for path in (self.directory / folder).iterdir()]
        return sorted(int(match[1]) for path, match in found if match and is_there(path))

    def attention(self, step: int) -> dict[str, Any]:
        """The ``samples`` of `attention_maps`, and the checkpoint's ``stamp``; neither if a user has removed them."""
        path = self.attention_of(step)
        content: dict[str, Any] = json.loads(path.read_bytes()) if path.exists() else {"stamp": None, "samples": []}
        return content

    def lines(self, step: int) -> list[dict[str, Any]]:
        """Every answer of a step, as in its ``answers.jsonl``."""
        return [json.loads(line) for line in (self.evaluation_of(step) / ANSWERS).read_bytes().splitlines()]

    def rows(self) -> list[dict[str, Any]]:
        """The lines of ``scores.jsonl``, one for each step in ascending order."""
        rows = []
        for step in self.evaluated():
            row = score_row(step, json.loads((self.evaluation_of(step) / EVALUATION_SCORES).read_bytes()))
            if self.lmms_eval_of(step).exists():
                row["lmms_eval"] = lmms_eval_results(self.lmms_eval_of(step))
            rows.append(row)
        return rows

    def delete_exports(self, kept: set[int]) -> None:
        """Deletes the exports of other evaluated steps; renames first, so that a kill leaves no part."""
        for step in set(self.exported()) & set(self.evaluated()) - kept:
            path = self.export_of(step)
            doomed = path.with_name(path.name + _DELETING)
            path.rename(doomed)
            shutil.rmtree(doomed)


def score_row(step: int, summary: dict[str, Any]) -> dict[str, Any]:
    """The scores of a step: means over data sets, each of which counts the same, and the data sets' own.

    Args:
        summary: the content of an evaluation's ``scores.json``.
    """
    asked = [scores for scores in summary["data_sets"].values() if scores["questions"]]
    means = {name: fmean(scores[name] for scores in asked) if asked else 0.0 for name in ("exact_match", "anls")}
    return {"step": step, **means, "data_sets": summary["data_sets"]}


def best_steps(rows: Sequence[Mapping[str, Any]], count: int) -> list[int]:
    """The steps of the highest mean exact match over data sets, best first; of equal ones the newest."""
    order = sorted(rows, key=lambda row: (row["exact_match"], row["step"]), reverse=True)
    return [row["step"] for row in order[:count]]
