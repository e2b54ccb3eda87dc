"""Property tests: whatever an annotation file holds, every sample is kept, or rejected with its reason."""

import gzip
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from support.bench import png

from neo_megatron.data.chat import ChatEncoder, load_tokenizer, special_ids
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.records import check_sample, parse_record
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.data.tags import IMAGE_TAG, count_tags
from neo_megatron.errors import Reason, RejectedSample

PNG = png()
SMALL = PreprocessConfig(min_pixels=1024, max_pixels=4096, records_per_shard=7)


def quick(examples: int) -> settings:
    """The same examples in every run."""
    every = list(HealthCheck)
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=every)


PIECES = [
    *("<image>", "<video>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<|endoftext|>"),
    *("assistant\n", "\0", "\ud800", "\udfff\ud800", "\x1b[0m", "\r", "\u2028", "\ufeff", "e\u0301", "👩‍👩‍👧", " ", ""),
]
texts = st.lists(st.sampled_from(PIECES) | st.text(st.characters(), max_size=8), max_size=6).map("".join)
paths = (
    st.sampled_from(
        [
            *("a.png", "a.png", "./a.png", "sub/../a.png", "broken.png", "missing.png", "a.png/", "a.png/b", ""),
            *("../a.png", "/etc/passwd", "link.png", "away/a.png", "loop", "..", ".", "/", "~/a.png", "sub"),
            *("a.tar/b.png", "a.zip", "http://x/a.png", "s3://b/a.png", "data:,", "file:///etc/passwd", "x" * 5000),
            *("/".join(["d"] * 3000), "\0", "a.png\0", "\ud800.png", "|id", "$(id)", "con:cat"),
        ]
    )
    | texts
)
numbers = st.integers() | st.integers(0, 4000).map(lambda digits: 10**digits) | st.floats() | st.booleans() | st.none()
values = st.recursive(
    numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


def mostly(usual: st.SearchStrategy, other: st.SearchStrategy) -> st.SearchStrategy:
    return st.integers(0, 9).flatmap(lambda draw: other if draw == 0 else usual)


roles = mostly(st.sampled_from(["human", "gpt", "system", "user", "assistant"]), values)
turns = mostly(
    st.fixed_dictionaries(
        {"from": roles, "value": mostly(texts, values)},
        optional={"is_input": mostly(st.booleans(), values), "extra": values},
    ),
    values,
)
samples = mostly(
    st.fixed_dictionaries(
        {"conversations": mostly(st.lists(turns, max_size=5), values)},
        optional={
            "image": paths | st.lists(paths, max_size=4) | values,
            "video": mostly(st.none(), paths | st.lists(paths, max_size=2) | values),
            "id": values,
        },
    ),
    values,
)
records = mostly(samples, st.lists(samples, max_size=3))


def deep(levels: int, kind: str = "[]") -> bytes:
    """A usable sample with arbitrary nested values in it."""
    opening = b"[" if kind == "[]" else b'{"a":'
    closing = b"]" if kind == "[]" else b"}"
    turns = b'[{"from":"human","value":"a"},{"from":"gpt","value":"b"}]'
    return b'{"conversations":' + turns + b',"extra":' + opening * levels + b"1" + closing * levels + b"}"


plain_texts = st.none() | st.sampled_from(["a.png", "<image>", "Hi", "", "../a.png", "/etc/passwd", "data:,"])
roles_text = st.sampled_from(["human", "gpt", "human", "gpt", "system", None, "x"])
image_bytes = st.sampled_from([None, b"", b"\x89PNG", PNG, PNG])
lines = mostly(
    records.map(lambda record: json.dumps(record).encode()),
    st.binary(max_size=40)
    | st.sampled_from([500, 5000, 100_000]).map(deep)
    | st.sampled_from(
        [b"", b" ", b"null", b"[]", b"{}", b"[[]]", b"1e999", b"-", b"9" * 5000, b'"', b"\xff\xfe{", b"NaN"]
    ),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of images, with links that leave it and one that is circular."""
    directory = tmp_path_factory.mktemp("properties") / "images"
    (directory / "sub").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(directory / "a.png")
    Image.new("RGB", (40, 30)).save(directory.parent / "a.png")
    (directory / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (directory / "link.png").symlink_to(directory.parent / "a.png")
    (directory / "away").symlink_to(directory.parent)
    (directory / "loop").symlink_to("loop")
    (directory.parent / "train.jsonl").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def neo(tokenizer: Path):
    return load_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def encoder(neo) -> ChatEncoder:
    return ChatEncoder(neo.backend_tokenizer.to_str(), special_ids(neo))


@quick(250)
@given(line=lines)
@example(line=deep(900))
@example(line=deep(900, "{}"))
@example(line=deep(100_000))
def test_a_record_is_kept_or_rejected(root, neo, encoder, line):
    source = Source("train", str(root.parent / "train.jsonl"), str(root))
    try:
        written = list(parse_record(line))
    except RejectedSample:
        return
    for _, sample in written:
        try:
            checked = check_sample(sample, source)
        except RejectedSample as rejected:
            assert rejected.reason in set(Reason) and "\n" not in rejected.sentence
            rejected.sentence.encode()  # it is written to a file
            continue
        assert all(Path(path).is_relative_to(root.resolve()) for path in checked.images + checked.videos)
        tags = sum(count_tags(turn.text, IMAGE_TAG) for turn in checked.turns)
        assert tags == len(checked.images)
        (encoded,) = encoder.encode([(checked.turns, [1] * tags)])
        check_layout(encoded.tokens.tolist(), neo, images=tags, turns=len(checked.turns))


def check_layout(tokens: list[int], neo, images: int | None = None, turns: int | None = None) -> None:
    """Checks that control tokens are where the template puts them, and nowhere else, whatever the text."""
    ids = special_ids(neo)
    special = set(neo.all_special_ids) | set(neo.convert_tokens_to_ids(list(neo.get_added_vocab())))
    names = {ids.turn_start: "S", ids.turn_end: "E", ids.image_start: "(", ids.image_context: ".", ids.image_end: ")"}
    controls = "".join(names.get(token, "?") for token in tokens if token in special)
    left = controls
    while "(.)" in left or ".." in left:
        left = left.replace("..", ".").replace("(.)", "P")
    assert set(left) <= set("SPE") and left.replace("P", "") == "SE" * left.count("S")
    assert images is None or left.count("P") == images
    assert turns is None or left.count("S") == turns


def run(root: Path, tokenizer: Path, content: bytes, name: str) -> tuple[dict, list[dict], ShardSet]:
    """Preprocesses an annotation file of these bytes; returns (counts, rejects, shards)."""
    directory = Path(tempfile.mkdtemp(dir=root.parent))
    (directory / name).write_bytes(content)
    source = Source("train", str(directory / name), str(root))
    manifest = preprocess([source], tokenizer, directory / "shards", SMALL)
    rejects = [json.loads(line) for line in (directory / "shards" / "rejects.jsonl").read_bytes().splitlines()]
    return manifest["counts"], rejects, ShardSet(directory / "shards")


def check_books(counts: dict, rejects: list[dict], shards: ShardSet, neo) -> None:
    """Checks that kept and rejected samples add up to those read, and that each reject has its place and reason."""
    assert len(shards) == counts["samples_kept"]
    assert len(rejects) == counts["samples_rejected"] == sum(counts["rejected_by_reason"].values())
    assert counts["samples_read"] == counts["samples_kept"] + counts["samples_rejected"]
    for reject in rejects:
        assert set(reject) == {"file", "record", "element", "kind", "reason"}
        assert reject["kind"] in set(Reason) and reject["reason"] and 0 <= reject["record"] < counts["records_read"]
    places = [(reject["record"], reject["element"]) for reject in rejects]
    assert len(set(places)) == len(places)
    for number in range(len(shards)):
        shard, local = shards.locate(number)
        check_layout(np.asarray(shard.tokens[local]).tolist(), neo)


@quick(20)
@given(content=st.lists(lines, max_size=25))
@example(content=[deep(900), deep(100_000), b"[" * 100_000, b"\xff", b"{}"])
def test_lines_are_kept_or_rejected(root, tokenizer, neo, content):
    file = b"\n".join([deep(1), *content])  # one good line makes it a file of lines, whatever the others are
    counts, rejects, shards = run(root, tokenizer, file, "train.jsonl")
    check_books(counts, rejects, shards, neo)
    assert counts["records_read"] == sum(bool(line.strip(b" \t\r\n\v\f")) for line in file.split(b"\n"))


@quick(6)
@given(content=st.lists(lines, max_size=25))
def test_compressed_lines_are_those_of_the_plain_file(root, tokenizer, neo, content):
    file = b"\n".join([deep(1), *content])
    plain, packed = (
        run(root, tokenizer, data, name) for data, name in ((file, "a.jsonl"), (gzip.compress(file), "a.jsonl.gz"))
    )
    check_books(*packed, neo)
    assert packed[0] == plain[0]
    assert [{**row, "file": ""} for row in packed[1]] == [{**row, "file": ""} for row in plain[1]]


parquet_samples = st.lists(
    st.fixed_dictionaries(
        {
            "conversations": st.none()
            | st.lists(st.none() | st.fixed_dictionaries({"from": roles_text, "value": plain_texts}), max_size=4),
            "image": st.none()
            | st.lists(st.none() | st.fixed_dictionaries({"bytes": image_bytes, "path": plain_texts}), max_size=2),
        }
    ),
    min_size=1,
    max_size=12,
)


@quick(15)
@given(content=parquet_samples)
def test_rows_with_nulls_anywhere_are_kept_or_rejected(root, tokenizer, neo, content):
    turns = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    image = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    schema = pa.schema([("conversations", turns), ("image", image)])
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(content, schema=schema), file)
    counts, rejects, shards = run(root, tokenizer, file.getvalue(), "a.parquet")
    check_books(counts, rejects, shards, neo)
    assert counts["records_read"] == len(content)


@quick(20)
@given(content=st.lists(records, max_size=25))
def test_elements_of_an_array_are_kept_or_rejected(root, tokenizer, neo, content):
    counts, rejects, shards = run(root, tokenizer, json.dumps(content).encode(), "train.json")
    check_books(counts, rejects, shards, neo)
    assert counts["records_read"] == len(content)


@quick(20)
@given(content=st.lists(lines, max_size=12), end=st.sampled_from([b"]", b"", b",]", b"]]", b"] 1"]))
def test_broken_arrays_are_accounted_for(root, tokenizer, neo, content, end):
    counts, rejects, shards = run(root, tokenizer, b"[" + b",".join(content) + end, "train.json")
    check_books(counts, rejects, shards, neo)
