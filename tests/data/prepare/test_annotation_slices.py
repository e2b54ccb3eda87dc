"""Slices of annotation files, shares of data sets, and registries."""

import json
import os
from fractions import Fraction
from unittest.mock import ANY

import numpy as np
import pytest

from neo_megatron.data.prepare import annotation_slices
from neo_megatron.data.prepare.annotation_slices import drawn_records, read_slice, slices
from neo_megatron.data.prepare.registry import Source, data_list, split_path_share
from neo_megatron.errors import DataError


def read(source: Source, size: int, seed: int = 0) -> list[tuple[int, object]]:
    return [
        (number, json.loads(line))
        for piece in slices([source], size)
        for number, line in read_slice(piece, source, seed)
    ]


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_array_and_lines_give_the_same_records(tmp_path, size):
    records = [{"n": n, "text": 'a ] " } \\ 你好\n', "list": [[1], {"x": None}], "f": 0.5} for n in range(7)]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=2, ensure_ascii=False))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, records)))  # blank lines, no newline at the end
    array, lines = (read(Source("a", str(tmp_path / name)), size) for name in ("a.json", "a.jsonl"))
    assert array == lines == list(enumerate(records))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_slicing_can_start_at_any_slice(tmp_path, name):
    """As when a run is continued: nothing before the slice is read again."""
    texts = [json.dumps({"n": n}) for n in range(20)]
    (tmp_path / name).write_text("\n".join(texts) if name == "a.jsonl" else "[" + ", ".join(texts) + "]")
    (tmp_path / "broken.json").write_text("[" + texts[0] + ", " + texts[1] + ", {")
    sources = [Source("a", str(tmp_path / name)), Source("b", str(tmp_path / "broken.json"))] * 2
    for size in (1, 3, 20, 100):
        every = list(slices(sources, size))
        for number, piece in enumerate(every):
            rest = list(slices(sources, size, piece.next))
            assert [other.place for other in rest] == [other.place for other in every[number + 1 :]]
            assert [other.broken for other in rest] == [other.broken for other in every[number + 1 :]]
            for one, other in zip(rest, every[number + 1 :], strict=True):
                assert np.array_equal(one.bounds, other.bounds)


def test_slices_come_before_the_file_is_read_to_its_end(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    path.write_text("[" + ",".join(json.dumps({"n": n, "x": "y" * 500}) for n in range(10000)) + "]")
    taken, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: taken.append(size) or pread(file, size, offset))
    next(iter(slices([Source("a", str(path))], 10)))
    assert sum(taken) < path.stat().st_size / 2


@pytest.mark.parametrize(
    ("text", "usable", "damaged", "reason"),
    [
        ('[{"n": 0}, {"n": 1}, {"n"', [0, 1], [], "in the middle of this record"),
        ('[{"n": 0}, {"n": "1', [0], [], "in the middle of this record"),
        ('[{"n": 0}, {"n": 1}', [0, 1], [], "no closing bracket"),
        ('[{"n": 0}, {"n": 1},', [0, 1], [], "no closing bracket"),
        ('[{"n": 0} {"n": 1}, {"n": 2}]', [1], [0], ""),
        ('[{"n": 0}, {"n" 1}, {"n": 2}, ]', [0, 2], [1, 3], ""),
        ('[{"n": 0}] [{"n": 1}]', [0], [], "the file continues"),
        ("[", [], [], "no closing bracket"),
        ("[ ]", [], [], ""),
        ("[,]", [], [0, 1], ""),
    ],
)
def test_intact_records_of_a_broken_array_are_kept(tmp_path, text, usable, damaged, reason):
    """The other records can be reported, the last with the reason why the array breaks off."""
    (tmp_path / "a.json").write_text(text)
    source = Source("a", str(tmp_path / "a.json"))
    pieces = list(slices([source], 100))
    intact, other = [], []
    for number, record in (pair for piece in pieces for pair in read_slice(piece, source, 0)):
        try:
            json.loads(record)
            intact.append(number)
        except ValueError:
            other.append(number)
    assert (intact, other) == (usable, damaged)
    assert [piece.broken for piece in pieces if piece.broken or reason] == [ANY] * bool(reason)
    assert all(reason in piece.broken for piece in pieces)


@pytest.mark.parametrize("text", ["", '{"n": 0}', '{"n": 0}\n{"n": 1}\n'])
def test_a_file_without_an_array_is_rejected(tmp_path, text):
    """Even if the file changes after the source was checked."""
    (tmp_path / "a.json").write_text("[]")
    source = Source("a", str(tmp_path / "a.json"))
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="does not hold a JSON array"):
        list(slices([source], 100))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_record_that_is_too_long_is_not_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(annotation_slices, "MAX_RECORD_BYTES", 1 << 17)
    records = ['{"n": 0}', '{"x": "' + "y" * (1 << 20) + '"}', '{"n": 2}']
    (tmp_path / name).write_text("\n".join(records) if name == "a.jsonl" else "[" + ",".join(records) + "]")
    source = Source("a", str(tmp_path / name))
    texts = [text for piece in slices([source], 100) for _, text in read_slice(piece, source, 0)]
    assert [text and json.loads(text) for text in texts] == [{"n": 0}, None, {"n": 2}]


@pytest.mark.parametrize("percent", ["50", "12.5", "100", "200", "250", "0.5", "33.3", "66.67"])
def test_shares_are_exact(tmp_path, percent):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"n": {n}}}\n' for n in range(1000)))
    source = Source("a", str(path), share=Fraction(percent) / 100)
    numbers = [number for number, _ in read(source, 64)]
    assert len(numbers) == round(10 * float(percent))
    times = np.bincount(numbers, minlength=1000)
    assert times.max() - times.min() <= 1  # nothing is drawn twice before all is drawn once
    assert numbers == sorted(numbers)


def test_draw_depends_only_on_seed_and_name(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(100)))
    half = [Source(name, str(tmp_path / f"{name}.jsonl"), share=Fraction(1, 2)) for name in ("a", "b")]

    def draw(sources, wanted, seed=0):
        return [
            (piece.place.first + drawn_records(piece, sources[piece.place.source], seed)).tolist()
            for piece in slices(sources, 32)
            if sources[piece.place.source] is wanted
        ]

    alone = draw(half[:1], half[0])
    assert draw(half[::-1], half[0]) == alone  # after another data set
    assert draw(half[:1], half[0], seed=1) != alone
    assert draw(half[1:], half[1]) != alone
    tenth = Source("a", half[0].annotations, share=Fraction(1, 10))
    assert all(set(some) <= set(more) for some, more in zip(draw([tenth], tenth), alone, strict=True))


@pytest.mark.parametrize(("percent", "total"), [("50", 100), ("10", 20), ("0.5", 1), ("150", 300), ("33.3", 67)])
def test_shares_of_many_small_files_add_up(tmp_path, percent, total):
    """200 files of one record each; rounding for each file would take none or all of them."""
    paths = [tmp_path / f"{number}.jsonl" for number in range(200)]
    for path in paths:
        path.write_text("{}\n")
    sources = [Source(path.stem, str(path), share=Fraction(percent) / 100) for path in paths]
    drawn = [len(drawn_records(piece, sources[piece.place.source], 0)) for piece in slices(sources, 64)]
    assert sum(drawn) == total and max(drawn) - min(drawn) <= 1
    # From any place on, as in a run that is continued.
    pieces = list(slices(sources, 64))
    later = slices(sources, 64, pieces[120].next)
    assert [len(drawn_records(piece, sources[piece.place.source], 0)) for piece in later] == drawn[121:]


def test_files_of_different_sizes_and_broken_ones_add_up(tmp_path):
    draw = np.random.default_rng(0)
    counts = draw.integers(0, 9, 60).tolist()
    sources = []
    for number, count in enumerate(counts):
        path = tmp_path / f"{number}.json"
        path.write_text("[" + ", ".join(["{}"] * count) + ("]" if number % 3 else ", !"))
        sources.append(Source(path.stem, str(path), share=Fraction(1 + number % 5, 7)))
    drawn = sum(len(drawn_records(piece, sources[piece.place.source], 0)) for piece in slices(sources, 4))
    read = [0] * len(sources)
    for piece in slices(sources, 4):
        read[piece.place.source] += len(piece.bounds)
    due = sum(count * source.share for count, source in zip(read, sources, strict=True))
    assert sum(read) > 150 and abs(drawn - due) <= Fraction(1, 2)


REGISTRY = """
caption:
  annotation_path: caption.json
  data_path: images
text:
  annotation_path: text.jsonl
  data_path: ""
"""


@pytest.fixture
def registry(tmp_path):
    (tmp_path / "registry.yaml").write_text(REGISTRY)
    (tmp_path / "caption.json").write_text("[]")
    (tmp_path / "text.jsonl").write_text("{}\n")
    (tmp_path / "images").mkdir()
    return tmp_path / "registry.yaml"


def test_registry_resolves_names_and_percentages(registry, monkeypatch):
    caption, text = data_list(["caption%12.5", "text"], registry)
    assert caption == Source(
        "caption", str(registry.parent / "caption.json"), str(registry.parent / "images"), Fraction(1, 8)
    )
    assert (text.image_root, text.share) == ("", 1)
    monkeypatch.chdir(registry.parent)
    assert data_list(["text%200"])[0].share == 2  # registry.yaml of this directory


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nothing", "choose from: caption, text"),
        ("text%0", "above 0"),
        ("text%-5", "above 0"),
        ("text%", "above 0"),
        ("text%much", "above 0"),
        ("text%nan", "above 0"),
        ("text%inf", "above 0"),
    ],
)
def test_unknown_names_are_rejected(registry, name, sentence):
    with pytest.raises(DataError, match=sentence):
        data_list([name], registry)


@pytest.mark.parametrize(
    "text", ["[1, 2", "- a", "a: b", "a: {annotation_path: x, root: y}", "a: {annotation_path: 3}"]
)
def test_malformed_registries_are_rejected(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(DataError, match=r"r\.yaml"):
        data_list(["a"], tmp_path / "r.yaml")


def test_a_data_set_that_is_named_twice_is_rejected(registry):
    with pytest.raises(DataError, match="data set text is named twice; .*text%200"):
        data_list(["text", "caption", "text%50"], registry)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "a: {annotation_path: x}\nb: {annotation_path: y}\na: {annotation_path: z}",
            "'a' is in line 1 and again in line 3",
        ),
        (
            "a:\n  annotation_path: x\n  data_path: p\n  annotation_path: y",
            "'annotation_path' is in line 2 and again in line 4",
        ),
    ],
)
def test_duplicate_keys_in_a_registry_are_rejected(tmp_path, text, said):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(DataError, match=rf"r\.yaml is not valid YAML: .*{said}"):
        data_list(["a"], tmp_path / "r.yaml")


def test_a_registry_may_merge_mappings(registry):
    text = "base: &base {annotation_path: text.jsonl}\nother:\n  <<: *base\n  data_path: images\n"
    registry.write_text(text)
    assert [source.name for source in data_list(["base", "other"], registry)] == ["base", "other"]


@pytest.mark.parametrize(
    ("text", "existing", "expected"),
    [
        ("a%50", "a", ("a", Fraction(1, 2))),
        ("a%50", "a%50", ("a%50", Fraction(1))),
        ("a%50%200", "a%50", ("a%50", Fraction(2))),
        ("100%/a", "100%/a", ("100%/a", Fraction(1))),
        ("100%/a%50", "100%/a", ("100%/a", Fraction(1, 2))),
        ("100%/nothing", "a", ("100%/nothing", Fraction(1))),
    ],
)
def test_paths_with_a_percent_sign_are_paths(tmp_path, monkeypatch, text, existing, expected):
    (tmp_path / existing).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert split_path_share(text) == expected


def test_missing_files_are_named(registry):
    (registry.parent / "text.jsonl").unlink()
    with pytest.raises(DataError, match=r"text\.jsonl does not exist"):
        data_list(["text"], registry)
