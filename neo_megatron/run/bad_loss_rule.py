"""The rule of `--on-bad-loss` and `--loss-jump`: when a finite loss is bad, and how many steps may be skipped in a row.

A loss jumps when it lies more than `--loss-jump` standard deviations above the mean of the last 128 losses: the rule of
the optimizers that skip steps in OLMo-core. Only losses of steps that changed the weights count, and a loss is judged
once half as many are known. They are kept with the arguments in every checkpoint, so that a resumed run judges alike.
"""

import math
import statistics
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

LOSSES = 128
MOST_SKIPPED = 10  # steps in a row


def rule_refusals(args: Namespace) -> Iterator[str]:
    """A sentence for everything in the two flags that cannot work."""
    if not (math.isfinite(args.loss_jump) and args.loss_jump >= 0):
        yield f"--loss-jump {args.loss_jump} must be a number of standard deviations above 0, such as 6"
    if (args.loss_jump or args.on_bad_loss == "skip") and args.skip_train:
        yield "--on-bad-loss and --loss-jump are for training, and --skip-train only evaluates: leave them out"
    if args.on_bad_loss == "skip" and not args.check_for_nan_in_loss_and_grad:
        yield "--on-bad-loss skip needs the check that --no-check-for-nan-in-loss-and-grad turns off: leave one out"


def state_of(args: Any) -> dict[str, Any]:
    """The arguments that hold the state of the rule, which earlier checkpoints lack; without any, of a new run."""
    return {
        "recent_losses": getattr(args, "recent_losses", ()),
        "skipped_in_a_row": getattr(args, "skipped_in_a_row", 0),
    }


def is_sound(args: Any) -> bool:
    """Whether the arguments of a checkpoint can be of this rule."""
    losses, skipped = state_of(args).values()
    finite = isinstance(losses, tuple) and all(type(loss) is float and math.isfinite(loss) for loss in losses)
    return finite and len(losses) <= LOSSES and type(skipped) is int and skipped >= 0


def jump_of(args: Any, loss: float) -> str:
    """Says how a finite loss jumps; empty if it does not."""
    known = args.recent_losses
    if len(known) < LOSSES // 2:
        return ""
    mean, deviation = statistics.fmean(known), statistics.pstdev(known)
    if loss <= mean + args.loss_jump * deviation:
        return ""
    return (
        f"the loss jumps to {loss:.4g}, more than {args.loss_jump:g} standard deviations above the last {len(known)} "
        f"({mean:.4g} ± {deviation:.2g})"
    )


def took(args: Any, loss: float) -> None:
    """Notes a step that changes the weights; ``loss`` is NaN for one without loss weight."""
    args.skipped_in_a_row = 0
    if math.isfinite(loss):
        args.recent_losses = (*args.recent_losses, loss)[-LOSSES:]


def may_skip(args: Any) -> bool:
    """Whether the rule skips a bad step; if it is one that skips, the step is noted."""
    if args.on_bad_loss != "skip":
        return False
    args.skipped_in_a_row += 1
    return args.skipped_in_a_row <= MOST_SKIPPED
