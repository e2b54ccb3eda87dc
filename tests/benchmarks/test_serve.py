"""The serving benchmark: both ways of this environment answer alike, and the others are named."""

import json
import sys

import pytest
import yaml
from support.processes import run_python

from neo_megatron.benchmarks import serve
from neo_megatron.benchmarks.serve_questions import chosen_questions
from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.checkpoint.to_hf import convert_megatron_to_hf
from neo_megatron.data.chat import load_tokenizer

QUESTIONS = ["What is it?", "Is it red?", "Where is it?", "And the other?"]


@pytest.fixture(scope="module")
def quickstart(golden, tmp_path_factory):
    """The files of the quickstart that the benchmark reads, with the golden model."""
    out = tmp_path_factory.mktemp("quickstart")
    convert_hf_to_megatron(golden / "ckpt_untied", out / "megatron")
    convert_megatron_to_hf(out / "megatron", out / "neo", load_tokenizer(golden / "tokenizer"))
    records = [
        {
            "image": f"{'ab'[number % 2]}.png",
            "conversations": [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "Yes."}],
        }
        for number, text in enumerate(QUESTIONS)
    ]
    (out / "test.json").write_text(json.dumps(records))
    data_set = {"annotation_path": "test.json", "data_path": str(golden / "images")}
    (out / "registry.yaml").write_text(yaml.safe_dump({"test": data_set}))
    return out


def test_questions_are_spread_over_all(quickstart):
    chosen = chosen_questions(quickstart / "registry.yaml", 2)
    assert [question.record for question in chosen] == [0, 2]
    assert len(chosen_questions(quickstart / "registry.yaml", 9)) == len(QUESTIONS)


def test_the_ways_answer_alike_and_what_is_not_installed_is_named(quickstart, tmp_path):
    pytest.importorskip("openai", reason="openai is not installed: tools/environment.sh test adds it")
    pytest.importorskip("transformers", minversion="5.6", reason="earlier servers of transformers do not load NEO")
    flags = ["--quickstart", quickstart, "--questions", len(QUESTIONS), "--scratch", tmp_path]
    done = run_python("-m", "neo_megatron", "benchmark", "serve", *flags)
    assert done.returncode == 0, done.stdout[-3000:]
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert [row[0].split("`")[1].split(" --")[0] for row in rows] == ["neo-megatron generate", "transformers serve"]
    for _, speed, first, memory, others in rows:
        assert float(speed) > 0 and float(first) > 0 and float(memory.replace(",", "")) > 100
        assert others == "0 of 4 |"
    assert "vLLM, 16 clients was not run, because --vllm-python names no Python with vLLM" in done.stdout


def test_other_answers_are_counted(quickstart, tmp_path):
    reference = serve.Measured(["yes", "no", "red"], 1.5, [0.01, 0.03, 0.02], 10**9)
    measured = serve.Measured(["yes ", "yes", "red"], 3.0, [0.01], 5 * 10**8)
    cells = serve._row("transformers", measured, reference)
    assert cells[1:] == ["1.0", "10", "500", "1 of 3"]
    assert serve._row("vllm", measured, None)[4] == ""


def test_without_the_quickstart_or_a_server_there_is_one_sentence(quickstart, tmp_path):
    done = run_python("-m", "neo_megatron", "benchmark", "serve", "--quickstart", tmp_path / "none")
    assert done.returncode == 1 and "none/neo is missing: run bash examples/quickstart/run.sh" in done.stdout
    with (
        pytest.raises(serve.DataError, match="ended: .*there is no model"),
        serve._started([sys.executable, "-c", "print('there is no model')"], 1, tmp_path / "log", {}),
    ):
        pass
    done = run_python("-m", "neo_megatron", "benchmark", "data", "--questions", "3")
    assert done.returncode == 2 and "--questions is for serve" in done.stdout
    done = run_python("-m", "neo_megatron", "benchmark", "serve", "--only", "batches", "--vllm-python", sys.executable)
    assert done.returncode == 2 and "--vllm-python is for the part vllm, which --only leaves out" in done.stdout
