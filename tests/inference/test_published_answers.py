"""`neo-megatron generate` and `evaluate` on exports of a NEO-unify: the answers of the published `chat`."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from support.golden_models import MODELS
from support.paths import GOLDEN

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.cli import evaluate, generate
from neo_megatron.data.chat import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning")

CASES = json.loads((GOLDEN / "u1" / "generate.json").read_text())


def record(case: dict[str, Any], answered: bool) -> dict[str, Any]:
    """A case of the published `chat` as an annotation, with its answer or for one."""
    texts = [text for turn in case["history"] or [] for text in turn] + [case["question"]]
    if "<image>" not in texts[0]:
        texts[0] = f"<image>\n{texts[0]}"
    texts += [case["response"]] if answered else []
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    return {"image": case["images"], "conversations": turns}


@pytest.fixture(scope="module", params=["dense", "moe"])
def export(request, tmp_path_factory) -> tuple[Path, list[dict[str, Any]]]:
    """An exported model, and what its published `chat` was asked."""
    room = tmp_path_factory.mktemp(request.param)
    convert_hf_to_megatron(MODELS[f"u1-{request.param}"].checkpoint, room / "megatron")
    convert_megatron_to_hf(room / "megatron", room / "hf", load_tokenizer(GOLDEN / "tokenizer"))
    return room / "hf", CASES[request.param]


@pytest.fixture
def asked(export, monkeypatch):
    """The cases of a model, and a function that runs a command on its export in this process."""
    model, cases = export

    def run(command, *flags: object) -> None:
        limits = [f"--{name}-pixels={cases[0][f'{name}_pixels']}" for name in ("min", "max")]
        limits += [f"--max-new-tokens={cases[0]['max_new_tokens']}"]
        monkeypatch.setattr(sys, "argv", ["neo-megatron", "--model", str(model), *limits, *map(str, flags)])
        command.main()

    return cases, run


def run_on_records(run, command, room: Path, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of `answers.jsonl`."""
    (room / "records.json").write_text(json.dumps(records))
    flags = ("--input", room / "records.json", "--image-root", GOLDEN, "--output", room / "out", "--workers", 1)
    run(command, *flags)
    return [json.loads(line) for line in (room / "out" / "answers.jsonl").read_text().splitlines()]


def test_generate_answers_as_published(asked, tmp_path, capsys):
    """One prompt, and a batch of records: one image, two, and a question after an answer."""
    cases, run = asked
    run(generate, "--image", GOLDEN / cases[0]["images"][0], "--prompt", cases[0]["question"])
    assert capsys.readouterr().out.strip() == cases[0]["response"].strip()
    lines = run_on_records(run, generate, tmp_path, [record(case, answered=False) for case in cases])
    assert [line["prediction"] for line in lines] == [case["response"].strip() for case in cases]


def test_evaluate_finds_the_published_answers_right(asked, tmp_path):
    """Each of them is the last answer of its record; the one before it is not the model's."""
    cases, run = asked
    lines = run_on_records(run, evaluate, tmp_path, [record(case, answered=True) for case in cases])
    last = {line["record"]: line for line in lines}
    assert len(lines) == 4 and [last[number]["prediction"] for number in range(3)] == [
        case["response"].strip() for case in cases
    ]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert all(line["exact_match"] for line in last.values()) and scores["exact_match"] == 0.75
