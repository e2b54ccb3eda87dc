"""Translates `generation_kwargs` of lmms-eval's tasks into arguments of transformers' `generate`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_NEW_TOKENS = 1024  # for tasks without a number
# lmms-eval's default of `until`. It ends an example in a text of several; in a chat a turn ends with its own token, and
# an empty line only ends a paragraph.
_BETWEEN_EXAMPLES = "\n\n"
_TAKEN = {"until", "max_new_tokens", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
_PASSED_ON = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens")


@dataclass(frozen=True)
class Generation:
    """``arguments`` of `generate`; an answer ends in front of the first of ``stops``; names ``ignored`` are unknown."""

    arguments: dict[str, Any]
    stops: tuple[str, ...]
    ignored: tuple[str, ...]

    def cut(self, text: str) -> str:
        """The answer up to the first stop."""
        return text[: min([place for stop in self.stops if (place := text.find(stop)) >= 0], default=len(text))]


def generation(settings: Mapping[str, Any]) -> Generation:
    """How to generate for a task: greedily, unless it gives a temperature and does not forbid sampling."""
    arguments: dict[str, Any] = {
        "max_new_tokens": int(settings.get("max_new_tokens") or settings.get("max_gen_toks") or MAX_NEW_TOKENS)
    }
    temperature = settings.get("temperature")
    if settings.get("do_sample", bool(temperature)) and temperature != 0:
        arguments["do_sample"] = True
        sampling = {name: settings.get(name) for name in ("temperature", "top_p", "top_k")}
        sampling["top_p"] = sampling["top_p"] or None  # 0 means none in a task, and transformers refuses it
        arguments |= {name: value for name, value in sampling.items() if value is not None}
    arguments |= {name: settings[name] for name in _PASSED_ON if settings.get(name) is not None}
    until = settings.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    ignored = tuple(sorted(settings.keys() - _TAKEN - set(_PASSED_ON)))
    return Generation(arguments, tuple(stop for stop in stops if stop not in ("", _BETWEEN_EXAMPLES)), ignored)
