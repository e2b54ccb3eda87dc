"""Documents: their tokens are those of the tokenizer, all of their text is trained, and every step accepts them."""

import re
from dataclasses import replace

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
    page = TokenizedSample(tokens, np.array([[1, length]], np.int32))
    pieces = [piece.sample for piece in split_document(page, -1, limit)]
    assert all(2 <= len(piece.tokens) <= limit for piece in pieces)
    pairs = []  # (token before it, target)
    for piece in pieces:
        (start, end) = piece.spans[0].tolist()
        pairs += zip(piece.tokens[start - 1 : end - 1].tolist(), piece.tokens[start:end].tolist(), strict=True)
    assert pairs == [(token, token + 1) for token in range(length - 1)]
    assert all(len(piece.tokens) == limit for piece in pieces[:-1])


IMAGE_START, IMAGE_CONTEXT, IMAGE_END, FIRST_TEXT = 1, 2, 3, 10


@st.composite
def pages(draw) -> TokenizedSample:
    """Texts, of which no two tokens are equal, with images between them."""
    tokens, trained = [], []
    text = FIRST_TEXT
    for is_image, length in draw(st.lists(st.tuples(st.booleans(), st.integers(1, 25)), max_size=12)):
        of_image = [IMAGE_START, *[IMAGE_CONTEXT] * length, IMAGE_END]
        tokens += of_image if is_image else range(text, text + length)
        trained += [not is_image] * (len(of_image) if is_image else length)
        text += length
    mask = np.array([*trained, True])  # of the end of the text
    mask[0] = False
    edges = np.flatnonzero(np.diff(mask.astype(int), prepend=0, append=0))
    return TokenizedSample(np.array([*tokens, text], np.int32), edges.reshape(-1, 2).astype(np.int32))


def targets_of(sample: TokenizedSample) -> list[tuple[int, int]]:
    """(token before it, target) of a sample."""
    return [
        (int(sample.tokens[place - 1]), int(sample.tokens[place]))
        for start, end in sample.spans
        for place in range(start, end)
    ]


def runs_of_images(tokens: np.ndarray) -> list[tuple[int, int]]:
    """(start, end) of each run of images in tokens."""
    edges = np.flatnonzero(np.diff((tokens < FIRST_TEXT).astype(int), prepend=0, append=0))
    return list(map(tuple, edges.reshape(-1, 2).tolist()))


@settings(deadline=None, derandomize=True, database=None, max_examples=500)
@given(pages(), st.integers(2, 60))
def test_every_text_token_of_a_page_is_a_target_once_and_every_image_is_in_one_piece(page, limit):
    pieces = split_document(page, IMAGE_START, limit)
    assert [pair for piece in pieces for pair in targets_of(piece.sample)] == targets_of(page)
    assert [number for piece in pieces for number in range(piece.images.start, piece.images.stop)] == list(
        range((page.tokens == IMAGE_START).sum())
    )
    for piece in pieces:
        tokens = piece.sample.tokens
        assert targets_of(piece.sample) or len(page.tokens) == 1
        opened = np.cumsum((tokens == IMAGE_START).astype(int) - (tokens == IMAGE_END))
        assert opened.min() == 0 and opened[-1] == 0 and opened.max() <= 1  # no image is cut
        assert (tokens == IMAGE_START).sum() == piece.images.stop - piece.images.start
        if len(tokens) > limit and len(pieces) > 1:  # only images that are too long themselves, and the texts at them
            ((start, end),) = runs_of_images(tokens)
            assert start <= 1 and end == len(tokens) - 1
    joined = [*pieces[0].sample.tokens]
    for before, after in zip(pieces, pieces[1:], strict=False):
        assert before.sample.tokens[-1] == after.sample.tokens[0] >= FIRST_TEXT
        joined += after.sample.tokens[1:].tolist()
    assert joined == page.tokens.tolist()


@settings(deadline=None, derandomize=True, database=None, max_examples=500)
@given(pages(), st.integers(2, 60))
def test_a_page_is_cut_within_a_text_only_where_that_is_too_long_with_its_images(page, limit):
    starts = [0, *[start for start, _ in runs_of_images(page.tokens) if start]]
    ends = [*starts[1:], len(page.tokens)]
    place = 0
    for piece in split_document(page, IMAGE_START, limit)[:-1]:
        place += len(piece.sample.tokens) - 1
        (number,) = (n for n, (start, end) in enumerate(zip(starts, ends, strict=True)) if start <= place < end)
        cut = place + 1  # of the tokens of the page that the pieces so far have
        if cut not in ends:
            assert ends[number] - max(starts[number] - 1, 0) > limit


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


@pytest.mark.parametrize("store", ["encoded", "reference", "patches"])
def test_pages_longer_than_a_pack_are_split(bench, new_png, store, samples_of):
    """With the sizes that images have in the complete page, which has six of them."""
    (bench.path / "images").mkdir()
    names = [f"{number}.png" for number in range(6)]
    for number, name in enumerate(names):
        (bench.path / "images" / name).write_bytes(new_png(200, 300, number))
    texts = [text for number in range(6) for text in (None, f"Text {number} " * 3)]
    images = [image for name in names for image in (name, None)]
    pages = [{"texts": texts, "images": images}, {"texts": ["Short", None], "images": [None, "0.png"]}]
    tags = "".join(f"<image> Number {number}. " for number in range(6))
    published = [{"conversations": [{"from": "document", "value": tags}], "images": names}]
    config = replace(bench.settings, image_store=store)

    def write(output, limit):
        sources = [
            Source(
                name,
                str(bench.annotations(rows, f"{name}.json")),
                str(bench.path / "images"),
                schema=SchemaOptions(name, max_document_tokens=limit),
            )
            for name, rows in (("interleaved", pages), ("neo", published))
        ]
        preprocess(sources, bench.tokenizer, bench.path / output, config)
        return ShardSet(bench.path / output)

    split, complete = write("shards", 80), write("complete", 8192)
    assert len(complete) == 3 and len(split) > 5
    assert split.manifest["counts"]["samples_kept"] == split.manifest["counts"]["samples_read"] == len(split)
    for shards in (split, complete):
        with_images = sum(int((shards.shard(number).samples["pictures"] > 0).sum()) for number in range(2))
        assert shards.manifest["counts"]["samples_with_images"] == with_images
    for pieces, page in zip(map(split.shard, range(2)), map(complete.shard, range(2)), strict=True):
        assert pieces.grids.tolist() == page.grids.tolist()
        assert pieces.samples["trained"].sum() == page.samples["trained"].sum()
        assert int(pieces.tokens.lengths.max()) <= 80 < int(page.tokens.lengths.max())
        assert [pieces.images[n].tobytes() for n in range(len(pieces.grids))] == [
            page.images[n].tobytes() for n in range(len(page.grids))
        ]
        assert len(pieces.tokens.documents) == len(page.tokens.documents)  # pieces of a page are one record
        assert sorted(pieces.media[["path", "content"]].tolist()) == sorted(page.media[["path", "content"]].tolist())
        assert np.bincount(pieces.media["sample"], minlength=len(pieces.samples)).tolist() == (
            pieces.samples["pictures"].tolist()
        )
    for output in ("shards", "complete"):
        assert not verify(bench.path / output).damage
    packs = bench.pack(128)
    assert not (packs / "rejects.jsonl").read_bytes() and not verify(packs).damage
    data = PackDataset(packs, None, seed=0)
    targets = [token for number in range(len(data)) for token in data[number]["targets"].tolist()]
    trained = [
        token for tokens, spans in samples_of(complete) for start, end in _pairs(spans) for token in tokens[start:end]
    ]
    assert sorted(targets) == sorted(trained)
    assert (bench.pack(128, data="complete", output="others") / "rejects.jsonl").read_bytes()


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
