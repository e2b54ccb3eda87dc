"""A run that was stopped, killed or moved to another layout goes on as if nothing had happened.

One uninterrupted run is the reference. Few launches serve all tests, because importing Megatron costs more than a run.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from support.paths import GOLDEN
from support.pretrain_jobs import Job, run_jobs
from support.processes import run_forked, run_ranks

from neo_megatron.checkpoint.dcp_metadata import CHECKSUMS
from neo_megatron.checkpoint.integrity import stored_pieces, verify_pieces
from neo_megatron.checkpoint.streaming import StoredTensor
from neo_megatron.checkpoint.torch_dist import TRACKER, TorchDistDirectory, write_torch_dist
from neo_megatron.run.scalar_file import NAME as SCALARS

STEPS, EVERY = 20, 2
# Each goes on where the one before it stopped, in the same directory: a chain of pairs.
LAYOUTS = {
    "tp2-sp": "--tensor-model-parallel-size 2 --sequence-parallel",
    "pp2": "--pipeline-model-parallel-size 2 --pre-buffer-pipeline-stages 1",
    "dp2-distributed": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather",
    "pp2-vp2": "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
    "cp2": "--context-parallel-size 2",
    "dp2": "--micro-batch-size 2",
}


@pytest.fixture(scope="module")
def room(room, tmp_path_factory) -> Path:
    """A place of this module's own, with the packs and the checkpoint that all modules start from."""
    own = tmp_path_factory.mktemp("run-checkpoints")
    for name in ("packs", "golden"):
        (own / name).symlink_to(room / name)
    return own


def command(room: Path, saved: Path, flags: str = "", steps: int = STEPS) -> list[str]:
    return [
        *("--neo-model", f"{GOLDEN}/ckpt_untied", "--train-data-path", f"{room}/packs"),
        *("--micro-batch-size", "1", "--global-batch-size", "4", "--train-iters", str(steps)),
        *("--lr", "1e-4", "--min-lr", "1e-5", "--lr-warmup-iters", "0", "--num-workers", "0", "--log-interval", "1"),
        *("--pretrained-checkpoint", f"{room}/golden", "--load", str(saved), "--save", str(saved)),
        *("--save-interval", str(EVERY), *flags.split()),
    ]


@pytest.fixture(scope="module")
def first(room) -> dict[str, Job]:
    """Runs of one process: the reference, one that keeps two checkpoints, and the first link of the chain."""
    jobs = {
        "reference": Job(room / "reference", command(room, room / "saved")),
        "limited": Job(room / "limited", command(room, room / "limited-saved", "--save-total-limit 2", 8)),
        "chain": Job(room / "chain", command(room, room / "chain-saved", f"--exit-interval {EVERY}")),
    }
    run_jobs(1, list(jobs.values()))
    return jobs


@pytest.fixture(scope="module")
def chain(room, first) -> dict[str, Job]:
    """Two processes go on in one layout after the other."""
    jobs = {
        name: Job(room / name, command(room, room / "chain-saved", f"{flags} --exit-interval {EVERY}"))
        for name, flags in LAYOUTS.items()
    }
    run_jobs(2, list(jobs.values()))
    return jobs


def assert_goes_on(job: Job, reference: Job, steps: range, tolerance: float = 0) -> None:
    expected, actual = reference.scalars("lm loss"), job.scalars("lm loss")
    assert list(actual) == list(steps)
    for step in steps:
        assert actual[step] == pytest.approx(expected[step], rel=tolerance, abs=0), step


@pytest.mark.parametrize("number, layout", list(enumerate(LAYOUTS, start=1)))
def test_any_layout_goes_on_from_any_other(first, chain, number, layout):
    """With the optimizer's state, and the same samples in each step: loss by loss as the reference."""
    before = number * EVERY
    assert chain[layout].exit() == 0, "stopped at --exit-interval"
    assert_goes_on(chain[layout], first["reference"], range(before + 1, before + EVERY + 1), 2e-6)


def test_each_rank_reads_and_holds_its_share_of_a_checkpoint(room, chain):
    """No tensor is read by both, the optimizer's state of another layout included, or held by both to be written."""
    first, second = (chain["dp2-distributed"].stored(rank) for rank in (0, 1))
    for does in ("read", "written"):
        assert first[does] and second[does] and not set(first[does]) & set(second[does])
    assert any(key.startswith("optimizer.state.exp_avg.") for key in first["read"] + second["read"])
    steps = (list(LAYOUTS).index("dp2-distributed") + 2) * EVERY
    stored = TorchDistDirectory(room / "chain-saved" / f"iter_{steps:07d}").shapes
    state = sorted(key for key in stored if key.startswith("optimizer.state."))
    assert state and sorted(first["written"] + second["written"]) == state


def test_one_rank_lists_the_files_of_a_checkpoint(chain):
    """There are as many as ranks, or twice, and they would be listed by each of thousands several times."""
    assert all(chain[name].stored(0)["listed"] > 0 for name in LAYOUTS)
    assert not any(chain[name].stored(1)["listed"] for name in LAYOUTS)


def test_old_checkpoints_are_deleted(room, first):
    assert first["limited"].exit() is None
    assert sorted(path.name for path in (room / "limited-saved").iterdir()) == [
        "iter_0000006",
        "iter_0000008",
        TRACKER,
        SCALARS,
    ]
    for path in (room / "limited-saved").glob("iter_*"):
        assert (path / CHECKSUMS).exists()
        verify_pieces(stored_pieces(path))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


LAST, BEFORE = f"iter_{STEPS:07d}", f"iter_{STEPS - EVERY:07d}"
# What is done to a copy of the reference's last two checkpoints; the file that is named; where the run goes on.
DAMAGES = {
    "cut": (lambda run: cut(run / LAST / "__0_0.distcp"), f"{LAST}/__0_0.distcp: has", STEPS - EVERY),
    "flipped": (lambda run: flip(run / LAST / "__0_0.distcp"), f"{LAST}/__0_0.distcp is damaged", STEPS - EVERY),
    "missing": (
        lambda run: (run / LAST / "__0_0.distcp").unlink(),
        f"{LAST}/__0_0.distcp: no such file",
        STEPS - EVERY,
    ),
    "no-metadata": (lambda run: (run / LAST / ".metadata").unlink(), f"{LAST}/.metadata: no such file", STEPS - EVERY),
    "metadata": (lambda run: flip(run / LAST / ".metadata"), f"{LAST}/.metadata has another", STEPS - EVERY),
    "format": (lambda run: (run / LAST / "metadata.json").write_text("{"), f"{LAST}/metadata.json", STEPS - EVERY),
    "tracker": (lambda run: (run / TRACKER).write_text(""), f"{TRACKER} named nothing", STEPS),
    "gone": (lambda run: shutil.rmtree(run / LAST), f"{TRACKER} named {STEPS}", STEPS - EVERY),
}


def leave_unfinished(run: Path) -> None:
    """As a run of more ranks leaves it that is killed while it saves."""
    shutil.rmtree(run / LAST)
    (run / TRACKER).write_text(str(STEPS - EVERY))
    (run / LAST).mkdir()
    (run / LAST / "__3_0.distcp").write_bytes(b"half")


def damage_both(run: Path) -> None:
    cut(run / LAST / "__0_0.distcp")
    flip(run / BEFORE / "__0_0.distcp")


@pytest.fixture(scope="module")
def second(room, first, chain) -> dict[str, Job]:
    """Runs of one process that go on from copies of what the first ones saved, and the last link of the chain."""
    jobs = {"chain": Job(room / "chain-end", command(room, room / "chain-saved", f"--exit-interval {EVERY}"))}

    def add(name: str, change, flags: str = "", steps: int = STEPS) -> None:
        run = room / f"{name}-saved"
        for saved in (LAST, BEFORE):
            shutil.copytree(room / "saved" / saved, run / saved)
        shutil.copy(room / "saved" / TRACKER, run)
        change(run)
        jobs[name] = Job(room / name, command(room, run, flags, steps))

    def back(run: Path) -> None:
        (run / TRACKER).write_text(str(STEPS - EVERY))

    for name, (change, _, _) in DAMAGES.items():
        add(name, change)
    add("unfinished", leave_unfinished)
    add("both", damage_both)
    add("back", back)
    add("longer", back, steps=STEPS + 2)
    add("longer-override", back, "--override-opt-param-scheduler", STEPS + 2)
    add("longer-keep", back, "--use-checkpoint-opt-param-scheduler", STEPS + 2)
    add("finetune", back, "--finetune")
    add("step", back, f"--ckpt-step {STEPS}")
    add("elsewhere", lambda run: cut(run / LAST / "__0_0.distcp"), f"--save {room}/other-saved")
    shutil.copytree(room / "golden", room / "golden-damaged")
    cut(next((room / "golden-damaged" / "release").glob("*.distcp")))
    for name, flags in MISTAKES.items():
        jobs[name] = Job(room / name, command(room, room / f"{name}-saved", flags[0].format(room=room)))
    run_jobs(1, list(jobs.values()))
    return jobs


MISTAKES = {
    "pretrained": ("--pretrained-checkpoint {room}/golden-damaged", "copy or convert it again"),
    "nothing-there": ("--pretrained-checkpoint {room}/packs", "holds packs, not a Megatron checkpoint: give"),
    "two-limits": ("--save-total-limit 2 --save-retain-interval 4", "both say which checkpoints are deleted"),
    "negative": ("--save-total-limit -1", "--save-total-limit -1: give 1 or more"),
    "format-flag": ("--ckpt-format torch", "--ckpt-format torch: only torch_dist"),
    "other-model": ("--vocab-size 1008", "is of another model (vocab_size 1024 there, 1008 here)"),
}


def test_one_process_ends_the_chain(first, second):
    before = (1 + len(LAYOUTS)) * EVERY
    assert_goes_on(second["chain"], first["reference"], range(before + 1, before + EVERY + 1), 2e-6)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_in_one_sentence(room, first, second, damage):
    _, sentence, start = DAMAGES[damage]
    job = second[damage]
    assert job.exit() is None  # also where nothing was left to do
    assert len([line for line in job.printed().splitlines() if sentence in line]) == 1, job.printed()[-3000:]
    if start < STEPS:
        assert_goes_on(job, first["reference"], range(start + 1, STEPS + 1))
    saved = room / f"{damage}-saved"
    assert (saved / TRACKER).read_text() == str(STEPS)
    verify_pieces(stored_pieces(saved / LAST))
    assert (saved / f"{LAST}.set-aside").is_dir() == (damage not in ("tracker", "gone"))


def test_what_a_killed_save_left_is_not_mixed_with_a_new_one(room, first, second):
    assert_goes_on(second["unfinished"], first["reference"], range(STEPS - EVERY + 1, STEPS + 1))
    assert f"{LAST} was still being written when its run ended: deleted" in second["unfinished"].printed()
    names = sorted(path.name for path in (room / "unfinished-saved" / LAST).iterdir())
    assert names == [".metadata", "__0_0.distcp", CHECKSUMS, "metadata.json"]


def test_no_whole_checkpoint_ends_in_a_sentence_that_names_the_files(room, second):
    sentence = second["both"].exit()
    assert "no complete checkpoint to resume from" in sentence and "\n" not in sentence
    assert f"{LAST}/__0_0.distcp" in sentence and f"{BEFORE}/__0_0.distcp" in sentence
    assert {path.name for path in (room / "both-saved").iterdir()} == {LAST, BEFORE, TRACKER}
    sums = [room / saved / LAST / CHECKSUMS for saved in ("both-saved", "saved")]
    assert sums[0].stat().st_mtime_ns == sums[1].stat().st_mtime_ns, "nothing was touched"


def test_a_user_who_goes_back_loses_nothing(room, first, second):
    assert_goes_on(second["back"], first["reference"], range(STEPS - EVERY + 1, STEPS + 1))
    verify_pieces(stored_pieces(room / "back-saved" / LAST))
    assert (room / "back-saved" / f"{LAST}.set-aside").is_dir()
    assert "training has ended before: all of its 80 packs were read" in second["step"].printed(), "--ckpt-step won"


def test_a_run_is_made_longer_only_with_a_word_on_its_schedule(first, second):
    sentence = second["longer"].exit()
    there, here = STEPS * 4, (STEPS + 2) * 4
    assert f"lr_decay_steps {there} there, {here} here" in sentence and "--override-opt-param-scheduler" in sentence
    rates = {name: second[name].scalars("learning-rate") for name in ("longer-override", "longer-keep")}
    assert all(list(rate) == list(range(STEPS - EVERY + 1, STEPS + 3)) for rate in rates.values())
    old = first["reference"].scalars("learning-rate")
    assert rates["longer-keep"][STEPS] == old[STEPS]
    assert rates["longer-override"][STEPS][0] > old[STEPS][0]


def test_finetune_does_not_save_over_what_it_starts_from(second):
    assert "--finetune starts at iteration 0 and would save over" in second["finetune"].exit()


def test_the_directory_of_another_run_is_only_read(room, first, second):
    assert_goes_on(second["elsewhere"], first["reference"], range(STEPS - EVERY + 1, STEPS + 1))
    assert (room / "elsewhere-saved" / TRACKER).read_text() == str(STEPS)
    assert {path.name for path in (room / "elsewhere-saved").iterdir()} == {LAST, BEFORE, TRACKER}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_a_sentence(second, mistake):
    sentence = second[mistake].exit()
    assert MISTAKES[mistake][1] in sentence and "\n" not in sentence


# Moments at which a run is killed, one after another: [operation, which one since the start]. Every second one comes
# after a complete save, so that the run gets on.
SAVING = [
    ["mkdir iter", 1],
    ["opened __0_0.distcp", 2],
    ["fsync __0_0.distcp", 1],
    ["rename .metadata.tmp", 2],
    ["opened metadata.json", 1],
    ["opened latest_checkpointed_iteration.txt", 2],
    ["opened latest_checkpointed_iteration.txt", 1],
]
KEEPING = [
    ["rename checksums.json.partial", 2],
    ["rename iter", 1],
    ["remove .metadata", 1],
    ["rmdir iter.deleting", 1],
]
# Of an asynchronous save the rank itself makes the directory, and finishes it after steps that went on meanwhile.
FINISHING = [
    ["mkdir iter", 2],
    ["open .metadata.tmp", 1],
    ["opened metadata.json", 2],
    ["opened latest_checkpointed_iteration.txt", 1],
]


def killed_run(room: Path, name: str, moments: list, flags: str, steps: int = STEPS) -> list[list[list[str]]]:
    """Kills a run at one moment after another; gives what each of its starts logged, by kind."""
    directory, saved = room / name, room / f"{name}-saved"
    argv = command(room, saved, flags, steps)
    directory.mkdir()
    job = {"argv": argv, "directory": str(directory), "root": str(saved), "moments": moments}
    (directory / "job.json").write_text(json.dumps(job))
    worker = Path(__file__).parent / "kill_worker.py"
    done = run_forked(worker, directory / "job.json")
    assert done.returncode == 0, done.stdout[-5000:]
    starts = (directory / "log").read_text().split("start\n")[1:]
    return [[line.split(" ", 1) for line in start.splitlines()] for start in starts]


@pytest.mark.parametrize(
    "name, moments, flags",
    [
        ("killed", SAVING + KEEPING, "--save-total-limit 1"),
        ("async", FINISHING[::2], "--save-total-limit 1 --async-save"),
        pytest.param(
            "async-rest", FINISHING[1::2], "--save-total-limit 1 --async-save", marks=pytest.mark.thorough
        ),  # every start imports Megatron once more, for the process that saves
    ],
)
def test_a_run_killed_at_any_moment_of_a_save_goes_on_with_the_same_batches_and_losses(
    room, first, name, moments, flags
):
    starts = killed_run(room, name, moments, flags)
    assert len(starts) == len(moments) + 1
    assert [start[-1] for start in starts] == [["killed"]] * len(moments) + [["end"]]
    batches, losses = defaultdict(set), defaultdict(set)
    for start in starts:
        steps = [(int(step), loss) for kind, *rest in start if kind == "loss" for step, loss in [rest[0].split()]]
        read = [rest[0] for kind, *rest in start if kind == "batch"]
        for step, loss in steps:
            losses[step].add(float.fromhex(loss))
        for number, batch in enumerate(read if steps else []):
            batches[(steps[0][0] - 1) * 4 + number].add(batch)
    assert all(len(seen) == 1 for seen in losses.values()), "to the last bit"
    logged = {step: [float(np.float32(loss)) for loss in seen] for step, seen in losses.items()}
    assert logged == first["reference"].scalars("lm loss")  # which TensorBoard keeps as float32
    assert sorted(batches) == list(range(4 * STEPS)) and all(len(seen) == 1 for seen in batches.values())
    left = sorted(path.name for path in (room / f"{name}-saved").iterdir() if ".set-aside" not in path.name)
    assert left == [LAST, TRACKER, SCALARS]
    lines = [json.loads(line) for line in (room / f"{name}-saved" / SCALARS).read_text().splitlines()]
    assert [line["step"] for line in lines if "lm loss" in line] == list(range(1, STEPS + 1)), "each once"


@pytest.mark.thorough
@pytest.mark.parametrize("limit", ["", "--save-total-limit 1"], ids=["all", "limit"])
@pytest.mark.parametrize("how", ["", "--async-save"], ids=["sync", "async"])
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(room, how, limit):
    """To the last bit, the optimizer's state included; every line of the log covers its own step."""
    steps, name = 120, f"random{how}{limit}".replace(" ", "")
    run_jobs(1, [Job(room / f"{name}-uninterrupted", command(room, room / f"{name}-uninterrupted-saved", how, steps))])
    draw = random.Random(name)
    starts = killed_run(room, name, [draw.uniform(0.5, 7.0) for _ in range(40)], f"{how} {limit}", steps)
    kills = sum(start[-1] == ["killed"] for start in starts)
    print(f"{name}: {kills} kills")
    assert kills > 15 and starts[-1][-1] == ["end"]
    expected, actual = (TorchDistDirectory(room / f"{name}{part}-saved") for part in ("-uninterrupted", ""))
    assert expected.shapes == actual.shapes
    for key in expected.shapes:
        assert torch.equal(expected.read(key), actual.read(key)), key
    losses = defaultdict(set)
    for start in starts:
        for kind, *rest in start:
            if kind == "loss":
                losses[int(rest[0].split()[0])].add(rest[0].split()[1])
    assert sorted(losses) == list(range(1, steps + 1)) and all(len(seen) == 1 for seen in losses.values())


@pytest.mark.thorough
@pytest.mark.parametrize("limit", ["", "--save-total-limit 1"], ids=["all", "limit"])
@pytest.mark.parametrize("how", ["", "--async-save"], ids=["sync", "async"])
def test_a_job_of_two_ranks_killed_at_random_moments_ends_with_the_same_weights(room, how, limit):
    """All of its processes at once, some time after its first step."""
    steps, name = 60, f"two-ranks{how}{limit}".replace(" ", "")
    flags = f"{how} --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --console-log full"
    run_jobs(
        2, [Job(room / f"{name}-uninterrupted", command(room, room / f"{name}-uninterrupted-saved", flags, steps))]
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    argv = command(room, room / f"{name}-saved", f"{flags} {limit}", steps)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}
    draw, kills = random.Random(name), 0
    for left_alone in (*[False] * 10, True):
        how_to = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen([*launch, "-m", "neo_megatron.pretrain_neo", *argv], **how_to)
        printed = []
        for line in process.stdout:
            printed.append(line)
            if not left_alone and " iteration " in line and "elapsed time" in line:
                time.sleep(draw.uniform(0, 2.5))
                for doomed in [*psutil.Process(process.pid).children(recursive=True), process]:
                    doomed.kill()
                break
        process.stdout.read()
        code = process.wait(timeout=120)
        assert code in (0, -signal.SIGKILL), "".join(printed)[-3000:]
        kills += code != 0
        if code == 0:
            break
    print(f"{name}: {kills} kills")
    assert kills > 4
    expected, actual = (TorchDistDirectory(room / f"{name}{part}-saved") for part in ("-uninterrupted", ""))
    assert expected.shapes == actual.shapes
    for key in expected.shapes:
        one, other = expected.read(key).double(), actual.read(key).double()
        assert (one - other).norm() <= 2e-6 * one.norm(), key


def test_a_killed_job_of_two_ranks_goes_on(room, first):
    """As a user meets it: torchrun and all its processes end in the middle of an asynchronous save."""
    flags = "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --async-save --exit-interval 8"
    argv = [*command(room, room / "torchrun-saved", flags), "--tensorboard-dir", f"{room}/torchrun/events"]
    argv += ["--console-log", "full"]
    module = ["-m", "neo_megatron.pretrain_neo"]
    process = subprocess.Popen(
        [*(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"), *module, *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        if "scheduled an async checkpoint save at iteration       6" in line:
            break
    for doomed in [*psutil.Process(process.pid).children(recursive=True), process]:
        doomed.kill()
    assert process.wait() == -signal.SIGKILL, "".join(printed)[-6000:]
    # On a busy machine the save of step 6 may have come to its end before the kill.
    saved = int((room / "torchrun-saved" / TRACKER).read_text())
    assert saved in (2, 4, 6)
    run_ranks(2, *module, *argv)
    expected, actual = first["reference"].scalars("lm loss"), Job(room / "torchrun", []).scalars("lm loss")
    assert set(range(saved + 1, 9)) <= actual.keys()
    for step, values in actual.items():
        assert values[-1] == pytest.approx(expected[step][0], rel=2e-6), step


def test_sigterm_to_all_processes_of_a_rank_saves_and_exits(room):
    """The worker of the data loader gets it too, as from a scheduler; the rank still has its data."""
    saved = room / "stopped-saved"
    argv = [*command(room, saved, "--num-workers 1 --save-interval 100000 --console-log full", steps=100000)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": "0"}
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "neo_megatron.pretrain_neo", *argv],
        env={**os.environ, **environment, "WORLD_SIZE": "1", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    printed = []
    for line in process.stdout:
        printed.append(line)
        if " iteration        3/" in line:
            os.killpg(process.pid, signal.SIGTERM)
            break
    printed.append(process.stdout.read())
    assert process.wait(timeout=120) == 0, "".join(printed)[-3000:]
    iteration = int((saved / TRACKER).read_text())
    assert iteration >= 3
    assert "exiting program after receiving SIGTERM" in "".join(printed)
    verify_pieces(stored_pieces(saved / f"iter_{iteration:07d}"))


class TestKeeping:
    """`RunCheckpoints` between steps, on checkpoints that hold one tensor."""

    @pytest.fixture
    def run(self, tmp_path):
        from neo_megatron.megatron_compat import cpu_platform

        cpu_platform.install_training()
        from neo_megatron.run.checkpoints import RunCheckpoints

        arguments = dict(
            load=None,
            save=str(tmp_path),
            pretrained_checkpoint=None,
            save_total_limit=1,
            finetune=False,
            skip_train=False,
            train_data_path=None,
        )
        with RunCheckpoints(SimpleNamespace(**arguments)) as run:
            run.start()
            yield run

    @staticmethod
    def save(root: Path, iteration: int) -> Path:
        path = root / f"iter_{iteration:07d}"
        path.mkdir()
        weight = StoredTensor("weight", (50,), torch.float32)
        write_torch_dist(path, [weight], [torch.ones(50)], {"iteration": iteration})
        return path

    @staticmethod
    def wait(run) -> None:
        run.look()
        if run._deleting:
            run._deleting.join()

    def test_nothing_is_deleted_before_the_tracker_names_the_newer_one(self, run, tmp_path):
        old, new = self.save(tmp_path, 10), self.save(tmp_path, 20)
        (tmp_path / TRACKER).write_text("10")
        self.wait(run)
        assert old.is_dir() and new.is_dir() and (old / CHECKSUMS).exists() and not (new / CHECKSUMS).exists()
        (tmp_path / TRACKER).write_text("20")
        self.wait(run)
        assert not old.exists() and (new / CHECKSUMS).exists()

    def test_the_last_good_checkpoint_is_kept_while_the_newest_is_damaged(self, run, tmp_path, capsys):
        old, new = self.save(tmp_path, 10), self.save(tmp_path, 20)
        cut(next(new.glob("*.distcp")))
        (tmp_path / TRACKER).write_text("20")
        self.wait(run)
        assert old.is_dir() and new.is_dir()
        assert "no older checkpoint is deleted until a later one is intact" in capsys.readouterr().out
        newest = self.save(tmp_path, 30)
        (tmp_path / TRACKER).write_text("30")
        self.wait(run)
        assert [newest] == sorted(tmp_path.glob("iter_*"))
