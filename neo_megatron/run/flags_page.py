"""Writes the table of Megatron's flags as a page.

python -m neo_megatron.run.flags_page > docs/flags.md
"""

from neo_megatron.run.accepted_flags import NOT_WITH_FSDP, ONLY_VALUES, ONLY_WITH
from neo_megatron.run.flag_status import Status, Verdict
from neo_megatron.run.flag_table import verdicts

INTRODUCTION = """# Megatron's flags

Every flag of Megatron-LM 0.19.2 and what it does in a training of NEO. A test compares this page, and the table that
the start reads, with Megatron's parser. `python -m neo_megatron.pretrain_neo --help` begins with NEO's own flags.

* **works**: the test named gives it and shows its effect.
* **passed on**: Megatron gets it as it is. It acts on GPUs alone, and no test of this repository has run it there; on a
  machine without a GPU it ends the start in a sentence.
* **no effect**: accepted, because scripts for other models often have it; the log says that it changes nothing.
* **rejected**: ends the start in one sentence, because it would be ignored silently, crash, or train another model. A
  flag that is set to its default changes nothing and is accepted.

| flag | | test, or why |
|---|---|---|
"""


def page() -> str:
    """The page, one row a flag in the order of the alphabet."""
    return INTRODUCTION + "".join(
        f"| `{flag}` | {_row(flag, verdict)} |\n" for flag, verdict in sorted(verdicts().items())
    )


def _row(flag: str, verdict: Verdict) -> str:
    """Status, and why."""
    why = f"`{verdict.why}`" if verdict.status is Status.WORKS else verdict.why
    for values in ONLY_VALUES:
        if values.flag == flag:
            why += f"; only {', '.join(f'`{value}`' for value in values.values)}"
    for needed in ONLY_WITH:
        if flag in needed.flags:
            why += f"; only with `{needed.needed}`"
    if flag in NOT_WITH_FSDP:
        why += "; not with `--use-megatron-fsdp`"
    return f"{verdict.status.value} | {why.replace('|', chr(92) + '|')}"


if __name__ == "__main__":
    print(page(), end="")
