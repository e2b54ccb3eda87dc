"""The workload of packs: the properties of their contents that decide work and memory."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """The mean pack of a run.

    Args:
        sequence_length: tokens of a pack, padding included.
        mean_keys: keys that a query may see, over all queries: only these pairs are attention work.
        image_share: share of the tokens that are image tokens.
        trained_share: share of the positions whose next token is trained; the head runs on these only.
        source: where the numbers come from, for people.
    """

    sequence_length: int
    mean_keys: float
    image_share: float
    trained_share: float
    source: str = "given"

    @classmethod
    def of_alike_documents(
        cls,
        sequence_length: int,
        document_length: int = 2500,
        image_share: float = 0.85,
        trained_share: float = 0.1,
    ) -> "Workload":
        """The workload of documents of one length, each with one image that takes a share of it.

        The defaults stand for photographs, pages and some text: in the mix of `benchmarks/lengths.py` queries see as
        many keys, and images take as many tokens.
        """
        length = min(document_length, sequence_length)
        keys = mean_keys([length], [round(image_share * length)])
        source = (
            f"assumed: documents of {length:,} tokens, {image_share:.0%} of them one image, {trained_share:.0%} trained"
        )
        return cls(sequence_length, keys, image_share, trained_share, source)


def mean_keys(document_lengths: Iterable[int], image_tokens: Iterable[int]) -> float:
    """Keys that a query may see, over the tokens of the given documents and of the images in them."""
    lengths = list(document_lengths)
    return allowed_pairs(lengths, image_tokens) / sum(lengths)


def allowed_pairs(document_lengths: Iterable[int], image_tokens: Iterable[int]) -> int:
    """Pairs of query and key that the mask allows.

    Causal: token i of a document sees i + 1 keys. Bidirectional: a token of an image of m sees the m - 1 others too, of
    which half stand before it.
    """
    pairs = sum(length * (length + 1) // 2 for length in document_lengths)
    return pairs + sum(tokens * (tokens - 1) // 2 for tokens in image_tokens)
