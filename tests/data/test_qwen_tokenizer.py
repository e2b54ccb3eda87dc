"""The data path with the real tokenizer of Qwen3, built from the ranks that the dashscope package ships."""

import json
from pathlib import Path

import pytest
import tiktoken
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from neo_megatron.benchmarks.tokenizer import SPLIT, read_ranks, write_tokenizer
from neo_megatron.data.chat import load_tokenizer
from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source

TEXTS = [
    "Hello, world! It's 2025; don't panic.",
    "  leading and trailing  \n\n\n tabs\t\tand spaces   ",
    "你好，世界。これはテストです。한국어 العربية עברית हिन्दी ไทย",
    "def f(x):\n    return {'a': x ** 2}  # comment\r\n",
    "naïve café Ångström — “quotes” … ½ ∑ ∞ 👩‍👩‍👧‍👦 🏳️‍🌈",
    "1234567890 3.14159 0xdeadbeef",
]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return read_ranks()


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("qwen3"))


def test_added_tokens_are_those_of_the_published_tokenizer(directory, tokenizer):
    """The golden tokenizer has the same 26 added tokens, after fewer ranks."""
    built, golden = (
        json.loads((path / "tokenizer.json").read_text())["added_tokens"] for path in (directory, tokenizer)
    )
    assert [(token["content"], token["special"]) for token in built] == [
        (token["content"], token["special"]) for token in sorted(golden, key=lambda token: token["id"])
    ]


def test_ids_are_those_of_qwen3_and_neo(directory):
    tokenizer = load_tokenizer(directory)
    expected = {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
        "</think>": 151668,
        "<IMG_CONTEXT>": 151669,
        "<img>": 151670,
        "</img>": 151671,
    }
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in expected} == expected
    assert tokenizer.pad_token_id == 151643
    assert len(tokenizer) == 151669 + 13


@pytest.mark.parametrize("text", TEXTS)
def test_text_equals_tiktoken(directory, ranks, text):
    """tiktoken is another implementation of byte-pair encoding for the same ranks."""
    reference = tiktoken.Encoding("qwen", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text


def test_a_sample_passes_through_the_data_path(directory, golden, tmp_path):
    """The published pack in the ids of the real tokenizer: pieces of text encoded by tiktoken, with images between."""
    records = json.loads((golden / "meta.json").read_text())["untied_pack1"]["docs"]
    (tmp_path / "a.json").write_text(json.dumps(records))
    source = Source("a", str(tmp_path / "a.json"), str(golden))
    preprocess([source], directory, tmp_path / "shards", PreprocessConfig(min_pixels=4096, max_pixels=65536))
    write_packs([PackInput(str(tmp_path / "shards"))], tmp_path / "packs", 150)
    item = PackDataset(tmp_path / "packs", 1, seed=0)[0]
    used = int((item["document"] >= 0).sum())
    tokenizer = load_tokenizer(directory)
    text = tokenizer.decode(item["tokens"][:used]).replace("<IMG_CONTEXT>", ".")
    assert text == json.loads((golden / "meta.json").read_text())["untied_pack1"]["text"]
    published = load_file(golden / "inputs_pack1.safetensors")
    assert len(item["image_token_index"]) == (published["input_ids"] == 896).sum()
    assert (item["tokens"][item["image_token_index"]] == 151669).all()
    assert item["tokens"][0] == 151644
    trained = tokenizer.decode(item["targets"])
    assert trained == "The first one.<|im_end|>\nIt looks warm; the second is blue-ish.<|im_end|>\n" + (
        "2 + 2 = 4. It is a simple sum.<|im_end|>\n"
    )
