r"""Tags in text: `\<image>` is literal, `\\<image>` a backslash and a tag, and any text can be escaped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo_megatron.data.tags import IMAGE_TAG, VIDEO_TAG, as_literal, count_tags, escape_tags, split_tags

texts = st.lists(st.sampled_from(["<image>", "<video>", "\\", "<", "a", "\n", "image>"]), max_size=12).map("".join)


@pytest.mark.parametrize(
    ("written", "pieces"),
    [
        ("a<image>b", ["a", "<image>", "b"]),
        (r"a\<image>b", ["a<image>b"]),
        (r"a\\<image>b", ["a\\", "<image>", "b"]),
        (r"a\\\<video>b", ["a\\<video>b"]),
        (r"C:\dir\new \\ <image>", [r"C:\dir\new \\ ", "<image>", ""]),
        ("<image><video>", ["", "<image>", "", "<video>", ""]),
    ],
)
def test_text_is_split_at_tags(written, pieces):
    assert split_tags(written) == pieces
    assert count_tags(written, IMAGE_TAG) == pieces[1::2].count("<image>")
    assert count_tags(written, VIDEO_TAG) == pieces[1::2].count("<video>")


@given(texts)
def test_any_text_can_be_written_literally(text):
    assert split_tags(escape_tags(text)) == [text]


@given(texts)
def test_literal_text_keeps_escapes_and_has_no_tags(text):
    assert split_tags(as_literal(text)) == ["".join(split_tags(text))]


@given(texts)
def test_text_without_backslashes_is_split_only_at_tags(text):
    plain = text.replace("\\", "")
    assert "".join(split_tags(plain)) == plain and not any("<image>" in piece for piece in split_tags(plain)[::2])
