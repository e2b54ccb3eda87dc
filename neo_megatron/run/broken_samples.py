"""Counts and reports samples with a broken image during training, and stops the run if there are too many."""

from collections.abc import Iterator
from typing import Any

from neo_megatron.errors import DataError

# A share of fewer samples than this says little: one broken image among the first ten does not mean a tenth.
_LEAST_READ = 1000


def watch_broken_samples(
    micro_batches: Iterator[dict[str, Any]], max_share: float, report: bool
) -> Iterator[dict[str, Any]]:
    """Passes micro-batches on and counts their broken samples, whose loss weight is 0.

    Args:
        micro_batches: as `dataset.collate` gives them.
        max_share: limit of broken samples, as a share of those read by this rank (of 1,000 if it has read fewer).
        report: whether to print each; one of the ranks that read the same packs does.

    Raises:
        DataError: the limit is exceeded, or a worker of the loader failed.
    """
    read = broken = 0
    while True:
        try:
            batch = next(micro_batches)
        except StopIteration:
            return
        except DataError as error:
            # A worker's error arrives with its traceback in the text; the sentence is the end of it.
            raise DataError(str(error).rsplit("DataError: ", 1)[-1].strip()) from error
        read += batch["samples"]
        broken += len(batch["broken"])
        if report:
            for sentence in batch["broken"]:
                print(f"broken sample, its loss weight is 0 ({broken} of {read} read): {sentence}", flush=True)
        if broken > max_share * max(read, _LEAST_READ):
            raise DataError(
                f"{broken} of the {read} samples read have a broken image, more than --max-broken-samples "
                f"{max_share} allows; the last: {batch['broken'][-1]}; find all with neo-megatron verify-data and "
                "preprocess again, or allow more"
            )
        yield batch
