"""The schedule of every command line, against its formula; what no schedule can be made of ends in a sentence."""

import math
from argparse import Namespace

import pytest

from neo_megatron.errors import ConfigError
from neo_megatron.presets import RECIPES

# Megatron builds flags in a way that argparse is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.type. is deprecated:DeprecationWarning")

BATCH = 4  # packs of a step, see `parse`


@pytest.fixture
def schedule(parse, monkeypatch):
    """Learning rate and weight decay at a step, as Megatron's scheduler has them."""
    from megatron.training import training

    def at(flags: str, step: int) -> tuple[float, float]:
        args = parse(flags)
        monkeypatch.setattr(training, "get_args", lambda: args)
        scheduler = training.get_optimizer_param_scheduler(Namespace(param_groups=[{"params": []}]))
        scheduler.step(step * BATCH)
        return scheduler.get_lr({}), scheduler.get_wd()

    return at


def cosine(peak: float, lowest: float, share: float) -> float:
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * share)) / 2


# Peak and lowest rate, warm-up in steps of a run of 10,000, and beta2: NEO's paper (v2, table 5), the kit's schedule
# and AdamW at the paper's peak rates, and NEO-ov's paper (section 4.1), which leaves the lowest rate open.
PUBLISHED = {
    ("kit", 1): (8e-4, 8e-5, 100, 0.95),
    ("kit", 2): (4e-5, 8e-6, 300, 0.95),
    ("kit", 3): (5e-5, 5e-6, 300, 0.95),
    ("paper", 1): (8e-4, 4e-5, 2000, 0.999),
    ("paper", 2): (4e-5, 4e-6, 200, 0.999),
    ("paper", 3): (5e-5, 0.0, 200, 0.999),
    ("neo-ov", 1): (2e-4, None, 100, 0.999),
    ("neo-ov", 2): (5e-5, None, 100, 0.999),
    ("neo-ov", 3): (5e-5, None, 100, 0.999),
}


@pytest.mark.parametrize(("recipe", "stage"), PUBLISHED)
@pytest.mark.parametrize("length", ["--train-iters 10000", "--train-samples 40000"])
def test_a_recipe_has_its_published_numbers(schedule, parse, recipe, stage, length):
    peak, lowest, warmup, beta2 = PUBLISHED[recipe, stage]
    flags = f"--recipe {recipe} --training-stage {stage} {length}"
    if lowest is None:
        with pytest.raises(ConfigError, match="--recipe neo-ov does not state how low the learning rate falls"):
            parse(flags)
        flags, lowest = f"{flags} --min-lr 1e-5", 1e-5
    assert schedule(flags, warmup)[0] == pytest.approx(peak)
    assert schedule(flags, warmup // 2)[0] == pytest.approx(peak / 2)
    halfway = warmup + (10_000 - warmup) // 2
    assert schedule(flags, halfway)[0] == pytest.approx((peak + lowest) / 2)
    assert schedule(flags, 10_000)[0] == pytest.approx(lowest)
    args = parse(flags)
    assert (args.adam_beta1, args.adam_beta2, args.adam_eps) == (0.9, beta2, 1e-8)
    assert (args.weight_decay, args.clip_grad, args.recipe) == (0.01, 1.0, recipe)


@pytest.mark.parametrize(
    ("model", "recipe"), [("tiny", "kit"), ("neo-2b", "kit"), ("neo-ov-2b", "neo-ov"), ("neo-ov-9b", "neo-ov")]
)
def test_the_default_recipe_is_that_of_the_size(parse, model, recipe):
    args = parse(f"--neo-model {model} --train-iters 100 --min-lr 1e-6")
    assert (args.recipe, args.lr) == (recipe, {"kit": 4e-5, "neo-ov": 5e-5}[recipe])
    assert parse(f"--neo-model {model} --train-iters 500 --recipe paper --training-stage 3").recipe == "paper"


def test_flags_win_over_a_recipe(parse):
    paper = "--recipe paper --training-stage 1 --train-iters 3000"
    assert parse(f"{paper} --adam-beta2 0.9").adam_beta2 == 0.9
    assert parse(f"{paper} --lr-warmup-iters 5").lr_warmup_iters == 5
    assert parse(f"{paper} --lr-warmup-iters 0").lr_warmup_iters == 0
    args = parse(f"{paper} --lr-warmup-fraction 0.1")
    assert (args.lr_warmup_iters, args.lr_warmup_fraction) == (0, 0.1)
    args = parse("--recipe paper --training-stage 1 --train-samples 12000 --lr-warmup-samples 7")
    assert (args.lr_warmup_samples, args.lr_warmup_iters) == (7, 0)
    args = parse("--recipe neo-ov --training-stage 2 --train-iters 100 --lr-decay-style constant")
    assert (args.lr_decay_style, args.min_lr) == ("constant", 0)


@pytest.mark.parametrize(("recipe", "stage"), [key for key, (_, lowest, *_) in PUBLISHED.items() if lowest is not None])
def test_lr_alone_keeps_the_share_of_the_lowest_rate(parse, recipe, stage):
    """Lower than the stage's lowest rate too, where Megatron would refuse it."""
    published = RECIPES[recipe].stages[stage]
    flags = f"--recipe {recipe} --training-stage {stage} --train-iters 3000"
    for lr in (published["lr"], 3e-3, 1e-6):
        args = parse(f"{flags} --lr {lr}")
        assert args.lr == lr and args.min_lr == pytest.approx(lr * published["min_lr"] / published["lr"])
    assert parse(flags).min_lr == pytest.approx(published["min_lr"])
    assert parse(f"{flags} --lr 1e-3 --min-lr 1e-5").min_lr == 1e-5
    assert parse(f"{flags} --lr 1e-3 --min-lr 0").min_lr == 0


LR = "--lr 1e-3 --min-lr 1e-4"


@pytest.mark.parametrize(
    ("flags", "step", "rate"),
    [
        (f"{LR} --train-iters 100", 50, cosine(1e-3, 1e-4, (50 - 3) / 97)),  # the warm-up of stage 2 is 3 %
        (f"{LR} --train-iters 100 --lr-warmup-fraction 0.2", 10, 0.5e-3),
        (f"{LR} --train-iters 100 --lr-warmup-iters 20", 10, 0.5e-3),
        (f"{LR} --train-iters 100 --lr-warmup-iters=20 --lr-warmup-init 5e-4", 10, 0.75e-3),
        (f"{LR} --train-iters 100 --lr-warmup-iters 0", 25, cosine(1e-3, 1e-4, 0.25)),
        (f"{LR} --train-iters 100 --lr-warmup-iters 0 --lr-decay-iters 50", 25, cosine(1e-3, 1e-4, 0.5)),
        (f"{LR} --train-iters 100 --lr-warmup-iters 0 --lr-decay-style constant", 80, 1e-3),
        (f"{LR} --train-iters 100 --lr-warmup-iters 0 --lr-decay-style linear", 50, 5.5e-4),
        (
            f"{LR} --train-iters 100 --lr-warmup-iters 4 --lr-decay-style inverse-square-root",
            64,
            1e-3 * (4 / 64) ** 0.5,
        ),
        (
            f"{LR} --train-iters 100 --lr-warmup-iters 0 --lr-decay-style WSD --lr-wsd-decay-iters 20 "
            "--lr-wsd-decay-style linear",
            90,
            5.5e-4,
        ),
        (f"{LR} --train-samples 400", 50, cosine(1e-3, 1e-4, (50 - 3) / 97)),
        (f"{LR} --train-samples 400 --lr-warmup-samples 80 --lr-decay-samples 200", 10, 0.5e-3),
        (
            f"{LR} --train-samples 400 --lr-warmup-samples 0 --lr-decay-style WSD --lr-wsd-decay-samples 80 "
            "--lr-wsd-decay-style linear",
            90,
            5.5e-4,
        ),
    ],
)
def test_the_rate_at_a_step(schedule, flags, step, rate):
    assert schedule(flags, step)[0] == pytest.approx(rate, rel=1e-6)


def test_weight_decay_may_grow(schedule):
    grows = "--weight-decay-incr-style linear --start-weight-decay 0.1 --end-weight-decay 0.3"
    assert schedule(f"--train-iters 100 {grows}", 50)[1] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("", "how long to train is missing: give --train-iters"),
        ("--train-iters 0", "how long to train is missing"),
        ("--train-iters 10 --train-samples 40", "both say how long to train"),
        ("--training-stage 4 --train-iters 10", "argument --training-stage: invalid choice: 4"),
        ("--training-stage 4 --lr-warmup-iters 0 --train-iters 10", "argument --training-stage: invalid choice: 4"),
        ("--training-stage two --train-iters 10", "argument --training-stage: invalid int value: 'two'"),
        ("--recipe paper --train-iters 500", "has other numbers for each training stage: add --training-stage"),
        ("--recipe book --training-stage 1 --train-iters 10", "argument --recipe: invalid choice: 'book'"),
        (
            "--recipe paper --training-stage 2 --train-iters 200",
            "--recipe paper warms up for 200 steps, and this run has 200: give a shorter --lr-warmup-fraction",
        ),
        ("--recipe paper --training-stage 2 --train-samples 400", "warms up for 200 steps, and this run has 100"),
        (
            "--recipe paper --training-stage 2 --train-samples 4000 --step-batch-size-schedule 0:4",
            "warms up for 200 steps, and how many packs these are is not known: add --lr-warmup-samples",
        ),
        ("--train-iters 10 --lr-warmup-iters 10", "leaves nothing of --train-iters 10"),
        ("--train-iters 10 --lr-warmup-iters 5 --lr-decay-iters 5", "leaves nothing of --lr-decay-iters 5"),
        ("--train-samples 10 --lr-warmup-iters 1", "--lr-warmup-iters does not go with --train-samples"),
        ("--train-iters 10 --lr-decay-samples 9", "give --lr-decay-iters"),
        ("--train-iters 10 --lr-warmup-fraction 0.1 --lr-warmup-iters 1", "both say how long to warm up"),
        ("--train-iters 10 --lr-warmup-fraction 1.5", "--lr-warmup-fraction 1.5: give a share"),
        ("--train-iters 10 --lr-decay-style WSD", "add --lr-wsd-decay-iters"),
        ("--train-iters 10 --lr 1e-4 --min-lr 1e-3", "--min-lr 0.001 is not between 0 and --lr 0.0001"),
        ("--train-iters 10 --lr-warmup-iters 0 --lr-warmup-init 1e-6", "is where a warm-up begins"),
        ("--train-iters 10 --start-weight-decay 0.1", "add --weight-decay-incr-style"),
        ("--train-iters 10 --weight-decay-incr-style linear", "needs --start-weight-decay"),
        ("--train-iters 10 --step-batch-size-schedule 0:4", "--step-batch-size-schedule counts packs, not steps"),
        ("--rampup-batch-size 1 1 100 --train-iters 10", "use that"),
    ],
)
def test_impossible_schedules_end_in_one_sentence(parse, flags, sentence):
    with pytest.raises(ConfigError) as refused:
        parse(flags)
    assert sentence in str(refused.value)
