"""Compressed JSON: the window of text that is kept, damage, and bombs."""

import gzip
import json
import resource
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.kills import in_child

from neo_megatron.data.prepare import annotation_slices, compressed
from neo_megatron.data.prepare.annotation_slices import read_slice, slices
from neo_megatron.data.prepare.compressed import CompressedText
from neo_megatron.data.prepare.file_kinds import FileKind
from neo_megatron.data.prepare.record_bounds import element_bounds, line_bounds
from neo_megatron.data.prepare.registry import Source
from neo_megatron.storage.open import open_source


def pack(data: bytes, suffix: str) -> bytes:
    return gzip.compress(data) if suffix == ".gz" else pa.compress(data, "zstd", asbytes=True)


def records(path, size: int = 7) -> tuple[list[bytes | None], list[str]]:
    """(texts of records, why slices are broken)."""
    source = Source("packed", str(path))
    pieces = list(slices([source], size))
    return [text for piece in pieces for _, text in read_slice(piece, source, 0)], [
        it.broken for it in pieces if it.broken
    ]


texts = st.text(alphabet='ab"\\[]{},:/ \n\té你', max_size=30)
documents = st.lists(st.dictionaries(texts, texts | st.lists(st.integers(), max_size=2), max_size=2), max_size=8)


@settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(documents, st.sampled_from([None, 2]), st.sampled_from([1, 2, 7, 1 << 18]), st.sampled_from(["", " \n"]))
def test_bounds_are_those_of_the_plain_text(tmp_path_factory, document, indent, block, blank):
    path = tmp_path_factory.getbasetemp() / "packed"
    lines = "".join(f"{json.dumps(record)}\n{blank}" for record in document).encode()
    for text, find in (
        (json.dumps(document, indent=indent).encode() + blank.encode(), element_bounds),
        (lines, line_bounds),
    ):
        path.write_bytes(text)
        with open_source(str(path)) as file:
            expected = [bounds for found in find(file, 0, block) for bounds in found.tolist()]
        path.write_bytes(gzip.compress(text))
        starts = [0, *(end for _, end in expected)]
        for start in starts[:: max(1, len(starts) // 2)]:
            with path.open("rb") as file:
                packed, found = CompressedText(file, FileKind.GZIP), []
                for some in find(packed, start, block):
                    for begin, end in some.tolist():
                        found.append([begin, end])
                        assert packed.take(begin, end) == text[begin:end]
                        packed.release(end)
            assert found == [bounds for bounds in expected if bounds[0] >= start]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_of_several_members_is_read_to_its_end(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    lines = [json.dumps({"n": number, "x": "y" * 1000}).encode() for number in range(900)]
    path.write_bytes(b"".join(pack(b"".join(line + b"\n" for line in lines[part::3]), suffix) for part in range(3)))
    read, broken = records(path, 100)
    assert [text.strip() for text in read] == [line for part in range(3) for line in lines[part::3]] and not broken


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_records_in_front_of_damage_are_kept(tmp_path, suffix, name):
    path = tmp_path / f"{name}{suffix}"
    lines = [json.dumps({"n": number, "x": str(number) * 2000}).encode() for number in range(900)]
    text = b"\n".join(lines) if name == "a.jsonl" else b"[" + b",".join(lines) + b"]"
    content = pack(text, suffix)
    for damaged in (content[:-100], content[: len(content) // 2], content + b"more"):
        path.write_bytes(damaged)
        read, broken = records(path)
        assert 100 < len(read) <= 900 and [text.strip() for text in read] == lines[: len(read)]
        assert len(broken) == 1 and "the compressed file is damaged or cut off here" in broken[0]


def test_a_record_of_gigabytes_takes_the_memory_of_a_window(tmp_path, monkeypatch):
    monkeypatch.setattr(compressed, "MAX_RECORD_BYTES", 8 << 20)
    monkeypatch.setattr(compressed, "_KEPT_BYTES", 9 << 20)
    path = tmp_path / "a.json.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'[{"n": 0}, "')
        for _ in range(300):
            file.write(b"x" * (1 << 20))
        file.write(b'", {"n": 2},')
        for _ in range(50):
            file.write(b" " * (1 << 20))
        file.write(b'{"n": 3}]')

    def check() -> None:
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (held + (100 << 20), resource.RLIM_INFINITY))
        read, broken = records(path)
        assert [text and json.loads(text) for text in read] == [{"n": 0}, None, {"n": 2}, None] and not broken

    assert in_child(check) == 0


def test_a_line_that_ends_with_much_white_space_is_a_record(tmp_path, monkeypatch):
    """Although only white space of it is in the window when it is found."""
    monkeypatch.setattr(compressed, "MAX_RECORD_BYTES", 1 << 20)
    monkeypatch.setattr(compressed, "_KEPT_BYTES", 2 << 20)
    path = tmp_path / "a.jsonl.gz"
    spaces = b" " * (4 << 20)
    path.write_bytes(gzip.compress(b'{"n": 0}\n' + spaces + b'\n {"n": 1}' + spaces + b'\n{"n": 2}\n'))
    assert [text and json.loads(text) for text in records(path)[0]] == [{"n": 0}, None, {"n": 2}]


def test_a_slice_holds_a_limited_amount_of_text(tmp_path, monkeypatch):
    """Whatever the blocks in which it is read, so that a continued run cuts at the same records."""
    monkeypatch.setattr(annotation_slices, "MAX_SLICE_BYTES", 1000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"n": "%s"}\n' % (b"x" * 290) for _ in range(40))))
    source = Source("packed", str(path))
    every = list(slices([source], 100))
    assert [len(piece.bounds) for piece in every] == [4] * 10
    rest = list(slices([source], 100, every[2].next))
    assert [piece.place for piece in rest] == [piece.place for piece in every[3:]]
