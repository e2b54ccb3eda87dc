"""`--dry-run`: checks on one process everything that can be known before the first step, and prints the plan.

Flags and parallel layout are checked where every run checks them. This module adds the packs of the first global batch,
read as a run reads them, the checkpoint to start from, and the plan of every pipeline rank. No model is built.
"""

from argparse import Namespace
from pathlib import Path

from megatron.core.transformer.enums import AttnBackend

from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.data.dataset import GlobalBatch
from neo_megatron.planning.packs import measure_items
from neo_megatron.planning.report import describe
from neo_megatron.planning.workload import Workload
from neo_megatron.run.after_loading import packs_to_read
from neo_megatron.run.broken_samples import watch_broken_samples
from neo_megatron.run.loaders import check_loader_memory, ended_before, open_packs
from neo_megatron.run.pack_lengths import check_borders, longest_ahead
from neo_megatron.run.planned import can_plan, gpu_to_plan_for, plan_of
from neo_megatron.run.resume import note_packs
from neo_megatron.run.start_checks import check_checkpoint


def dry_run(args: Namespace) -> None:
    """Checks a run and prints its plan.

    Args:
        args: checked already; `world_size` is the number of processes that the run is to have.

    Raises:
        ConfigError, DataError: what would stop the run too, in the same words.
    """
    if args.rank != 0:
        return
    note_packs(args)
    if args.world_size == 1:  # with more ranks, packs are in the shared memory of other machines
        check_loader_memory(args)
    iteration, consumed = _check_checkpoint(args)
    workload = _check_packs(args, iteration, consumed)
    if not can_plan(args):
        print("no plan: Megatron alone knows this split; write it as --pipeline-model-parallel-layout to see one")
    else:
        if args.num_experts and args.moe_token_dispatcher_type != "alltoall":
            print("memory and traffic of experts are planned for --moe-token-dispatcher-type alltoall")
        if args.attention_backend == AttnBackend.unfused:
            print("attention is planned for auto: unfused needs more, which grows with the square of the pack")
        gpu, note = gpu_to_plan_for()
        if note:
            print(note)
        print(describe(plan_of(args, workload, gpu)))
    print("dry run: nothing was found that would stop this run before its first step", flush=True)


def _check_checkpoint(args: Namespace) -> tuple[int, int]:
    """Iteration and packs consumed where the run starts."""
    path = check_checkpoint(args, read_tensors=False)
    if path is None:
        print("checkpoint   none: the weights start from random values")
        return 0, 0
    print(f"checkpoint   {path}: fits this model, all files complete (checksums are compared when the run starts)")
    goes_on = args.load and path.parent == Path(args.load) and path.name != "release" and not args.finetune
    if not goes_on:
        return 0, 0
    common_state = TorchDistDirectory(path).common_state()
    return common_state["iteration"], common_state["args"].consumed_train_samples


def _check_packs(args: Namespace, iteration: int, consumed: int) -> Workload:
    """Reads the first global batch of training packs, and the first pack of other splits; images are decoded.

    Of packs of several lengths, it also reads the first global batch of the longest ones, which decide what fits.
    """
    size = args.global_batch_size
    train = packs_to_read(args, iteration, consumed)
    if sentence := ended_before(args, train, consumed):
        print(sentence)
    check_borders(args, consumed, train)
    longest = longest_ahead(args.pack_lengths, consumed, train) if args.train_data_path else consumed
    batch = GlobalBatch(size, args.data_parallel_size, args.micro_batch_size, start=consumed)
    workload = None
    for split, first, count, global_batch in (
        ("train", consumed, train, None if args.step_batch_size_schedule else batch),
        *([("train", longest, train, batch)] if longest > consumed else []),
        ("valid", 0, 1, None),
        ("test", 0, 1, None),
    ):
        dataset = open_packs(args, split, count, "check", global_batch)
        if dataset is None:
            continue
        last = min(first + (size if split == "train" else 1), count)
        items = list(
            watch_broken_samples((dataset[n] for n in range(first, last)), args.max_broken_samples, report=True)
        )
        samples = sum(item["samples"] for item in items)
        tokens = f" of {len(items[0]['tokens']):,} tokens" if items and len(dataset.lengths) > 1 else ""
        location = getattr(args, f"{split}_data_path")[0]
        print(f"{split:<12} {location}: {len(items):,} packs{tokens} read, {samples:,} samples")
        if split == "train" and items:
            workload = measure_items(items)
    return workload or Workload.of_alike_documents(args.seq_length)
