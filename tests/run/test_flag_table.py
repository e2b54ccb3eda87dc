"""Every flag of the pinned Megatron has a verdict, the page shows it, and a start heeds it."""

import re
from argparse import Action, ArgumentParser
from collections import Counter, defaultdict

import pytest
from support.paths import ROOT

from neo_megatron import presets
from neo_megatron.run import accepted_flags, rejected_model_flags, rejected_run_flags
from neo_megatron.run.flag_status import Status
from neo_megatron.run.flag_table import given_flags, refusals, table_name, verdicts
from neo_megatron.run.flags_page import page
from neo_megatron.run.training_arguments import run_defaults

# Megatron builds flags in a way that argparse is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.type. is deprecated:DeprecationWarning")

RUN = "--neo-model neo-2b --seq-length 4096 --micro-batch-size 1 --global-batch-size 64 --train-iters 100"


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    """Megatron's, with the defaults of a training."""
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import add_megatron_arguments

    with pytest.MonkeyPatch.context() as patch:
        # Megatron parses its own source for the texts of --help, which takes a second.
        patch.setattr(ArgumentGroupFactory, "_get_field_docstrings", lambda factory, dataclass: defaultdict(str))
        parser = add_megatron_arguments(ArgumentParser(allow_abbrev=False, exit_on_error=False))
    parser.set_defaults(**run_defaults(presets.SIZES["neo-2b"]), **presets.RECIPES["kit"].stages[2])
    parser.set_defaults(mlflow_dir="")  # of NEO's own flags, the one that decides about Megatron's
    return parser


def actions(parser: ArgumentParser) -> dict:
    """Every action of Megatron's parser but --help, by the name that the table has."""
    return {table_name(action.option_strings): action for action in parser._actions if action.dest != "help"}


def sentences(parser: ArgumentParser, *command_line: str) -> list[str]:
    args = parser.parse_args(command_line)
    return list(refusals(given_flags(parser, args, command_line), args))


def value_for(parser: ArgumentParser, action: Action) -> list[str]:
    """A value that the parser takes and that is not the default."""
    default = parser.get_default(action.dest)
    if action.nargs == 0 or type(action).__name__ == "BooleanOptionalAction":
        return []
    if action.choices:
        return [getattr(choice, "name", str(choice)) for choice in action.choices if choice != default][:1]
    count = action.nargs if isinstance(action.nargs, int) else 1
    for value in ("7", "0.7", "1,2", "attn", "x"):
        try:
            converted = (action.type or str)(value)
        except Exception:
            continue
        if converted not in (default, [default]):
            return [value] * count
    raise AssertionError(f"no value for {action.option_strings}")


def test_every_flag_of_megatron_has_one_verdict(parser):
    listed = Counter(
        flag
        for table in (
            accepted_flags.WORKS,
            accepted_flags.WORKS_ON_GPU,
            accepted_flags.NO_EFFECT,
            rejected_model_flags.REJECTED,
            rejected_run_flags.REJECTED,
        )
        for verdict in table
        for flag in verdict.flags
    )
    assert [flag for flag, count in listed.items() if count > 1] == []
    assert set(actions(parser)) == set(listed)


def test_conditions_are_about_flags_that_are_taken():
    conditions = [only.flag for only in accepted_flags.ONLY_VALUES]
    conditions += [flag for only in accepted_flags.ONLY_WITH for flag in only.flags]
    table = verdicts()
    assert [flag for flag in conditions if table[flag].status in (Status.REJECTED, Status.NO_EFFECT)] == []


def test_the_test_of_every_flag_that_works_gives_it():
    """In its own file, or in what that imports of `tests/support`."""
    for verdict in accepted_flags.WORKS:
        text = (ROOT / verdict.why).read_text()
        for name in re.findall(r"^from support\.(\w+) import", text, re.MULTILINE):
            text += (ROOT / "tests" / "support" / f"{name}.py").read_text()
        missing = [flag for flag in verdict.flags if not re.search(rf"{re.escape(flag)}(?![\w-])", text)]
        assert missing == [], verdict.why


def test_the_page_is_up_to_date():
    assert (ROOT / "docs" / "flags.md").read_text() == page(), "python -m neo_megatron.run.flags_page > docs/flags.md"


def test_every_rejected_flag_is_refused_in_a_sentence(parser):
    known = actions(parser)
    for flag, verdict in verdicts().items():
        if verdict.status is Status.REJECTED:
            said = sentences(parser, flag, *value_for(parser, known[flag]))
            assert len(said) == 1 and said[0].startswith(flag) and said[0].endswith(verdict.why), (flag, said)


def test_every_other_flag_is_accepted(parser):
    """But for one that needs another, which the sentence then names, as --wandb-project needs --save."""
    known = actions(parser)
    values = {only.flag for only in accepted_flags.ONLY_VALUES}
    for flag, verdict in verdicts().items():
        if verdict.status is not Status.REJECTED and flag not in (*values, "--wandb-project"):
            said = sentences(parser, flag, *value_for(parser, known[flag]))
            needed = [only.needed for only in accepted_flags.ONLY_WITH if flag in only.flags]
            assert [sentence for sentence in said if not any(f"is for {word}" in sentence for word in needed)] == []


@pytest.mark.parametrize(
    "command_line",
    [
        "--num-experts 8",
        "--num-experts=8",
        "--no-rl-partial-rollouts --rl-partial-rollouts",
        "--no-yarn-correction-range-round-to-int",
        "--optimizer dist_muon",
        "--muon-momentum 0.8",
        "--muon-tp-mode blockwise --optimizer muon",
        "--muon-fp32-matmul-prec low --optimizer muon",
        "--muon-coefficient-type custom --optimizer muon",
        "--fp16 --optimizer muon",
        "--fp8-format hybrid --optimizer muon",
        "--use-megatron-fsdp --optimizer muon",
        "--optimizer=soap",
        "--dataloader-type cyclic",
        "--normalization LayerNorm",
        "--position-embedding-type rope",
        "--split 99,1,0",
        "--profile-step-end 20",
        "--adam-beta2 0.9 --optimizer sgd",
        "--attention-backend local",
    ],
)
def test_all_spellings_of_a_flag_are_checked(parser, command_line):
    words = command_line.split()
    assert any(
        said.startswith(words[0].partition("=")[0].replace("--no-rl", "--rl")) for said in sentences(parser, *words)
    )


@pytest.mark.parametrize(
    "command_line",
    [
        "--normalization RMSNorm --position-embedding-type none --swiglu --disable-bias-linear --attention-dropout 0",
        "--rotary-percent 1.0 --rotary-base 1000000 --num-query-groups 8 --group-query-attention --qk-layernorm",
        "--optimizer adam --dataloader-type external --tokenizer-type NullTokenizer --ckpt-format torch_dist",
        "--no-rl-partial-rollouts --make-vocab-size-divisible-by 1 --transformer-impl local --softmax-type vanilla",
    ],
)
def test_a_rejected_flag_set_to_its_default_is_accepted(parser, command_line):
    assert sentences(parser, *command_line.split()) == []
