"""Any text survives between places of media: only the places are tags."""

from hypothesis import given, settings
from hypothesis import strategies as st

from neo_megatron.data.prepare.schemas.tagged_text import IMAGE, VIDEO, images_first, places_in, tagged
from neo_megatron.data.tags import split_tags

words = st.lists(st.sampled_from(["<image>", "<video>", "<ima", "ge>", "<", "\\", "a", "\n", "[IMG]"]), max_size=6)
texts = words.map("".join)


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(texts | st.sampled_from([IMAGE, VIDEO]), max_size=8))
def test_reading_the_tags_returns_the_pieces(pieces):
    expected = [""]
    for piece in pieces:
        if isinstance(piece, str):
            expected[-1] += piece
        else:
            expected += [piece.tag, ""]
    assert split_tags(tagged(pieces)) == expected


@settings(deadline=None, derandomize=True, database=None)
@given(texts)
def test_placeholders_and_nothing_else_become_places(text):
    found = split_tags(tagged(places_in(text, "[IMG]")))
    assert found[::2] == text.split("[IMG]") and set(found[1::2]) <= {"<image>"}
    assert split_tags(tagged(places_in(text, ""))) == [text]


def test_images_stand_on_lines_in_front_of_the_text():
    assert tagged(images_first(2, "a <image>")) == "<image>\n<image>\na \\<image>"
    assert tagged(images_first(0, "a")) == "a"
