"""Checks that the files of a tokenizer are safe to load and use, by an allow-list of the parts of Qwen's tokenizers.

A `tokenizer.json` is a small program: normalizers that double a text many times over, regular expressions that never
end, ids that need gigabytes. Trying a text in a process with limits would find those that misbehave on that text but
not those that wait for another one, and the tokenizers library ends the process when memory runs out. So all parts are
checked before anything is built: only types with known cost and growth, and only published regular expressions. That
needs neither a process nor a time limit, and the message names the part at fault.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neo_megatron.checked_files import UnreadableFile, check_file, read_json

# Names of files that a library may read as parts of a tokenizer.
_ENDINGS = (".json", ".txt", ".jinja", ".model", ".bpe", ".vocab", ".v1", ".v3")
_LARGEST_ID = 1 << 24  # every id takes a row of the embedding
_LONGEST_TOKEN = 1024
_LARGEST_GROWTH = 16  # of the bytes of a text, by all normalizers or decoders together
_TEXT_BYTES = 128 << 20
# Of GPT-2, cl100k, Llama 3, Qwen 2 to 3.5, o200k and DeepSeek: their time is linear in the length of any text.
KNOWN_PATTERNS = frozenset(
    {
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
        r"|\s+(?!\S)|\s+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"\p{N}{1,3}",
        r"\p{N}",
    }
)


def check_tokenizer_files(directory: str | Path) -> None:
    """Checks all files of a tokenizer before any library opens them.

    Raises:
        UnreadableFile: a file is not a regular file, too large, or not what its name says; a part of it is not of a
            known type, or would make a text or the memory of its reader grow beyond the limits.
    """
    directory = Path(directory)
    for place in (directory, directory / "chat_templates", directory / "additional_chat_templates"):
        for name in sorted(os.listdir(place)) if place.is_dir() else ():
            if name.endswith(_ENDINGS):
                check_file(place / name, _TEXT_BYTES)
    for name, check in _CHECKS.items():
        if os.path.lexists(path := directory / name):
            contents = read_json(path, _TEXT_BYTES)
            try:
                check(contents)
            except _Refused as error:
                raise UnreadableFile(f"{path}: {error}: {_REMEDY}") from error


def check_built(tokenizer_json: str, directory: str | Path) -> None:
    """Checks the tokenizer that a library has built from the files, as some of its classes add parts of their own.

    Args:
        tokenizer_json: the fast tokenizer as text.
        directory: that it came from, for messages.

    Raises:
        UnreadableFile: as `check_tokenizer_files`.
    """
    try:
        _check_parts(json.loads(tokenizer_json))
    except _Refused as error:
        raise UnreadableFile(f"{directory}: {error}: {_REMEDY}") from error


_REMEDY = "use the tokenizer of a Qwen or NEO model as it was published"


class _Refused(ValueError):
    """A part of a tokenizer is not of a known type."""


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise _Refused(what)


def _check_tokenizer(parts: dict[str, Any]) -> None:
    model = parts.get("model")
    _require(isinstance(model, dict), "it has no model")
    _require(model.get("type", "BPE") == "BPE", f"its model is of type {_short(model.get('type'))}, not BPE")
    vocabulary = model.get("vocab")
    _require(isinstance(vocabulary, dict), "its vocab is not a table of tokens")
    _check_ids(vocabulary)
    _require(len(set(vocabulary.values())) == len(vocabulary), "two tokens of its vocab have the same id")
    _check_merges(model.get("merges", []), vocabulary)
    for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        _require(_is_short(model.get(key)), f"its {key} is {_short(model.get(key))}, not a short string")
    for key in ("fuse_unk", "byte_fallback", "ignore_merges"):
        _require(isinstance(model.get(key), bool | None), f"its {key} is {_short(model.get(key))}, not true or false")
    _require(not model.get("dropout"), "it drops merges at random (dropout)")
    added = parts.get("added_tokens", [])
    _require(isinstance(added, list), "its added_tokens are not a list")
    for token in added:
        _require(isinstance(token, dict), f"an added token is {_short(token)}, not an object")
        _check_token(token)
        _require(_is_id(token.get("id")), f"an added token has the id {_short(token.get('id'))}")
    _check_parts(parts)
    for key, limit in (("truncation", "max_length"), ("padding", "pad_to_multiple_of")):
        _check_length(parts.get(key), key, limit)


def _check_parts(parts: dict[str, Any]) -> None:
    for key, known in (("normalizer", _NORMALIZERS), ("decoder", _DECODERS)):
        growth = _growth(parts.get(key), known, key)
        _require(growth <= _LARGEST_GROWTH, f"its {key} can make a text {growth:.3g} times as long")
    _growth(parts.get("pre_tokenizer"), _PRE_TOKENIZERS, "pre_tokenizer")
    _growth(parts.get("post_processor"), _POST_PROCESSORS, "post_processor")
    _require(len(json.dumps(parts.get("post_processor"))) <= 4096, "its post_processor is longer than 4,096 characters")


def _check_ids(tokens: dict[str, Any]) -> None:
    for token, number in tokens.items():
        if not _is_id(number) or len(token) > _LONGEST_TOKEN:
            raise _Refused(f"the token {_short(token)} has the id {_short(number)} or is too long")


def _is_id(number: Any) -> bool:
    return type(number) is int and 0 <= number < _LARGEST_ID


def _check_merges(merges: Any, vocabulary: dict[str, int]) -> None:
    _require(isinstance(merges, list), "its merges are not a list")
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        good = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
        if not good or pair[0] not in vocabulary or pair[1] not in vocabulary:
            raise _Refused(f"the merge {_short(merge)} is not a pair of tokens of its vocab")


def _check_length(setting: Any, key: str, name: str) -> None:
    """Checks padding or truncation, which each user of a tokenizer sets: saved lengths must not need much memory."""
    if setting is None:
        return
    strategy = setting.get("strategy") if isinstance(setting, dict) else 0
    lengths = list(strategy.values()) if isinstance(strategy, dict) else []
    lengths += [setting.get(name) or 0] if isinstance(setting, dict) else [-1]
    _require(all(_is_id(length) for length in lengths), f"its {key} is {_short(setting)}")


def _check_token(token: Any) -> None:
    """Checks a special token: a string, or an object with its text and how spaces around it are treated."""
    if isinstance(token, dict):
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        _require(
            all(isinstance(token.get(key, False), bool) for key in flags), f"the token {_short(token)} has wrong flags"
        )
        unknown = token.keys() - {*flags, "content", "id", "__type"}
        _require(not unknown, f"the token {_short(token)} has the key {_short(min(unknown, default=''))}")
        token = token.get("content")
    good = isinstance(token, str) and 0 < len(token) <= _LONGEST_TOKEN
    _require(good, f"the special token {_short(token)} is not a short string")


def _check_special(contents: dict[str, Any]) -> None:
    """Checks `special_tokens_map.json`, and the same keys of `tokenizer_config.json`."""
    for key, value in contents.items():
        if key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = list(value.values()) if isinstance(value, dict) else value
            _require(isinstance(tokens, list | None), f"{key} is {_short(value)}, not a list of tokens")
            for token in tokens or []:
                _check_token(token)
        elif key.endswith("_token") and not isinstance(value, bool | None):  # add_bos_token is true or false
            _check_token(value)
        elif key.endswith("_token_id"):
            _require(value is None or _is_id(value), f"{key} is {_short(value)}, not an id")


def _check_config(contents: dict[str, Any]) -> None:
    _check_special(contents)
    decoder = contents.get("added_tokens_decoder", {})
    _require(isinstance(decoder, dict), "its added_tokens_decoder is not a table of tokens")
    for number, token in decoder.items():
        plain = number.isascii() and number.isdecimal() and len(number) < 10 and _is_id(int(number))
        _require(plain, f"an added token has the id {_short(number)}")
        _require(isinstance(token, dict), f"the added token {number} is {_short(token)}")
        _check_token(token)
    for key in ("tokenizer_class", "padding_side", "truncation_side", "processor_class", "backend"):
        _require(isinstance(contents.get(key), str | None), f"its {key} is {_short(contents.get(key))}, not a name")
    longest = contents.get("model_max_length")
    number = isinstance(longest, int | float) and not isinstance(longest, bool) and longest > 0
    _require(longest is None or number, f"its model_max_length is {_short(longest)}")
    for key in ("init_inputs", "model_specific_special_tokens", "vocab", "merges", "gguf_file", "tokenizer_object"):
        _require(not contents.get(key), f"it sets {key}")
    template = contents.get("chat_template")
    _require(isinstance(template, str | list | dict | None), f"its chat_template is {_short(template)}")


def _check_model_config(contents: dict[str, Any]) -> None:
    """Checks the model type in `config.json`, by which transformers chooses a class of tokenizers."""
    kind = contents.get("model_type")
    _require(isinstance(kind, str | None), f"its model_type is {_short(kind)}, not a name")


_CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "tokenizer.json": _check_tokenizer,
    "tokenizer_config.json": _check_config,
    "special_tokens_map.json": _check_special,
    "added_tokens.json": _check_ids,
    "vocab.json": _check_ids,
    "config.json": _check_model_config,
}

# Type of a part -> the factor by which it can grow the bytes of a text.
_STRUCTURED = ("type", "pattern", "single", "pair", "special_tokens")
_Growth = dict[str, "float | Callable[[dict[str, Any]], float]"]


def _growth(part: Any, known: _Growth, what: str) -> float:
    """The factor by which a part and its inner parts can grow a text. Raises _Refused for a part of unknown type."""
    if part is None:
        return 1.0
    kind = part.get("type") if isinstance(part, dict) else None
    _require(isinstance(kind, str), f"its {what} {_short(part)} has no type")
    if kind == "Sequence":
        lists = ("normalizers", "pretokenizers", "decoders", "processors")
        inner = next((part[key] for key in lists if key in part), None)
        _require(isinstance(inner, list) and len(inner) <= 32, f"its {what} is not a sequence of parts")
        growth = 1.0
        for one in inner:
            growth *= _growth(one, known, what)
        return growth
    _require(kind in known, f"its {what} is of type {_short(kind)}, which is not one of {', '.join(sorted(known))}")
    for key, value in part.items():
        good = isinstance(value, bool) or _is_id(value) or _is_short(value) or key in _STRUCTURED
        _require(good, f"its {what} has {_short(key)}: {_short(value)}")
    factor = known[kind]
    return factor if isinstance(factor, float) else factor(part)


def _replacing(part: dict[str, Any]) -> float:
    pattern, content = part.get("pattern"), part.get("content")
    literal = pattern.get("String") if isinstance(pattern, dict) else None
    _require(isinstance(literal, str) and literal != "", "its Replace does not replace a literal string")
    _require(isinstance(content, str), "its Replace has no content")
    return max(1.0, len(content.encode()) / len(literal.encode()))


def _splitting(part: dict[str, Any]) -> float:
    pattern = part.get("pattern")
    _require(isinstance(pattern, dict) and len(pattern) == 1, "its Split has no pattern")
    if isinstance(pattern.get("String"), str) and _is_short(pattern["String"]) and pattern["String"]:
        return 1.0
    known = isinstance(pattern.get("Regex"), str) and pattern["Regex"] in KNOWN_PATTERNS
    _require(known, f"it splits text by {_short(pattern)}, which is not a published expression and may never end")
    return 1.0


# A character of two bytes becomes up to 9; NFKD and NFKC turn one of three into 33: the Arabic ligature U+FDFA.
_NORMALIZERS: _Growth = {"NFC": 3.0, "NFD": 4.0, "NFKC": 11.0, "NFKD": 11.0, "Lowercase": 1.5, "Strip": 1.0}
_NORMALIZERS |= {"StripAccents": 1.0, "Replace": _replacing, "Prepend": 1.0}
_PRE_TOKENIZERS: _Growth = {"ByteLevel": 2.0, "Split": _splitting, "Digits": 1.0, "Punctuation": 1.0, "Metaspace": 3.0}
_PRE_TOKENIZERS |= {"Whitespace": 1.0, "WhitespaceSplit": 1.0}
_POST_PROCESSORS: _Growth = {"ByteLevel": 1.0, "TemplateProcessing": 1.0}
_DECODERS: _Growth = {"ByteLevel": 1.0, "ByteFallback": 1.0, "Fuse": 1.0, "Strip": 1.0, "Metaspace": 1.0}
_DECODERS |= {"Replace": _replacing, "BPEDecoder": 1.0}


def _is_short(text: Any) -> bool:
    return text is None or (isinstance(text, str) and len(text) <= 16)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
