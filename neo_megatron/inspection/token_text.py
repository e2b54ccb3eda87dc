"""Text to show for each token id."""

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
_BROKEN = "\ufffd"
# A character of UTF-8 has at most four bytes, so at most four tokens share one; an emoji's parts are tokens apart.
_LONGEST_CHARACTER = 4
_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def token_texts(ids: Sequence[int], decode: Decode | None) -> list[str]:
    """The text of each token; "" for one that only continues the character of the token before.

    Args:
        ids: of consecutive tokens.
        decode: ids -> text, special tokens included; ``None``: the ids themselves are shown.
    """
    if decode is None:
        return [f"{number} " for number in ids]
    known: dict[int, str] = {}
    texts: list[str] = []
    while len(texts) < len(ids):
        place = len(texts)
        number = ids[place]
        if number not in known:
            known[number] = decode([number])
        text, size = known[number], 1
        if _BROKEN in text:
            text, size = _join(list(ids[place : place + _LONGEST_CHARACTER]), decode)
        texts += [text] + [""] * (size - 1)
    return texts


def _join(ids: list[int], decode: Decode) -> tuple[str, int]:
    """Text of the fewest tokens that make complete characters, and how many they are; the first alone if none do."""
    for size in range(2, len(ids) + 1):
        text = decode(ids[:size])
        if _BROKEN not in text:
            return text, size
    return _BROKEN, 1


def visible(text: str) -> str:
    """Text whose control characters are shown by symbols; those that change the direction of text, by their code.

    A line break is kept after its symbol.
    """
    return "".join(_symbol(character) for character in text)


def _symbol(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if character in _TURNING:
        return f"[U+{ord(character):04X}]"
    if character < " ":
        return chr(0x2400 + ord(character))
    return "␡" if character == "\x7f" else character
