"""Handlers of the page's events, without Gradio: checked input, shown output, and the state of each visitor."""

import time
from collections.abc import Iterator
from typing import Any

from neo_megatron.demo.talk import Answer, Talk
from neo_megatron.errors import RejectedSample

# Least seconds between drawings of an answer: a small model generates a hundred words in that time.
REDRAW_SECONDS = 0.1

Shown = dict[str, Any]
"""Data that image.js or answer.js draws; {} draws nothing."""


class Events:
    """The page's handlers; ``answer`` is the visitor's last one, ``path`` is that of the uploaded image.

    Args:
        longest_answer: in tokens.
    """

    def __init__(self, talk: Talk, longest_answer: int) -> None:
        self._talk = talk
        self._longest_answer = longest_answer

    def look(self, uploaded: str, answer: Answer | None) -> tuple[Shown, str | None, Shown, None]:
        """A new image -> image, path, words, answer."""
        if answer is not None:
            answer.stopped = answer.outdated = True
        try:
            return self._talk.image_view(uploaded), uploaded, {}, None
        except RejectedSample as rejected:
            return {"refused": _sentence(rejected)}, None, {}, None

    def ask(self, question: str, path: str | None, layer: int) -> Iterator[tuple[Shown, Answer | None]]:
        """A question -> words, answer, repeatedly as it grows."""
        if not question.strip():
            yield {"note": "Type a question first."}, None
            return
        drawn = 0.0
        try:
            for answer in self._talk.answers(question, path, layer - 1, self._longest_answer):
                if answer.outdated:  # its heat map would cover another image
                    yield {}, None
                    return
                if not answer.running or time.monotonic() - drawn > REDRAW_SECONDS:
                    yield answer.view(), answer
                    drawn = time.monotonic()
        except RejectedSample as rejected:
            yield {"note": _sentence(rejected)}, None
        except Exception as error:
            yield {"note": f"The model failed: {error}"}, None  # otherwise the page would wait for it
            raise

    def show_layer(self, layer: int, answer: Answer | None) -> Shown:
        """Another layer -> words, also while the answer grows."""
        if answer is None:
            return {}
        answer.layer = layer - 1
        return answer.view()

    def stop(self, answer: Answer | None) -> None:
        if answer is not None:
            answer.stopped = True


def _sentence(rejected: RejectedSample) -> str:
    return f"{rejected.sentence[:1].upper()}{rejected.sentence[1:]}."
