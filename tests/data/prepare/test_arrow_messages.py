"""The messages of Arrow files and streams are those that pyarrow reads."""

import io

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo_megatron.data.prepare.arrow_messages import BrokenMessages, MessageKind, messages
from neo_megatron.storage.open import open_source

WRITERS = {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}


def table(rows: int, with_dictionary: bool = False) -> pa.Table:
    columns = {"number": pa.array(range(rows)), "text": pa.array([f"text {number}" * 9 for number in range(rows)])}
    if with_dictionary:
        columns["kind"] = columns["text"].dictionary_encode()
    return pa.table(columns)


def written(kind: str, content: pa.Table, rows: int, **options) -> bytes:
    file = io.BytesIO()
    with WRITERS[kind](file, content.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(content, max_chunksize=rows)
    return file.getvalue()


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("options", [{}, {"compression": "zstd"}, {"use_legacy_format": True}])
@pytest.mark.parametrize("with_dictionary", [False, True])
def test_each_record_batch_can_be_read_alone(tmp_path, kind, options, with_dictionary):
    content = table(23, with_dictionary)
    (tmp_path / "a").write_bytes(written(kind, content, 5, **options))
    data = (tmp_path / "a").read_bytes()
    with open_source(str(tmp_path / "a")) as file:
        found = list(messages(file))
    assert [it.rows for it in found if it.kind is MessageKind.RECORDS] == [5, 5, 5, 5, 3]
    assert found[0].kind is MessageKind.SCHEMA
    assert sum(it.kind is MessageKind.DICTIONARY for it in found) == with_dictionary
    before = b"".join(data[it.begin : it.end] for it in found if it.kind is not MessageKind.RECORDS)
    batches = []
    for message in found:
        if message.kind is MessageKind.RECORDS:
            batches.append(pa.ipc.open_stream(before + data[message.begin : message.end]).read_next_batch())
    assert pa.Table.from_batches(batches).to_pydict() == content.to_pydict()


def test_empty_files_have_no_batches(tmp_path):
    for kind in WRITERS:
        (tmp_path / "a").write_bytes(written(kind, table(0), 5))
        with open_source(str(tmp_path / "a")) as file:
            assert [it.kind for it in messages(file)] == [MessageKind.SCHEMA]


INTACT = {kind: written(kind, table(9, True), 4) for kind in WRITERS}


@given(st.sampled_from(sorted(WRITERS)), st.data())
def test_damage_ends_in_a_sentence(tmp_path_factory, kind, data):
    """Whatever the bytes say, messages stay within the file and follow each other."""
    content = bytearray(INTACT[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path_factory.getbasetemp() / "damaged.arrow"
    path.write_bytes(content)
    end = 0
    with open_source(str(path)) as file:
        try:
            for message in messages(file):
                assert end <= message.begin < message.end <= len(content) and message.rows >= 0
                end = message.end
        except BrokenMessages as error:
            assert str(error)
