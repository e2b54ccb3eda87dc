"""`neo-megatron generate`: one answer on the terminal, many into a file."""

import gzip
import json
import runpy
import sys
from pathlib import Path

import pytest
from support.paths import TOOLS

from neo_megatron.cli import generate
from neo_megatron.data.conversation import Turn
from neo_megatron.errors import DataError
from neo_megatron.inference.answering import Answerer

TOOL = TOOLS / "generate.py"
TOKENS = 6


@pytest.fixture
def run(checkpoint, monkeypatch):
    """Runs the tool in this process."""

    def of(*flags: object) -> None:
        command = ["generate.py", "--model", checkpoint, "--max-new-tokens", TOKENS, *flags]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        generate.main()

    return of


def test_one_answer(run, answerer, golden, capsys):
    """The answer alone on standard output; the system turn is part of the prompt."""
    images = [golden / "images" / f"{letter}.png" for letter in "ab"]
    (expected,) = answerer.answer([answerer.prompt("Same?", images)], TOKENS)
    run("--image", *images, "--prompt", "Same?")
    out = capsys.readouterr()
    assert out.out == expected.text + "\n" and "tokens/s" in out.err
    run("--image", *images, "--prompt", "Same?", "--system", "Be terse.")
    other = capsys.readouterr().out
    assert other != out.out


def test_a_tag_can_be_a_word(run, answerer, golden, capsys):
    """In the prompt after a backslash, in the system turn always; in a record as in one prompt."""
    image = golden / "images" / "a.png"
    turns = [Turn("system", r"Mind the \<image> tag.", False), Turn("user", "<image>\n" + r"Is \<image> a tag?", False)]
    (expected,) = answerer.answer([answerer.prompt(turns, [image])], TOKENS)
    run("--image", image, "--prompt", r"Is \<image> a tag?", "--system", "Mind the <image> tag.")
    assert capsys.readouterr().out == expected.text + "\n"


def test_a_seed_repeats_sampled_answers(run, capsys):
    def drawn(seed):
        run("--prompt", "Hi", "--temperature", 2.0, "--top-p", 0.9, "--seed", seed)
        return capsys.readouterr().out

    assert drawn(1) == drawn(1)
    assert len({drawn(seed) for seed in (1, 2, 3)}) > 1


def test_many_answers(run, answerer, golden, tmp_path, capsys):
    records = [
        {"id": "x", "image": "a.png", "prompt": "What?"},
        {"image": "none.png", "prompt": "What?"},
        {"conversations": [{"from": "human", "value": "Hi"}]},
        {"prompt": r"What is \<image>?"},
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ["--image-root", golden / "images", "--output", tmp_path / "out", "--workers", 1]
    run("--input", tmp_path / "prompts.jsonl", *flags)
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    prompts = [answerer.prompt("What?", [golden / "images" / "a.png"]), answerer.prompt("Hi")]
    prompts.append(answerer.prompt(r"What is \<image>?"))
    expected = [answerer.answer([prompt], TOKENS)[0] for prompt in prompts]
    assert [(line["id"], line["record"], line["prediction"]) for line in lines] == [
        ("x", 0, expected[0].text.strip()),
        (None, 2, expected[1].text.strip()),
        (None, 3, expected[2].text.strip()),
    ]
    (reject,) = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert (reject["record"], reject["kind"]) == (1, "missing picture")
    assert "1 samples were rejected" in capsys.readouterr().out


def test_prompts_of_several_files(run, tmp_path):
    """Of a directory; the lines say from which file each answer is."""
    (tmp_path / "prompts").mkdir()
    for name, prompts in (("a.jsonl", ["One?", "Two?"]), ("b.jsonl.gz", ["Three?"])):
        opened = gzip.open if name.endswith("gz") else open
        with opened(tmp_path / "prompts" / name, "wt") as file:
            file.writelines(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
    run("--input", tmp_path / "prompts", "--output", tmp_path / "out", "--workers", 1)
    lines = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [(line["data_set"], Path(line["file"]).name, line["record"], line["question"]) for line in lines] == [
        ("prompts", "a.jsonl", 0, "One?"),
        ("prompts", "a.jsonl", 1, "Two?"),
        ("prompts", "b.jsonl.gz", 0, "Three?"),
    ]
    with pytest.raises(DataError, match=r"--input names .*a\.jsonl twice"):
        run("--input", tmp_path / "prompts", tmp_path / "prompts" / "a.jsonl", "--output", tmp_path / "other")


def test_the_form_of_a_prompt_is_chosen(run, checkpoint, golden, tmp_path, capsys):
    """Layout, system turn and places of images are the same for one prompt and for records."""
    flags = ["--chat-layout", "u1", "--system", "Reason step by step.", "--image-text", "numbered"]
    flags += ["--min-pixels", 4096, "--max-pixels", 65536, "--sample-tokens", 3072 + 32]
    limits = {"min_pixels": 4096, "max_pixels": 65536, "sample_tokens": 3072 + 32}
    images = [golden / "images" / f"{letter}.png" for letter in "ab"]
    other = Answerer(checkpoint, device="cpu", chat_layout="u1", system="Reason step by step.", **limits)
    prompt = other.prompt("Same? <image><image>", images, "numbered")
    text = other.tokenizer.decode(other.tokens([prompt])[0]).replace("<IMG_CONTEXT>", "")
    assert text == (
        "<|im_start|>system\nReason step by step.<|im_end|>\n<|im_start|>user\nImage-1: <img></img>\n"
        "Image-2: <img></img>\nSame? <|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert [rows * columns // 4 <= 16 for rows, columns in prompt.grids] == [True, True]
    (expected,) = other.answer([prompt], TOKENS)
    run("--image", *images, "--prompt", "Same? <image><image>", *flags)
    assert capsys.readouterr().out == expected.text + "\n"
    record = {"image": ["a.png", "b.png"], "prompt": "Same? <image><image>"}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(record))
    flags += ["--image-root", golden / "images", "--output", tmp_path / "out", "--workers", 1]
    run("--input", tmp_path / "prompts.jsonl", *flags)
    (line,) = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert json.loads(line)["prediction"] == expected.text.strip()


def test_a_bad_image_ends_in_one_sentence(checkpoint, golden, tmp_path, monkeypatch):
    torn = tmp_path / "torn.png"
    torn.write_bytes((golden / "images" / "a.png").read_bytes()[:500])
    command = [str(TOOL), "--model", str(checkpoint), "--image", str(torn), "--prompt", "What?"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert ended.value.code.startswith(f"generate: the image {torn} cannot be decoded")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ([], "give either --prompt or --input"),
        (["--prompt", "Hi", "--input", "a.jsonl"], "give either --prompt or --input"),
        (["--input", "a.jsonl"], "--input and --output go together"),
        (["--prompt", "Hi", "--temperature", "-1"], "--temperature must be 0 or above"),
        (["--prompt", "Hi", "--top-p", "0.5"], "--top-p needs a --temperature above 0"),
        (["--prompt", "Hi", "--image-root", "a"], "--image-root goes with --input"),
        (["--prompt", "Hi", "--sample-tokens", "8192"], "--sample-tokens goes with --chat-layout u1"),
        (["--prompt", "Hi", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
    ],
)
def test_flags_that_contradict_each_other(run, capsys, flags, sentence):
    with pytest.raises(SystemExit):
        run(*flags)
    assert sentence in capsys.readouterr().err


def test_a_missing_model_is_named(monkeypatch, tmp_path):
    command = [str(TOOL), "--model", str(tmp_path / "gone"), "--prompt", "Hi"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOL), run_name="__main__")
    assert ended.value.code.startswith(f"generate: --model {tmp_path}/gone does not exist: give the directory of a NEO")
