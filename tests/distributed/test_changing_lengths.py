"""Packs of 192 tokens, then of 384, in one run: as one process trains alone, on any layout, resumed at any step."""

from pathlib import Path

import pytest
from support.golden_packs import make_packs
from support.layout_runs import SMALL, assert_same, layout_job, write_random_model
from support.pretrain_jobs import Job, run_jobs

from neo_megatron.data.dataset import GlobalBatch, PackDataset
from neo_megatron.data.packs.writer import PackInput, write_packs

STEPS, BATCH, BORDER = 6, 4, 3  # the fourth step has the first long packs
TP2, PP2, CP2 = (f"--{kind}-parallel-size 2" for kind in ("tensor-model", "pipeline-model", "context"))
# An evaluation, always of long packs, comes after a step of each length.
EVALUATION = "--valid-data-path {room}/long --eval-interval 2 --eval-iters 1"
LAYOUTS = {
    "tp2-sp": f"{TP2} --sequence-parallel",
    "pp2": f"{PP2} {EVALUATION}",
    "pp2-vp2": f"{PP2} --num-virtual-stages-per-pipeline-rank 2",
    "cp2": f"{CP2} --cp-comm-type a2a {EVALUATION}",
    "cp2-micro-batch": f"{CP2} --cp-comm-type allgather --micro-batch-size 2",
    "dp2-distributed": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
}
SAVED = "--save {room}/saved-{name} --load {room}/saved-{name}"
# The step at which a run ends, its mixture until then, and the processes and the layout with which it goes on: at the
# border; within the long packs; and before anyone thought of long packs.
INTERRUPTED = {
    "border": (BORDER, "schedule", 1, ""),
    "within": (BORDER + 1, "schedule", 2, PP2),
    "extended": (BORDER - 1, "short", 1, ""),
}


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    room = tmp_path_factory.mktemp("lengths")
    make_packs(room, repeats=8, seq_length=192).rename(room / "short")
    write_packs([PackInput(str(room / "shards"))], room / "long", 384)
    short = "- {from: 0, shares: {short: 1}}\n"
    (room / "short.yaml").write_text(short)
    for name, start in (("schedule", BORDER * BATCH), ("crooked", BORDER * BATCH - 1)):
        (room / f"{name}.yaml").write_text(f"{short}- {{from: {start}, shares: {{long: 1}}}}")
    (room / "model").mkdir()
    write_random_model(room / "model", SMALL)
    return room


@pytest.fixture(scope="module")
def runs(room) -> dict[str, Job]:
    def job(name: str, flags: str = "", data: str = "schedule.yaml") -> Job:
        made = layout_job(room / "runs" / name, room / "model", room / data, flags.format(room=room, name=name), STEPS)
        kind = "--mixture" if data.endswith(".yaml") else "--train-data-path"
        words = [kind if word == "--train-data-path" else word for word in made.flags]
        return Job(made.directory, words, gradients=True)

    alone = [job("one", EVALUATION), job("short", data="short"), job("crooked", data="crooked.yaml")]
    for name, (end, mixture, _, _) in INTERRUPTED.items():
        alone.append(job(name, f"{SAVED} --exit-interval {end}", f"{mixture}.yaml"))
    on_two = [job(name, flags) for name, flags in LAYOUTS.items()]
    run_jobs(1, alone)
    resumed = {1: [], 2: on_two}
    for name, (_, _, processes, layout) in INTERRUPTED.items():
        on = job(f"{name}-on", f"{SAVED.replace('{name}', name)} {layout}")
        resumed[processes].append(on)
    for processes, jobs in resumed.items():
        run_jobs(processes, jobs)
    return {job.directory.name: job for job in (*alone, *resumed[1], *resumed[2])}


def test_packs_are_those_of_each_directory_from_its_first_one_on(room, runs):
    expected = []
    for name, steps in (("short", BORDER), ("long", STEPS - BORDER)):
        dataset = PackDataset(room / name, steps * BATCH, 1234, images="none", global_batch=GlobalBatch(BATCH, 1, 1))
        expected += [len(dataset[number]["targets"]) for number in range(steps * BATCH)]
    assert [call["targets"] for call in runs["border"].inputs(0)] == expected[: BORDER * BATCH]
    assert [call["targets"] for call in runs["border-on"].inputs(0)] == expected[BORDER * BATCH :]
    printed = runs["one"].printed()
    for length, pack in ((192, 0), (384, BORDER * BATCH)):
        assert printed.count(f"packs of {length} tokens from pack {pack} on") == 1


def test_there_is_one_schedule_and_one_loss_curve(runs):
    one, short = runs["one"], runs["short"]
    assert one.scalars("learning-rate") == short.scalars("learning-rate")
    losses, expected = one.scalars("lm loss"), short.scalars("lm loss")
    assert list(losses) == list(range(1, STEPS + 1))
    assert [losses[step] == expected[step] for step in losses] == [True] * BORDER + [False] * (STEPS - BORDER)


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupted_run_has_the_losses_of_the_uninterrupted(runs, name):
    end, _, processes, _ = INTERRUPTED[name]
    assert runs[name].exit() == 0 and runs[f"{name}-on"].exit() is None
    losses = {**runs[name].scalars("lm loss"), **runs[f"{name}-on"].scalars("lm loss")}
    assert list(runs[name].scalars("lm loss")) == list(range(1, end + 1))
    tolerance = 0 if processes == 1 else 2e-6
    assert losses == {
        step: pytest.approx(loss, abs=tolerance, rel=0) for step, loss in runs["one"].scalars("lm loss").items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train_alike(runs, layout):
    assert_same(SMALL, runs[layout], runs["one"], loss=2e-6, gradient=1e-5)
    if EVALUATION in LAYOUTS[layout]:
        expected, actual = (runs[name].scalars("lm loss validation") for name in ("one", layout))
        assert list(expected) == [2, 4, 6]
        assert actual == {step: pytest.approx(loss, abs=2e-6, rel=0) for step, loss in expected.items()}


def test_a_border_within_a_step_is_one_sentence(runs):
    sentence = runs["crooked"].exit()
    assert "pack 11 begins packs of 384 tokens after those of 192, in the middle of a step of 4 packs" in sentence
    assert sentence.endswith("begin them at pack 12") and "\n" not in sentence
