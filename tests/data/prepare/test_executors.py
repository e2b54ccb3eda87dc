"""Executors: all give the same bytes, keep the order, and report a worker that dies."""

import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import pytest

from neo_megatron.data.prepare.annotation_slices import Place, Slice, slices
from neo_megatron.data.prepare.executors import LocalExecutor, open_executor
from neo_megatron.data.prepare.output import open_output
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.resume import Outcome
from neo_megatron.data.prepare.schemas.options import SchemaOptions
from neo_megatron.data.prepare.worker import Task
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.data.tokenizer_process import load_parts
from neo_megatron.errors import DataError
from neo_megatron.worker_pool import in_order


class Shuffled:
    """An executor that finishes the newest slice first, and records how many slices it had at a time."""

    def __init__(self, workers: int, failing: set[int]) -> None:
        self.workers, self.failing = workers, failing
        self.held: list[int] = []
        self.most = self.last = 0

    def start(self, number: int, piece: Slice) -> None:
        self.held.append(number)
        self.last = number
        self.most = max(self.most, len(self.held))
        assert len(self.held) <= self.workers

    def wait(self) -> tuple[int, Outcome | DataError]:
        number = self.held.pop()
        return number, DataError(str(number)) if number in self.failing else Outcome(Place(number + 1), 0)

    def close(self) -> None:
        pass


def pieces(count: int) -> Iterator[Slice]:
    return (Slice(Place(number), np.empty((0, 2), np.int64)) for number in range(count))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_outcomes_are_in_order_and_work_in_flight_is_bounded(workers):
    executor = Shuffled(workers, set())
    for number, outcome in enumerate(in_order(executor, pieces(40))):
        assert outcome.number == number
        assert executor.last - number < 4 * workers  # others do not get far ahead of a slow slice
    assert number == 39
    assert executor.most == workers


def test_the_first_error_in_order_is_raised():
    got = []
    with pytest.raises(DataError, match="^6$"):
        for outcome in in_order(Shuffled(3, {6, 7, 8}), pieces(40)):
            got.append(outcome.number)
    assert got == list(range(6))


def test_a_worker_that_dies_is_reported_with_its_records(bench, new_sample, tmp_path):
    file = bench.annotations([new_sample()] * 10, "train.jsonl")
    source = Source("train", str(file))
    piece = next(slices([source], 4))
    file.unlink()
    os.mkfifo(file)  # a worker that opens it waits forever
    parts = load_parts(bench.tokenizer)
    task = Task([source], parts.json, parts.ids, bench.settings, "skip", open_output(tmp_path))
    executor = LocalExecutor(task, 1, lambda *_: None)
    try:
        executor.start(0, piece)
        os.kill(active_children()[0].pid, signal.SIGSEGV)
        with pytest.raises(DataError) as raised:
            executor.wait()
    finally:
        executor.close()
    assert str(raised.value).startswith("a worker died (by SIGSEGV) while it worked on ")
    assert "train.jsonl, records 0 to 3; run the same command again to continue" in str(raised.value)


@pytest.fixture(scope="module")
def ray_cluster():
    """A Ray cluster of two simulated machines with one CPU each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


def mixed(bench, new_sample) -> tuple[Source, dict]:
    bench.images("a.png")
    records = [new_sample("<image>\nWhat?", "That.", image="a.png"), {}, [new_sample(), new_sample("a", "b")]] * 6
    source = Source("train", str(bench.annotations(records)), str(bench.path / "images"))
    return source, dataclasses.replace(bench.settings, records_per_shard=4)


def test_a_ray_cluster_makes_the_same_bytes(bench, new_sample, directory_bytes, ray_cluster, monkeypatch):
    source, settings = mixed(bench, new_sample)
    preprocess([source], bench.tokenizer, bench.path / "local", settings)
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    preprocess([source], bench.tokenizer, bench.path / "ray", settings, workers=2, engine="ray")
    assert directory_bytes(bench.path / "ray") == directory_bytes(bench.path / "local")
    with pytest.raises(DataError, match=r"train\.json, record 1:"):
        preprocess([source], bench.tokenizer, bench.path / "fail", settings, "fail", workers=2, engine="ray")


TRANSFORM = """
def ask(record):
    return {"conversations": [{"from": "human", "value": record["q"]}, {"from": "gpt", "value": "Yes."}]}
"""


@pytest.fixture
def transform(bench, monkeypatch) -> Iterator[tuple[Path, Source]]:
    """A module in the current directory, which is not that of the cluster, and a data set that it reads."""
    module = bench.path / f"ray_{bench.path.name}.py"
    module.write_text(TRANSFORM)
    monkeypatch.chdir(bench.path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    file = bench.annotations([{"q": f"Is {number} a number?"} for number in range(12)])
    yield module, Source("train", str(file), schema=SchemaOptions(transform=f"{module.stem}:ask"))
    sys.modules.pop(module.stem, None)


def test_a_transform_runs_on_a_ray_cluster(bench, transform, directory_bytes, ray_cluster, monkeypatch):
    module, source = transform
    settings = dataclasses.replace(bench.settings, records_per_shard=4)
    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    preprocess([source], bench.tokenizer, bench.path / "ray", settings, workers=2, engine="ray")
    assert module.stem not in sys.modules  # the workers have imported it, this process has not
    preprocess([source], bench.tokenizer, bench.path / "local", settings)
    assert directory_bytes(bench.path / "ray") == directory_bytes(bench.path / "local")
    assert len(ShardSet(bench.path / "ray")) == 12


@pytest.mark.parametrize(
    ("source_there", "sentence"),
    [(TRANSFORM + "# edited", "its source file has changed; run the command again"), (None, "all machines share")],
)
def test_workers_on_ray_check_the_source_of_a_transform(
    bench, transform, ray_cluster, monkeypatch, source_there, sentence
):
    """It changes, or is gone, after the command has read it."""
    module, source = transform

    def opened(*arguments):
        module.unlink() if source_there is None else module.write_text(source_there)
        return open_executor(*arguments)

    monkeypatch.setenv("RAY_ADDRESS", ray_cluster.address)
    monkeypatch.setattr("neo_megatron.data.prepare.preprocess.open_executor", opened)
    with pytest.raises(DataError, match=f"--transform {module.stem}:ask: .*{sentence}"):
        preprocess([source], bench.tokenizer, bench.path / "ray", bench.settings, workers=2, engine="ray")
    assert not (bench.path / "ray" / "manifest.json").exists()


def test_without_ray_the_message_says_how_to_install_it(bench, new_sample, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    source, settings = mixed(bench, new_sample)
    with pytest.raises(DataError, match="--engine ray needs Ray: pip install 'ray>=2.40,<2.61'"):
        preprocess([source], bench.tokenizer, bench.path / "ray", settings, engine="ray")
