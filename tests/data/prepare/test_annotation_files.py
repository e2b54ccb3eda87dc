"""Annotation files whose contents do not fit their name are rejected with a remedy; others are accepted."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neo_megatron.data.prepare.annotation_files import check_annotation_file
from neo_megatron.data.prepare.registry import Source
from neo_megatron.errors import DataError

RECORDS = [
    {"id": number, "conversations": [{"from": "human", "value": f"a {number}"}, {"from": "gpt", "value": "b"}]}
    for number in range(3)
]
ARRAY = json.dumps(RECORDS).encode()
LINES = b"".join(json.dumps(record).encode() + b"\n" for record in RECORDS)
LONG = {"conversations": [{"from": "human", "value": "x" * (1 << 21)}, {"from": "gpt", "value": "b"}]}


def archive(kind: str) -> bytes:
    file = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=file, mode="w") as tar:
            entry = tarfile.TarInfo("a.json")
            entry.size = len(ARRAY)
            tar.addfile(entry, io.BytesIO(ARRAY))
    else:
        with zipfile.ZipFile(file, "w") as packed:
            packed.writestr("a.json", ARRAY)
    return file.getvalue()


def said(path, content: bytes) -> str:
    """The message about a file; "" if it is accepted."""
    path.write_bytes(content)
    try:
        check_annotation_file(str(path))
    except DataError as error:
        assert str(error).startswith(str(path)) and "\n" not in str(error)
        return str(error)
    return ""


BINARY = {
    "gzip": (gzip.compress(ARRAY)[:5], "JSON compressed with gzip, but damaged"),
    "zstd": (b"\x28\xb5\x2f\xfd" + ARRAY, "JSON compressed with Zstandard, but damaged"),
    "bzip2": (bz2.compress(ARRAY), "compressed with bzip2"),
    "xz": (lzma.compress(ARRAY), "compressed with xz"),
    "tar.gz": (gzip.compress(archive("tar")), "a tar archive in a compressed file; decompress it with: gunzip"),
    "xz in gzip": (gzip.compress(lzma.compress(ARRAY)), "compressed with xz"),
    "empty in gzip": (gzip.compress(b""), "is empty"),
    "utf-16 in gzip": (gzip.compress(LINES.decode().encode("utf-16")), "is UTF-16"),
    "zip": (archive("zip"), "a ZIP archive"),
    "parquet": (b"PAR1" + ARRAY + b"PAR1", "is damaged Parquet (its footer is missing)"),
    "cut parquet": (b"PAR1" + ARRAY, "is damaged Parquet (its footer is missing)"),
    "encrypted parquet": (b"PAR1" + ARRAY + b"PARE", "is encrypted Parquet; write it without"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git lfs pull"),
    "empty": (b"", "is empty"),
    "blank": (b" \n\n", "is empty"),
    "html": (b"<!DOCTYPE html>\n<html>\n", "begins with '<!DOCTYPE html>'"),
    "csv": (b"image,question,answer\na.jpg,What?,A cat.\n", "begins with 'image,question,answer'"),
    "yaml": (b"- image: a.jpg\n  text: b\n", "begins with '- image: a.jpg'"),
} | {
    f"{encoding} {bool(mark)}": (mark + LINES.decode().encode(encoding), f"is {encoding[:6].upper()}")
    for encoding, mark in [
        *(("utf-16-le", b"\xff\xfe"), ("utf-16-be", b"\xfe\xff"), ("utf-16-le", b""), ("utf-16-be", b"")),
        *(("utf-32-le", b"\xff\xfe\0\0"), ("utf-32-be", b"\0\0\xfe\xff"), ("utf-32-le", b""), ("utf-32-be", b"")),
    ]
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("kind", BINARY)
def test_other_file_formats_are_recognised(tmp_path, name, kind):
    content, sentence = BINARY[kind]
    assert sentence in said(tmp_path / name, content)


@pytest.mark.parametrize(
    "content",
    [
        ARRAY,
        ARRAY + b"\n",
        json.dumps(RECORDS, indent=2).encode(),
        json.dumps(RECORDS, indent=0).encode(),
        b"[" + b",\n".join(LINES.splitlines()) + b"]",
        b"[\n" + b",\n".join(LINES.splitlines()) + b"\n]\n",
        b"[\n" + b"\n,".join(LINES.splitlines()) + b"\n]\n",
        json.dumps([LONG]).encode(),
        json.dumps([LONG]).encode() + b"\n\n",
        b"\xef\xbb\xbf" + ARRAY,
        json.dumps([RECORDS]).encode(),
    ],
)
def test_an_array_in_a_jsonl_file_is_rejected(tmp_path, content):
    assert "is one JSON array; rename it to .json, or" in said(tmp_path / "a.jsonl", content)
    assert not said(tmp_path / "a.json", content)
    assert "is one JSON array; rename it to .json.gz, or" in said(tmp_path / "a.jsonl.gz", gzip.compress(content))
    assert not said(tmp_path / "a.json.gz", gzip.compress(content))


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES.strip(),
        b"\xef\xbb\xbf" + LINES,
        b"\n\n" + LINES.replace(b"\n", b"\r\n"),
        (json.dumps(RECORDS) + "\n").encode() * 2,  # list-packed
        json.dumps(LONG).encode() + b"\n" + LINES,
        json.dumps([LONG]).encode() + b"\n" + json.dumps([LONG]).encode(),
    ],
)
def test_lines_in_a_json_file_are_rejected(tmp_path, content):
    assert not said(tmp_path / "a.jsonl", content)
    if len(content) < 1 << 20:
        assert "has one record a line; rename it to .jsonl" in said(tmp_path / "a.json", content)
        assert "has one record a line; rename it to .jsonl.gz" in said(tmp_path / "a.json.gz", gzip.compress(content))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"info": {"version": 1}, "data": RECORDS}, "the list of records under 'data'; write only that list"),
        ({str(number): record for number, record in enumerate(RECORDS)}, "a record under each key"),
    ],
)
def test_an_object_that_holds_all_records_is_rejected(tmp_path, value, sentence, indent):
    content = json.dumps(value, indent=indent).encode()
    assert sentence in said(tmp_path / "a.json", content)
    assert (sentence if indent is None else "span several lines") in said(tmp_path / "a.jsonl", content)


def test_a_record_that_spans_several_lines_is_rejected(tmp_path):
    content = json.dumps(RECORDS[0], indent=2).encode()
    assert "span several lines; write one a line" in said(tmp_path / "a.jsonl", content)
    assert "is one JSON object, not an array" in said(tmp_path / "a.json", content)
    assert not said(tmp_path / "a.jsonl", json.dumps(RECORDS[0]).encode())


@pytest.mark.parametrize("first", [b"{broken", b'{"conversations": [', b"[{broken", b'"text"', b"log: started"])
def test_a_broken_first_record_does_not_reject_the_file(tmp_path, first):
    assert not said(tmp_path / "a.jsonl", first + b"\n" + LINES)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # a busy machine may be slow
@given(
    st.lists(st.recursive(st.none() | st.integers() | st.text(), lambda v: st.dictionaries(st.text(), v)), min_size=2)
)
def test_files_written_by_json_are_accepted(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("written")
    assert not said(path / "a.json", json.dumps(records).encode())
    objects = [{"value": record} for record in records]
    assert not said(path / "a.jsonl", "\n".join(map(json.dumps, objects)).encode())


def test_a_source_is_checked_before_anything_else(tmp_path):
    with pytest.raises(DataError, match="is an empty directory: give a JSON or JSONL file"):
        Source("a", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(bz2.compress(LINES))
    with pytest.raises(DataError, match=r"a\.jsonl is compressed with bzip2"):
        Source("a", str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.tar"])
def test_what_is_read_is_known_from_its_content(tmp_path, name):
    """Whatever its name says, as long as it is clear how records are separated."""
    if name != "a.tar":
        assert not said(tmp_path / name, gzip.compress(LINES))
    assert not said(tmp_path / name, archive("tar"))


@pytest.mark.parametrize("magic", [b"PAR1", b"\xff\xff\xff\xff\x10\0\0\0", b"ARROW1\0\0", b"\x28\xb5\x2f\xfd"])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, magic):
    monkeypatch.setattr("neo_megatron.data.prepare.file_kinds.is_installed", lambda module: module != "pyarrow")
    assert "which needs PyArrow: pip install 'pyarrow" in said(tmp_path / "a", magic)
