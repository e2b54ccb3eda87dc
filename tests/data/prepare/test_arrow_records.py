"""Rows of Arrow files and streams, as Hugging Face datasets writes them, and damaged and hostile ones."""

import json
import mmap

import pyarrow as pa
import pytest
from support.kills import in_child
from support.little_memory import read_with_limit

from neo_megatron.data.prepare.annotation_slices import read_slice, slices
from neo_megatron.data.prepare.input_files import annotation_files
from neo_megatron.data.prepare.registry import Source
from neo_megatron.errors import DataError, RejectedSample

WRITERS = {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}


def write(path, table: pa.Table, kind: str, rows: int = 3, **options):
    with WRITERS[kind](str(path), table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def write_zeros(file, kind: str, size: int) -> None:
    offsets = pa.array([0, size], pa.int32()).buffers()[1]
    array = pa.Array.from_buffers(pa.binary(), 1, [None, offsets, pa.py_buffer(mmap.mmap(-1, size))])
    schema = pa.schema([("data", array.type)])
    with WRITERS[kind](file, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(pa.record_batch([array], schema=schema))


def records(path, size: int = 7) -> tuple[list, list[str]]:
    """(records, why slices are broken)."""
    source = Source("table", str(path))
    pieces = list(slices([source], size))
    read = [record for piece in pieces for _, record in read_slice(piece, source, 0)]
    return read, [piece.broken for piece in pieces if piece.broken]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("compression", [None, "zstd", "lz4"])
@pytest.mark.parametrize("rows", [1, 3, 100, 200])
def test_rows_are_those_that_were_written(tmp_path, kind, compression, rows):
    table = pa.Table.from_pylist([{"n": n, "text": f"é{n}", "tags": ["a"] * (n % 3)} for n in range(150)])
    table = table.append_column("label", table["text"].dictionary_encode())
    path = write(tmp_path / "a.arrow", table, kind, rows, compression=compression)
    assert records(path) == (table.to_pylist(), [])


def test_a_data_set_saved_by_hugging_face_is_read_in_its_order(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"n": list(range(20)), "text": [f"t{n}" for n in range(20)]}
    datasets.Dataset.from_dict(rows).shuffle(seed=1).save_to_disk(str(tmp_path / "saved"), num_shards=3)
    expected = datasets.load_from_disk(str(tmp_path / "saved")).to_list()
    files = annotation_files(str(tmp_path / "saved"))
    assert len(files) == 3
    assert [record for file in files for record in records(file)[0]] == expected


def test_what_is_missing_of_a_stream_counts_as_broken(tmp_path):
    table = pa.table({"text": [f"text {n}" for n in range(20)]})
    path = write(tmp_path / "a.arrow", table, "stream", 4)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 5])
    read, broken = records(path)
    assert 4 <= len(read) < 20 and read == table.to_pylist()[: len(read)]
    assert len(broken) == 1 and f"record batch {len(read) // 4} cannot be read" in broken[0]


@pytest.mark.parametrize("kept", [6, 8, 20, 0.5, 0.95])
def test_a_file_without_its_footer_is_rejected(tmp_path, kept):
    path = write(tmp_path / "a.arrow", pa.table({"text": [f"text {n}" for n in range(20)]}), "file")
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(len(content) * kept)])
    with pytest.raises(DataError, match=r"a\.arrow is (damaged Arrow data|not a JSON array)"):
        records(path)


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("seed", range(4))
def test_any_changed_byte_is_read_or_has_a_reason(tmp_path, kind, seed):
    """Offsets that leave the memory, sizes of exabytes: nothing crashes or is lost."""
    table = pa.table({"text": ["a", None, "bc"] * 5, "data": [b"x", b"yz", None] * 5, "list": [[1], [], None] * 5})
    path = write(tmp_path / "a.arrow", table, kind, 5)
    content = path.read_bytes()

    def check() -> None:
        for place in range(12 + seed, len(content), 8):
            changed = bytearray(content)
            changed[place] = (changed[place] + (1, 64, 127, 255)[place % 4]) % 256
            path.write_bytes(changed)
            try:
                read, broken = records(path)
            except DataError as error:
                assert str(error).startswith(str(path)) and "\n" not in str(error)
                continue
            assert all(isinstance(record, dict | RejectedSample) for record in read) and "\n" not in "".join(broken)

    assert in_child(check) == 0


@pytest.mark.parametrize(("limit", "rejected"), [(64 << 20, True), (4 << 30, False)])
def test_compressed_batches_that_expand_beyond_the_limit_of_memory_are_rejected(tmp_path, limit, rejected):
    for kind in WRITERS:
        with pa.PythonFile((tmp_path / kind).open("wb")) as file:
            write_zeros(file, kind, 256 << 20)
        assert (tmp_path / kind).stat().st_size < 1 << 20
    for read, refused, broken in read_with_limit(limit, [tmp_path / kind for kind in WRITERS]):
        assert read + broken == 1 and refused + broken == rejected


def test_a_damaged_file_is_accounted_for(bench, new_sample):
    rows = [{"conversations": new_sample("Hi", f"{n}")["conversations"]} for n in range(12)]
    path = write(bench.path / "train.arrow", pa.Table.from_pylist(rows), "stream", 4)
    path.write_bytes(path.read_bytes()[:-200])
    counts = bench.preprocess(path).manifest["counts"]
    rejects = bench.rejects()
    assert (counts["samples_read"], counts["samples_kept"]) == (9, 8)
    assert [(it["record"], it["kind"]) for it in rejects] == [(8, "unreadable record")] and json.dumps(rejects)
