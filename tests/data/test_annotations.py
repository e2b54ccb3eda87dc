"""Annotation files: slices, shares, registry."""

import json
from fractions import Fraction

import numpy as np
import pytest

from neo_megatron.data import annotations
from neo_megatron.data.annotations import drawn_records, read_slice, slices
from neo_megatron.data.errors import DataError
from neo_megatron.data.registry import Source, data_list


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


def test_array_is_streamed(tmp_path, monkeypatch):
    """Slices come before the file has been read to its end."""
    path = tmp_path / "a.json"
    path.write_text("[" + ",".join(json.dumps({"n": n, "x": "y" * 500}) for n in range(5000)) + "]")
    taken = []
    original = annotations._BoundedStream.read
    monkeypatch.setattr(
        annotations._BoundedStream, "read", lambda self, size: taken.append(size) or original(self, size)
    )
    next(iter(slices([Source("a", str(path))], 10)))
    assert sum(taken) < path.stat().st_size / 5


@pytest.mark.parametrize(
    ("text", "whole", "reason"),
    [
        ('[{"n": 0}, {"n": 1}, {"n"', 2, "breaks off"),
        ('[{"n": 0}, {"n": 1}', 2, "breaks off"),
        ('[{"n": 0} {"n": 1}]', 1, "breaks off"),
        ("[", 0, "breaks off"),
    ],
)
def test_broken_array_gives_what_is_whole(tmp_path, text, whole, reason):
    (tmp_path / "a.json").write_text(text)
    pieces = list(slices([Source("a", str(tmp_path / "a.json"))], 100))
    assert sum(piece.count for piece in pieces) == whole
    assert reason in pieces[-1].broken and "\n" not in pieces[-1].broken


@pytest.mark.parametrize("text", ["", '{"n": 0}', '{"n": 0}\n{"n": 1}\n'])
def test_what_is_no_array_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match="no JSON array"):
        list(slices([Source("a", str(tmp_path / "a.json"))], 100))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_record_without_end_does_not_fill_the_memory(tmp_path, monkeypatch, name):
    monkeypatch.setattr(annotations, "MAX_RECORD_BYTES", 1 << 17)
    records = ['{"n": 0}', '{"x": "' + "y" * (1 << 20) + '"}', '{"n": 2}']
    (tmp_path / name).write_text("\n".join(records) if name == "a.jsonl" else "[" + ",".join(records) + "]")
    source = Source("a", str(tmp_path / name))
    pieces = list(slices([source], 100))
    lines = [line for piece in pieces for _, line in read_slice(piece, source, 0)]
    if name == "a.jsonl":
        assert lines == [b'{"n": 0}\n', None, b'{"n": 2}']
    else:
        assert lines == [b'{"n": 0}'] and "longer than" in pieces[0].broken


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


def test_draw_depends_on_seed_and_name_alone(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"n": {n}}}\n' for n in range(100)))
    half = [Source(name, str(tmp_path / f"{name}.jsonl"), share=Fraction(1, 2)) for name in ("a", "b")]

    def draw(sources, wanted, seed=0):
        return [
            (piece.first + drawn_records(piece, sources[piece.source], seed)).tolist()
            for piece in slices(sources, 32)
            if sources[piece.source] is wanted
        ]

    alone = draw(half[:1], half[0])
    assert draw(half[::-1], half[0]) == alone  # behind another data set
    assert draw(half[:1], half[0], seed=1) != alone
    assert draw(half[1:], half[1]) != alone
    tenth = Source("a", half[0].annotations, share=Fraction(1, 10))
    assert all(set(some) <= set(more) for some, more in zip(draw([tenth], tenth), alone, strict=True))


REGISTRY = """
caption:
  annotation_path: caption.json
  data_path: pictures
text:
  annotation_path: text.jsonl
  data_path: ""
"""


@pytest.fixture
def registry(tmp_path):
    (tmp_path / "registry.yaml").write_text(REGISTRY)
    (tmp_path / "caption.json").write_text("[]")
    (tmp_path / "text.jsonl").write_text("")
    (tmp_path / "pictures").mkdir()
    return tmp_path / "registry.yaml"


def test_registry_resolves_names_and_percentages(registry, monkeypatch):
    caption, text = data_list(["caption%12.5", "text"], registry)
    assert caption == Source(
        "caption", str(registry.parent / "caption.json"), str(registry.parent / "pictures"), Fraction(1, 8)
    )
    assert (text.image_root, text.share) == ("", 1)
    monkeypatch.chdir(registry.parent)
    assert data_list(["text%200"])[0].share == 2  # registry.yaml of this directory


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nothing", "holds: caption, text"),
        ("text%0", "above 0"),
        ("text%-5", "above 0"),
        ("text%", "above 0"),
        ("text%much", "above 0"),
        ("text%nan", "above 0"),
        ("text%inf", "above 0"),
    ],
)
def test_wrong_names_are_refused(registry, name, sentence):
    with pytest.raises(DataError, match=sentence):
        data_list([name], registry)


@pytest.mark.parametrize(
    "text", ["[1, 2", "- a", "a: b", "a: {annotation_path: x, root: y}", "a: {annotation_path: 3}"]
)
def test_wrong_registries_are_refused(tmp_path, text):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(DataError, match=r"r\.yaml"):
        data_list(["a"], tmp_path / "r.yaml")


def test_missing_files_are_named(registry):
    (registry.parent / "text.jsonl").unlink()
    with pytest.raises(DataError, match=r"text\.jsonl does not exist"):
        data_list(["text"], registry)
