"""Workers of the data loaders that hang, are killed, or find no shared memory: the rank says so instead of waiting."""

import errno
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from functools import partial
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from neo_megatron.errors import DataError
from neo_megatron.run import loader_workers
from neo_megatron.run.loader_workers import (
    begin_worker,
    check_room,
    describe_ended_worker,
    seconds_to_wait,
    start_workers,
)

FAULTY = 5


class Packs(Dataset):
    """Packs of one token, one of which a worker cannot deliver."""

    data_sets, has_images = ("a",), False

    def __init__(self, fault) -> None:
        self._fault = fault

    def __getitem__(self, number: int) -> dict:
        if number == FAULTY:
            self._fault()
        rows, flat = torch.zeros(1, 3, dtype=torch.int32), torch.full((1,), number)
        lists = ("targets", "target_weight", "patches", "target_index", "image_token_index")
        per_token = ("tokens", "document", "image")
        return {
            **dict.fromkeys(per_token, flat),
            **dict.fromkeys(lists, flat),
            **{"positions_thw": rows, "samples": 1, "broken": []},
        }

    def pack(self, number: int) -> SimpleNamespace:
        records = [("a.json", 10 * number), ("a.json", 10 * number + 1), ("b.json", number)]
        return SimpleNamespace(number=number, records=lambda: records)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def read(megatron):
    """Reads micro-batches of one pack with two workers until one of them fails."""
    from neo_megatron.run.loaders import MicroBatches

    def read(fault) -> list[int]:
        settings = dict(num_workers=2, distributed_timeout_minutes=0.2, exit_signal=signal.SIGTERM)
        batches = MicroBatches(
            SimpleNamespace(**settings, max_broken_samples=0.001),
            Packs(fault),
            [[number] for number in range(10)],
            "patches",
        )
        return [batch["packs"][0] for batch in batches]

    return read


def test_batches_carry_the_numbers_of_their_packs(read):
    assert read(lambda: None) == list(range(10))


def test_a_worker_that_hangs_is_named_with_its_pack(read):
    with pytest.raises(DataError) as raised:
        read(partial(time.sleep, 600))
    assert re.fullmatch(
        r"worker 1 of 2 of the data loader has not delivered pack 5 \(a.json records 50, 51; b.json record 5\) within "
        r"6 s: look at the storage .* raise --distributed-timeout-minutes, of which half is waited",
        str(raised.value),
    )


def test_without_workers_nothing_is_waited_for():
    assert seconds_to_wait(SimpleNamespace(num_workers=0, distributed_timeout_minutes=10)) == 0
    assert seconds_to_wait(SimpleNamespace(num_workers=1, distributed_timeout_minutes=10)) == 300


def test_a_killed_worker_is_reported_in_one_sentence(read):
    with pytest.raises(RuntimeError) as raised:
        read(kill)
    sentence = describe_ended_worker(raised.value)
    assert re.fullmatch(
        r"a worker of the data loader \(process \d+\) was ended by SIGKILL, as the system does where memory "
        r"runs out: use fewer --num-workers",
        sentence,
    )


def test_the_error_of_another_library_is_left_alone():
    assert describe_ended_worker(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert describe_ended_worker(ValueError("DataLoader worker (pid 1) is killed by signal: Killed. ")) is None


class Megabytes(Dataset):
    """Items that take more than the room there is."""

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.zeros(2**21, dtype=torch.uint8)


def small_files(worker: int) -> None:
    """Makes shared memory of more than a megabyte fail, as a full /dev/shm does."""
    begin_worker(signal.SIGTERM, worker)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))


def read_megabytes(worker_init_fn) -> str:
    given = dict(sampler=range(4), collate_fn=itemgetter(0), num_workers=1, timeout=60)
    loader = DataLoader(Megabytes(), worker_init_fn=worker_init_fn, **given)
    with pytest.raises(RuntimeError) as raised:
        next(start_workers(loader))
    return describe_ended_worker(raised.value)


NO_ROOM = r"a worker of the data loader \(process \d+\) could not hand over a pack: /dev/shm is full; .*--shm-size=.*"


def test_a_pack_that_cannot_be_handed_over_does_not_hang():
    assert re.fullmatch(NO_ROOM, read_megabytes(small_files))


def test_a_full_shared_memory_is_reported_in_one_sentence():
    """A real one of 1 MB, in a mount namespace of its own."""
    inside = (
        "import test_loader_workers as tests\n"
        "print(tests.read_megabytes(tests.partial(tests.begin_worker, 15)))\n"
        "try: tests.check_room(10**6, 4)\n"
        "except tests.DataError as error: print(error)"
    )
    shell = f'mount -t tmpfs -o size=1m tmpfs /dev/shm || exit 77; exec {sys.executable} -c "$INSIDE"'
    here = Path(__file__).parent
    environment = {**os.environ, "INSIDE": inside, "PYTHONPATH": f"{here.parents[1]}:{here}"}
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", shell]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    except FileNotFoundError:
        pytest.skip("unshare is not installed")
    if done.returncode == 77 or "unshare failed" in done.stderr:
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")
    ended, refused = done.stdout.splitlines()
    assert re.fullmatch(NO_ROOM, ended), done.stderr
    assert refused.startswith(
        "/dev/shm has 1 MB free, and the workers of the data loaders on this machine keep up to 4"
    )


def test_the_room_is_compared_with_the_packs(monkeypatch):
    """Docker's 64 MB against packs of 8,192 image tokens."""
    room = SimpleNamespace(f_bavail=2**14, f_frsize=2**12)
    monkeypatch.setattr(loader_workers.os, "statvfs", lambda path: room)
    check_room(25_600_000, 2)
    with pytest.raises(DataError) as raised:
        check_room(25_600_000, 100)
    assert str(raised.value) == (
        "/dev/shm has 67 MB free, and the workers of the data loaders on this machine keep up to 100 packs of 25.6 MB "
        "there: give the container more (docker run --shm-size=3g, or --ipc=host), or fewer --num-workers (0 needs "
        "none)"
    )


def test_a_worker_killed_while_it_hands_over_is_reported():
    """The rank then sees a broken connection before it can see that the process has ended."""
    worker = multiprocessing.get_context("spawn").Process(target=kill)
    worker.start()
    worker.join()

    def broken():
        yield 1
        raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")

    batches = loader_workers._batches(broken(), {worker})
    loader_workers._workers[worker.pid] = worker
    assert next(batches) == 1
    with pytest.raises(RuntimeError) as raised:
        next(batches)
    assert "was ended by SIGKILL" in describe_ended_worker(raised.value)
    with pytest.raises(ConnectionResetError):
        list(loader_workers._batches(broken(), set()))
