"""One message of a conversation, as preprocessing, `chat()` and the commands that query a model have it."""

from dataclasses import dataclass

from neo_megatron.data.tags import split_tags


@dataclass(frozen=True)
class Turn:
    """One message: ``role`` in the words of the template, ``trained`` where the model learns to say it.

    Tags in ``text`` are places for media, unless they are escaped; ``literal`` is the text with the escapes resolved.
    """

    role: str
    text: str
    trained: bool

    @property
    def literal(self) -> str:
        return "".join(split_tags(self.text))
