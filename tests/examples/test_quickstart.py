"""What the quickstart's numbers rest on: its annotations, its tokenizer, its scores, and its page."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from base64 import b64decode
from collections import defaultdict
from pathlib import Path

import easy_vqa
import prepare_data
import pytest
import report
from questions import COLOURS, KINDS, SHAPES, Question, kind_of_question, read_questions, scores, text_only_answers
from torch.utils.tensorboard import SummaryWriter
from training_runs import TrainingRun, looking_curves, loss_curves, thinned
from transformers import AutoTokenizer

from neo_megatron.checkpoint.neo_directory import read_sizes
from neo_megatron.data.chat import NEO_TOKENS, ChatEncoder, load_tokenizer, special_ids
from neo_megatron.data.prepare.records import check_sample
from neo_megatron.data.prepare.registry import Source, data_list

TEST_IMAGES = Path(easy_vqa.get_test_image_paths()[0]).parent


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """What `prepare_data.py` writes."""
    output = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, str(Path(prepare_data.__file__)), "--output", str(output), "--pixels", "16384"]
    options = ["--vocabulary", "512", "--questions-per-sample", "1", "--attention-form", "separate"]
    subprocess.run([*command, *options], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    return output


@pytest.mark.parametrize(("name", "count"), [("questions", 38575), ("test", 9673)])
def test_every_question_is_a_record_of_the_published_form(data, name, count):
    records = json.loads((data / f"{name}.json").read_text())
    assert len(records) == count
    split = {"questions": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[name]
    expected = [
        {
            "image": f"{image}.png",
            "conversations": [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": answer}],
        }
        for text, answer, image in zip(*split(), strict=True)
    ]
    assert sorted(map(json.dumps, records)) == sorted(map(json.dumps, expected))


def test_the_data_path_accepts_the_records(data):
    """Each data set of the registry, read with its own directory of images."""
    for source in data_list(["shapes", "questions", "test"], data / "registry.yaml"):
        for record in json.loads(Path(source.annotations).read_text())[:50]:
            (image,) = check_sample(record, source).images
            assert Path(image).is_file()


def test_shapes_are_the_training_questions_that_ask_for_one(data):
    """The first run's questions; every answer comes from the training set."""
    training = {
        (f"{image}.png", text, answer) for text, answer, image in zip(*easy_vqa.get_train_questions(), strict=True)
    }
    records = json.loads((data / "shapes.json").read_text())
    assert len(records) == 1689 + 1701 + 1612
    for record in records:
        question, answer = (turn["value"] for turn in record["conversations"])
        assert answer in SHAPES
        assert (record["image"], question.removeprefix("<image>\n"), answer) in training


def test_several_questions_may_share_an_image():
    questions = prepare_data.load_questions("train")
    records = list(prepare_data.question_records(questions, 4))
    turns = [len(record["conversations"]) for record in records]
    assert max(turns) == 8 and sum(turns) == 2 * 38575
    for record in records:
        values = [turn["value"] for turn in record["conversations"]]
        assert values[0].startswith("<image>\n") and not any("<image>" in value for value in values[1:])
        assert [turn["from"] for turn in record["conversations"]] == ["human", "gpt"] * (len(values) // 2)


def test_tokenizer(data):
    """It gives every text back, has NEO's tokens, and typing one does not make one."""
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    assert len(tokenizer) == 512
    assert tokenizer.pad_token == "<|endoftext|>"
    for text in ("what color is the circle?", "blue rectangle", "Grüße, 你好\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(load_tokenizer(data / "tokenizer")) == 512  # nothing is missing that NEO would add
    for token in NEO_TOKENS:
        assert tokenizer.decode([tokenizer.convert_tokens_to_ids(token)]) == token
    ids = special_ids(tokenizer)
    encoder = ChatEncoder(tokenizer.backend_tokenizer.to_str(), ids)
    record = {"conversations": [{"from": "human", "value": "<img>"}, {"from": "gpt", "value": "no"}]}
    (sample,) = encoder.encode([(check_sample(record, Source("test", data / "test.json")).turns, [])])
    assert ids.image_start not in sample.tokens


def test_model_config_fits_the_tokenizer(data):
    tokenizer = AutoTokenizer.from_pretrained(data / "tokenizer")
    sizes = read_sizes(data / "model")
    assert sizes.image_start_token_id == tokenizer.convert_tokens_to_ids("<img>")
    assert sizes.image_context_token_id == tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert (sizes.vocab_size, sizes.min_pixels, sizes.max_pixels) == (512, 16384, 16384)


def test_nothing_is_learned_from_test_questions(tmp_path, monkeypatch):
    """With every test answer exchanged, all but the test annotations stays byte for byte the same."""
    options = ["--questions-per-sample", "1", "--attention-form", "separate"]
    arguments = ["--pixels", "16384", "--vocabulary", "512", *options]
    texts, answers, images = easy_vqa.get_test_questions()
    for name, test in (("as_is", answers), ("exchanged", ["purple pentagon"] * len(answers))):
        monkeypatch.setattr(easy_vqa, "get_test_questions", lambda test=test: (texts, test, images))
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", "--output", str(tmp_path / name), *arguments])
        prepare_data.main()
    files = {path.relative_to(tmp_path / "as_is") for path in (tmp_path / "as_is").rglob("*") if path.is_file()}
    differing = {
        str(file)
        for file in files
        if (tmp_path / "as_is" / file).read_bytes() != (tmp_path / "exchanged" / file).read_bytes()
    }
    assert differing == {"test.json"}


def test_best_text_only_answerer(data):
    training, asked = read_questions(data / "questions.json"), read_questions(data / "test.json")
    guesses = text_only_answers(training, asked)
    overall, *kinds = scores(asked, guesses, guesses)
    assert overall.text_only / overall.total == pytest.approx(0.670, abs=0.001)
    assert [kind.kind for kind in kinds] == list(KINDS)
    assert sum(kind.total for kind in kinds) == overall.total == 9673
    assert sum(kind.right for kind in kinds) == overall.right


def test_an_unknown_question_gets_the_most_frequent_answer():
    training = [Question("0.png", text, answer) for text, answer in [("a?", "yes"), ("b?", "no"), ("c?", "no")]]
    asked = [Question("1.png", text, "yes") for text in ("a?", "z?")]
    assert text_only_answers(training, asked) == ["yes", "no"]


def test_kind_of_question(data):
    """The answers to each kind are of one sort, over all test questions."""
    answers = defaultdict(set)
    for question in read_questions(data / "test.json"):
        answers[question.kind].add(question.answer)
    assert answers["what shape"] == set(SHAPES)
    assert answers["what colour"] == set(COLOURS)
    assert answers["yes or no, shape"] == answers["yes or no, colour"] == {"yes", "no"}
    assert kind_of_question("is there not a triangle in the image?") == "yes or no, shape"
    assert kind_of_question("is no teal shape present?") == "yes or no, colour"


@pytest.fixture
def run(tmp_path) -> TrainingRun:
    """A run as TensorBoard keeps it: a loss at every step, held-out losses at some, Megatron's arguments as text."""
    writer = SummaryWriter(tmp_path / "tensorboard")
    for name in report.SETTINGS.values():
        writer.add_text(name, "2")
    for step in range(1, 1001):
        writer.add_scalar("lm loss", 1 / step, step)
    for step in (500, 1000):
        writer.add_scalar("lm loss validation", 2 / step, step)
        writer.add_scalar("looking/delta-permuted validation", step / 1000 - 0.6, step)
        writer.add_scalar("looking/delta-blank validation", step / 500, step)
    writer.close()
    return TrainingRun.read("questions", tmp_path / "tensorboard")


def test_training_run_is_read_whole(run):
    assert run.settings["lr"] == "2"
    assert [step for step, _ in run.loss] == list(range(1, 1001))
    assert dict(run.held_out) == pytest.approx({500: 0.004, 1000: 0.002})
    assert list(map(dict, run.deltas)) == [pytest.approx({500: -0.1, 1000: 0.4}), pytest.approx({500: 1.0, 1000: 2.0})]


def test_loss_curve(run):
    """Falling losses go down the page; the held-out points are marked."""
    (svg,) = loss_curves([run])
    points = re.search(r'class="loss" points="([^"]*)"', svg).group(1).split()
    assert 100 < len(points) <= 160
    heights = [float(point.split(",")[1]) for point in points]
    assert heights == sorted(heights)
    assert svg.count("<circle") == 2
    assert thinned([(1, 1.0), (2, 3.0), (3, 5.0), (4, 7.0)], points=2) == [(1.5, 2.0), (3.5, 6.0)]


def test_looking_curves(run):
    """The higher a delta the higher it is on the page; 0 is marked; a run on text has none."""
    (svg,) = looking_curves([run, dataclasses.replace(run, deltas=([], []))])
    drawn = {
        kind: re.search(f'class="{kind}" points="([^"]*)"', svg).group(1).split() for kind in ("held-out", "blank")
    }
    heights = [float(point.split(",")[1]) for kind in ("blank", "held-out") for point in reversed(drawn[kind])]
    assert heights == sorted(heights) and heights[-1] == 250 - 34, "the lowest stands on the axis"
    assert ">0</text>" in svg and ">2</text>" in svg
    assert svg.count("<circle") == 4


def test_the_answers_are_those_of_the_evaluation(tmp_path):
    """As `neo-megatron evaluate` writes them; only the very text is right."""
    lines = [
        {
            "pictures": ["/some/where/7.png"],
            "question": "<image>\nwhat shape?",
            "references": ["circle"],
            "prediction": said,
        }
        for said in ("circle", "Circle")
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answers = report.read_answers(tmp_path, [Question("1.png", "what shape?", "triangle")])
    assert [answer.question for answer in answers] == [Question("7.png", "what shape?", "circle")] * 2
    assert [(answer.given, answer.text_only, answer.right) for answer in answers] == [
        ("circle", "triangle", True),
        ("Circle", "triangle", False),
    ]


def test_page_is_self_contained(data, run):
    """No other file, no address; what is written is what was counted; every shown image is in the page."""
    answers = [
        report.Answer(question, "<b>odd</b>" if number % 10 == 0 else question.answer, "no")
        for number, question in enumerate(read_questions(data / "test.json"))
    ]
    html = report.page(answers, TEST_IMAGES, [run, run], [("Training on <questions>", 61)], 1234567)
    assert not re.search(r"https?:|src=\"(?!data:)|<link|<script|@import|url\(", html)
    assert "$" not in html  # no placeholder is left
    assert "90.0%" in html and "1,234,567" in html and "1 min 1 s" in html
    assert "<b>odd" not in html and "Training on &lt;questions&gt;" in html

    shown = report.drawn(answers)
    assert len(shown) == 60 and sum(not answer.right for answer in shown) == 24
    assert len({answer.question.image for answer in shown}) == 60
    assert html.count("✗ &lt;b&gt;") == 24 and html.count('class="answer right">✓') == 36
    embedded = [b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', html)]
    assert embedded == [(TEST_IMAGES / answer.question.image).read_bytes() for answer in shown]


@pytest.mark.parametrize("given", ["right", "wrong"])
def test_page_shows_what_there_is(data, given):
    """All right or all wrong: no more than there are of either."""
    questions = read_questions(data / "test.json")
    answers = [report.Answer(question, question.answer if given == "right" else "", "no") for question in questions]
    shown = report.drawn(answers)
    assert len(shown) == (60 if given == "right" else 24)


def test_without_the_images_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "prepare_data")
    with pytest.raises(SystemExit, match="pip install 'easy-vqa==1.0'"):
        import prepare_data  # noqa: F401
