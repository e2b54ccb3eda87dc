"""Prints `--help`: NEO's flags first, then those of Megatron that a training of NEO can use."""

import re
from argparse import SUPPRESS, ArgumentParser

from neo_megatron.run.flag_status import Status
from neo_megatron.run.flag_table import table_name, verdicts

USAGE = "python -m neo_megatron.pretrain_neo --train-data-path PACKS --micro-batch-size 1 --train-iters N [flags]"
EPILOG = "docs/flags.md lists every flag of Megatron, and says which are refused and what to use instead."


def prepare_help(parser: ArgumentParser) -> None:
    """Puts NEO's groups first, hides rejected flags, and repairs Megatron's help texts."""
    table = verdicts()
    parser.usage, parser.description, parser.epilog = USAGE, None, EPILOG
    for action in parser._actions:
        verdict = table.get(table_name(action.option_strings))
        if verdict is not None and verdict.status in (Status.REJECTED, Status.NO_EFFECT):
            action.help = SUPPRESS
        elif action.help:
            # argparse raises ValueError at a percent sign that does not begin "%(default)s".
            action.help = re.sub(r"%(?![(%])", "%%", action.help)
    parser._action_groups.sort(key=lambda group: not group.title.startswith("NEO"))
