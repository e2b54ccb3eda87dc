"""The page of `neo-megatron inspect`: its numbers, its images, its mask; and that data cannot break out of it."""

import base64
import io
import json
from collections import Counter
from fractions import Fraction
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from neo_megatron.cli.inspect import packs_page, refuse_others
from neo_megatron.data.dataset import PackDataset
from neo_megatron.data.packs.index import PackIndex
from neo_megatron.data.packs.writer import HeldOut, PackInput, write_packs
from neo_megatron.data.shards.mixture import Mixture
from neo_megatron.errors import DataError
from neo_megatron.inspection.images import ShownImage, images_of, jpeg_addresses, png_address
from neo_megatron.inspection.mask_image import ALL, NONE, SOME, mask_levels
from neo_megatron.inspection.pack_view import Origin, Pack, pack_parts
from neo_megatron.inspection.page import pack_part, page
from neo_megatron.inspection.statistics import EXAMPLES, SourceCounts, Statistics, count, count_packs
from neo_megatron.inspection.token_text import token_texts, visible
from neo_megatron.storage.open import open_directory

HOSTILE = '</i></script><script>alert(1)</script><img src="http://example.org/a.png"> & "quoted"'


@pytest.fixture
def records(new_sample) -> list:
    """Texts, two with images, a hostile one, and more rejected samples than a page shows."""
    return [
        new_sample("<image>\nWhat?", "An image, or so.", image="a.png"),
        [new_sample("one", "two"), new_sample("three", "four", image="b.png")],
        new_sample("<image><image>", "both", image=["b.png", "a.png"]),
        new_sample(HOSTILE, HOSTILE),
        *(new_sample("<image>", "gone", image=f"{HOSTILE.replace('/', '')}{number}.png") for number in range(5)),
        {"conversations": []},
    ]


@pytest.fixture
def packs(bench, records) -> Path:
    """All in one pack; a smooth image, so that JPEG changes it little."""
    bench.images("a.png", "b.png")
    ramp = np.add.outer(np.arange(90), 2 * np.arange(70)).astype(np.uint8)
    Image.fromarray(np.stack([ramp // 2, ramp // 4, 128 - ramp // 2], axis=2)).save(bench.path / "images" / "a.png")
    bench.preprocess(records)
    return bench.pack(1024)


class Elements(HTMLParser):
    """Tags, attributes and texts of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.tokens: list[tuple[int, str | None]] = []
        self._open = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        named = dict(attributes)
        if tag == "i":
            self.tokens.append((int(named["n"]), named.get("class")))
        self._open = tag

    def handle_data(self, data: str) -> None:
        if self._open == "script":
            self.scripts.append(data)
        elif self._open != "style":
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._open = ""


@pytest.fixture
def inspected(packs, bench) -> tuple[str, Elements]:
    """The page of the pack."""
    html = packs_page(str(packs), 0, 0, 1234, str(bench.tokenizer))
    return html, Elements(html)


@pytest.fixture
def item(packs) -> dict:
    """The pack itself."""
    return PackDataset(packs, 1, seed=1234)[0]


def test_the_page_refers_to_nothing_outside_of_it(inspected):
    html, elements = inspected
    for tag, name, value in elements.attributes:
        if name in ("src", "href"):
            assert value.startswith(("data:image/", "#document-")), (tag, name, value[:80])
        assert not name.startswith("on")
    assert "url(" not in html and "@import" not in html
    assert not elements.tags.keys() & {"link", "iframe", "object", "form", "base"}


def test_hostile_data_stays_text(inspected):
    _, elements = inspected
    assert elements.tags["script"] == 2
    assert all("alert" not in script for script in elements.scripts)
    assert elements.text.count("<script>alert(1)</script>") == 2  # question and answer
    assert "<script>alert(1)<script>" in elements.text  # a rejected sample's path
    assert elements.tags["img"] == 1 + 4  # the mask, and an image for each <image> tag


def test_hostile_names_stay_text(item):
    """Of data sets, annotation files and reasons, wherever they stand."""
    statistics = Statistics(
        [SourceCounts(HOSTILE, samples=1, other_tokens=9)],
        np.bincount([9]),
        Counter({HOSTILE: 1}),
        {HOSTILE: [{"file": HOSTILE, "record": 0, "reason": HOSTILE}]},
    )
    origins = [Origin(HOSTILE, HOSTILE, 0)] * item["samples"]
    parts = pack_parts(Pack.of_item(item | {"broken": [HOSTILE]}), origins, None)
    shown = pack_part(Pack.of_item(item), parts, 0, 0, 0)
    elements = Elements(page(HOSTILE, shown, statistics, None, ""))
    assert elements.tags["script"] == 0 and elements.tags["img"] == 1 + 4
    assert elements.text.count("<script>alert(1)</script>") == 6 + item["samples"]


def test_every_token_is_on_the_page_and_marked_as_it_is_trained(inspected, item):
    _, elements = inspected
    document, image = item["document"].numpy(), item["image"].numpy()
    assert [place for place, _ in elements.tokens] == np.flatnonzero((document >= 0) & (image < 0)).tolist()
    trained = [place for place, kind in elements.tokens if kind == "t"]
    assert trained == (item["target_index"] + 1).tolist()
    assert f"padding: {(document < 0).sum():,}" in elements.text
    facts = json.loads(elements.scripts[0])
    assert facts["id"] == item["tokens"].tolist() and facts["t"] == item["positions_thw"][:, 0].tolist()
    weights = {place: weight for start, end, weight in facts["weights"] for place in range(start, end)}
    assert sorted(weights) == trained
    assert np.allclose([weights[place] for place in trained], item["target_weight"], rtol=1e-3)


def test_every_document_says_where_it_comes_from(inspected, packs):
    _, elements = inspected
    index = PackIndex.open(packs)
    for sample in index.samples(1234, 0, 0).tolist():
        assert f"train.json, record {index.data.describe(sample)[1]} · " in elements.text
    identifiers = [value for _, name, value in elements.attributes if name == "id"]
    assert sum(value.startswith("document-") for value in identifiers) == len(index.data)


def test_numbers_equal_a_count_over_the_samples(inspected, packs):
    _, elements = inspected
    shards = PackIndex.open(packs).data.sets[0]
    samples = shards.fetch(range(len(shards)))
    context = sum(int((sample.tokens == shards.ids.image_context).sum()) for sample in samples)
    tokens = sum(len(sample.tokens) for sample in samples)
    trained = sum(int(end - start) for sample in samples for start, end in sample.spans)
    for value, label in (
        (f"{len(samples)}", "samples"),
        (f"{sum(len(sample.images) for sample in samples)}", "images"),
        (f"{tokens:,}", "tokens"),
        (f"{context / tokens:.1%}", "of them images"),
        (f"{trained / tokens:.1%}", "of them trained on"),
        (f"{tokens / 1024:.2%}", f"filled; {1024 - tokens:,} tokens are padding"),
    ):
        assert value + label in elements.text
    statistics = count(Mixture([shards.location]))
    [source] = statistics.sources
    assert (source.tokens, source.image_tokens, source.trained_tokens) == (tokens, context, trained)
    assert statistics.lengths.tolist() == np.bincount([len(sample.tokens) for sample in samples]).tolist()


def test_rejects_are_counted_by_reason_with_the_first_of_each(inspected, bench):
    _, elements = inspected
    entries = bench.rejects()
    counts = Counter(entry["kind"] for entry in entries)
    assert sorted(counts.values()) == [1, 5]
    for kind, number in counts.items():
        assert f"{number}{kind}" in elements.text
        listed = [entry for entry in entries if entry["kind"] == kind]
        for place, entry in enumerate(listed):
            assert (f"record {entry['record']}: {entry['reason']}" in elements.text) == (place < EXAMPLES)


def test_images_are_those_that_the_model_gets(inspected, item, bench):
    _, elements = inspected
    addresses = [value for tag, name, value in elements.attributes if (tag, name) == ("img", "src")][1:]
    pack = Pack.of_item(item)
    images = images_of(pack.image, pack.positions, pack.patches)
    smooth = Image.open(bench.path / "images" / "a.png")
    found = 0
    for image, address in zip(images, addresses, strict=True):
        height, width = image.pixels.shape[:2]
        shown = Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))
        assert shown.size == (width, height)
        resized = np.asarray(smooth.resize((width, height), Image.Resampling.BICUBIC))
        if np.array_equal(image.pixels, resized):
            found += 1
            assert np.abs(np.asarray(shown).astype(int) - resized).mean() < 4
    assert found == 2


def test_the_mask_on_the_page_is_the_definition(inspected, item):
    """Causal within a document, both ways within an image, padding sees itself; two tokens to a point."""
    _, elements = inspected
    address = next(value for tag, name, value in elements.attributes if (tag, name) == ("img", "src"))
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))))
    document, image = item["document"].tolist(), item["image"].tolist()

    def sees(query: int, key: int) -> bool:
        together = document[query] == document[key] >= 0 and (key <= query or image[query] == image[key] >= 0)
        return together or query == key

    for row, column in np.random.default_rng(0).integers(0, 512, (4000, 2)).tolist() + [[n, n] for n in range(512)]:
        seen = [sees(2 * row + a, 2 * column + b) for a in range(2) for b in range(2)]
        assert shown[row, column] == (ALL if all(seen) else SOME if any(seen) else NONE), (row, column)


@pytest.mark.parametrize("side", [1, 7, 64, 100])
def test_the_mask_by_blocks_is_the_dense_one_reduced(side):
    """Also where the last block is shorter."""
    document = np.repeat([0, 1, 2, -1], [20, 13, 24, 7]).astype(np.int32)
    image = np.full(64, -1, np.int32)
    image[3:9], image[22:30], image[40:41] = 0, 1, 2
    query, key = np.mgrid[:64, :64]
    same = (document[query] == document[key]) & (document[query] >= 0)
    inside = (image[query] == image[key]) & (image[query] >= 0)
    dense = (same & ((key <= query) | inside)) | (query == key)
    levels = mask_levels(document, image, side)
    block = -(-64 // side)
    assert len(levels) == -(-64 // block) <= side
    for row in range(len(levels)):
        for column in range(len(levels)):
            part = dense[row * block : (row + 1) * block, column * block : (column + 1) * block]
            assert levels[row, column] == (ALL if part.all() else SOME if part.any() else NONE)


def test_a_mask_keeps_its_levels_as_png():
    levels = np.random.default_rng(0).integers(0, 3, (50, 50)).astype(np.uint8)
    address = png_address(levels, ((0, 0, 0, 0), (1, 2, 3, 100), (1, 2, 3, 255)))
    image = Image.open(io.BytesIO(base64.b64decode(address.split(",")[1])))
    assert np.array_equal(np.asarray(image), levels)
    assert np.array_equal(np.asarray(image.convert("RGBA"))[..., 3], np.array([0, 100, 255])[levels])


def test_many_images_do_not_make_a_large_page():
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3)).astype(np.uint8)
    images = [ShownImage(noise, 0), ShownImage(noise[:256], 300)]
    sizes = [sum(map(len, jpeg_addresses(images, limit))) for limit in (10**9, 200_000, 20_000)]
    assert sizes[0] > 300_000 and sizes[1] < 200_000 * 1.4 and sizes[2] < 20_000 * 1.4


def test_shares_and_held_out_samples_count_as_often_as_they_are_packed(bench, new_sample):
    bench.preprocess([new_sample(f"question {number}", "word " * (1 + number % 9)) for number in range(50)])
    inputs = [PackInput(str(bench.path / "shards"), Fraction(5, 2))]
    held_out = HeldOut(Fraction(1, 4), str(bench.path / "held_out"))
    manifests = write_packs(inputs, bench.path / "packs", 40, held_out=held_out)
    for name, manifest in zip(("packs", "held_out"), manifests, strict=True):
        index = PackIndex.open(bench.path / name)
        drawn = Counter(sample for place in range(len(index)) for sample in index.samples(7, 3, place).tolist())
        statistics = count_packs(index, open_directory(bench.path / name))
        assert statistics.sources[0].samples == drawn.total() == manifest["counts"]["samples_packed"]
        assert statistics.sources[0].tokens == manifest["counts"]["tokens"]
        assert statistics.rejected.total() == manifest["counts"]["samples_rejected"]


@pytest.mark.slow
def test_a_data_set_that_is_not_packed_and_ids_without_a_tokenizer(bench, new_sample, run_tool):
    bench.preprocess([new_sample("Hi", "Hello!")])
    done = run_tool("inspect_data.py", "--data", bench.path / "shards", "--output", bench.path / "page.html")
    assert done.returncode == 0, done.stderr
    elements = Elements((bench.path / "page.html").read_text())
    assert "The data set" in elements.text and not elements.scripts and "No sample was rejected" in elements.text
    packs = bench.pack(64)
    elements = Elements(packs_page(str(packs), 0, 0, 1, None))
    assert str(PackDataset(packs, 1, seed=1)[0]["tokens"][0].item()) in elements.text


def test_invalid_requests_end_in_one_sentence(packs, bench, run_tool, tmp_path):
    for number, epoch in ((10**19, 0), (0, 10**19)):
        with pytest.raises(DataError, match="no run has that many packs"):
            packs_page(str(packs), number, epoch, 0, None)
    with pytest.raises(DataError, match="is a directory of other files, not packs"):
        packs_page(str(bench.path), 0, 0, 0, None)
    done = run_tool("inspect_data.py", "--packs", bench.path / "shards", "--output", tmp_path / "page.html")
    assert done.returncode == 1 and "holds shards, not packs" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "page.html").exists()


def test_packs_of_later_epochs_and_of_mixtures_are_shown(packs, bench, new_sample):
    """By the number that a training names."""
    bench.preprocess([new_sample(f"Question {number}?", "Yes!") for number in range(9)], "other")
    bench.pack(40, data="other", output="other-packs")
    (bench.path / "mixture.yaml").write_text(
        f"- {{from: 0, shares: {{{packs}: 1}}}}\n- {{from: 2, shares: {{other-packs: 1}}}}\n"
    )
    for location in (packs, bench.path / "other-packs", bench.path / "mixture.yaml"):
        data_set = PackDataset(location, 100, seed=3)
        for number in (1, 2, 40):
            elements = Elements(packs_page(str(location), number, 0, 3, None))
            places = [f"record {record} · " in elements.text for _, record in data_set.describe(number)]
            assert f"Pack {number} of {location}" in elements.text and places and all(places)
            facts = json.loads(elements.scripts[0])
            assert facts["id"] == data_set[number]["tokens"].tolist()
        if location == packs:  # one pack: its number is that of the epoch
            assert facts["id"] == json.loads(Elements(packs_page(str(location), 0, 40, 3, None)).scripts[0])["id"]
    with pytest.raises(DataError, match="leave out --epoch"):
        packs_page(str(bench.path / "mixture.yaml"), 0, 1, 3, None)


def test_another_tokenizer_is_refused(packs, bench, tmp_path):
    text = json.loads((bench.tokenizer / "tokenizer.json").read_text())
    text["model"]["merges"].pop()
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (bench.tokenizer / name).exists():
            (tmp_path / name).write_bytes((bench.tokenizer / name).read_bytes())
    (tmp_path / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(DataError, match="not the tokenizer"):
        packs_page(str(packs), 0, 0, 0, str(tmp_path))


def test_tokens_that_share_a_character_show_it_once():
    """Tokens that are bytes: every character is decoded with as many of them as it needs."""
    text = "aé \U0001f469\u200d\U0001f467 你"

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    texts = token_texts(list(text.encode()), decode)
    assert "".join(texts) == text and len(texts) == len(text.encode())
    assert texts[:3] == ["a", "é", ""]
    assert token_texts([0xFF, 0x61], decode) == ["\ufffd", "a"]
    assert token_texts([5, 6], None) == ["5 ", "6 "]


def test_control_characters_are_shown_and_have_no_effect():
    assert visible("a\nb\0\x7f\u202ec") == "a↵\nb␀␡[U+202E]c"


def test_only_a_page_is_replaced(inspected, tmp_path):
    page, other = tmp_path / "page.html", tmp_path / "thesis.html"
    page.write_text(inspected[0], encoding="utf-8")
    refuse_others(page)
    refuse_others(tmp_path / "new.html")
    other.write_text("<!doctype html><title>My thesis</title>")
    with pytest.raises(DataError, match="exists and is not a page of this tool; choose another --output"):
        refuse_others(other)
    with pytest.raises(DataError, match="is not a file that can be written; choose another --output"):
        refuse_others(tmp_path)
