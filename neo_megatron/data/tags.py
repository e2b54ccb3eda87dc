r"""Media tags in text, and the backslash that makes a tag literal.

``<image>`` and ``<video>`` mark the place of an image or a video. A backslash in front makes a tag literal text, as in
most languages: ``\<image>`` reads ``<image>``, and a backslash directly in front of a tag is written twice
(``\\<image>`` is a backslash and a place for an image). Backslashes anywhere else mean nothing special.

The exported processor carries a copy of this file (``hf/tags_neo.py``), so it imports nothing of the project.
"""

import re
from collections.abc import Callable

IMAGE_TAG, VIDEO_TAG = "<image>", "<video>"

_TAG = re.compile(r"(\\*)(<image>|<video>)")


def split_tags(text: str) -> list[str]:
    """Literal text and tags in turn: ``[text, tag, text, ..., tag, text]``, with escapes resolved.

    Elements at odd indices are tags; ``"".join`` of all is the text a model would read if tags were words.
    """
    if IMAGE_TAG not in text and VIDEO_TAG not in text:  # the usual case, and many times faster than the search
        return [text]
    pieces, literal, end = [], "", 0
    for match in _TAG.finditer(text):
        backslashes, tag = match.groups()
        literal += text[end : match.start()] + "\\" * (len(backslashes) // 2)
        end = match.end()
        if len(backslashes) % 2:
            literal += tag
        else:
            pieces += [literal, tag]
            literal = ""
    return [*pieces, literal + text[end:]]


def count_tags(text: str, tag: str) -> int:
    """Number of tags of this kind in a text; escaped tags do not count."""
    return split_tags(text)[1::2].count(tag) if tag in text else 0


def replace_tags(text: str, tag: str, replacement: Callable[[], str]) -> str:
    """The text with each tag of this kind replaced by ``replacement()``, which must not begin with a tag."""

    def replaced(match: re.Match[str]) -> str:
        backslashes = match[1]
        if len(backslashes) % 2 or match[2] != tag:
            return match[0]
        return "\\" * (len(backslashes) // 2) + replacement()  # no tag follows them, so they are not written twice

    return _TAG.sub(replaced, text)


def escape_tags(text: str) -> str:
    """The text escaped, so that :func:`split_tags` returns it unchanged and without any tag."""
    return _TAG.sub(lambda match: match[1] * 2 + "\\" + match[2], text)


def as_literal(text: str) -> str:
    """The text with every tag that is not escaped yet made literal; escaped tags stay as they are."""
    return _TAG.sub(lambda match: match[0] if len(match[1]) % 2 else "\\" + match[0], text)


def literal_beyond(text: str, tag: str, kept: int) -> str:
    """The text with its tags of this kind made literal, except for the first ``kept``."""
    seen = 0

    def replaced(match: re.Match[str]) -> str:
        nonlocal seen
        if len(match[1]) % 2 or match[2] != tag:
            return match[0]
        seen += 1
        return match[0] if seen <= kept else "\\" + match[0]

    return _TAG.sub(replaced, text)
