"""Iterators over the packs of a run."""

import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.training import get_args
from megatron.training.datasets.data_samplers import MegatronPretrainingSampler
from torch.utils.data import DataLoader

from neo_megatron import cpu_platform
from neo_megatron.data.broken import watch_broken_samples
from neo_megatron.data.dataset import GlobalBatch, PackDataset, Pictures, collate
from neo_megatron.model.config import ConfigError
from neo_megatron.run.console import say
from neo_megatron.run.loader_signals import heed_only_parent


def datasets_provider(
    num_samples: tuple[int, int, int], vp_stage: int | None = None
) -> tuple[Iterator | None, Iterator | None, Iterator | None]:
    """Iterators over micro-batches of packs, for training, validation and test.

    Every rank reads for itself what it needs of a pack, so nothing is broadcast. Where training stands is one number,
    Megatron's count of consumed samples.
    """
    args = get_args()
    pictures: Pictures = "none"
    if parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage):
        pictures = "patches"
    elif parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage):
        pictures = "check"
    train, valid, test = num_samples
    if 0 < train <= args.consumed_train_samples:
        if args.rank == 0:
            say(f"training has ended before: all of its {train} packs were read; a longer one needs more steps")
        sys.exit()
    even = GlobalBatch(
        args.global_batch_size,
        parallel_state.get_data_parallel_world_size(),
        args.micro_batch_size,
        start=args.consumed_train_samples,
    )
    if args.step_batch_size_schedule:
        even = None  # steps have many sizes
    eval_size = getattr(args, "eval_micro_batch_size", None) or args.micro_batch_size
    return (
        pack_iterator("train", train, args.consumed_train_samples, args.micro_batch_size, pictures, even),
        pack_iterator("valid", valid, args.consumed_valid_samples, eval_size, pictures),
        pack_iterator("test", test, 0, eval_size, pictures),
    )


datasets_provider.is_distributed = True


def pack_iterator(
    split: str,
    num_samples: int,
    consumed: int,
    micro_batch_size: int,
    pictures: Pictures,
    global_batch: GlobalBatch | None = None,
) -> Iterator[dict[str, Any]] | None:
    """Micro-batches of this data-parallel rank from pack number `consumed` on; `None` where the split has no packs."""
    args = get_args()
    dataset = open_packs(args, split, num_samples, pictures, global_batch)
    if dataset is None:
        return None
    sampler = MegatronPretrainingSampler(
        total_samples=num_samples,
        consumed_samples=consumed,
        micro_batch_size=micro_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=args.num_workers,
        pin_memory=not cpu_platform.on_cpu(),
        persistent_workers=args.num_workers > 0,
        worker_init_fn=partial(heed_only_parent, args.exit_signal),
    )
    # Pipeline stages, tensor- and context-parallel ranks read the same packs; one of them names what is broken.
    ranks_alike = (parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_context_parallel_rank())
    report = pictures == "patches" and ranks_alike == (0, 0)
    return watch_broken_samples(iter(loader), args.max_broken_samples, report)


def open_packs(
    args: Namespace, split: str, num_samples: int, pictures: Pictures, global_batch: GlobalBatch | None = None
) -> PackDataset | None:
    """The packs of a split; `None` where it has none.

    Raises:
        ConfigError: they do not fit the model or the sequence length.
    """
    flag, paths = f"--{split}-data-path", getattr(args, f"{split}_data_path")
    if not paths or num_samples == 0:
        return None
    if len(paths) != 1:
        raise ConfigError(
            f"{flag} takes one directory of packs, not {len(paths)}: "
            "pack data sets together with tools/pack_data.py --data A B"
        )
    quality = args.min_jpeg_quality if split == "train" else 100
    dataset = PackDataset(paths[0], num_samples, args.seed, args.loss_weighting, pictures, global_batch, quality)
    if dataset.packs.sequence_length != args.seq_length:
        raise ConfigError(
            f"{flag} {paths[0]} holds packs of {dataset.packs.sequence_length} tokens, "
            f"--seq-length is {args.seq_length}: pack again with tools/pack_data.py, which does not tokenize again"
        )
    tokens = dataset.packs.data.tokenizer["size"]
    if tokens > args.vocab_size:
        raise ConfigError(
            f"{flag} {paths[0]} was made with a tokenizer of {tokens} tokens, the model has {args.vocab_size}: "
            "grow the model with convert_checkpoint.py qwen3-to-neo --tokenizer, or preprocess with its own tokenizer"
        )
    return dataset
