"""Status of every flag of Megatron's parser: it works, has no effect here, or is rejected with a reason.

The table itself is in `accepted_flags.py`, `rejected_model_flags.py` and `rejected_run_flags.py`; `flags_page.py`
writes docs/flags.md from it. tests/run/test_flag_table.py checks that it has every flag of the pinned Megatron.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

from neo_megatron.run import accepted_flags, rejected_model_flags, rejected_run_flags
from neo_megatron.run.flag_status import Status, Verdict

# Megatron has some flags only if an optional package is installed.
_UNKNOWN = Verdict(Status.REJECTED, "no run of NEO has tried it: leave it out", ())


def verdicts() -> dict[str, Verdict]:
    """The verdict on every flag of Megatron, keyed by flag."""
    accepted = (*accepted_flags.WORKS, *accepted_flags.WORKS_ON_GPU, *accepted_flags.NO_EFFECT)
    rejected = (*rejected_model_flags.REJECTED, *rejected_run_flags.REJECTED)
    return {flag: verdict for verdict in (*accepted, *rejected) for flag in verdict.flags}


def given_flags(parser: ArgumentParser, args: Namespace, command_line: Sequence[str]) -> dict[str, Any]:
    """The value of every flag of Megatron on the command line that is not the default; `--a=b` and aliases are known.

    Args:
        args: the command line as this parser parsed it.

    Returns:
        Flag as in the table -> value. A flag that is set to its default changes nothing and is left out.
    """
    groups = [group for group in parser._action_groups if not group.title.startswith("NEO")]
    known = {name: action for group in groups for action in group._group_actions for name in action.option_strings}
    defaults = parser.parse_args([])
    given = {}
    for word in command_line:
        action = known.get(word.partition("=")[0])
        if action is not None and getattr(args, action.dest, None) != getattr(defaults, action.dest, None):
            given[table_name(action.option_strings)] = getattr(args, action.dest)
    return given


def table_name(option_strings: Sequence[str]) -> str:
    """The name of a flag that the table uses: the first without an underscore."""
    return next((name for name in option_strings if "_" not in name), option_strings[0])


def refusals(given: dict[str, Any], args: Namespace) -> Iterator[str]:
    """A sentence for every flag given that would be ignored or crash."""
    table = verdicts()
    for flag, value in given.items():
        verdict = table.get(flag, _UNKNOWN)
        if verdict.status is Status.REJECTED:
            yield f"{as_written(flag, value)}: {verdict.why}"
    for only in accepted_flags.ONLY_VALUES:
        if only.flag in given and _text(given[only.flag]) not in only.values:
            yield f"{as_written(only.flag, given[only.flag])}: {only.remedy}"
    for flag in accepted_flags.NOT_WITH_FSDP if args.use_megatron_fsdp else ():
        if flag in given:
            yield f"{as_written(flag, given[flag])} is not for --use-megatron-fsdp: leave one of them out"
    for flag in accepted_flags.NOT_WITH_MUON if args.optimizer == "muon" else ():
        if flag in given:
            yield f"{as_written(flag, given[flag])} is not for --optimizer muon: leave one of them out"
    for pair in accepted_flags.ONLY_WITH:
        for flag in pair.flags:
            if flag in given and not pair.where(args):
                yield f"{as_written(flag, given[flag])} is for {pair.needed}: add it, or leave {flag} out"


def gpu_refusals(given: dict[str, Any]) -> Iterator[str]:
    """A sentence for every flag given that needs a GPU."""
    table = verdicts()
    for flag, value in given.items():
        if flag in table and table[flag].status is Status.WORKS_ON_GPU:
            yield f"{as_written(flag, value)} needs a GPU, and this machine has none: leave it out"
    if given.get("--profile") and "--use-pytorch-profiler" not in given:
        yield "--profile needs --use-pytorch-profiler on this machine, where CUDA's own profiler is not: add it"
    if given.get("--distributed-backend") == "nccl":
        yield "--distributed-backend nccl needs GPUs, and this machine has none: leave it out to use gloo"


def without_effect(given: dict[str, Any]) -> str:
    """A sentence that names the flags given that have no effect, or an empty one."""
    table = verdicts()
    idle = [flag for flag in given if flag in table and table[flag].status is Status.NO_EFFECT]
    return "; ".join(f"{flag} has no effect here: {table[flag].why}" for flag in idle)


def as_written(flag: str, value: Any) -> str:
    """A flag and its value as they are written on a command line."""
    return flag if isinstance(value, bool) else f"{flag} {_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(_text, value))
    return value.name if isinstance(value, Enum) else str(value)
