"""Rows of Parquet files: row groups of any size, and damaged and hostile files."""

import json
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.containers import write
from support.kills import in_child
from support.little_memory import read_with_limit

from neo_megatron.data.prepare import parquet_records
from neo_megatron.data.prepare.annotation_slices import read_slice, slices
from neo_megatron.data.prepare.registry import Source
from neo_megatron.errors import DataError, RejectedSample


def records(path, size: int = 7) -> list:
    source = Source("table", str(path))
    return [record for piece in slices([source], size) for _, record in read_slice(piece, source, 0)]


@pytest.mark.parametrize("group", [1, 3, 10, 100])
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_rows_are_those_of_pyarrow(tmp_path, monkeypatch, group, batch):
    monkeypatch.setattr(parquet_records, "_BATCH_ROWS", batch)
    rows = [{"n": number, "text": f"é{number}" * number, "tags": ["a"] * (number % 3)} for number in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=group, compression="zstd")
    assert records(tmp_path / "a.parquet") == pq.read_table(tmp_path / "a.parquet").to_pylist() == rows


def test_empty_row_groups_and_tables_are_read(tmp_path):
    table = pa.table({"n": pa.array([1, 2, 3])})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for part in (table[:0], table[:2], table[:0], table[2:]):
            writer.write_table(part)
    assert records(tmp_path / "a.parquet", 2) == [{"n": 1}, {"n": 2}, {"n": 3}]
    pq.write_table(table[:0], tmp_path / "empty.parquet")
    assert records(tmp_path / "empty.parquet") == []


def images(path, count: int = 40, size: int = 20_000) -> list[dict]:
    rows = [{"image": bytes([number]) * size, "n": number} for number in range(count)]
    options = {"use_dictionary": False, "compression": "none", "data_page_size": 4 * size, "write_page_checksum": True}
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20, **options)
    return rows


def test_rows_after_a_damaged_page_are_rejected_and_other_row_groups_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_records, "_BATCH_ROWS", 2)
    path = tmp_path / "a.parquet"
    images(path)
    content = bytearray(path.read_bytes())
    place = content.index(bytes([9]) * 20_000)
    header = content.rindex(bytes([8]) * 20_000, 0, place) + 20_000
    content[header : header + 4] = b"\xff\xff\xff\xff"  # the length of the next value
    path.write_bytes(content)
    found = records(path)
    assert len(found) == 40 and [record["n"] for record in found if isinstance(record, dict)][-20:] == list(
        range(20, 40)
    )
    rejected = [record for record in found if isinstance(record, RejectedSample)]
    assert 0 < len(rejected) < 20 and all("row group 0 cannot be read from row" in it.sentence for it in rejected)


@pytest.mark.parametrize("cut", [3, 4, 8, 100, 500, 100_000])
def test_a_file_that_is_cut_off_is_rejected(tmp_path, cut):
    path = tmp_path / "a.parquet"
    images(path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(DataError, match=r"a\.parquet is damaged Parquet"):
        records(path)


def test_footers_that_lie_are_rejected(tmp_path):
    path = tmp_path / "a.parquet"
    images(path)
    content = path.read_bytes()
    footer = struct.unpack("<I", content[-8:-4])[0]
    for length in (footer - 1, footer // 2, 0, len(content), 0xFFFFFFFF):
        path.write_bytes(content[:-8] + struct.pack("<I", length) + b"PAR1")
        with pytest.raises(DataError, match="is damaged Parquet"):
            records(path)


@pytest.mark.parametrize("seed", range(8))
def test_changed_bytes_of_a_footer_end_with_a_reason(tmp_path, seed):
    """Every row is read or rejected, or the file is."""
    path = tmp_path / "a.parquet"
    images(path, 20, 100)
    content = path.read_bytes()
    footer = struct.unpack("<I", content[-8:-4])[0]

    def check() -> None:
        for place in range(len(content) - 8 - footer + seed, len(content) - 8, 8):
            changed = bytearray(content)
            changed[place] ^= 1 << (place // 8 % 8)
            path.write_bytes(changed)
            try:
                found = records(path)
            except DataError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)
                continue
            assert all(isinstance(record, dict | RejectedSample) for record in found)

    assert in_child(check) == 0


def test_a_claim_of_more_rows_than_there_is_room_for_is_rejected(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": pa.nulls(5_000_000)}), path)
    with pytest.raises(DataError, match=r"claims 5,000,000 rows in [\d,]+ bytes"):
        records(path)
    monkeypatch.setattr(parquet_records, "MAX_FOOTER_BYTES", 10)
    with pytest.raises(DataError, match="its footer has .* bytes, over 10"):
        records(path)


def memory(kind: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{kind}:"))


def test_memory_is_bounded_whatever_the_size_of_a_row_group(tmp_path):
    """A row group of 250 MB takes less than 160; it is written by a process whose memory is not used again."""
    path = tmp_path / "a.parquet"

    def write() -> None:
        rows = pa.table({"image": [bytes([number]) * 1_000_000 for number in range(10)] * 25})
        options = {"use_dictionary": False, "compression": "none"}
        pq.write_table(rows, path, row_group_size=250, write_batch_size=1, **options)  # pages of a megabyte

    def check() -> None:
        source = Source("table", str(path))
        (piece,) = slices([source], 8192)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before, count = memory("VmRSS"), 0
        for number, record in read_slice(piece, source, 0):
            assert record["image"].data == bytes([number % 10]) * 1_000_000
            count += 1
        assert count == 250 and memory("VmHWM") - before < 160 << 20

    assert in_child(write) == 0 and in_child(check) == 0


def test_a_dictionary_that_expands_to_gigabytes_is_rejected_by_row(tmp_path):
    """256 rows share a value of 16 MB: 4 GB in a file of kilobytes."""
    path = tmp_path / "a.parquet"
    image = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), pa.array([bytes(16 << 20)]))
    pq.write_table(pa.table({"image": image}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1 << 20
    assert read_with_limit(256 << 20, [path]) == [(256, 256, 0)]


def test_a_damaged_file_is_accounted_for(bench, new_sample):
    bench.images("a.png", "b.png")
    names = ["a.png", "b.png"]
    many = [new_sample("<image>" * 2 + "What?", f"{number}", image=names) for number in range(12)]
    path = write("parquet", bench.path / "train", many, bench.path / "images", row_group_size=6, use_dictionary=False)
    content = bytearray(path.read_bytes())
    place = content.index(b"\x89PNG") + 2000
    content[place : place + 400] = bytes(400)
    path.write_bytes(content)
    counts = bench.preprocess(path).manifest["counts"]
    rejects = bench.rejects()
    assert counts["samples_read"] == 12 == counts["samples_kept"] + len(rejects) and 0 < len(rejects) <= 6
    assert json.dumps(rejects) and {reject["file"] for reject in rejects} == {str(path)}
