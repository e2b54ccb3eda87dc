"""Writes the report of a quickstart: accuracy, loss, and images with questions and answers, in one HTML file.

python examples/quickstart/report.py --data out
"""

import argparse
import base64
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

import yaml
from questions import IMAGE_TAG, Question, Score, read_questions, scores, text_only_answers
from safetensors import safe_open
from training_runs import TrainingRun, looking_curves, loss_curves

SHOWN, SHOWN_WRONG = 60, 24
RUNS = {"shapes": "train-shapes", "questions": "train-questions"}
SETTINGS = {
    "steps": "train_iters",
    "packs a step": "global_batch_size",
    "packs at once": "micro_batch_size",
    "tokens of a pack": "seq_length",
    "learning rate": "lr",
    "layers": "num_layers",
    "of which pre-buffer": "pre_buffer_num_layers",
    "width": "hidden_size",
    "width of the SwiGLU": "ffn_hidden_size",
    "query heads": "num_attention_heads",
    "key-value heads": "num_query_groups",
    "channels of the patch embedding": "patch_embedding_size",
    "vocabulary": "vocab_size",
    "pipeline stages": "pipeline_model_parallel_size",
    "tensor parallel": "tensor_model_parallel_size",
    "data parallel": "data_parallel_size",
    "processes": "world_size",
    "bf16": "bf16",
}


@dataclass(frozen=True)
class Answer:
    """A test question with the model's answer and the best one without the image."""

    question: Question
    given: str
    text_only: str

    @property
    def right(self) -> bool:
        """Whether the model's answer is correct."""
        return self.given == self.question.answer


def read_answers(evaluation: Path, training: Sequence[Question]) -> list[Answer]:
    """The answers that `neo-megatron evaluate` wrote, with the best answers without the image."""
    lines = [json.loads(line) for line in (evaluation / "answers.jsonl").read_text().splitlines()]
    asked = [
        Question(Path(*line["pictures"]).name, line["question"].removeprefix(IMAGE_TAG), *line["references"])
        for line in lines
    ]
    text_only = text_only_answers(training, asked)
    return [Answer(*row) for row in zip(asked, (line["prediction"] for line in lines), text_only, strict=True)]


def scores_of(answers: Sequence[Answer]) -> list[Score]:
    """The score of all answers, then of each kind of question."""
    return scores(
        [answer.question for answer in answers],
        [answer.given for answer in answers],
        [answer.text_only for answer in answers],
    )


def print_scores(answers: Sequence[Answer]) -> None:
    """Prints the scores as a table."""
    print(f"{'':20} questions   this model   best without the image")
    for score in scores_of(answers):
        right, guessed = score.right / score.total, score.text_only / score.total
        print(f"{score.kind:20} {score.total:9}   {right:10.1%}   {guessed:24.1%}")


def drawn(answers: Sequence[Answer], shown: int = SHOWN, wrong: int = SHOWN_WRONG) -> list[Answer]:
    """A fixed random choice of up to ``shown`` answers, at most one per image, with up to ``wrong`` wrong ones."""
    shuffled = random.Random(0).sample(answers, len(answers))
    images: set[str] = set()
    chosen: dict[bool, list[Answer]] = {True: [], False: []}
    # Wrong ones first, because they are few, and a right answer about the same image would take their place.
    for answer in sorted(shuffled, key=lambda answer: answer.right):
        full = len(chosen[False]) + len(chosen[True]) == shown or (not answer.right and len(chosen[False]) == wrong)
        if answer.question.image not in images and not full:
            images.add(answer.question.image)
            chosen[answer.right].append(answer)
    return random.Random(1).sample(chosen[True] + chosen[False], sum(map(len, chosen.values())))


def parameters(model: Path) -> int:
    """Number of parameters of an exported checkpoint, from the headers of its weight files."""
    total = 0
    for path in model.glob("*.safetensors"):
        with safe_open(path, framework="np") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def score_row(score: Score) -> str:
    """A row of the table of scores, as HTML."""
    model, guess = score.right / score.total, score.text_only / score.total
    return (
        f"<tr{' class="all"' if score.kind == 'all questions' else ''}><td>{score.kind}</td>"
        f'<td class="number">{score.total:,}</td><td class="number">{model:.1%}</td><td class="number">{guess:.1%}</td>'
        f'<td class="bars"><div class="bar" style="width:{model:.1%}"></div>'
        f'<div class="bar guess" style="width:{guess:.1%}"></div></td></tr>'
    )


def card(answer: Answer, images: Path) -> str:
    """An image with its question and answer, as HTML; ``images`` is the directory of the test images."""
    data = base64.b64encode((images / answer.question.image).read_bytes()).decode()
    given = escape(answer.given) or "(nothing)"
    if answer.right:
        verdict = f'<div class="answer right">✓ {given}</div>'
    else:
        verdict = f'<div class="answer wrong">✗ {given} <small>right: {escape(answer.question.answer)}</small></div>'
    return (
        f'<figure><img alt="test image {escape(answer.question.image)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(answer.question.text)}</figcaption>{verdict}</figure>"
    )


def setting_rows(runs: Sequence[TrainingRun]) -> str:
    """The rows of the table of settings, with a column for each run, as HTML."""
    rows = []
    for label, name in SETTINGS.items():
        cells = "".join(f'<td class="number">{escape(run.settings[name])}</td>' for run in runs)
        rows.append(f"<tr><td>{label}</td>{cells}</tr>")
    return "\n".join(rows)


def figures(runs: Sequence[TrainingRun], curves: Sequence[str]) -> str:
    """The curves of runs with captions, as HTML."""
    return "\n".join(
        f"<figure>{svg}<figcaption>steps of the run on {escape(run.name)}</figcaption></figure>"
        for run, svg in zip(runs, curves, strict=True)
    )


def page(
    answers: Sequence[Answer],
    images: Path,
    runs: Sequence[TrainingRun],
    seconds: Sequence[tuple[str, int]],
    parameter_count: int,
) -> str:
    """The complete page, as HTML.

    Args:
        answers: to the test questions.
        images: directory of the test images.
        runs: of training.
        seconds: title and wall seconds of every step of the quickstart so far.
        parameter_count: of the model.
    """
    everything, *kinds = scores_of(answers)
    shown = drawn(answers)
    training = sum(took for title, took in seconds if title.startswith("Training"))
    processes = int(runs[-1].settings["world_size"])
    looking = [run for run in runs if any(run.deltas)]
    return Template((Path(__file__).parent / "page.html").read_text()).substitute(
        accuracy=f"{everything.right / everything.total:.1%}",
        total=f"{everything.total:,}",
        images=f"{len({answer.question.image for answer in answers}):,}",
        text_only=f"{everything.text_only / everything.total:.1%}",
        parameters=f"{parameter_count:,}",
        training_time=f"{training // 60} min {training % 60} s",
        processes=f"{processes} process{'es' if processes > 1 else ''}",
        score_rows="\n".join(map(score_row, (everything, *kinds))),
        curves=figures(runs, loss_curves(runs)),
        looking=figures(looking, looking_curves(looking)),
        shown_right=sum(answer.right for answer in shown),
        shown_wrong=sum(not answer.right for answer in shown),
        cards="\n".join(card(answer, images) for answer in shown),
        run_names="".join(f'<th class="number">{escape(run.name)}</th>' for run in runs),
        setting_rows=setting_rows(runs),
        seconds_rows="\n".join(
            f'<tr><td>{escape(title)}</td><td class="number">{took}</td></tr>' for title, took in seconds
        ),
    )


def main() -> None:
    """Writes the page and prints the scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="output directory of the other steps of run.sh")
    data = parser.parse_args().data
    registry = yaml.safe_load((data / "registry.yaml").read_text())
    runs = [TrainingRun.read(name, data / directory / "tensorboard") for name, directory in RUNS.items()]
    lines = (line.rsplit("\t", 1) for line in (data / "seconds.tsv").read_text().splitlines())
    seconds = [(title, int(took)) for title, took in lines]
    answers = read_answers(data / "evaluation", read_questions(data / "questions.json"))
    html = page(answers, Path(registry["test"]["data_path"]), runs, seconds, parameters(data / "neo"))
    (data / "report.html").write_text(html, encoding="utf-8")
    print_scores(answers)
    print(f"the page to look at: {(data / 'report.html').resolve()}")


if __name__ == "__main__":
    main()
