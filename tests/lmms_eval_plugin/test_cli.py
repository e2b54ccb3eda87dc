"""The installed lmms-eval, through its own command line, on tasks made of local files."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from support.processes import run_python

from neo_megatron.data.conversation import Turn
from neo_megatron.follow.lmms_eval import lmms_eval_results
from neo_megatron.inference.answering import Answerer
from neo_megatron.inference.likelihood import answer_likelihoods
from neo_megatron.inference.prompt_forms import ImageText

from .local_task import CHOICES

LMMS_EVAL = os.environ.get("NEO_TEST_LMMS_EVAL")
pytestmark = pytest.mark.skipif(
    not LMMS_EVAL, reason="NEO_TEST_LMMS_EVAL names no Python with lmms-eval (tests/run.sh makes its environment)"
)

MAX_PIXELS, MAX_NEW_TOKENS = 16384, 6
RIGHT = {0, 1, 4}  # the documents of which the annotation says what the model says

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {documents}}}}}
test_split: test
doc_to_visual: !function utils.visuals
doc_to_text: !function utils.text
"""
GENERATE = f"""
output_type: generate_until
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {MAX_NEW_TOKENS}, image_aspect_ratio: original}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = """
output_type: multiple_choice
doc_to_choice: !function utils.choices
doc_to_target: choice
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TASKS = {
    "neo_chat": GENERATE + "doc_to_messages: !function utils.messages\n",
    "neo_simple": GENERATE,
    "neo_choice": CHOOSE,
}


@dataclass
class Document:
    """A question, its images, and where a task of conversations puts them."""

    question: str
    images: list[str]
    in_conversation: str
    usable: bool = True

    @property
    def in_front(self) -> str:
        return "<image>\n" * len(self.images) + self.question


@dataclass
class Run:
    """The model's answers without lmms-eval, one document at a time, and what lmms-eval wrote and printed.

    ``kept`` are the scores that `neo-megatron follow` reads.
    """

    answers: dict[str, list[str]]
    losses: list[list[float]]
    results: dict[str, dict[str, float]]
    samples: dict[str, list[dict]]
    printed: str
    kept: dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def documents(golden, tmp_path_factory) -> list[Document]:
    long = tmp_path_factory.mktemp("images") / "long.png"
    Image.new("RGB", (3000, 10)).save(long)
    a, b, d = (str(golden / "images" / f"{letter}.png") for letter in "abd")
    return [
        Document("Are they the same?", [a, b], "<image>\nAre they the same?<image>"),
        Document("What is this?", [b], "What is this?<image>"),
        Document("Hi", [], "Hi"),
        Document("What?", [str(long)], "What?<image>", usable=False),
        Document(
            "Which of all the colours that you know has it?",
            [d],
            "Which of all the colours that you know has it?<image>",
        ),
    ]


@pytest.fixture(scope="module")
def run(checkpoint, documents, tmp_path_factory) -> Run:
    directory = tmp_path_factory.mktemp("lmms-eval")
    answerer = Answerer(checkpoint, device="cpu", max_pixels=MAX_PIXELS)
    without_thinking = Answerer(checkpoint, device="cpu", max_pixels=MAX_PIXELS, chat_layout="u1")
    answers = {
        "neo_chat": [answer_of(answerer, doc, doc.in_conversation) for doc in documents],
        "neo_simple": [answer_of(without_thinking, doc, doc.in_front, "numbered") for doc in documents],
    }
    losses = [losses_of(without_thinking, doc) for doc in documents]
    write_tasks(directory / "tasks", documents, answers, losses)
    model = f"pretrained={checkpoint},max_pixels={MAX_PIXELS},device=cpu"
    # One process for both forms: most of its time goes into the list of lmms-eval's own tasks.
    runs = [
        {"tasks": "neo_chat", "batch_size": 3, "model_args": model},
        {
            **{"tasks": "neo_simple,neo_choice", "batch_size": 2, "force_simple": True},
            "model_args": f"{model},chat_layout=u1,image_text=numbered",
        },
    ]
    (directory / "runs.yaml").write_text(yaml.safe_dump(runs))
    done = run_python(
        Path(LMMS_EVAL).with_name("lmms-eval"),
        *("--model", "neo"),
        *("--include_path", directory / "tasks", "--output_path", directory / "out", "--log_samples"),
        *("--config", directory / "runs.yaml"),
        environment={"HF_HOME": str(directory / "huggingface"), "HF_HUB_OFFLINE": "1"},
        python=LMMS_EVAL,
    )
    assert done.returncode == 0 and "Error during evaluation" not in done.stdout, done.stdout[-6000:]
    results = [json.loads(path.read_text())["results"] for path in (directory / "out").rglob("*_results.json")]
    samples = {
        path.stem.split("samples_")[1]: sorted(map(json.loads, path.open()), key=lambda sample: sample["doc_id"])
        for path in (directory / "out").rglob("*.jsonl")
    }
    return Run(answers, losses, results[0] | results[1], samples, done.stdout, lmms_eval_results(directory / "out"))


def answer_of(answerer: Answerer, document: Document, text: str, image_text: ImageText = "written") -> str:
    if not document.usable:
        return ""
    prompt = answerer.prompt([Turn("user", text, False)], document.images, image_text)
    return answerer.answer([prompt], MAX_NEW_TOKENS)[0].text.strip()


def losses_of(answerer: Answerer, document: Document) -> list[float]:
    if not document.usable:
        return [np.inf] * len(CHOICES)
    prompt = answerer.prompt(document.question, document.images, "numbered")
    weighed = [answer_likelihoods(answerer, [prompt], [0], [choice])[0] for choice in CHOICES]
    return [-one.log_probability / one.tokens for one in weighed]


def write_tasks(
    directory: Path, documents: list[Document], answers: dict[str, list[str]], losses: list[list[float]]
) -> None:
    directory.mkdir()
    shutil.copy(Path(__file__).with_name("local_task.py"), directory / "utils.py")
    for name, task in TASKS.items():
        with (directory / f"{name}.jsonl").open("w") as lines:
            for number, document in enumerate(documents):
                right, likeliest = number in RIGHT, int(np.argmin(losses[number]))
                annotated = {
                    "question": document.question,
                    "images": document.images,
                    "answer": answers[name][number] if right and name in answers else "no such answer",
                    "choice": likeliest if right else (likeliest + 1) % len(CHOICES),
                }
                lines.write(json.dumps(annotated) + "\n")
        (directory / f"{name}.yaml").write_text(TASK.format(name=name, documents=directory / f"{name}.jsonl") + task)


@pytest.mark.parametrize("task", ["neo_chat", "neo_simple"])
def test_answers_are_those_of_the_model(run, task):
    """In batches as alone, images where the task puts them; an image that cannot be used has an empty answer."""
    assert run.answers["neo_chat"] != run.answers["neo_simple"]
    assert [sample["filtered_resps"].strip() for sample in run.samples[task]] == run.answers[task]
    assert run.results[task]["exact_match,none"] == pytest.approx(len(RIGHT) / 5)


def test_the_likeliest_choice_is_chosen(run):
    losses = [[float(loss) for loss, _ in sample["filtered_resps"]] for sample in run.samples["neo_choice"]]
    np.testing.assert_allclose(losses, run.losses, atol=1e-4)
    assert len({int(np.argmin(row)) for row in losses}) > 1
    assert run.results["neo_choice"]["acc,none"] == pytest.approx(len(RIGHT) / 5)


def test_the_scores_are_found_by_follow(run):
    share = pytest.approx(len(RIGHT) / 5)
    assert run.kept == {
        "neo_chat": {"exact_match": share},
        "neo_simple": {"exact_match": share},
        "neo_choice": {"acc": share},
    }


def test_rejected_documents_and_ignored_arguments_are_reported(run):
    for task in TASKS:
        sentence = f"{task}, document 3: the image number 1: absolute aspect ratio must be smaller than 200"
        assert run.printed.count(sentence) == 1
    assert "1 documents, named above" in run.printed and "2 documents, named above" in run.printed
    assert run.printed.count("ignored: image_aspect_ratio") == 2  # once in each run
