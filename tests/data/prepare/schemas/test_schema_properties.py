"""Whatever a record of any form holds, it is kept or rejected; equal contents in two forms are equal shards."""

import copy
import json
import tempfile
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.records import check_sample
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.resume import Outcome, save_outcome
from neo_megatron.data.prepare.schemas.fields import Origin
from neo_megatron.data.prepare.schemas.options import SchemaOptions
from neo_megatron.data.prepare.schemas.table import SCHEMAS, published_form
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.data.tags import IMAGE_TAG, count_tags
from neo_megatron.errors import Reason, RejectedSample
from neo_megatron.inference.questions import read_questions

USER, ANSWER = {"role": "user", "content": "<image>Hi"}, {"role": "assistant", "content": "Hello!"}
PARTS = [{"type": "image"}, {"type": "text", "text": "Hi"}]
FORMS = {
    "neo": [
        {"conversations": [{"from": "human", "value": "<image>Hi"}, {"from": "gpt", "value": "A"}], "image": "a.png"},
    ],
    "messages": [
        {"messages": [USER, ANSWER], "images": ["a.png"]},
        {"messages": [USER | {"content": PARTS}, ANSWER], "images": ["a.png"]},
        {"messages": [USER | {"content": [{"type": "image", "image": "a.png"}, PARTS[1]]}, ANSWER]},
        {"texts": [{"user": "Hi", "assistant": "A", "source": "s"}], "images": ["a.png"]},
        {"query": "<image>Hi", "response": "A", "history": [["B", "C"]], "images": ["a.png"]},
        {"instruction": "Hi", "input": "there", "output": "A"},
    ],
    "caption": [{"jpg": "a.png", "txt": "A cat.", "url": "u", "key": "0"}],
    "interleaved": [
        {"texts": ["One.", None, "Two."], "images": [None, "a.png", None], "metadata": "[]"},
        {"text_list": ["One.", "Two."], "image_info": [{"image_name": "a.png", "matched_text_index": 1}]},
        {"content": [*PARTS, {"type": "image", "image": "a.png"}], "url": "u"},
    ],
    "text": [{"text": "Some text, and more of it.", "url": "u"}],
}
VALUES: list = [
    *(None, True, 0, -1, 1.5, "", " ", "a.png", "../a.png", "missing.png", "<image>", "\\<image>", "\ud800", "tool"),
    *([], {}, [None], ["a.png"], [["a"]], {"url": "a.png"}, [{}]),
    *([{"type": "text"}], [{"type": "image"}]),
]
KEYS = ["image", "images", "text", "texts", "messages", "role", "content", "loss", "tools", "bbox", "type", "value"]


def places(value, path=()):
    """Paths of all values in a record."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def mutated(record: dict, random: Random) -> object:
    """The record with one to three changes at random places."""
    record = copy.deepcopy(record)
    for _ in range(random.randint(1, 3)):
        if not record:
            break
        *path, last = random.choice([path for path in places(record) if path])
        holder = record
        for key in path:
            holder = holder[key]
        change = random.choice(["remove", "replace", "replace", "add"])
        value = copy.deepcopy(random.choice(VALUES))
        if change == "remove":
            del holder[last]
        elif change == "add" and isinstance(holder, dict):
            holder[random.choice(KEYS)] = value
        elif change == "add":
            holder.insert(last, value)
        else:
            holder[last] = value
    return record


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("schemas") / "images"
    directory.mkdir()
    Image.new("RGB", (40, 30)).save(directory / "a.png")
    (directory.parent / "train.json").write_text("[{}]")
    return directory


@pytest.mark.parametrize(
    ("schema", "number"), [(name, number) for name, records in FORMS.items() for number in range(len(records))]
)
def test_a_changed_record_is_kept_or_rejected(root, schema, number):
    source = Source("train", str(root.parent / "train.json"), str(root))
    random = Random(f"{schema} {number}")
    options = [SchemaOptions(schema), SchemaOptions(schema, prompts=("What?",))]
    options += [SchemaOptions(schema, image_placeholder="Hi")] if SCHEMAS[schema].has_users else []
    kept = 0
    for _ in range(400):
        record = mutated(FORMS[schema][number], random)
        as_it_was = copy.deepcopy(record)
        try:
            checked = check_sample(published_form(record, random.choice(options), Origin()), source)
        except RejectedSample as rejected:
            assert rejected.reason in set(Reason) and "\n" not in rejected.sentence
            rejected.sentence.encode()  # it is written to a file
        else:
            kept += 1
            places_of_images = sum(count_tags(turn.text, IMAGE_TAG) for turn in checked.turns)
            assert places_of_images == len(checked.images)
            assert any(turn.trained for turn in checked.turns)
        assert record == as_it_was
    assert 0 < kept < 400


@settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 30))
def test_kept_and_rejected_are_those_read(root, tokenizer, seed):
    random = Random(seed)
    directory = Path(tempfile.mkdtemp(dir=root.parent))
    sources, count = [], 0
    for schema, records in FORMS.items():
        lines = [mutated(record, random) if random.random() < 0.7 else record for record in records for _ in range(3)]
        count += len(lines)
        (directory / f"{schema}.jsonl").write_text("{}\n" + "".join(json.dumps(line) + "\n" for line in lines))
        options = SchemaOptions(schema, max_document_tokens=8)
        sources.append(Source(schema, str(directory / f"{schema}.jsonl"), str(root), schema=options))
    small = PreprocessConfig(min_pixels=1024, max_pixels=4096, records_per_shard=5)
    counts = preprocess(sources, tokenizer, directory / "shards", small)["counts"]
    rejects = [json.loads(line) for line in (directory / "shards" / "rejects.jsonl").read_bytes().splitlines()]
    shards = ShardSet(directory / "shards")
    assert counts["samples_read"] == counts["samples_kept"] + counts["samples_rejected"]
    assert (counts["samples_kept"], counts["samples_rejected"]) == (len(shards), len(rejects))
    found = {shards.describe(number) for number in range(len(shards))} | {(it["file"], it["record"]) for it in rejects}
    assert len(found) == counts["records_read"] == count + len(sources)


@pytest.fixture
def same(bench):
    """A conversation in several forms, each of which becomes the same samples."""
    bench.images("a.png", "b.png")
    questions = ["<image>\n<image>\nWhat differs?", "Sure?"]
    turns = [("user", questions[0]), ("assistant", "The size."), ("user", questions[1]), ("assistant", "Yes.")]
    roles = {"user": "human", "assistant": "gpt"}
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What differs?"}]
    messages = [{"role": role, "content": text} for role, text in turns]
    typed = [messages[0] | {"content": parts}, *messages[1:]]
    files = ["a.png", "b.png"]
    return {
        "neo": {"conversations": [{"from": roles[role], "value": text} for role, text in turns], "image": files},
        "strings": {"messages": messages, "images": files},
        "parts": {"messages": typed, "images": files},
        "cauldron": {
            "texts": [{"user": "What differs?", "assistant": "The size."}, {"user": "Sure?", "assistant": "Yes."}],
            "images": files,
        },
        "swift": {"query": "Sure?", "response": "Yes.", "history": [[turns[0][1], turns[1][1]]], "images": files},
    }


def shard_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name[:5].isdigit()}


def test_the_same_conversation_in_any_form_gives_the_same_shards(bench, same):
    for name, record in same.items():
        bench.preprocess([record] * 3, name)
    neo = shard_files(bench.path / "neo")
    assert len(neo) == 9
    assert all(shard_files(bench.path / name) == neo for name in same)


def test_the_same_conversation_in_any_form_is_asked_the_same_questions(bench, same):
    asked = []
    for name, record in same.items():
        source = Source("asked", str(bench.annotations([record], f"{name}.json")), str(bench.path / "images"))
        listed = read_questions([source], bench.settings, "every answer")
        asked.append([(question.turn, question.sample, question.references) for question in listed.questions])
    assert len(asked[0]) == 2 and asked.count(asked[0]) == len(same)


def test_shards_do_not_depend_on_workers_or_interruptions(bench, same, directory_bytes, monkeypatch):
    settings_of_run = PreprocessConfig(min_pixels=1024, max_pixels=4096, records_per_shard=2)
    captions = [{"image": "a.png", "caption": f"Caption {number}"} for number in range(7)]
    texts = [{"text": "word " * (7 * number + 1)} for number in range(7)]
    sources = [
        Source(name, str(bench.annotations(rows, f"{name}.jsonl")), str(bench.path / "images"), schema=options)
        for name, rows, options in (
            ("chats", [same["parts"]] * 5, SchemaOptions()),
            ("captions", captions, SchemaOptions(prompts=("What?", "Which?", "Describe it."))),
            ("texts", texts, SchemaOptions(max_document_tokens=9)),
        )
    ]
    for workers in (1, 3):
        preprocess(sources, bench.tokenizer, bench.path / f"by{workers}", settings_of_run, workers=workers)
    assert directory_bytes(bench.path / "by1") == directory_bytes(bench.path / "by3")
    saved = []

    def save(directory: Path, outcome: Outcome) -> None:
        if len(saved) == 9:
            raise KeyboardInterrupt
        saved.append(outcome)
        save_outcome(directory, outcome)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("neo_megatron.data.prepare.output.save_outcome", save)
        preprocess(sources, bench.tokenizer, bench.path / "killed", settings_of_run)
    preprocess(sources, bench.tokenizer, bench.path / "killed", settings_of_run)
    assert directory_bytes(bench.path / "by1") == directory_bytes(bench.path / "killed")
