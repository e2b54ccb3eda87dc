"""Where a run starts: the checkpoint to go on from, proved whole by all ranks, and nothing of a killed run in the way.

Megatron loads what the tracker file names, whatever state it is in. This comes before: a damaged checkpoint is passed
over for the one before it, and what the run would save over is moved.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from megatron.training.training import get_optimizer_param_scheduler

from neo_megatron.checkpoint.integrity import (
    DamagedCheckpoint,
    share_of,
    stored_pieces,
    verify_pieces,
)
from neo_megatron.checkpoint.run_directory import RunDirectory
from neo_megatron.checkpoint.saved_metadata import CHECKSUMS, write_checksums
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.model.config import ConfigError
from neo_megatron.paths import Wanted, WrongPath, check_path
from neo_megatron.run.console import say


def choose_checkpoint(args: Namespace, read_tensors: bool = True) -> Path | None:
    """The directory of the checkpoint that this run starts from, verified; `None` where it starts from nothing.

    A call on all ranks, which share the reading; without a process group this process reads alone. Changes no file.
    Without `read_tensors` files and their sizes are compared, and no more.

    Raises:
        ConfigError: there are checkpoints but none is whole, or the one asked for is not.
    """
    if args.load:
        paths = _on_rank_0(lambda: _candidates(args))
        damages = []
        for path in paths:
            damage = _verify_together(path, read_tensors)
            if damage is None:
                for earlier in damages:
                    _say_on_rank_0(f"{earlier}: going on from {path.name}")
                return path
            damages.append(damage)
        if damages:
            raise ConfigError(
                f"--load {args.load}: no whole checkpoint to go on from ({'; '.join(damages)}): "
                "bring one back from a copy, or start anew with other directories for --load and --save"
            )
    if args.pretrained_checkpoint:
        directory = RunDirectory(args.pretrained_checkpoint)
        _on_rank_0(partial(check_path, directory.root, Wanted.START, "--pretrained-checkpoint"))
        path = _on_rank_0(directory.named_path)
        if path is None:
            raise ConfigError(
                f"--pretrained-checkpoint {directory.root}: {directory.tracker.name} in it names no checkpoint: give "
                "a directory that tools/convert_checkpoint.py has written or --save has filled"
            )
        if damage := _verify_together(path, read_tensors):
            raise ConfigError(f"--pretrained-checkpoint {directory.root}: {damage}: copy or convert it again")
        return path
    return None


def _candidates(args: Namespace) -> list[Path]:
    directory = RunDirectory(args.load)
    check_path(directory.root, Wanted.RUN, "--load")
    if args.ckpt_step:
        return [directory.path_of(args.ckpt_step)]  # asked for, so no other will do
    paths = directory.candidates()
    if not paths and directory.tracker.exists():
        raise ConfigError(
            f"--load {args.load}: {directory.tracker.name} names {directory.named()}, and no finished checkpoint is "
            "there: bring one back from a copy, or start anew with other directories for --load and --save"
        )
    return paths


def _verify_together(path: Path, read_tensors: bool) -> str | None:
    """What is wrong with a checkpoint, as a sentence; every rank reads its part of the tensors."""
    rank, ranks = rank_and_ranks()
    damage = None
    try:
        pieces = share_of(stored_pieces(path), rank, ranks)
        if read_tensors:
            verify_pieces(pieces)
    except (DamagedCheckpoint, OSError) as error:
        damage = str(error)
    if ranks == 1:
        return damage
    damages: list[str | None] = [None] * ranks
    torch.distributed.all_gather_object(damages, damage)
    return next(filter(None, damages), None)


def check_model_and_schedule(args: Namespace, checkpoint: Path) -> None:
    """Compares sizes, stage and learning-rate schedule with the run's; Megatron asserts some and ignores others.

    Raises:
        ConfigError: the checkpoint is of another model, or a run that goes on would change what it trains or its
            schedule.
    """
    common_state = TorchDistDirectory(checkpoint).common_state()
    saved = common_state["args"].neo_sizes
    # The others are limits and labels, which a run may choose anew.
    free = {"min_pixels", "max_pixels", "max_positions", "max_positions_hw"}
    sizes = {name: value for name, value in args.neo_sizes.items() if name not in free}
    if differences := _differences(saved, sizes):
        raise ConfigError(
            f"the checkpoint {checkpoint} is of another model ({differences}): "
            "choose --neo-model and the size flags that it was made with"
        )
    if not _loads_optimizer(args, checkpoint):
        return
    stage = common_state["args"].training_stage
    if (stage == 1) != (args.training_stage == 1):  # of the others each trains everything
        raise ConfigError(
            f"the checkpoint {checkpoint} is of --training-stage {stage} and this run, which goes on from it, of "
            f"{args.training_stage}: to begin a stage, give it as --pretrained-checkpoint, with --pretrained-optimizer "
            "to keep the optimizer's state, and another --load and --save"
        )
    if args.override_opt_param_scheduler:
        return
    schedule = common_state.get("opt_param_scheduler", {})
    if not args.use_checkpoint_opt_param_scheduler and (differences := _differences(schedule, _schedule(args))):
        raise ConfigError(
            f"the checkpoint {checkpoint} follows another schedule (in packs: {differences}), as after a change of "
            "--train-iters or --lr: add --override-opt-param-scheduler to follow the new one from here on, or "
            "--use-checkpoint-opt-param-scheduler to keep the old one"
        )


def _loads_optimizer(args: Namespace, checkpoint: Path) -> bool:
    return _loaded_iteration(args, checkpoint) is not None and not args.finetune and not args.no_load_optim


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    return "; ".join(
        f"{name} {there[name]} there, {value} here"
        for name, value in here.items()
        if name in there and there[name] != value
    )


def _schedule(args: Namespace) -> dict[str, Any]:
    """The schedule that Megatron will build from the arguments, which it also changes; they are put back."""
    before = dict(vars(args))
    schedule = get_optimizer_param_scheduler(SimpleNamespace(param_groups=[])).state_dict()
    vars(args).clear()
    vars(args).update(before)
    return {name: value for name, value in schedule.items() if name != "num_steps"}


def _loaded_iteration(args: Namespace, checkpoint: Path | None) -> int | None:
    """The iteration of a checkpoint of ``--load``; `None` for converted and pretrained ones, which begin a run."""
    if checkpoint is None or not args.load or checkpoint.parent != Path(args.load) or checkpoint.name == "release":
        return None
    return int(checkpoint.name.removeprefix("iter_"))


def check_way(args: Namespace, checkpoint: Path | None) -> None:
    """Raises ConfigError where a run would save over what it starts from."""
    if args.finetune and _saves_where_it_loads(args) and _loaded_iteration(args, checkpoint) is not None:
        raise ConfigError(
            f"--finetune starts at iteration 0 and would save over {args.load}, from which it starts: give another "
            "--save, or leave --finetune out to go on"
        )


def _saves_where_it_loads(args: Namespace) -> bool:
    return bool(args.load and args.save) and Path(args.load).resolve() == Path(args.save).resolve()


def make_way(args: Namespace, checkpoint: Path | None) -> None:
    """Makes Megatron load this checkpoint, and clears what it would save over. A call on all ranks.

    Raises:
        ConfigError: the run would save over what it starts from, or a directory cannot be changed.
    """
    check_way(args, checkpoint)
    loaded = _loaded_iteration(args, checkpoint)
    same = _saves_where_it_loads(args)
    if loaded is not None and not same:
        _point_megatron_to(args, loaded)
    args.take_optimizer_from = None
    if checkpoint is not None and _loads_optimizer(args, checkpoint) and _other_kind_of_optimizer(args, checkpoint):
        args.take_optimizer_from, args.no_load_optim = str(checkpoint), True
    if args.save:
        start = 0 if loaded is None or args.finetune else loaded
        for sentence in _on_rank_0(lambda: _clear(RunDirectory(args.save), start, same)):
            _say_on_rank_0(sentence)


def _other_kind_of_optimizer(args: Namespace, checkpoint: Path) -> bool:
    """Whether the state is stored by the other of the plain and the distributed optimizer; Megatron loads its own."""
    state = TorchDistDirectory(checkpoint).common_state()
    saved = state["args"].use_distributed_optimizer
    return "optimizer" in state and saved != args.use_distributed_optimizer


def _point_megatron_to(args: Namespace, iteration: int) -> None:
    """Without touching a directory that may be someone else's."""
    directory = RunDirectory(args.load)
    named = _on_rank_0(directory.named)
    if named is None:  # Megatron reads the tracker even where it is told the iteration
        raise ConfigError(f"{directory.tracker} names no checkpoint: write {iteration} into it")
    if named != iteration:
        args.ckpt_step = iteration


def _clear(directory: RunDirectory, start: int, starts_here: bool) -> list[str]:
    sentences = directory.clear_after(start)
    named = directory.named()
    if starts_here and start:
        if named != start:
            directory.name(start)
            sentences.append(f"{directory.tracker} named {named or 'nothing'}: it names {start} now")
        if not (directory.path_of(start) / CHECKSUMS).exists():
            write_checksums(directory.path_of(start))  # its run was killed before it could
    elif isinstance(named, int):
        directory.tracker.unlink()  # names what was just set aside
    return sentences


def rank_and_ranks() -> tuple[int, int]:
    if not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _say_on_rank_0(sentence: str) -> None:
    if rank_and_ranks()[0] == 0:
        say(sentence)


def _on_rank_0(action: Callable[[], Any]) -> Any:
    """Its result, or its error, on every rank: they may see a shared file system at different times.

    Raises:
        ConfigError: as the action does, also where a file could not be changed.
    """
    rank, ranks = rank_and_ranks()
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = action()
        except (ConfigError, WrongPath, OSError) as error:
            outcome[1] = str(error)
    if ranks > 1:
        torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1]:
        raise ConfigError(outcome[1])
    return outcome[0]
