"""Checks a checkpoint's `generation_config.json` before transformers reads it."""

import os
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from neo_megatron.checked_files import UnreadableFile, read_json

GENERATION_CONFIG = "generation_config.json"
_IDS = ("eos_token_id", "pad_token_id", "bos_token_id")
# Key -> smallest and largest value. Other keys would change the answers or the memory they take.
_RANGES = {
    "temperature": (0, 1e3),
    "top_k": (0, 1e9),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (1e-3, 1e3),
    "max_new_tokens": (1, 1e9),
    "max_length": (1, 1e9),
}
_NAMES = ("transformers_version", "_from_model_config", "do_sample", "use_cache")


def check_generation_config(directory: str | Path, vocab_size: int) -> None:
    """Checks `generation_config.json`, if there is one.

    Raises:
        UnreadableFile: a value is of another type or out of range; a setting is not supported.
    """
    path = Path(directory) / GENERATION_CONFIG
    if not os.path.lexists(path):
        return
    usual = GenerationConfig().to_dict()
    for key, value in read_json(path).items():
        if value is None or (key in usual and type(value) is type(usual[key]) and value == usual[key]):
            continue
        if key in _IDS:
            ids = value if isinstance(value, list) and key == "eos_token_id" else [value]
            good = len(ids) <= 64 and all(type(number) is int and 0 <= number < vocab_size for number in ids)
        elif key in _RANGES:
            smallest, largest = _RANGES[key]
            kinds = (int,) if key in ("top_k", "max_new_tokens", "max_length") else (int, float)
            good = type(value) in kinds and smallest <= value <= largest
        else:
            good = key in _NAMES and isinstance(value, bool | str)
        if not good:
            raise UnreadableFile(f"{path}: {_short(key)} is {_short(value)}, which is not supported: remove it there")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) and value.isidentifier() else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
