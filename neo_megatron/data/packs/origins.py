"""Finds the origin of a sample: its annotation file, record, and element in a list-packed record."""

from bisect import bisect_right
from collections import defaultdict

from neo_megatron.data.rejects import read_rejects
from neo_megatron.data.shards.mixture import Mixture
from neo_megatron.errors import DataError


class Origins:
    """Origins of the samples of a mixture; lists of rejected samples are read when first needed.

    A shard stores the record number of a sample, but not its element in a list-packed record. The element follows from
    the samples of the record that were kept, in order, and from those that were rejected.
    """

    def __init__(self, data: Mixture) -> None:
        self._data = data
        self._rejected: dict[int, dict[tuple[str, int], set[int]]] = {}

    def of(self, sample: int) -> tuple[str, int, int | None]:
        """(annotation file, record, element) of a global sample number.

        The element is ``None`` for a record of one sample, even if that is alone in a list.

        Raises:
            DataError: the list of rejected samples contradicts the shards.
        """
        owner = bisect_right(self._data.starts, sample) - 1
        shards, local = self._data.sets[owner], sample - self._data.starts[owner]
        file, record = shards.describe(local)
        shard, local = shards.locate(local)
        documents = shard.tokens.documents
        document = bisect_right(documents, local) - 1
        first, count = int(documents[document]), int(documents[document + 1] - documents[document])
        rejected = self._rejected_elements(owner).get((file, record), set())
        if count == 1 and not rejected:
            return file, record, None
        kept = [number for number in range(count + len(rejected)) if number not in rejected]
        if len(kept) != count:  # the list has an element that the record cannot have
            raise DataError(f"{shards.location}: rejects.jsonl and the shards contradict each other; copy it again")
        return file, record, kept[local - first]

    def _rejected_elements(self, owner: int) -> dict[tuple[str, int], set[int]]:
        if owner not in self._rejected:
            found: dict[tuple[str, int], set[int]] = defaultdict(set)
            for row in read_rejects(self._data.sets[owner].storage):
                if row["element"] is not None:
                    found[row["file"], row["record"]].add(row["element"])
            self._rejected[owner] = dict(found)
        return self._rejected[owner]
