"""Rows of Arrow batches as records: the forms of images, types that JSON lacks, and rows that cannot be read."""

import datetime
import decimal

import pyarrow as pa
import pytest

from neo_megatron.data.prepare import arrow_values
from neo_megatron.data.prepare.arrow_values import records_of
from neo_megatron.data.prepare.stored_file import StoredFile
from neo_megatron.errors import RejectedSample

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def values(array: pa.Array) -> list:
    """The values of one column; for a rejected row its sentence."""
    found = list(records_of(pa.record_batch({"column": array}), "a.parquet"))
    return [record.sentence if isinstance(record, RejectedSample) else record["column"] for record in found]


def stored(data: bytes, name: str = "column") -> StoredFile:
    return StoredFile("a.parquet", name, data)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array([b"a", None]), [stored(b"a"), None]),
        (pa.array([b"a", None], pa.large_binary()), [stored(b"a"), None]),
        (pa.array([b"a", None], pa.binary(1)), [stored(b"a"), None]),
        (pa.array([b"a", None], pa.binary_view()), [stored(b"a"), None]),
        (pa.array([b"a", None, b"a"]).dictionary_encode(), [stored(b"a"), None, stored(b"a")]),
        (pa.array([[b"a", b"b"], [], None, [None]]), [[stored(b"a"), stored(b"b")], [], None, [None]]),
        (pa.array([{"bytes": b"a", "path": "x.png"}, None], IMAGE), [stored(b"a", "x.png"), None]),
        (pa.array([{"bytes": b"a", "path": None}], IMAGE), [stored(b"a")]),
        (pa.array([{"bytes": None, "path": "x.png"}, {"bytes": None, "path": None}], IMAGE), ["x.png", None]),
        (
            pa.array([{"bytes": None, "path": "x.png"}], pa.struct([("path", pa.string()), ("bytes", pa.null())])),
            ["x.png"],
        ),
        (pa.array([[{"bytes": b"a", "path": "x"}, None], None], pa.list_(IMAGE)), [[stored(b"a", "x"), None], None]),
        (pa.array(["x.png", None]), ["x.png", None]),
    ],
)
def test_images_are_stored_files_or_paths(array, expected):
    assert values(array) == expected
    assert values(array.slice(1)) == expected[1:]


NESTED = [[{"from": "human", "value": "a"}, None], None, [], [{"from": None, "value": "é"}]]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (pa.array(NESTED), NESTED),
        (
            pa.array(NESTED, pa.large_list(pa.struct([("from", pa.large_string()), ("value", pa.string_view())]))),
            NESTED,
        ),
        (pa.array([[1, 2], None], pa.list_(pa.int8(), 2)), [[1, 2], None]),
        (pa.array([1, None], pa.uint64()), [1, None]),
        (pa.array([1.5, None], pa.float16()), [1.5, None]),
        (pa.array([True, None]), [True, None]),
        (pa.nulls(2), [None, None]),
        (pa.array([{}, None], pa.struct([])), [{}, None]),
        (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
        (pa.RunEndEncodedArray.from_arrays([2, 3], ["a", None]), ["a", "a", None]),
        (pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0" * 16], pa.binary(16))), [stored(b"0" * 16)]),
        (pa.array([decimal.Decimal("1.50"), None]), ["1.50", None]),
        (pa.array([datetime.date(2020, 1, 2), None]), ["2020-01-02", None]),
        (pa.array([1, None], pa.timestamp("ns", "Mars/Olympus")), ["1970-01-01 00:00:00.000000001", None]),
        (pa.array([61, None], pa.time32("s")), ["00:01:01", None]),
        (pa.array([3, None], pa.duration("s")), ["3", None]),
    ],
)
def test_other_types_become_what_json_would_have(array, expected):
    assert values(array) == expected


def test_types_without_a_form_reject_the_rows_that_have_a_value():
    array = pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int8()))
    said, nothing = values(array)
    assert said == "the column 'column' has the type map<string, int8>, which is not read; leave it out"
    assert nothing is None


@pytest.mark.parametrize("kind", [pa.string(), pa.string_view(), pa.large_string()])
def test_a_text_that_is_longer_than_a_record_of_json_may_be_is_rejected(monkeypatch, kind):
    monkeypatch.setattr(arrow_values, "MAX_RECORD_BYTES", 1000)
    array = pa.array(["a" * 400, "b" * 1100, None, "c" * 400], kind)
    first, long, nothing, last = values(array)
    assert (first, nothing, last) == ("a" * 400, None, "c" * 400)
    assert long == "the column 'column' has over 0 MiB in this row, too much for text"
    lists = pa.array([["a" * 400] * 2, ["b" * 400] * 3], pa.list_(kind))
    assert [isinstance(value, list) for value in values(lists)] == [True, False]
    assert values(pa.array([b"x" * 5000])) == [stored(b"x" * 5000)]  # of an image


def test_a_row_that_cannot_be_read_does_not_take_others_with_it():
    text = pa.Array.from_buffers(pa.string(), 3, [None, *pa.array([b"a", b"\xff", b"c"]).buffers()[1:]])
    first, second, third = values(text)
    assert (first, third) == ("a", "c") and "the row cannot be read ('utf-8' codec" in second


def test_offsets_that_leave_the_memory_of_an_array_are_not_followed():
    offsets = pa.array([0, 1, 1 << 30, 3], pa.int32()).buffers()[1]
    text = pa.Array.from_buffers(pa.binary(), 3, [None, offsets, pa.py_buffer(b"abc")])
    found = list(records_of(pa.record_batch({"column": text}), "a.arrow", is_valid=False))
    assert found[0] == {"column": StoredFile("a.arrow", "column", b"a")}
    assert all("the row cannot be read" in record.sentence for record in found[1:])


def test_deeply_nested_types_and_equal_names_are_rejected():
    array = pa.array([1])
    for _ in range(40):
        array = pa.ListArray.from_arrays([0, 1], array)
    assert "nested more than 32 deep" in values(array)[0]
    twice = pa.RecordBatch.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])
    (rejected,) = records_of(twice, "a.parquet")
    assert "the file has the column 'a' twice" in rejected.sentence
