"""The data path with the real tokenizer of Qwen3, built from the ranks that the dashscope package ships."""

import base64
import json
from importlib.resources import files
from pathlib import Path

import pytest
import tiktoken
from safetensors.numpy import load_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from neo_megatron.data.chat import load_tokenizer
from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.pack_index import write_packs
from neo_megatron.data.preprocess import preprocess
from neo_megatron.data.registry import Source
from neo_megatron.data.settings import Settings

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "Hello, world! It's 2025; don't panic.",
    "  leading and trailing  \n\n\n tabs\t\tand spaces   ",
    "你好，世界。これはテストです。한국어 العربية עברית हिन्दी ไทย",
    "def f(x):\n    return {'a': x ** 2}  # comment\r\n",
    "naïve café Ångström — “quotes” … ½ ∑ ∞ 👩‍👩‍👧‍👦 🏳️‍🌈",
    "1234567890 3.14159 0xdeadbeef",
]


def read_ranks() -> dict[bytes, int]:
    lines = files("dashscope").joinpath("resources/qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte if byte in printable else next(hidden)) for byte in range(256)]


def last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that byte-pair encoding joins last: what is left when only lower ranks may merge."""
    parts = [token[place : place + 1] for place in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(parts[place] + parts[place + 1], rank) for place in range(len(parts) - 1)]
        lowest = min(range(len(joined)), key=joined.__getitem__)
        assert joined[lowest] < rank
        parts[lowest : lowest + 2] = [parts[lowest] + parts[lowest + 1]]
    return parts[0], parts[1]


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return read_ranks()


@pytest.fixture(scope="module")
def directory(ranks, tokenizer, tmp_path_factory) -> Path:
    """Qwen3's tokenizer as a Hugging Face directory; the golden one has its 26 added tokens, behind fewer ranks."""
    added = json.loads((tokenizer / "tokenizer.json").read_text())["added_tokens"]
    assert len(added) == 26
    characters = byte_characters()

    def text(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = [last_merge(token, rank, ranks) for token, rank in ranks.items() if len(token) > 1]
    model = models.BPE({text(token): rank for token, rank in ranks.items()}, [(text(a), text(b)) for a, b in merges])
    built = Tokenizer(model)
    built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    built.decoder = decoders.ByteLevel()
    for token in sorted(added, key=lambda token: token["id"]):
        built.add_tokens([AddedToken(token["content"], special=token["special"], normalized=False)])
    folder = tmp_path_factory.mktemp("qwen3")
    built.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


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
    """tiktoken reads the same ranks with another implementation of byte-pair encoding."""
    reference = tiktoken.Encoding("qwen", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens={})
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == reference.encode(text)
    assert tokenizer.decode(ids) == text


def test_a_sample_runs_through_the_data_path(directory, golden, tmp_path):
    """The published pack, in the ids of the real tokenizer: every piece read by tiktoken, pictures in their places."""
    records = json.loads((golden / "meta.json").read_text())["untied_pack1"]["docs"]
    (tmp_path / "a.json").write_text(json.dumps(records))
    source = Source("a", str(tmp_path / "a.json"), str(golden))
    preprocess([source], directory, tmp_path / "shards", Settings(min_pixels=4096, max_pixels=65536))
    write_packs(tmp_path / "shards", tmp_path / "packs", 150)
    item = PackDataset(tmp_path / "packs", 1, seed=0)[0]
    used = int((item["document"] >= 0).sum())
    tokenizer = load_tokenizer(directory)
    text = tokenizer.decode(item["tokens"][:used]).replace("<IMG_CONTEXT>", ".")
    assert text == json.loads((golden / "meta.json").read_text())["untied_pack1"]["text"]
    published = load_file(golden / "inputs_pack1.safetensors")
    assert len(item["cell_index"]) == (published["input_ids"] == 896).sum()
    assert (item["tokens"][item["cell_index"]] == 151669).all()
    assert item["tokens"][0] == 151644
    trained = tokenizer.decode(item["targets"])
    assert trained == "The first one.<|im_end|>\nIt looks warm; the second is blue-ish.<|im_end|>\n" + (
        "2 + 2 = 4. It is a simple sum.<|im_end|>\n"
    )
