"""Layout u1 compared with the published training function: ids, labels and positions of records."""

import json
from dataclasses import replace

import numpy as np
import pytest
from support.paths import GOLDEN
from transformers import AutoTokenizer

from neo_megatron.data.chat import ChatEncoder, load_tokenizer, special_ids
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.dataset import native_positions
from neo_megatron.data.image import pixel_limit
from neo_megatron.data.prepare.media import _limits
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.records import check_sample
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.data.verify import verify
from neo_megatron.errors import DataError, Reason, RejectedSample

CASES = json.loads((GOLDEN / "u1" / "text_layout.json").read_text())
THINKING = (
    "Reason step by step and place the thought process within the <think></think> tags, and provide the final "
    "conclusion at the end."
)
BLOCK = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def neo(tokenizer):
    return load_tokenizer(tokenizer)


@pytest.fixture
def read(tmp_path, new_png):
    """Checks a record with so many images."""
    (tmp_path / "train.json").write_text("[]")
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(new_png())
    source = Source("train", str(tmp_path / "train.json"), str(tmp_path))

    def check(conversations, images=0, layout="u1", **keys):
        names = [f"{number}.png" for number in range(images)]
        return check_sample({"conversations": conversations, "image": names, **keys}, source, layout)

    return check


def said(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": text} for role, text in pairs]


def layout_of(case: dict) -> str:
    """Without thinking in a sample, "sys" is the layout of NEO 1.0."""
    return {"tag": "u1", "sys": "neo1_0"}[case["thinking_method"]]


def labels(encoded) -> list[int]:
    found = np.full(len(encoded.tokens), -100)
    for start, end in encoded.spans:
        found[start:end] = encoded.tokens[start:end]
    return found.tolist()


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_published_ids_labels_and_positions(neo, read, case):
    layout, counts = layout_of(case), case["image_tokens"]
    sample = read(case["conversations"], len(counts), layout)
    ids = special_ids(neo)
    (encoded,) = ChatEncoder(neo.backend_tokenizer.to_str(), ids, layout).encode([(sample.turns, counts)])
    assert encoded.tokens.tolist() == case["input_ids"]
    assert labels(encoded) == case["labels"]
    grids = np.array([(2, 2 * count) for count in counts]).reshape(-1, 2)
    positions, _ = native_positions(encoded.tokens, np.zeros(len(encoded.tokens), np.int32), grids, ids)
    assert positions[:, 0].tolist() == case["t"]
    assert neo.decode(encoded.tokens) == case["text"]


def test_the_command_writes_published_ids(tokenizer, tmp_path, run_tool, samples_of):
    cases = [case for case in CASES if not case["image_tokens"] and layout_of(case) == "u1"]
    records = [{"conversations": case["conversations"]} for case in cases]
    (tmp_path / "train.json").write_text(json.dumps(records))
    done = run_tool(
        *("preprocess_data.py", "--input", tmp_path / "train.json", "--tokenizer", tokenizer),
        *("--output", tmp_path / "shards", "--chat-layout", "u1", "--sample-tokens", 8192, "--workers", 1),
    )
    assert done.returncode == 0, done.stderr
    shards = ShardSet(tmp_path / "shards")
    assert shards.manifest["settings"]["sample_tokens"] == 8192
    for (tokens, spans), case in zip(samples_of(shards), cases, strict=True):
        assert tokens == case["input_ids"]
        trained = [
            place for start, end in zip(*[iter(np.ravel(spans))] * 2, strict=True) for place in range(start, end)
        ]
        assert trained == [place for place, label in enumerate(case["labels"]) if label != -100]


def decoded(neo, read, conversations, layout="u1", images=0, **keys) -> tuple[str, str]:
    """(all text, trained text) of a record."""
    sample = read(conversations, images, layout, **keys)
    encoder = ChatEncoder(neo.backend_tokenizer.to_str(), special_ids(neo), layout)
    (encoded,) = encoder.encode([(sample.turns, [1] * images)])
    return neo.decode(encoded.tokens), "".join(neo.decode(encoded.tokens[a:b]) for a, b in encoded.spans)


@pytest.mark.parametrize(
    ("system", "left"),
    [
        (THINKING, ""),
        (f"\n{THINKING}", ""),
        ("", ""),
        (f"{THINKING}\nBe brief.", "\nBe brief."),
        (f"A.\n\n{THINKING} B.", "A.\n B."),
        (f"A.\n{THINKING}\n{THINKING}", "A."),
        (THINKING[:-1], THINKING[:-1]),
    ],
)
@pytest.mark.parametrize("own_key", [False, True])
def test_the_prompt_for_thinking_is_cut_out_of_the_system_turn(neo, read, system, left, own_key):
    asked = said(("human", "Hi"), ("gpt", "Ho"))
    if own_key:
        text, _ = decoded(neo, read, asked, system=system)
    else:
        text, _ = decoded(neo, read, [*said(("system", system)), *asked])
    opening = f"<|im_start|>system\n{left}<|im_end|>\n" if left else ""
    assert text == f"{opening}<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{BLOCK}Ho<|im_end|>\n"


def test_only_the_first_turn_is_a_system_turn_to_cut(neo, read):
    text, _ = decoded(neo, read, said(("human", THINKING), ("system", THINKING), ("gpt", "Ho")))
    assert text.count(THINKING) == 2


def published(tokenizer, turns) -> tuple[list[int], list[int]]:
    """The published rule read literally, for turns without images: strings with control tokens in them."""
    tokens, targets = [], []
    for role, text, is_input in turns:
        strings = [(f"<|im_start|>{role}\n{text}<|im_end|>\n", False)]
        if role == "assistant" and not is_input:
            block = "" if text.startswith("<think>") else BLOCK
            strings = [(f"<|im_start|>assistant\n{block}", False), (f"{text}<|im_end|>\n", True)]
        for string, trained in strings:
            ids = tokenizer(string, add_special_tokens=False).input_ids
            tokens += ids
            targets += ids if trained else [-100] * len(ids)
    return tokens, targets


@pytest.mark.parametrize(
    "answer", ["x", "\n\nx", " <think>x</think>", "<think>\n</think>", "<think", "</think>\n", "\n"]
)
@pytest.mark.parametrize("is_input", [False, True])
def test_answers_are_cut_as_in_the_published_code(neo, read, answer, is_input):
    turns = [*said(("human", "Hi"), ("gpt", answer), ("human", "And?"), ("gpt", "Last."))]
    turns[1]["is_input"] = is_input
    sample = read(turns)
    (encoded,) = ChatEncoder(neo.backend_tokenizer.to_str(), special_ids(neo), "u1").encode([(sample.turns, [])])
    literal = [("user", "Hi", 0), ("assistant", answer, is_input), ("user", "And?", 0), ("assistant", "Last.", 0)]
    with_tokens = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer")
    assert (encoded.tokens.tolist(), labels(encoded)) == published(with_tokens, literal)


def test_roles_of_u1_are_no_roles_of_neo(read):
    with pytest.raises(RejectedSample, match="plugin is a role of --chat-layout u1") as raised:
        read(said(("plugin", "{}"), ("gpt", "x")), layout="neo1_0")
    assert raised.value.reason == Reason.UNKNOWN_ROLE
    with pytest.raises(RejectedSample, match="'tool', not one of .*interpreter-return\"\\)$"):
        read(said(("tool", "{}"), ("gpt", "x")))


def test_typed_control_tokens_stay_text_in_further_roles(neo, read):
    text, _ = decoded(neo, read, said(("plugin", "<|plugin|>"), ("human", "a"), ("gpt", "b")))
    assert text.startswith("<|im_start|>system name=<|plugin|>\n<|plugin|><|im_end|>\n")
    sample = read(said(("plugin", "<|plugin|>"), ("human", "a"), ("gpt", "b")))
    (encoded,) = ChatEncoder(neo.backend_tokenizer.to_str(), special_ids(neo), "u1").encode([(sample.turns, [])])
    assert encoded.tokens.tolist().count(neo.convert_tokens_to_ids("<|plugin|>")) == 1


@pytest.mark.parametrize(
    ("turns", "images", "surplus", "expected"),
    [
        ([("human", "<image> a <image>")], 1, 1, "<img> a <image>"),
        ([("human", r"\<image> <image> \\<image>")], 1, 1, r"<image> <img> \<image>"),
        ([("human", "<image>")], 0, 1, "<image>"),
        ([("human", "<image>"), ("human", "<image><image>")], 2, 1, "<img>|<img><image>"),
        ([("human", "a"), ("human", "b")], 1, 0, "<img>\na|b"),
        ([("knowledge", "<image>"), ("human", "b")], 1, 0, "<img>|b"),
    ],
)
def test_tags_beyond_the_images_stay_text(neo, read, turns, images, surplus, expected):
    conversation = [*said(*turns), *said(("gpt", "x"))]
    sample = read(conversation, images)
    assert sample.surplus_tags == surplus
    text, _ = decoded(neo, read, conversation, images=images)
    contents = [part.split("\n", 1)[1] for part in text.split("<|im_end|>\n")[:-2]]
    assert "|".join(contents) == expected.replace("<img>", "<img><IMG_CONTEXT></img>")
    if surplus:
        with pytest.raises(RejectedSample, match="images but"):
            read(conversation, images, "neo1_0")


def test_missing_tags_and_tags_of_an_answer_still_reject(read):
    for conversation, images in (
        (said(("human", "<image>"), ("gpt", "x")), 2),
        (said(("human", "<image>"), ("gpt", "<image>")), 0),
    ):
        with pytest.raises(RejectedSample) as raised:
            read(conversation, images)
        assert raised.value.reason == Reason.IMAGE_COUNT


def test_a_tokenizer_without_think_tokens_is_refused(neo):
    text = neo.backend_tokenizer.to_str().replace('"<think>"', '"<other>"')
    with pytest.raises(DataError, match="no tokens <think> and </think> for text"):
        ChatEncoder(text, special_ids(neo), "u1")
    ChatEncoder(text, special_ids(neo), "neo1_0")


def test_layout_neo1_0_has_none_of_it(neo, read):
    conversation = said(("system", THINKING), ("human", "Hi"), ("gpt", "Ho"))
    text, trained = decoded(neo, read, conversation, "neo1_0")
    assert text == (
        f"<|im_start|>system\n{THINKING}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n"
    )
    assert trained == "Ho<|im_end|>\n"


def test_several_images_share_a_budget_of_tokens():
    """max(min(max_pixels, (max_tokens - 3072) * 32^2 // n), min_pixels), for n > 1."""
    settings = PreprocessConfig(chat_layout="u1", sample_tokens=8192)
    assert settings.shared_image_tokens == 5120
    for images, expected in ((1, 4194304), (2, 2621440), (3, 1747626), (80, 65536), (1000, 65536)):
        assert pixel_limit(65536, 4194304, images, settings.shared_image_tokens) == expected
    assert pixel_limit(65536, 4194304, 2, 100000) == 4194304
    assert PreprocessConfig(sample_tokens=8192).shared_image_tokens == 0
    with pytest.raises(DataError, match="--sample-tokens is 3072: it must be above 3072"):
        PreprocessConfig(chat_layout="u1", sample_tokens=3072)


def test_the_layout_is_in_the_manifest_and_in_the_plan(bench, new_sample, new_png):
    u1 = replace(bench.settings, chat_layout="u1", sample_tokens=3072 + 24)
    bench.images("a.png", "b.png")
    for name in ("a.png", "b.png"):
        (bench.path / "images" / name).write_bytes(new_png(256, 256))
    records = [
        new_sample("<image> and <image>?", "x", image=["a.png", "b.png"]),
        new_sample("<image> and <image>?", "x", image="a.png"),
        {"conversations": said(("knowledge", "k"), ("human", "a"), ("gpt", "b"))},
    ]
    shards = bench.preprocess(records, settings=u1)
    assert len(shards) == 3 and shards.chat_layout == "u1"
    settings = shards.manifest["settings"]
    assert (settings["chat_layout"], settings["sample_tokens"]) == ("u1", 3096)
    assert shards.manifest["counts"]["surplus_tags"] == 1
    assert shards.fetch([0])[0].grids.tolist() == [[6, 6], [6, 6]], "two images share 24 tokens"
    assert shards.fetch([1])[0].grids.tolist() == [[16, 16]]
    assert verify(bench.path / "shards").damage == []

    plain = bench.preprocess(records, "plain")
    assert len(plain) == 1 and plain.manifest["settings"]["chat_layout"] == "neo1_0"
    assert [entry["kind"] for entry in bench.rejects("plain")] == ["pictures and tags differ", "unknown role"]

    unfinished = bench.path / "unfinished"
    file = bench.annotations(records)
    source = [Source("train", str(file), str(bench.path / "images"))]
    with pytest.raises(DataError):
        preprocess(source, bench.tokenizer, unfinished, bench.settings, on_error="fail")
    with pytest.raises(DataError, match="unfinished run with --chat-layout neo1_0, not u1"):
        preprocess(source, bench.tokenizer, unfinished, u1)


def test_frames_of_u1_have_the_published_limits():
    settings = PreprocessConfig(min_pixels=65536, max_pixels=1 << 22, chat_layout="u1", sample_tokens=4096)
    for frames, expected in ((1, 1 << 22), (2, 1 << 22), (4, 1 << 21), (5, 512 * 512)):
        assert _limits(settings, 0, frames).frame == (65536, expected)
    assert _limits(settings, 4, 2).image == (65536, 262144)
    own = replace(settings, video_max_pixels=100000)
    assert _limits(own, 4, 2).frame == (65536, 100000)


def test_manifests_without_a_layout_are_of_neo1_0(bench, new_sample):
    bench.preprocess([new_sample()])
    manifest = bench.path / "shards" / "manifest.json"
    settings = json.loads(manifest.read_text())
    for key in ("chat_layout", "sample_tokens"):
        del settings["settings"][key]
    manifest.write_text(json.dumps(settings))
    assert ShardSet(bench.path / "shards").chat_layout == "neo1_0"
