"""The learning-rate schedule of a command line: `--lr` alone is enough, and invalid combinations are one sentence."""

from argparse import Namespace
from collections.abc import Iterator
from typing import Any

# Says how long to warm up: a recipe with a number of steps gives way to any of them.
WARMUP_FLAGS = ("--lr-warmup-fraction", "--lr-warmup-iters", "--lr-warmup-samples")


def fill_schedule(args: Namespace, stage: dict[str, Any], warmup_given: bool) -> Iterator[str]:
    """Sets ``args.min_lr`` and a warm-up in steps, unless given, as the recipe has them for its training stage.

    `--lr` alone keeps the recipe's ratio of the lowest rate to the peak rate.

    Args:
        stage: of `presets.Recipe`; empty for one that does not exist.
        warmup_given: whether one of `WARMUP_FLAGS` is on the command line.

    Yields:
        A sentence for every number that the recipe does not have, or that does not fit the run.
    """
    if args.min_lr is None:
        falls = args.lr is not None and args.lr_decay_style != "constant" and not args.skip_train
        if stage and "min_lr" not in stage and falls:
            yield (
                f"--recipe {args.recipe} does not state how low the learning rate falls: add --min-lr, such as "
                f"{args.lr / 10:g} (a tenth of --lr) or 0"
            )
        share = stage.get("min_lr", 0.0) / stage["lr"] if stage else 0.0
        args.min_lr = args.lr * share if args.lr is not None else 0.0
    steps = stage.get("lr_warmup_iters")
    if steps is None or warmup_given or args.skip_train:
        return
    warms_up = f"--recipe {args.recipe} warms up for {steps} steps"
    if args.train_samples:
        if args.step_batch_size_schedule or not args.global_batch_size:
            yield f"{warms_up}, and how many packs these are is not known: add --lr-warmup-samples"
        else:
            args.lr_warmup_samples = steps * args.global_batch_size
        steps_of_run = args.train_samples // (args.global_batch_size or 1)
    else:
        args.lr_warmup_iters = steps
        steps_of_run = args.train_iters
    if steps_of_run and steps >= steps_of_run:
        yield f"{warms_up}, and this run has {steps_of_run}: give a shorter --lr-warmup-fraction, or train for longer"


def schedule_refusals(args: Namespace) -> Iterator[str]:
    """A sentence for every invalid schedule flag; Megatron would stop later, in an assertion."""
    if args.skip_train:
        return
    unit, steps = ("iters", args.train_iters) if args.train_iters else ("samples", args.train_samples)
    if args.train_iters and args.train_samples:
        yield "--train-iters and --train-samples both say how long to train: give one"
    elif not steps or steps < 1:
        yield "how long to train is missing: give --train-iters (steps) or --train-samples (packs), 1 or more"
        return
    if args.step_batch_size_schedule and unit == "iters":
        yield "--step-batch-size-schedule counts packs, not steps: give --train-samples in place of --train-iters"
    other = "samples" if unit == "iters" else "iters"
    for name in ("lr_decay", "lr_warmup", "lr_wsd_decay"):
        if getattr(args, f"{name}_{other}"):
            flag = f"--{name.replace('_', '-')}"
            yield f"{flag}-{other} does not go with --train-{unit}: give {flag}-{unit}"
    warmup = getattr(args, f"lr_warmup_{unit}")
    if args.lr_warmup_fraction is not None and warmup:
        yield f"--lr-warmup-fraction and --lr-warmup-{unit} both say how long to warm up: give one"
    if args.lr_warmup_fraction is not None and not 0 <= args.lr_warmup_fraction < 1:
        yield f"--lr-warmup-fraction {args.lr_warmup_fraction}: give a share of the training from 0 to less than 1"
    decay = getattr(args, f"lr_decay_{unit}")
    decay_flag = f"--lr-decay-{unit}" if decay else f"--train-{unit}"
    if decay is not None and decay < 1:
        yield f"--lr-decay-{unit} {decay}: give 1 or more, or leave it out to decay until the end"
    elif warmup and warmup >= (decay or steps):
        yield (
            f"--lr-warmup-{unit} {warmup} leaves nothing of {decay_flag} {decay or steps} to train at the full rate: "
            "warm up for less, or train for longer"
        )
    if args.lr_warmup_init and not warmup and not args.lr_warmup_fraction:
        yield f"--lr-warmup-init {args.lr_warmup_init} is where a warm-up begins: add --lr-warmup-{unit}"
    wsd = getattr(args, f"lr_wsd_decay_{unit}")
    if args.lr_decay_style == "WSD" and not wsd:
        yield f"--lr-decay-style WSD needs the length of its last phase: add --lr-wsd-decay-{unit}"
    if args.lr is not None and not 0 <= args.min_lr <= args.lr:
        yield f"--min-lr {args.min_lr} is not between 0 and --lr {args.lr}: choose another, or leave it out"
    if args.lr is not None and not 0 <= args.lr_warmup_init <= args.lr:
        yield f"--lr-warmup-init {args.lr_warmup_init} is not between 0 and --lr {args.lr}: choose another"
    start, end = args.start_weight_decay, args.end_weight_decay
    if args.weight_decay_incr_style == "constant":
        if start is not None or end is not None:
            yield (
                "--start-weight-decay and --end-weight-decay change the decay over time: add --weight-decay-incr-style "
                "linear or cosine, or give --weight-decay alone"
            )
    elif start is None or end is None:
        yield (
            f"--weight-decay-incr-style {args.weight_decay_incr_style} needs --start-weight-decay and "
            "--end-weight-decay: add them"
        )
    elif not 0 <= start <= end:
        yield f"--start-weight-decay {start} is not between 0 and --end-weight-decay {end}: decay can only grow"
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        yield (
            "--override-opt-param-scheduler follows the new schedule, --use-checkpoint-opt-param-scheduler the saved "
            "one: give one of them"
        )
