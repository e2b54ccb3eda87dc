"""A dry run refuses what a start refuses, in the same sentence, and accepts what a start accepts."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from support.golden_packs import make_packs
from support.paths import GOLDEN
from support.pretrain_jobs import Job, run_jobs
from support.processes import run_forked

from neo_megatron.checkpoint.from_hf import convert_hf_to_megatron
from neo_megatron.errors import DataError
from neo_megatron.run import loader_workers, pretraining

# Megatron builds flags in a way that argparse is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:.type. is deprecated:DeprecationWarning")

WORKER = Path(__file__).parents[1] / "planning" / "dry_run_worker.py"
BEGIN = "--pretrained-checkpoint {room}/golden"
RESUME = "--load {room}/saved --save {room}/saved"
REFUSED = {
    "no optimizer state": (f"{BEGIN} --pretrained-optimizer", "release has no optimizer state (converted, or saved"),
    "another learning rate": (f"{RESUME} --lr 5e-4", "follows another schedule"),
    "saves over its start": (f"{RESUME} --finetune", "--finetune starts at iteration 0 and would save over"),
    "another model": (f"{RESUME} --ffn-hidden-size 128", "is of another model"),
    "attention backend": (f"{BEGIN} --attention-backend fused", "none of its kernels has NEO's mask: choose auto"),
    "name for W&B": (f"{BEGIN} --wandb-project neo", "--wandb-project needs the name of the run: add --wandb-exp-name"),
    "directory for W&B": (
        f"{BEGIN} --wandb-project neo --wandb-exp-name one",
        "--wandb-project needs a directory for its files: add --wandb-save-dir, or --save",
    ),
}
CHANGE = "--load {room}/saved --save {room}/changed"
VALIDATE = "--valid-data-path {room}/packs --eval-interval 1"
TAKEN = {
    "bf16": f"{CHANGE}-bf16 --bf16",
    "smaller batch": f"{CHANGE}-batch --global-batch-size 2",
    "distributed optimizer": f"{CHANGE}-optimizer --use-distributed-optimizer",
    "fewer evaluations": f"{CHANGE}-evaluations {VALIDATE} --eval-iters 1",
    "full validation": f"{CHANGE}-validation {VALIDATE} --full-validation",
    "a new schedule": f"{CHANGE}-rate --lr 5e-4 --override-opt-param-scheduler",
    "evaluation alone": "--load {room}/saved --valid-data-path {room}/packs --eval-iters 2 --skip-train",
}
FINE = TAKEN | {
    "resumes": RESUME,
    "has ended": "--load {room}/saved --save {room}/saved --train-iters 1 --override-opt-param-scheduler",
    "packages for GPUs": f"{BEGIN} --bf16 --transformer-impl transformer_engine --attention-backend flash",
}


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """Packs, and a run of one step."""
    room = tmp_path_factory.mktemp("start_checks")
    make_packs(room, repeats=2, seq_length=192)
    convert_hf_to_megatron(GOLDEN / "ckpt_untied", room / "golden")
    return room


@pytest.fixture(scope="module")
def started(room) -> dict[str, Job]:
    """All starts, those that are refused and others, after one that saves a checkpoint."""
    first = Job(
        room / "first", command(room, f"{BEGIN} {VALIDATE} --eval-iters 2 --exit-interval 1 --save {{room}}/saved")
    )
    flags = {name: flags for name, (flags, _) in REFUSED.items()} | TAKEN
    jobs = {name: Job(room / f"start {name}", command(room, text)) for name, text in flags.items()}
    run_jobs(1, [first, *jobs.values()])
    return jobs


@pytest.fixture(scope="module")
def dry(room, started) -> dict[str, tuple[str, str | None]]:
    """Output and exit code of dry runs with the same flags."""
    flags = {name: flags for name, (flags, _) in REFUSED.items()} | FINE
    jobs = [{"argv": [*command(room, text), "--dry-run"], "world_size": 1} for text in flags.values()]
    done = run_forked(WORKER, json.dumps(jobs))
    assert done.returncode == 0, done.stdout[-6000:]
    return dict(zip(flags, json.loads(done.stdout.splitlines()[-1]), strict=True))


def command(room: Path, flags: str) -> list[str]:
    common = f"--neo-model {GOLDEN}/ckpt_untied --train-data-path {room}/packs --micro-batch-size 1 "
    common += "--global-batch-size 4 --train-iters 3 --num-workers 0 --lr 1e-4 --min-lr 1e-5 "
    return (common + flags.format(room=room)).split()


@pytest.mark.parametrize("name", REFUSED)
def test_a_dry_run_refuses_what_the_start_refuses(name, started, dry):
    sentence = started[name].exit()
    assert isinstance(sentence, str) and REFUSED[name][1] in sentence, sentence
    assert dry[name][1] == sentence


@pytest.mark.parametrize("name", TAKEN)
def test_a_dry_run_accepts_what_the_start_accepts(name, started, dry):
    assert started[name].exit() is None
    printed, end = dry[name]
    assert end is None and "dry run: nothing was found that would stop this run" in printed, (printed, end)


def test_a_run_that_can_resume_is_not_refused(dry):
    printed, end = dry["resumes"]
    assert end is None and "iter_0000001: fits this model" in printed, (printed, end)


def test_a_finished_run_is_reported(dry):
    printed, end = dry["has ended"]
    assert end is None and "training has ended before: all of its 4 packs were read" in printed, (printed, end)


def test_a_dry_run_looks_for_room_for_the_loader(room, parse, monkeypatch):
    """Of a run on this machine; more ranks may run on others."""
    args = parse(
        f"--neo-model {GOLDEN}/ckpt_untied --train-data-path {room}/packs --train-iters 3 --num-workers 2 --dry-run"
    )
    monkeypatch.setattr(loader_workers.os, "statvfs", lambda path: Namespace(f_bavail=0, f_frsize=4096))
    with pytest.raises(DataError, match="/dev/shm has 0 MB free, .* --shm-size=1g"):
        pretraining.dry_run(args)
    args.world_size = 2
    pretraining.dry_run(args)


def test_missing_gpu_packages_are_named(dry):
    printed, end = dry["packages for GPUs"]
    assert end is None
    for package in ("transformer_engine", "flash_attn"):
        assert f"packages     {package} is not installed here; the run needs it for" in printed
