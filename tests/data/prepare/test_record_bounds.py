"""Bounds of records against ``json.loads`` of the complete document, for blocks cut anywhere."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo_megatron.data.prepare.record_bounds import element_bounds, line_bounds
from neo_megatron.errors import DataError
from neo_megatron.storage.open import open_source

BLOCKS = [1, 2, 3, 7, 1 << 20]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("bounds") / "a.json"


def read(path, text: bytes, find=element_bounds, block: int = 1 << 20, start: int = 0):
    """([begin, end] of the records, their bytes, why the file breaks off)."""
    path.write_bytes(text)
    with open_source(str(path)) as file:
        found, bounds = find(file, start, block), []
        while True:
            try:
                bounds += next(found).tolist()
            except StopIteration as stop:
                return bounds, [text[begin:end] for begin, end in bounds], stop.value


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)
texts = st.text(alphabet='ab"\\[]{},:/ \n\té你😀\u2028') | st.text()
values = st.recursive(
    scalars | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)
documents = st.builds(
    lambda records, indent, ascii, mark, before, after: (
        mark + (before + json.dumps(records, indent=indent, ensure_ascii=ascii) + after).encode(errors="surrogatepass")
    ),
    st.lists(values, max_size=6),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
    *[st.text(" \t\r\n", max_size=3)] * 2,
)
SURVEY = settings(max_examples=100, deadline=None, derandomize=True)


@SURVEY
@given(documents)
def test_elements_equal_those_of_the_parsed_document(path, text):
    document = json.loads(text)
    for block in BLOCKS:
        bounds, records, broken = read(path, text, block=block)
        assert [json.loads(record) for record in records] == document
        assert broken == ""
        for number, (_, end) in enumerate(bounds):
            assert read(path, text, block=block, start=end)[0] == bounds[number + 1 :]  # continuing after any record


@SURVEY
@given(st.binary(max_size=3), documents, st.data())
def test_broken_json_is_never_accepted(path, noise, text, data):
    """A damaged document parses exactly if all of its elements do and it does not break off."""
    begin = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(begin, min(begin + 3, len(text))))
    text = (text[:begin] + noise + text[end:]).replace(b"\0", b"0")  # zeros make json.loads guess at UTF-16
    try:
        document = json.loads(text.decode("utf-8-sig", "surrogatepass"))
    except ValueError:
        document = None
    try:
        results = [read(path, text, block=block) for block in BLOCKS]
    except DataError:
        assert not isinstance(document, list)
        return
    assert all(result == results[0] for result in results)
    _, records, broken = results[0]
    try:
        parsed = [json.loads(record.decode("utf-8", "surrogatepass")) for record in records]
    except ValueError:
        parsed = None
    if broken or parsed is None:
        assert document is None
    else:
        assert json.dumps(parsed) == json.dumps(document)  # as texts: NaN is not equal to itself


@SURVEY
@given(st.lists(st.text('{}"\\,[] \t\ra', max_size=8), max_size=8), st.booleans())
def test_lines_are_those_that_are_not_blank(path, lines, ends):
    text = "\n".join(lines).encode() + b"\n" * ends
    expected = [line for line in text.split(b"\n") if line.strip(b" \t\r")]
    for block in BLOCKS:
        bounds, records, broken = read(path, text, line_bounds, block)
        assert [record.removesuffix(b"\n") for record in records] == expected
        assert broken == ""
        for number, (_, end) in enumerate(bounds):
            assert read(path, text, line_bounds, block, start=end)[0] == bounds[number + 1 :]
