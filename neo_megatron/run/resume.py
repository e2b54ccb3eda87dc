"""Chooses the checkpoint to resume from, verified by all ranks, and removes leftovers of killed runs.

Megatron loads what the tracker file names, whatever state it is in. This module runs before that: it falls back
from a damaged checkpoint to the one before it, and moves what the run would overwrite.
"""

from argparse import Namespace
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from neo_megatron.checkpoint.dcp_metadata import CHECKSUMS, write_checksums
from neo_megatron.checkpoint.integrity import share_of, stored_pieces, verify_pieces
from neo_megatron.checkpoint.run_directory import RunDirectory
from neo_megatron.checkpoint.torch_dist import TorchDistDirectory
from neo_megatron.errors import ConfigError, DamagedCheckpoint
from neo_megatron.paths import Kind, Wanted, check_path, kind_of
from neo_megatron.run import bad_loss_rule
from neo_megatron.run.changes import check_model, check_training, identity_of_packs, needs_state_by_names, told_changes
from neo_megatron.run.console import say
from neo_megatron.run.pretrained_optimizer import check_state
from neo_megatron.run.progress import progress
from neo_megatron.run.ranks import on_rank_0, rank_and_ranks


def choose_checkpoint(args: Namespace, read_tensors: bool = True) -> Path | None:
    """The directory of the checkpoint that this run starts from, verified; `None` for a new run.

    Collective: all ranks share the reading; without a process group this process reads alone. Changes no file. Without
    `read_tensors` only files and their sizes are checked.

    Raises:
        ConfigError: there are checkpoints but no complete one, or the requested one is not complete.
    """
    if args.load:
        paths = on_rank_0(lambda: _candidates(args))
        damages: list[str] = []
        for path in paths:
            damage = _verify_together(path, read_tensors)
            if damage is None:
                for earlier in damages:
                    _say_on_rank_0(f"{earlier}: resuming from {path.name}")
                return path
            damages.append(damage)
        if damages:
            raise ConfigError(
                f"--load {args.load}: no complete checkpoint to resume from ({'; '.join(damages)}): "
                "bring one back from a copy, or start again with other directories for --load and --save"
            )
    if args.pretrained_checkpoint:
        directory = RunDirectory(args.pretrained_checkpoint)
        on_rank_0(partial(check_path, directory.root, Wanted.START, "--pretrained-checkpoint"))
        path = directory.path_of(args.ckpt_step) if args.ckpt_step else on_rank_0(directory.named_path)
        if path is None:
            raise ConfigError(
                f"--pretrained-checkpoint {directory.root}: {directory.tracker.name} in it names no checkpoint: give "
                "a directory that neo-megatron convert has written or --save has filled"
            )
        if damage := _verify_together(path, read_tensors):
            other = "" if path.name == "release" else ", or choose another iteration of it with --ckpt-step"
            raise ConfigError(f"--pretrained-checkpoint {directory.root}: {damage}: copy or convert it again{other}")
        return path
    return None


def _candidates(args: Namespace) -> list[Path]:
    directory = RunDirectory(args.load)
    check_path(directory.root, Wanted.RUN, "--load")
    paths = directory.candidates()
    if not paths and directory.tracker.exists():
        raise ConfigError(
            f"--load {args.load}: {directory.tracker.name} names {directory.named()}, and no finished checkpoint is "
            "there: bring one back from a copy, or start again with other directories for --load and --save"
        )
    if not paths and not _saves_where_it_loads(args):  # otherwise it is the first start of a run
        found = kind_of(directory.root)
        what = found.value if found in (Kind.MISSING, Kind.EMPTY) else "holds no finished checkpoint"
        raise ConfigError(
            f"--load {args.load} {what}: give the --save directory of the run to resume, or leave --load out to "
            "start a new run"
        )
    if args.ckpt_step and (paths or not args.pretrained_checkpoint) and not _began_there(args, paths):
        return [directory.path_of(args.ckpt_step)]  # requested explicitly, so there is no fallback
    return paths


def _began_there(args: Namespace, paths: list[Path]) -> bool:
    """Whether `--ckpt-step` names the checkpoint of `--pretrained-checkpoint` that the run in `--load` began from.

    The same command starts and resumes a run, which must not fall back to its own iteration of this number.
    """
    if not args.pretrained_checkpoint or not paths:
        return False
    start = RunDirectory(args.pretrained_checkpoint).path_of(args.ckpt_step)
    for path in paths:
        try:
            saved = TorchDistDirectory(path).common_state()["args"]
        except (ValueError, OSError):  # damaged; another checkpoint of the same run has the answer
            continue
        return getattr(saved, "started_from", None) == str(start.resolve())
    return False


def _saves_where_it_loads(args: Namespace) -> bool:
    return bool(args.load and args.save) and Path(args.load).resolve() == Path(args.save).resolve()


def _verify_together(path: Path, read_tensors: bool) -> str | None:
    """Describes the damage of a checkpoint in a sentence; rank 0 lists its pieces, every rank reads a part of them."""
    try:
        pieces = on_rank_0(partial(stored_pieces, path))
    except ConfigError as error:
        return str(error)
    rank, ranks = rank_and_ranks()
    damage = None
    try:
        if read_tensors:
            for _, of_file in groupby(share_of(pieces, rank, ranks), attrgetter("path")):
                progress.note(f"the check of {path}")
                verify_pieces(list(of_file))
    except (DamagedCheckpoint, OSError) as error:
        damage = str(error)
    if ranks == 1:
        return damage
    damages: list[str | None] = [None] * ranks
    torch.distributed.all_gather_object(damages, damage)
    return next(filter(None, damages), None)


def note_packs(args: Namespace) -> None:
    """Records in the saved arguments which packs train, for a resumed run to compare. Collective."""
    args.train_packs = None
    if args.train_data_path:
        args.train_packs = on_rank_0(partial(identity_of_packs, args.train_data_path[0]))


def check_model_and_schedule(args: Namespace, checkpoint: Path) -> None:
    """Compares the run with the checkpoint that it starts from, see `changes`, and reports what changes. Collective.

    Takes over the state of `bad_loss_rule` if the run goes on.

    Raises:
        ConfigError: the checkpoint is of another model, or a resumed run would change what it trains or its
            schedule.
    """
    vars(args).update(on_rank_0(partial(_check_model_and_schedule, args, checkpoint)))


def _check_model_and_schedule(args: Namespace, checkpoint: Path) -> dict[str, Any]:
    """Returns the arguments that the run takes over."""
    common_state = TorchDistDirectory(checkpoint).common_state()
    goes_on = _loaded_iteration(args, checkpoint) is not None and not args.finetune
    _check_state(common_state, checkpoint, goes_on)
    check_model(args, common_state, checkpoint)
    if not goes_on:
        if args.pretrained_optimizer:
            check_state(TorchDistDirectory(checkpoint), args.optimizer)
        return {}
    check_training(args, common_state, checkpoint)
    if not args.no_load_optim:
        needs_state_by_names(args, checkpoint)  # raises if it can be loaded in neither way
    if told := told_changes(args, common_state):
        say(f"resuming from {checkpoint} with changes: {'; '.join(told)}")
    return bad_loss_rule.state_of(common_state["args"])


def _check_state(common_state: dict[str, Any], checkpoint: Path, goes_on: bool) -> None:
    """Raises ConfigError if a checkpoint lacks arguments that every run of NEO saves."""
    saved = common_state.get("args")
    numbers = {name: getattr(saved, name, None) for name in ("training_stage", "global_batch_size")}
    numbers["iteration"] = common_state.get("iteration")
    wrong = [name for name, number in numbers.items() if goes_on and (type(number) is not int or number < 0)]
    wrong += [] if isinstance(getattr(saved, "neo_sizes", None), dict) else ["neo_sizes"]
    wrong += [] if bad_loss_rule.is_sound(saved) else ["recent_losses"]
    if wrong:
        raise ConfigError(
            f"the checkpoint {checkpoint} says nothing of {', '.join(wrong)}: give one that pretrain_neo or "
            "neo-megatron convert has written"
        )


def _loaded_iteration(args: Namespace, checkpoint: Path | None) -> int | None:
    """The iteration of a checkpoint of ``--load``; `None` for converted and pretrained ones, which start a run."""
    if checkpoint is None or not args.load or checkpoint.parent != Path(args.load) or checkpoint.name == "release":
        return None
    return int(checkpoint.name.removeprefix("iter_"))


def check_way(args: Namespace, checkpoint: Path | None) -> None:
    """Raises ConfigError if a run would overwrite the checkpoint that it starts from."""
    if args.finetune and _saves_where_it_loads(args) and _loaded_iteration(args, checkpoint) is not None:
        raise ConfigError(
            f"--finetune starts at iteration 0 and would save over {args.load}, from which it starts: give another "
            "--save, or leave --finetune out to resume"
        )


def make_way(args: Namespace, checkpoint: Path | None) -> None:
    """Makes Megatron load this checkpoint, and clears what the run would overwrite. Collective.

    Raises:
        ConfigError: the run would overwrite what it starts from, or a directory cannot be changed.
    """
    check_way(args, checkpoint)
    loaded = _loaded_iteration(args, checkpoint)
    same = _saves_where_it_loads(args)
    args.ckpt_step = None
    args.resume_from, args.load_state_by_names = None, False
    if loaded is None or args.finetune:
        args.started_from = str(checkpoint.resolve()) if checkpoint is not None else None
    else:
        args.started_from, by_names = on_rank_0(partial(_way_of, args, checkpoint))
        args.resume_from = str(checkpoint)
        if by_names:
            args.load_state_by_names = args.no_load_optim = True
    if checkpoint is not None and args.resume_from is None:
        _say_on_rank_0(f"a new run, starting from {checkpoint}")
    if checkpoint is not None and not (same and loaded is not None):
        _point_megatron_to(args, checkpoint)
    if args.save:
        start = 0 if loaded is None or args.finetune else loaded
        for sentence in on_rank_0(lambda: _clear(RunDirectory(args.save), start, same)):
            _say_on_rank_0(sentence)


def _way_of(args: Namespace, checkpoint: Path) -> tuple[str | None, bool]:
    """The checkpoint that the run of this one started from, and whether optimizer state is to be loaded by names."""
    saved = TorchDistDirectory(checkpoint).common_state()["args"]
    return getattr(saved, "started_from", None), not args.no_load_optim and needs_state_by_names(args, checkpoint)


def _point_megatron_to(args: Namespace, checkpoint: Path) -> None:
    """Sets Megatron's arguments to load a checkpoint, without changing a directory that another run may own."""
    directory = RunDirectory(checkpoint.parent)
    named = on_rank_0(directory.named)
    if on_rank_0(directory.named_path) == checkpoint:
        return
    iteration = int(checkpoint.name.removeprefix("iter_"))
    if not isinstance(named, int):  # Megatron reads the tracker even if it is given the iteration
        raise ConfigError(f"{directory.tracker} names {named or 'no checkpoint'}: write {iteration} into it")
    args.ckpt_step = iteration


def _clear(directory: RunDirectory, start: int, starts_here: bool) -> list[str]:
    sentences = directory.clear_after(start)
    named = directory.named()
    if starts_here and start:
        if named != start:
            directory.name(start)
            sentences.append(f"{directory.tracker} named {named or 'nothing'}: it names {start} now")
        if not (directory.path_of(start) / CHECKSUMS).exists():
            write_checksums(directory.path_of(start))  # its run was killed before it wrote the tracker
    elif isinstance(named, int):
        directory.tracker.unlink()  # names a checkpoint that was just set aside
    return sentences


def _say_on_rank_0(sentence: str) -> None:
    if rank_and_ranks()[0] == 0:
        say(sentence)
