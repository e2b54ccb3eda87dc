"""Follows a run: each new checkpoint is exported, evaluated, recorded in the run's trackers and shown on the page."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neo_megatron.atomic_files import json_line, write_atomically
from neo_megatron.checkpoint.reader import open_megatron
from neo_megatron.checkpoint.to_hf import check_tokenizer, convert_megatron_to_hf
from neo_megatron.command_line import sentence_of
from neo_megatron.data.prepare.registry import Source
from neo_megatron.errors import NeoError
from neo_megatron.follow.attention import attention_maps
from neo_megatron.follow.lmms_eval import LmmsEval
from neo_megatron.follow.output import PAGE, SCORES, FollowOutput, best_steps
from neo_megatron.follow.page import page
from neo_megatron.follow.trackers import record
from neo_megatron.follow.watched_run import RunFacts, WatchedRun
from neo_megatron.inference.batches import Task, plan_of
from neo_megatron.inference.evaluate import evaluate
from neo_megatron.inference.questions import QuestionList, read_questions


@dataclass(frozen=True)
class Evaluator:
    """How each checkpoint is evaluated.

    Args:
        tokenizer: of the training data, with NEO's tokens.
        sources: annotation files with their schemas.
        task_of: the directory of an export -> the task of each worker, and the number of workers.
        batch_size: questions answered together.
        lmms_eval: further tasks; ``None`` for none of them.
    """

    tokenizer: Any
    sources: Sequence[Source]
    task_of: Callable[[Path], tuple[Task, int]]
    batch_size: int
    lmms_eval: LmmsEval | None


class Follower:
    """Treats the checkpoints of a run, the oldest first, because a run deletes that one first.

    Args:
        run: only read; its trackers get scores.
        output: locked for this process.
        evaluator: how checkpoints are evaluated.
        keep_best: exports that are kept in addition to the newest.
    """

    def __init__(self, run: WatchedRun, output: FollowOutput, evaluator: Evaluator, keep_best: int) -> None:
        self._run, self._output, self._evaluator, self._keep_best = run, output, evaluator, keep_best
        self._questions: QuestionList | None = None
        self._damaged: dict[int, int | None] = {}  # step -> stamp of its checkpoint
        self._stamps: dict[int, int | None] = {}  # of evaluated steps
        self._vanished = 0
        self._facts: tuple[int, RunFacts | None] = (-1, None)  # of the newest step
        self._said: set[str] = set()

    def follow(self, once: bool, poll: float) -> None:
        """Returns when the run has reached its last step, or with ``once`` when all that is there has been treated.

        Args:
            poll: seconds between looks at the directory of the run.
        """
        self._publish()  # a kill may have come between an evaluation and its record
        while True:
            while (step := self._next()) is not None:
                self._treat(step)
                self._publish()
            if once or self._is_finished():
                break
            if not self._run.steps():
                self._say(f"{self._run.root} has no complete checkpoint yet")
            time.sleep(poll)
        self._say_result()

    def _next(self) -> int | None:
        """The oldest checkpoint that is neither evaluated nor known to be damaged; exported ones need not be there."""
        done, exported = set(self._output.evaluated()), set(self._output.exported())
        for step in sorted({*self._run.steps(), *exported}):
            stamp = self._run.stamp(step)
            if step in done:
                if step not in self._stamps:
                    self._stamps[step] = self._output.attention(step)["stamp"]
                if None not in (stamp, self._stamps[step]) and stamp != self._stamps[step]:
                    self._say(
                        f"step {step:,}: the run has saved it again since; to evaluate that checkpoint, remove "
                        f"{self._output.evaluation_of(step)}, {self._output.attention_of(step)} and "
                        f"{self._output.export_of(step)}, then start again"
                    )
            elif step in exported or (stamp is not None and self._damaged.get(step) != stamp):
                return step
        return None

    def _treat(self, step: int) -> None:
        stamp = self._run.stamp(step)
        if not self._output.export_of(step).is_dir() and not self._export(step):
            return
        evaluator, output = self._evaluator, self._output
        export = output.export_of(step)
        task, workers = evaluator.task_of(export)
        plan = plan_of(task, evaluator.sources, "every answer")
        del plan["--model"]  # differs between checkpoints, and an evaluation checks its own
        lmms_eval = evaluator.lmms_eval
        tasks = list(lmms_eval.tasks) if lmms_eval else []
        output.claim({"RUN": str(self._run.root.absolute()), "--lmms-eval-tasks": tasks, **plan})
        if self._questions is None:
            self._questions = read_questions(evaluator.sources, task.settings, "every answer")
            for sentence in self._questions.noticed.sentences():
                self._say(sentence)
        if not output.attention_of(step).exists():
            samples = attention_maps(task, self._questions.questions)
            write_atomically(output.attention_of(step), json_line({"stamp": stamp, "samples": samples}))
            torch.cuda.empty_cache()  # for the processes that follow
        if lmms_eval and not output.lmms_eval_of(step).exists():
            lmms_eval.run(task, output.lmms_eval_of(step))
        evaluate(
            task,
            evaluator.sources,
            output.evaluation_of(step),
            evaluator.batch_size,
            workers,
            f"step {step}",
            self._questions,
        )
        torch.cuda.empty_cache()
        (row,) = (row for row in output.rows() if row["step"] == step)
        sets = len(row["data_sets"])
        means = f"exact match {row['exact_match']:.2%}, ANLS {row['anls']:.4f}"
        print(f"step {step:,}: {means}{f' (means over {sets} data sets)' if sets > 1 else ''}", flush=True)

    def _export(self, step: int) -> bool:
        """Whether a checkpoint could be exported; the run may delete it at any moment."""
        path, stamp = self._run.path_of(step), self._run.stamp(step)
        try:
            sizes = open_megatron(path).sizes
        except (NeoError, OSError) as error:
            return self._skip(step, stamp, error)
        check_tokenizer(self._evaluator.tokenizer, sizes)  # an error of the command line, not of the checkpoint
        try:
            convert_megatron_to_hf(path, self._output.export_of(step), self._evaluator.tokenizer)
        except (NeoError, OSError) as error:
            return self._skip(step, stamp, error)
        return True

    def _skip(self, step: int, stamp: int | None, error: Exception) -> bool:
        """Says why a checkpoint is left out.

        Raises:
            OSError: the error, if it is not one of reading the checkpoint.
        """
        if self._run.stamp(step) is None:
            self._vanished += 1
            print(f"step {step:,}: its checkpoint was deleted while it was read; skipped", flush=True)
            return False
        if isinstance(error, OSError):
            raise error
        self._damaged[step] = stamp
        print(f"step {step:,}: {sentence_of(error)}; skipped", flush=True)
        return False

    def _publish(self) -> None:
        """Writes all that follows from the evaluations."""
        output = self._output
        if not (rows := output.rows()):
            return
        write_atomically(output.directory / SCORES, b"".join(map(json_line, rows)))
        if (facts := self._newest_facts()) is not None:
            for sentence in record(facts, rows):
                self._say(sentence)
        steps = [row["step"] for row in rows]
        output.delete_exports({steps[-1], *best_steps(rows, self._keep_best)})
        html = page(
            str(self._run.root),
            rows,
            output.exported(),
            [output.lines(step) for step in steps[-2:]],
            {step: output.attention(step)["samples"] for step in (steps[0], steps[-1])},
        )
        write_atomically(output.directory / PAGE, html.encode(errors="backslashreplace"))

    def _newest_facts(self) -> RunFacts | None:
        steps = self._run.steps()
        if steps and steps[-1] != self._facts[0] and (facts := self._run.facts(steps)) is not None:
            self._facts = (steps[-1], facts)
        return self._facts[1]

    def _is_finished(self) -> bool:
        """Whether the checkpoint of the run's last step is there; a run that is stopped before may be resumed."""
        steps, facts = self._run.steps(), self._newest_facts()
        return bool(steps) and facts is not None and facts.train_iters is not None and steps[-1] >= facts.train_iters

    def _say(self, sentence: str) -> None:
        """Prints a sentence once, though it may be true at every look."""
        if sentence not in self._said:
            self._said.add(sentence)
            print(sentence, flush=True)

    def _say_result(self) -> None:
        rows = self._output.rows()
        skipped = f"{self._vanished:,} deleted while they were read, {len(self._damaged):,} damaged"
        print(f"checkpoints evaluated: {len(rows):,}; skipped: {skipped}")
        if rows:
            (best,) = best_steps(rows, 1)
            print(f"the best by mean exact match over data sets: {self._output.export_of(best)}")
            print(f"the page to look at: {(self._output.directory / PAGE).resolve()}")
