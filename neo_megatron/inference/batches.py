"""Answers many questions in batches, on one process or on several with a model each.

Batches are made of all questions, longest first: they do not depend on workers or on progress, and too little memory
shows at once. A sampled answer depends on the seed and its batch, not on the worker.
"""

import contextlib
import itertools
import os
import warnings
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm
from transformers import logging

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.prepare.registry import Source
from neo_megatron.errors import DataError, RejectedSample
from neo_megatron.inference.answer_run import AnswerRun
from neo_megatron.inference.answering import Answer, Answerer
from neo_megatron.inference.prompt_forms import ImageText
from neo_megatron.inference.prompts import Prompt, prompt_of_sample
from neo_megatron.inference.questions import Ask, Question
from neo_megatron.processes import SPAWN
from neo_megatron.storage.base import is_remote
from neo_megatron.worker_pool import WorkerDied, WorkerPool

Result = dict[str, Any]
"""``prediction`` and ``finished`` of an answer, or ``rejected``, a line of ``rejects.jsonl``."""
Batch = tuple[Sequence[Question], int]
"""Questions that are answered together, and the seed of their sampling."""


@dataclass(frozen=True)
class Task:
    """Everything that a worker needs besides its questions.

    Args:
        model: directory of the checkpoint.
        dtype: as of `Answerer`.
        settings: limits of pixels and frames, the chat layout, and the seed of what is drawn.
        max_new_tokens: limit of an answer.
        generation: further arguments of ``generate``.
        allow_pickle, system: as of `Answerer`.
        image_text: the places of the images of a turn.
    """

    model: Path
    dtype: str
    settings: PreprocessConfig
    max_new_tokens: int
    generation: dict[str, Any] = field(default_factory=dict)
    allow_pickle: bool = False
    system: str = ""
    image_text: ImageText = "written"

    def load(self, device: str | None = None) -> Answerer:
        """Loads the model; corrections of its config were reported when the task was made."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Answerer(
                self.model,
                device=device,
                dtype=self.dtype,
                allow_pickle=self.allow_pickle,
                chat_layout=self.settings.chat_layout,
                sample_tokens=self.settings.sample_tokens,
                system=self.system,
            )


def plan_of(task: Task, sources: Sequence[Source], ask: Ask) -> dict[str, Any]:
    """Everything but the images that decides the answers, keyed by the words of an error message."""
    files = ("config.json", "generation_config.json", "tokenizer.json")
    model = [*(task.model / name for name in files), *_weight_files(task.model)]
    data_sets = list(dict.fromkeys(source.name for source in sources))
    settings = {f"--{name.replace('_', '-')}": value for name, value in asdict(task.settings).items()}
    return {
        "kind of questions": ask,
        "--model": {path.name: _state(path) for path in model if path.exists()},
        "--dtype": task.dtype,
        "--max-new-tokens": task.max_new_tokens,
        "way of choosing tokens": task.generation,
        "--system": task.system,
        "--image-text": task.image_text,
        **settings,
        "list of data sets": data_sets,
        **{
            f"list of annotation files, root or share of {name}": [
                [
                    source.annotations if is_remote(source.annotations) else os.path.abspath(source.annotations),
                    [source.version] if source.version else _state(Path(source.annotations)),
                    source.image_root,
                    str(source.share),
                ]
                for source in sources
                if source.name == name
            ]
            for name in data_sets
        },
        **{f"schema of {source.name}": entry for source in sources if (entry := source.schema.entry())},
        **{f"limit of images or videos of {source.name}": own for source in sources if (own := source.media.entry())},
    }


def _weight_files(model: Path) -> list[Path]:
    return sorted([*model.glob("*.safetensors"), *model.glob("*.bin")])


def _state(path: Path) -> list[int]:
    """Size and modification time of a file."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def make_batches(questions: Sequence[Question], size: int) -> list[list[int]]:
    """Numbers of the questions of each batch: of similar length, so that there is little padding."""
    order = sorted(range(len(questions)), key=lambda number: (-questions[number].length, number))
    return [order[start : start + size] for start in range(0, len(order), size)]


def default_workers(model: Path) -> int:
    """One per GPU; without GPUs one per core, limited by the models that fit into free memory."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    size = sum(path.stat().st_size for path in _weight_files(model))
    fitting = psutil.virtual_memory().available // max(2 * size, 1 << 30)
    return int(max(1, min(len(os.sched_getaffinity(0)), fitting)))


class Worker:
    """One model that answers batches."""

    def __init__(self, task: Task, device: str | None) -> None:
        self._task = task
        self._answerer = task.load(device)

    def __call__(self, questions: Sequence[Question], seed: int) -> list[Result]:
        """The result of each question.

        Raises:
            DataError: out of GPU memory.
        """
        with ThreadPoolExecutor(torch.get_num_threads()) as threads, warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"PIL\.")
            prompts = list(threads.map(self._prompt, questions))
        asked = [prompt for prompt in prompts if isinstance(prompt, Prompt)]
        torch.manual_seed(seed)
        try:
            said = iter(
                self._answerer.answer(asked, self._task.max_new_tokens, **self._task.generation) if asked else []
            )
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"a batch of {len(asked)} questions does not fit into the GPU's memory; run the same command again "
                "with a smaller --batch-size to continue"
            ) from error
        return [self._result(next(said)) if isinstance(prompt, Prompt) else prompt for prompt in prompts]

    def _prompt(self, question: Question) -> Prompt | Result:
        try:
            settings = question.source.settings(self._task.settings)
            return prompt_of_sample(question.sample, question.turn, settings, self._task.image_text)
        except RejectedSample as rejected:
            return {"rejected": rejected.row(question.source.annotations, question.record, question.element)}

    @staticmethod
    def _result(answer: Answer) -> Result:
        return {"prediction": answer.text.strip(), "finished": answer.finished}


def answer_all(questions: Sequence[Question], task: Task, run: AnswerRun, batch_size: int, workers: int) -> None:
    """Answers the questions that ``run`` does not know yet, and records each result there.

    Several workers are processes that import the main module: a script needs its ``if __name__ == "__main__"``.

    Raises:
        ValueError, DataError: the model cannot be loaded or does not fit; a worker died.
    """
    batches = []
    for batch in make_batches(questions, batch_size):
        missing = [questions[number] for number in batch if questions[number].place not in run.done]
        if missing:
            batches.append((missing, task.settings.seed + batch[0]))
    workers = max(1, min(workers, len(batches)))
    answers = _inline(task, batches) if workers == 1 else _on_processes(task, batches, workers)
    with (
        contextlib.closing(answers),
        tqdm(desc="answering", total=len(questions), initial=len(run.done), unit=" questions") as progress,
    ):
        for asked, results in answers:
            run.add(zip((question.place for question in asked), results, strict=True))
            progress.update(len(asked))


def _inline(task: Task, batches: Sequence[Batch]) -> Generator[tuple[Sequence[Question], list[Result]], None, None]:
    worker = Worker(task, None) if batches else None
    for asked, seed in batches:
        yield asked, worker(asked, seed)


def _on_processes(
    task: Task, batches: Sequence[Batch], workers: int
) -> Generator[tuple[Sequence[Question], list[Result]], None, None]:
    """Results of batches, as they are finished."""
    devices = SPAWN.SimpleQueue()
    for number in range(workers):
        devices.put(f"cuda:{number % torch.cuda.device_count()}" if torch.cuda.is_available() else None)
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    waiting, running = enumerate(batches), 0
    with contextlib.closing(WorkerPool(workers, _prepare, (task, devices, threads), lambda: None)) as pool:
        while True:
            for number, batch in itertools.islice(waiting, workers - running):
                pool.start(number, batch)
                running += 1
            if not running:
                return
            try:
                number, results = pool.wait()
            except WorkerDied as died:
                raise DataError(
                    "a worker died; run the same command again to continue, with fewer --workers if memory ran out"
                ) from died
            if isinstance(results, Exception):
                raise results
            running -= 1
            yield batches[number][0], results


def _prepare(argument: tuple[Task, Any, int], report: Callable[[], None]) -> Callable[[Batch], list[Result]]:
    """Prepares a process of the pool. It loads its model with its first batch, so that errors are passed back."""
    task, devices, threads = argument
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = devices.get()
    load = cache(lambda: Worker(task, device))
    return lambda batch: load()(*batch)
