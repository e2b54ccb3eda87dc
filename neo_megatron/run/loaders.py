"""Iterators over the packs of a run."""

import os
import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.training import get_args
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch.utils.data import DataLoader

from neo_megatron.data.dataset import GlobalBatch, Images, PackDataset, collate
from neo_megatron.data.packs.mixture_schedule import longest_packs
from neo_megatron.errors import ConfigError
from neo_megatron.megatron_compat import cpu_platform
from neo_megatron.run.after_loading import packs_to_read
from neo_megatron.run.broken_samples import watch_broken_samples
from neo_megatron.run.console import say
from neo_megatron.run.evaluation import EvaluationPacks, EvaluationRound
from neo_megatron.run.image_views import ViewedBatches
from neo_megatron.run.loader_workers import begin_worker, check_room, late, seconds_to_wait, start_workers
from neo_megatron.run.pack_lengths import check_borders
from neo_megatron.run.progress import progress

_MOST = 4  # the most packs that a sentence lists, files of a pack, and records of a file


def datasets_provider(
    num_samples: tuple[int, int | None, int], vp_stage: int | None = None
) -> tuple["MicroBatches | None", ViewedBatches | None, ViewedBatches | None]:
    """Iterators over micro-batches of packs, for training, validation and test.

    Every rank reads for itself what it needs of a pack, so nothing is broadcast. The state of training and of
    validation is one number each, Megatron's counts of consumed samples.
    """
    args = get_args()
    images: Images = "none"
    if parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage):
        images = "patches"
    elif parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage):
        images = "check"
    train, consumed = packs_to_read(args, args.iteration, args.consumed_train_samples), args.consumed_train_samples
    if sentence := ended_before(args, train, consumed):
        if args.rank == 0:
            say(sentence)
        sys.exit()
    return (
        None if args.skip_train else _training(args, train, consumed, images),
        _evaluation(args, "valid", 0 if args.skip_train else args.consumed_valid_samples, images),
        _evaluation(args, "test", 0, images),
    )


datasets_provider.is_distributed = True  # type: ignore[attr-defined]


def ended_before(args: Namespace, packs: int, consumed: int) -> str:
    """A sentence about a run that has already read all of its packs; empty for any other."""
    if args.skip_train or not 0 < packs <= consumed:
        return ""
    return f"training has ended before: all of its {packs} packs were read; a longer one needs more steps"


def _training(args: Namespace, num_samples: int, consumed: int, images: Images) -> "MicroBatches | None":
    """Training packs from number `consumed` on; `None` without packs."""
    check_borders(args, consumed, num_samples)
    ranks = parallel_state.get_data_parallel_world_size()
    even = GlobalBatch(args.global_batch_size, ranks, args.micro_batch_size, start=consumed)
    # With a batch-size ramp-up, steps differ in size.
    dataset = open_packs(args, "train", num_samples, images, None if args.step_batch_size_schedule else even)
    if dataset is None:
        return None
    sampler = MegatronPretrainingSampler(
        total_samples=num_samples,
        consumed_samples=consumed,
        micro_batch_size=args.micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=ranks,
    )
    return MicroBatches(args, dataset, sampler, images)


def _evaluation(args: Namespace, split: str, consumed: int, images: Images) -> ViewedBatches | None:
    """Evaluation packs without end, after `consumed` packs; `None` without packs, or if none are to be evaluated."""
    dataset = open_packs(args, split, None, images) if args.eval_iters else None
    if dataset is None:
        return None
    order = EvaluationRound(len(dataset), args.eval_global_batch_size, args.evaluates_all_packs, args.eval_iters)
    rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    sampler = order.sampler(consumed, args.eval_micro_batch_size, rank, ranks)
    batches = MicroBatches(args, EvaluationPacks(dataset), sampler, images, order.iterations_of_an_evaluation)
    micro_batches = args.eval_global_batch_size // (args.eval_micro_batch_size * ranks)
    return ViewedBatches(batches, micro_batches, rank, ranks)


class MicroBatches:
    """Micro-batches of packs for this rank, as `dataset.collate` makes them.

    Each also has the numbers of its ``packs``, a function to ``describe`` numbers, and the names of all ``data_sets``.

    Args:
        dataset: the packs.
        sampler: the numbers of the packs of each micro-batch; iterating again gives the same.
        images: what this rank reads of them.
        iterations: of an evaluation.
    """

    def __init__(
        self,
        args: Namespace,
        dataset: PackDataset | EvaluationPacks,
        sampler: Iterable[list[int]],
        images: Images,
        iterations: int = 0,
    ) -> None:
        self.iterations = iterations
        self.has_images = dataset.has_images
        self._dataset = dataset
        self._workers, self._seconds = args.num_workers, seconds_to_wait(args)
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collate,
            num_workers=args.num_workers,
            pin_memory=not cpu_platform.on_cpu(),
            persistent_workers=args.num_workers > 0,
            worker_init_fn=partial(begin_worker, args.exit_signal),
            timeout=self._seconds,
        )
        # Pipeline stages, tensor- and context-parallel ranks read the same packs; one of them reports broken samples.
        ranks_alike = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank())
        report = images == "patches" and ranks_alike == (0, 0)
        self._batches = watch_broken_samples(start_workers(loader), args.max_broken_samples, report)
        self._numbers = enumerate(sampler)

    def __iter__(self) -> "MicroBatches":
        return self

    def __next__(self) -> dict[str, Any]:
        """Raises DataError if the loader cannot deliver; it names the packs."""
        count, numbers = next(self._numbers)
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader timed out"):
                raise
            progress.write_stacks(f"no micro-batch within {self._seconds:g} s")
            # Workers take turns.
            raise late(count % self._workers, self._workers, self.describe(numbers), self._seconds) from error
        return self._named(batch, numbers)

    def _named(self, batch: dict[str, Any], numbers: list[int]) -> dict[str, Any]:
        again = partial(self._read_again, numbers)
        data_sets = self._dataset.data_sets
        return {**batch, "packs": numbers, "describe": self.describe, "again": again, "data_sets": data_sets}

    def _read_again(self, numbers: list[int]) -> dict[str, Any]:
        """The same micro-batch, read in this process."""
        return self._named(collate([self._dataset[number] for number in numbers]), numbers)

    def describe(self, numbers: Sequence[int]) -> str:
        """Describes packs by their numbers in the order drawn and by their records; of many, the first ones."""
        packs = map(self._dataset.pack, numbers[:_MOST])
        return describe_packs({pack.number: pack.records() for pack in packs}, len(numbers))


def describe_packs(records: dict[int, list[tuple[str, int]]], count: int) -> str:
    """``pack 7 (a.json records 3, 4; b.json record 1) and 2 more packs``.

    Args:
        records: annotation file and record of each sample, by the number of the pack.
        count: of packs; ``records`` may have fewer.
    """
    described = []
    for number, samples in records.items():
        by_file: dict[str, list[int]] = {}
        for file, record in samples:
            by_file.setdefault(file, []).append(record)
        files = [
            f"{file} record{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:_MOST]))}"
            f"{', ...' * (len(numbers) > _MOST)}"
            for file, numbers in list(by_file.items())[:_MOST]
        ]
        described.append(f"pack {number} ({'; '.join(files)}{'; ...' * (len(by_file) > _MOST)})")
    more = count - len(records)
    if more > 0:
        described.append(f"{more} more pack{'s' * (more > 1)}")
    return " and ".join(described)


def check_loader_memory(args: Namespace) -> None:
    """Raises DataError if the packs that workers prefetch do not fit into the shared memory of this machine.

    Called before any rank starts workers. PyTorch's workers prefetch two micro-batches each, and a rank holds one more;
    without a GPU, to which they would be copied at once, it holds those of a step, or of an iteration of an evaluation.
    """
    if not args.num_workers:
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    pack_bytes = packs = 0
    for split in ("train", "valid", "test"):
        wanted = not args.skip_train if split == "train" else args.eval_iters
        dataset = open_packs(args, split, None, "patches") if wanted else None
        if dataset is None:
            continue
        for start, _ in dataset.lengths:
            pack_bytes = max(pack_bytes, dataset.largest(start, min(len(dataset), 256)))
        size = args.micro_batch_size if split == "train" else args.eval_micro_batch_size
        batch = args.global_batch_size if split == "train" else args.eval_global_batch_size
        held = batch // (size * args.data_parallel_size) if cpu_platform.on_cpu() else 1
        packs += ranks * size * (2 * args.num_workers + held)
    check_room(pack_bytes, packs)


def open_packs(
    args: Namespace, split: str, num_samples: int | None, images: Images, global_batch: GlobalBatch | None = None
) -> PackDataset | None:
    """The packs of a split, one epoch or `num_samples` of them; `None` if it has none.

    Raises:
        ConfigError: they do not fit the model or the sequence length.
    """
    flag, paths = f"--{split}-data-path", getattr(args, f"{split}_data_path")
    if not paths or num_samples == 0:
        return None
    if len(paths) != 1:
        raise ConfigError(
            f"{flag} takes one directory of packs, not {len(paths)}: "
            "pack data sets together with neo-megatron pack --data A B"
        )
    quality = args.min_jpeg_quality if split == "train" else 100
    dataset = PackDataset(paths[0], num_samples, args.seed, args.loss_weighting, images, global_batch, quality)
    length = longest_packs(dataset.lengths)[1]
    if length != args.seq_length:
        raise ConfigError(
            f"{flag} {paths[0]} holds packs of {length} tokens, "
            f"--seq-length is {args.seq_length}: pack again with neo-megatron pack, which does not tokenize again"
        )
    tokens = dataset.packs.data.tokenizer["size"]
    if tokens > args.vocab_size:
        raise ConfigError(
            f"{flag} {paths[0]} was made with a tokenizer of {tokens} tokens, the model has {args.vocab_size}: "
            "grow the model with neo-megatron convert qwen3-to-neo --tokenizer, or preprocess with its own tokenizer"
        )
    return dataset
