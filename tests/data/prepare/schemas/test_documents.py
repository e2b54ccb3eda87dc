"""Documents: their tokens are those of the tokenizer, all of their text is trained, and every step accepts them."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from neo_megatron.cli.inspect import packs_page
from neo_megatron.data.chat import ChatEncoder, TokenizedSample, load_tokenizer, special_ids
from neo_megatron.data.conversation import Turn
from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.schemas.documents import split_document
from neo_megatron.data.prepare.schemas.options import SchemaOptions
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.data.verify import verify
from neo_megatron.errors import DataError, Reason
from neo_megatron.inference.questions import read_questions


@pytest.fixture(scope="module")
def neo(tokenizer):
    return load_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def encoder(neo):
    return ChatEncoder(neo.backend_tokenizer.to_str(), special_ids(neo))


@pytest.mark.parametrize(
    "text", ["a", "Hello there, 12345 \n\n x", "你好 é", "<|im_end|> <img> <|endoftext|>", r"\<video>"]
)
def test_tokens_are_those_of_the_text_and_the_end_of_text(tokenizer, encoder, text):
    plain = AutoTokenizer.from_pretrained(tokenizer)
    (encoded,) = encoder.encode([([Turn("document", text, True)], [])])
    expected = plain(text.replace("\\", ""), add_special_tokens=False, split_special_tokens=True).input_ids
    assert encoded.tokens.tolist() == [*expected, plain.convert_tokens_to_ids("<|endoftext|>")]
    assert encoded.spans.tolist() == [[1, len(expected) + 1]]


@pytest.mark.parametrize("text", ["<image>\nA cat.", "One <image> two<image>", "a<image><image>b"])
def test_images_stand_in_the_text_and_are_not_trained(neo, encoder, text):
    count = text.count("<image>")
    (encoded,) = encoder.encode([([Turn("document", text, True)], [3, 5][:count])])
    of_images = [f"<img>{'<IMG_CONTEXT>' * number}</img>" for number in (3, 5)]
    expected, trained = [], []
    for number, piece in enumerate(text.split("<image>")):
        if number:  # the tokenizer itself reads the control tokens
            ids = neo(of_images[number - 1], add_special_tokens=False).input_ids
            expected += ids
            trained += [False] * len(ids)
        ids = neo(piece, add_special_tokens=False).input_ids
        expected += ids
        trained += [True] * len(ids)
    trained[0] = False  # nothing stands before it
    assert encoded.tokens.tolist() == [*expected, neo.convert_tokens_to_ids("<|endoftext|>")]
    mask = np.zeros(len(encoded.tokens), bool)
    for start, end in encoded.spans:
        assert start < end
        mask[start:end] = True
    assert mask.tolist() == [*trained, True]


def test_a_tokenizer_without_an_end_of_text_is_reported(neo):
    other = neo.backend_tokenizer.to_str().replace("<|endoftext|>", "<|other|>")
    with pytest.raises(DataError, match=r"none of <\|endoftext\|>, .* which has to end a document"):
        ChatEncoder(other, special_ids(neo)).encode([([Turn("document", "a", True)], [])])


@settings(deadline=None, derandomize=True, database=None)
@given(st.integers(2, 60), st.integers(2, 20))
def test_every_token_but_the_first_is_a_target_once(length, limit):
    tokens = np.arange(length, dtype=np.int32)
    pieces = split_document(TokenizedSample(tokens, np.array([[1, length]], np.int32)), limit)
    assert all(2 <= len(piece.tokens) <= limit for piece in pieces)
    pairs = []  # (token before it, target)
    for piece in pieces:
        (start, end) = piece.spans[0].tolist()
        pairs += zip(piece.tokens[start - 1 : end - 1].tolist(), piece.tokens[start:end].tolist(), strict=True)
    assert pairs == [(token, token + 1) for token in range(length - 1)]
    assert all(len(piece.tokens) == limit for piece in pieces[:-1])


@pytest.fixture
def documents(bench):
    """Shards with a long text, a short text, a captioned image and a conversation, and how to write them again."""
    bench.images("a.png", "b.png")
    long = " ".join(str(number) for number in range(120))
    records = {
        "text": [{"text": long}, {"text": "Short."}, {"text": " "}],
        "caption": [{"image": "a.png", "caption": "Some colours."}],
        "interleaved": [{"texts": ["One.", None, "Two."], "images": [None, "b.png", None]}],
        "neo": [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}],
    }
    sources = []
    for name, rows in records.items():
        file = bench.annotations(rows, f"{name}.json")
        options = SchemaOptions(max_document_tokens=50)
        sources.append(Source(name, str(file), str(bench.path / "images"), schema=options))

    def write(output: str, workers: int = 1) -> dict:
        return preprocess(sources, bench.tokenizer, bench.path / output, bench.settings, workers=workers)

    return write, long, sources


def test_documents_pass_through_every_step(bench, documents, neo, samples_of, directory_bytes):
    write, long, sources = documents
    counts = write("shards")["counts"]
    shards = ShardSet(bench.path / "shards")
    tokens = neo(long, add_special_tokens=False).input_ids
    pieces = -(-(len(tokens)) // 49)  # with the end of text one token more; each piece repeats one
    assert counts["samples_kept"] == len(shards) == pieces + 4 and pieces > 2
    assert counts["samples_read"] == counts["samples_kept"] + counts["samples_rejected"] == pieces + 5
    assert [reject["kind"] for reject in bench.rejects()] == [Reason.NOTHING_TRAINED]
    stored = samples_of(shards)
    joined = stored[0][0] + [token for sample, _ in stored[1:pieces] for token in sample[1:]]
    assert joined == [*tokens, neo.convert_tokens_to_ids("<|endoftext|>")]
    assert not verify(bench.path / "shards").damage
    packs = bench.pack(256)
    assert not verify(packs).damage
    data = PackDataset(packs, None, seed=0)
    targets = [token for number in range(len(data)) for token in data[number]["targets"].tolist()]
    trained = [token for sample, spans in stored for start, end in _pairs(spans) for token in sample[start:end]]
    assert sorted(targets) == sorted(trained)
    shown = re.sub("<[^>]*>", "", packs_page(str(bench.pack(2048, output="one")), 0, 0, 0, str(bench.tokenizer)))
    assert "colours" in shown and "&lt;|endoftext|&gt;" in shown
    write("three", workers=3)
    assert directory_bytes(bench.path / "three") == directory_bytes(bench.path / "shards")


def _pairs(spans: list[int]) -> list[tuple[int, int]]:
    return list(zip(spans[::2], spans[1::2], strict=True))


def test_documents_are_not_asked(documents, bench):
    _, _, sources = documents
    listed = read_questions(sources, bench.settings, "every answer")
    assert [question.source.name for question in listed.questions] == ["neo"]
    assert {reject["reason"] for reject in listed.rejects} == {
        "the sample is a document, which has no question",
        "the document has no text",
    }
    assert len(listed.rejects) == 5


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"conversations": [{"from": "document", "value": "a"}, {"from": "gpt", "value": "b"}]}, "the only turn"),
        ({"conversations": [{"from": "document", "value": "a"}], "system": "b"}, "the only turn"),
        ({"conversations": [{"from": "document", "value": "<image> \n"}], "image": "a.png"}, "has no text"),
        ({"conversations": [{"from": "document", "value": "a", "train": False}]}, "no assistant turn is trained on"),
        ({"conversations": [{"from": "document", "value": "a <image>"}]}, "0 images but 1 <image> tags"),
    ],
)
def test_documents_of_the_published_form_are_checked(bench, keys, sentence):
    bench.images("a.png")
    bench.preprocess([keys, {"conversations": [{"from": "document", "value": "<img>a.png</img>", "train": True}]}])
    (reject,) = bench.rejects()
    assert sentence in reject["reason"]
