"""`Turn`, one message of a conversation, which preprocessing, `chat()` and the commands that query a model share."""

from dataclasses import dataclass

from neo_megatron.data.tags import split_tags

FURTHER_ROLES = ("knowledge", "plugin", "plugin-return", "interpreter", "interpreter-return")
"""Roles of layout u1 in addition to those of a `Turn` of any layout."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation.

    Args:
        role: "system", "user" or "assistant"; "document" for a text that is trained on without the template of a chat;
            in layout u1 also one of `FURTHER_ROLES`.
        text: tags in it are places for media, unless they are escaped.
        trained: whether the model is trained on it.
    """

    role: str
    text: str
    trained: bool

    @property
    def literal(self) -> str:
        """The text with escapes resolved."""
        return "".join(split_tags(self.text))
