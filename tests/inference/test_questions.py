"""Which turns of which records are asked, and which records are left out."""

import json
from fractions import Fraction

import numpy as np
import pytest
from support.containers import write

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.prepare.registry import Source
from neo_megatron.errors import DataError
from neo_megatron.inference.prompts import prompt_of_sample
from neo_megatron.inference.questions import read_questions

SETTINGS = PreprocessConfig(min_pixels=4096, max_pixels=65536, image_store="patches")


def human(text):
    return {"from": "human", "value": text}


def gpt(text, **keys):
    return {"from": "gpt", "value": text, **keys}


@pytest.fixture
def read(golden, tmp_path):
    """Reads records as a JSONL; images are the golden ones."""

    def of(records, ask="every answer", share=1):
        path = tmp_path / "asked.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records))
        source = Source("asked", str(path), str(golden / "images"), Fraction(share))
        return read_questions([source], SETTINGS, ask)

    return of


def test_every_trained_turn_is_a_question(read):
    records = [
        {"id": "a1", "image": "a.png", "conversations": [human("One?"), gpt("1"), human("Two?"), gpt("2")]},
        [
            {"conversations": [human("Three?"), gpt("3", is_input=True), human("Four?"), gpt("4", answers=["four"])]},
            {"conversations": [human("Five?"), gpt("5")]},
        ],
    ]
    questions = read(records).questions
    assert [(*question.place[2:], question.text, question.references) for question in questions] == [
        (0, None, 1, "<image>\nOne?", ("1",)),
        (0, None, 3, "Two?", ("2",)),
        (1, 0, 3, "Four?", ("4", "four")),
        (1, 1, 1, "Five?", ("5",)),
    ]
    assert [question.id for question in questions] == ["a1", "a1", None, None]
    assert questions[1].length > questions[3].length


def test_questions_of_containers_are_those_of_loose_files(read, golden, tmp_path):
    """Their images are in the container; answers name it."""
    records = [{"image": ["a.png"], "conversations": [human("<image>One?"), gpt(f"{number}")]} for number in range(3)]
    expected = read(records).questions
    for kind in ("parquet struct", "tar", "jsonl.gz"):
        path = write(kind, tmp_path / "packed", records, golden / "images")
        source = Source("packed", str(path), str(golden / "images"))
        found = read_questions([source], SETTINGS, "every answer").questions
        assert [(it.record, it.text, it.references, it.length) for it in found] == [
            (it.record, it.text, it.references, it.length) for it in expected
        ]
        prompts = [prompt_of_sample(it.sample, it.turn, SETTINGS) for it in (found[0], expected[0])]
        assert np.array_equal(prompts[0].images[0], prompts[1].images[0]) and prompts[0].turns == prompts[1].turns


def test_answers_and_tags_are_read_as_in_training(read):
    """A system prompt of its own key moves no turn; tags of an answer are text; an empty answer asks nothing."""
    records = [
        {"system": "s", "conversations": [human("One?"), gpt("1", answers=["one"]), human("Two?"), gpt("2")]},
        {
            "images": ["a.png"],
            "conversations": [human(r"<image> \<image>"), gpt("<image>", weight=1), gpt("x", loss=0)],
        },
        {"conversations": [human("Empty, but not only?"), gpt(" ", answers=["nothing"])]},
        {"conversations": [human("Empty?"), gpt(" ")]},
        {"tools": "[]", "conversations": [human("Six?"), gpt("6")]},
    ]
    listed = read(records)
    assert [(*question.place[2:], question.references) for question in listed.questions] == [
        (0, None, 2, ("1", "one")),
        (0, None, 4, ("2",)),
        (1, None, 1, ("<image>",)),
        (2, None, 1, (" ", "nothing")),
    ]
    prompt = prompt_of_sample(listed.questions[2].sample, 1, SETTINGS)
    assert len(prompt.images) == 1 and prompt_of_sample(listed.questions[2].sample, 3, SETTINGS).grids == prompt.grids
    assert listed.questions[2].sample.turns[0].literal == "<image> <image>"
    assert [(entry["record"], entry["kind"]) for entry in listed.rejects] == [
        (3, "empty answer"),
        (4, "unsupported key"),
    ]


def test_a_prompt_ends_in_front_of_its_answer(read):
    """Images of later turns are left out, and share the limit of pixels all the same, as in training."""
    turns = [human("<image>One?"), gpt("1"), human("<image>Two?"), gpt("2")]
    first, second = read([{"image": ["c.png", "a.png"], "conversations": turns}]).questions
    prompts = [prompt_of_sample(question.sample, question.turn, SETTINGS) for question in (first, second)]
    assert [len(prompt.turns) for prompt in prompts] == [1, 3]
    assert [len(prompt.images) for prompt in prompts] == [1, 2]
    assert prompts[0].grids == prompts[1].grids[:1]
    assert prompts[0].images[0].shape == (prompts[0].grids[0][0] * prompts[0].grids[0][1] // 4, 4, 768)


def test_next_turns(read):
    """A prompt; a conversation that waits for an answer; one that has it already."""
    records = [
        {"id": 7, "image": "a.png", "prompt": "What?"},
        {"conversations": [human("Hi"), gpt("Hello"), human("And?")]},
        {"conversations": [human("Hi"), gpt("Hello"), human("And?"), gpt("Well.")]},
        {"prompt": "Both?", "conversations": [human("Hi")]},
        {"conversations": []},
        {"prompt": 3},
        {"prompt": "<image>", "image": []},
    ]
    listed = read(records, "next turn")
    asked = [(question.record, question.turn, question.text, question.references) for question in listed.questions]
    assert asked == [(0, 1, "<image>\nWhat?", ()), (1, 3, "And?", ()), (2, 3, "And?", ())]
    assert [(entry["record"], entry["kind"]) for entry in listed.rejects] == [
        (3, "malformed record"),
        (4, "empty conversation"),
        (5, "malformed record"),
        (6, "pictures and tags differ"),
    ]


def test_a_question_is_asked_once(read, tmp_path):
    records = [{"conversations": [human(f"{number}?"), gpt("yes")]} for number in range(20)]
    assert len(read(records, share="1/4").questions) == 5
    with pytest.raises(DataError, match="asked: each question is asked once"):
        read(records, share=2)


@pytest.mark.parametrize("answers", ["four", [4], {"a": 1}])
def test_answers_must_be_strings(read, answers):
    good = {"conversations": [human("Two?"), gpt("2")]}
    listed = read([{"conversations": [human("Four?"), gpt("4", answers=answers)]}, good])
    assert [entry["reason"] for entry in listed.rejects] == ["'answers' of turn 1 must be a list of strings"]


def test_answers_must_be_unicode(read):
    """JSON can write an unpaired surrogate, which no page can show."""
    good = {"conversations": [human("Two?"), gpt("2", answers=["\U0001f600"])]}
    listed = read([{"conversations": [human("Four?"), gpt("4", answers=["\ud83d"])]}, good])
    assert [question.references for question in listed.questions] == [("2", "\U0001f600")]
    assert ["an unpaired surrogate" in entry["reason"] for entry in listed.rejects] == [True]


def test_a_file_without_questions_is_refused(read):
    with pytest.raises(DataError, match="no question in .*asked.jsonl; the first of 2 rejected: the record is not"):
        read(["{broken", "more"])


def test_unread_keys_are_reported(read):
    """As in preprocessing; `prompt` is read where it is asked."""
    records = [{"prompt": "One?", "lang": "en"}, {"prompt": "Two <|image_pad|>?", "lang": "en"}]
    keys, warning = read(records, "next turn").noticed.sentences()
    assert keys == "ignored keys of samples kept, which nothing reads: 'lang' in 2"
    assert warning.startswith("warning: '<|image_pad|>' stays text in 1 samples") and "record 1" in warning
    (keys,) = read([{"prompt": "3", "conversations": [human("Two?"), gpt("2")]}]).noticed.sentences()
    assert keys.endswith("'prompt' in 1")
