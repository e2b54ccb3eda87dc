"""The page of a run that is followed: curves, changed answers, and attention as the model computes it."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from support.paths import GOLDEN

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.prepare.registry import Source
from neo_megatron.follow.attention import SAMPLES, attention_maps
from neo_megatron.follow.page import CHANGES, changed_answers, page
from neo_megatron.inference.answering import Answerer
from neo_megatron.inference.batches import Task
from neo_megatron.inference.questions import read_questions

HOSTILE = '</p></style><script>alert(1)</script><img src="http://example.org/a.png"> & "quoted"'


def row(step: int, match: float, sets=("a", "b")) -> dict:
    scores = {"questions": 4, "exact_match": match, "anls": match, "cut": 0}
    return {"step": step, "exact_match": match, "anls": match, "data_sets": dict.fromkeys(sets, scores)}


def line(record: int, prediction: str, right: bool, **keys) -> dict:
    return {
        **{"data_set": "a", "file": "/data/a.json", "record": record, "element": None, "turn": 1, "finished": True},
        **{"question": "<image>\nIs it?", "pictures": [], "references": ["yes"], "prediction": prediction},
        **{"exact_match": right, "anls": float(right), **keys},
    }


def test_changed_answers_are_those_that_differ():
    """Not in case, white space or thinking; the ones that became wrong come first."""
    before = [line(0, "yes", True), line(1, "no", False), line(2, "a", False), line(3, "Yes ", True)]
    before.append(line(4, "not asked again", False))
    after = [line(0, "no", False), line(1, "yes", True), line(2, "b", False), line(3, "<think>\n</think>yes", True)]
    pairs = changed_answers(before, [*reversed(after), line(9, "new", False)])
    assert [(old["prediction"], new["prediction"]) for old, new in pairs] == [("yes", "no"), ("no", "yes"), ("a", "b")]


def test_the_page(tmp_path):
    Image.new("RGB", (64, 32)).save(tmp_path / "a.png")
    shown = {"pictures": [str(tmp_path / "a.png"), "gone.png"]}
    answers = [[line(0, "yes", True, **shown)], [line(0, "no", False, **shown)]]
    html = page("runs/one", [row(20, 0.5), row(1000, 0.75), row(2000, 0.25)], [1000, 2000], answers, {20: [], 2000: []})
    assert "<h1>25.0%</h1>" in html and "mean over 2 data sets" in html
    assert re.search(r"best of 3 checkpoints\s+is step <b>1,000</b> with 75.0%", html)
    assert html.count("exports/step-") == 2 and html.count("not kept") == 1
    assert html.count("<svg") == 3 and html.count("<title>step 1,000: 0.750</title>") == 6
    assert "1 that changed from step 1,000 to step 2,000" in html
    assert 'class="right">yes<' in html and 'class="wrong">no<' in html and "expected: yes" in html
    assert html.count('src="data:image/jpeg') == 1 and "and 1 more images" in html
    assert "No question is about one image." in html


def test_the_page_of_one_checkpoint_and_of_one_data_set():
    html = page("run", [row(5, 1.0, ["a"])], [5], [[line(0, "yes", True)]], {5: []})
    assert html.count("<svg") == 1 and "There is one checkpoint yet" in html and "of 1 checkpoint\n" in html


def test_many_changes_are_cut():
    count = CHANGES + 3
    answers = [[line(number, said, False) for number in range(count)] for said in ("a", "b")]
    html = page("run", [row(1, 0.0), row(2, 0.0)], [], answers, {1: [], 2: []})
    assert f"The first {CHANGES} of {count} that changed" in html and html.count('class="case"') == CHANGES


def test_everything_is_escaped():
    keys = {"data_set": HOSTILE, "question": HOSTILE, "references": [HOSTILE], "pictures": [HOSTILE]}
    answers = [[line(0, HOSTILE, False, **keys)], [line(0, f"{HOSTILE}!", False, **keys)]]
    levels = base64.b64encode(bytes([0, 255])).decode()
    sample = {"data_set": HOSTILE, "question": HOSTILE, "answer": HOSTILE, "references": [HOSTILE]}
    sample |= {"grid": [1, 2], "levels": levels, "share": 0.5, "image": "data:image/jpeg;base64,AA=="}
    rows = [row(1, 0.0, [HOSTILE, "b"]), row(2, 0.0, [HOSTILE, "b"])]
    html = page(HOSTILE, rows, [1], answers, {1: [sample], 2: [sample]})
    assert "<script" not in html and html.count("</style>") == 1 and "http://example.org/a.png&quot;" in html
    assert set(re.findall(r'(?:src|href)="(.{5})', html)) == {"data:"}


@pytest.fixture(scope="module")
def asked(checkpoint, tmp_path_factory) -> tuple[Task, list]:
    """Questions of two data sets; one image is broken, one is asked about twice, one question has two images."""
    room = tmp_path_factory.mktemp("attention")
    (room / "broken.png").write_bytes((GOLDEN / "images" / "b.png").read_bytes()[:-200])

    def conversation(tags: int) -> list:
        return [{"from": "human", "value": "<image>" * tags + "Odd?"}, {"from": "gpt", "value": "No."}]

    images = GOLDEN / "images"
    records = {
        "first": [
            {"image": str(room / "broken.png"), "conversations": conversation(1)},
            {"image": [str(images / "a.png"), str(images / "b.png")], "conversations": conversation(2)},
            {"image": str(images / "a.png"), "conversations": [*conversation(1), *conversation(0)]},
            {"conversations": conversation(0)},
            {"image": str(images / "b.png"), "conversations": conversation(1)},
        ],
        "second": [{"image": str(images / f"{name}.png"), "conversations": conversation(1)} for name in "cea"],
    }
    sources = []
    for name, written in records.items():
        (room / f"{name}.json").write_text(json.dumps(written))
        sources.append(Source(name, str(room / f"{name}.json"), ""))
    settings = PreprocessConfig(min_pixels=4096, max_pixels=65536, image_store="patches")
    task = Task(checkpoint, "auto", settings, 5)
    return task, read_questions(sources, settings, "every answer").questions


def test_attention_maps_are_the_weights_of_a_dense_computation(asked, checkpoint):
    """As the eager kernel gives all weights at once, without a cache."""
    task, questions = asked
    maps = attention_maps(task, questions)
    assert [(one["data_set"], one["question"]) for one in maps] == [
        *(("second", "<image>Odd?"), ("first", "<image>Odd?"), ("second", "<image>Odd?"), ("first", "<image>Odd?"))
    ]
    assert len(maps) == SAMPLES
    answerer = Answerer(checkpoint, device="cpu", attention="eager", min_pixels=4096, max_pixels=65536)
    for one, name in zip(maps, ["c", "a", "e", "b"], strict=True):
        prompt = answerer.prompt("<image>Odd?", [GOLDEN / "images" / f"{name}.png"])
        (answer,) = answerer.answer([prompt], 5)
        inputs = answerer.inputs([prompt])
        length = inputs["input_ids"].shape[1]
        said = torch.tensor([answer.tokens])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], said], dim=1)
        del inputs["attention_mask"]
        with torch.inference_mode():
            weights = torch.stack(answerer.model(**inputs, output_attentions=True).attentions)[:, 0]
        image = inputs["input_ids"][0] == answerer.config.img_context_token_id
        steps = len(answer.tokens) + answer.finished
        expected = weights[:, :, length - 1 : length - 1 + steps][..., image].mean(dim=(0, 1, 2))
        assert one["answer"] == answer.text.strip() and one["references"] == ("No.",)
        assert np.prod(one["grid"]) == len(expected) and one["grid"] == [side // 2 for side in prompt.grids[0]]
        assert one["share"] == pytest.approx(float(expected.sum()), rel=1e-4)
        levels = np.frombuffer(base64.b64decode(one["levels"]), np.uint8)
        assert np.abs(levels - (expected / expected.max() * 255).numpy()).max() <= 0.51
        assert one["image"].startswith("data:image/jpeg;base64,")


def test_questions_without_an_image_have_no_maps(asked):
    task, questions = asked
    assert attention_maps(task, [question for question in questions if len(question.sample.images) != 1]) == []
