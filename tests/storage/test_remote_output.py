"""Shards and packs written straight to object storage have the bytes of local ones, whatever kills their run."""

import os
import signal
import tempfile
import threading
from fractions import Fraction
from pathlib import Path

import boto3
import pytest
from support.kills import in_child

from neo_megatron.data.packs.writer import HeldOut, PackInput, write_packs
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.verify import verify
from neo_megatron.errors import DataError, TooManyRejected
from neo_megatron.storage import object_requests
from neo_megatron.storage.object_writer import ObjectWriter

PLACE = "s3://output/a/shards"


@pytest.fixture(autouse=True)
def bucket(proxy, monkeypatch, tmp_path):
    """An empty bucket; the locks of its addresses are those of this test."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    host, port = proxy.server
    bucket = boto3.resource("s3", endpoint_url=f"http://{host}:{port}").Bucket("output")
    bucket.create()
    bucket.objects.delete()
    return bucket


@pytest.fixture
def sources(bench, new_sample) -> list[Source]:
    """Seven records in four slices; the last slice has only a record that is rejected."""
    bench.images(*(f"{number}.png" for number in range(6)))
    records = [new_sample("<image> this", f"is {number}", image=f"{number}.png") for number in range(6)]
    file = bench.annotations([*records, new_sample("<image>", "gone", image="missing.png")])
    return [Source("train", str(file), str(bench.path / "images"))]


@pytest.fixture
def write(bench, sources):
    """Preprocesses the records into a path or an address."""
    settings = type(bench.settings)(min_pixels=1024, max_pixels=65536, records_per_shard=2)

    def run(output: str | Path = PLACE, workers: int = 1, seed: int = 0, **flags) -> None:
        chosen = type(settings)(**settings.__dict__ | {"seed": seed})
        preprocess(sources, bench.tokenizer, output, chosen, workers=workers, **flags)

    return run


def contents(place: str = PLACE) -> dict[str, bytes]:
    writer = ObjectWriter(place)
    names = sorted(writer.sizes())
    return dict(zip(names, writer.read(names, 1 << 30), strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_shards_have_the_bytes_of_local_ones(bench, write, directory_bytes, workers, proxy):
    write(bench.path / "local")
    write(workers=workers)
    assert contents() == directory_bytes(bench.path / "local") and len(contents()) > 20
    written = [path.rpartition("/")[2] for method, path, _ in proxy.requests if method == "PUT"]
    assert written[0] == "run.json" and written[-1] == "manifest.json", "the manifest last"
    assert not verify(PLACE).damage
    with pytest.raises(DataError, match="s3://output/a/shards already holds a data set"):
        write()


def kill_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills this process in front of the n-th request that changes an object, or after it."""
    left, one_at_a_time = step // 2, threading.Lock()
    for name in ("write", "upload", "delete"):
        original = getattr(object_requests.Connection, name)

        def counted(*arguments, original=original):
            nonlocal left
            with one_at_a_time:
                left -= 1
                if left == -1 and step % 2 == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                original(*arguments)
                if left == -1:
                    os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(object_requests.Connection, name, counted)


@pytest.mark.parametrize("stride", [13, pytest.param(1, marks=pytest.mark.thorough)])
def test_a_run_killed_at_any_request_goes_on(bench, write, directory_bytes, bucket, monkeypatch, stride):
    write(bench.path / "local")
    expected = directory_bytes(bench.path / "local")
    for step in range(0, 200, stride):
        bucket.objects.delete()

        def killed(step=step):
            kill_at(step, monkeypatch)
            write()

        status = in_child(killed)
        if status == 0:
            break
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
        write()
        assert contents() == expected, step
    assert step > 60


def test_another_command_and_other_objects_are_left_alone(write, proxy, bucket):
    bucket.put_object(Key="a/shards/notes.txt", Body=b"mine")
    with pytest.raises(DataError, match="s3://output/a/shards is not empty"):
        write()
    assert contents() == {"notes.txt": b"mine"}
    bucket.objects.delete()
    proxy.fault = lambda request: 403 if request.command == "PUT" and "outcome" in request.path else None
    with pytest.raises(DataError, match=r"00000.outcome.json may not be written"):
        write()
    proxy.fault = lambda request: None
    with pytest.raises(DataError, match="unfinished run with --seed 0, not 1"):
        write(seed=1)
    write()
    assert "manifest.json" in contents()


def test_too_many_rejected_samples_leave_no_manifest(write):
    with pytest.raises(TooManyRejected, match=r"s3://output/a/shards/rejects.jsonl has the reason"):
        write(max_rejected=1)
    assert "manifest.json" not in contents() and b"missing.png" in contents()["rejects.jsonl"]
    write()
    assert "manifest.json" in contents()


def test_packs_have_the_bytes_of_local_ones(bench, write, directory_bytes):
    """Local packs of the same shards, which both see as the directory next to theirs."""
    write(bench.path / "local" / "shards")
    write()
    local = [bench.path / "local" / name for name in ("packs", "held-out")]
    remote = ["s3://output/a/packs", "s3://output/a/held-out"]
    # By content, because the draw by paths follows the temporary directory: with six images a part may be empty.
    held_out = [HeldOut(Fraction(1, 2), str(place), "content") for place in (local[1], remote[1])]
    write_packs([PackInput(str(bench.path / "local" / "shards"))], local[0], 128, held_out=held_out[0])
    write_packs([PackInput(PLACE)], remote[0], 128, held_out=held_out[1])
    for here, there in zip(local, remote, strict=True):
        assert contents(there) == directory_bytes(here)
        assert not verify(there).damage
    with pytest.raises(DataError, match="s3://output/a/packs already holds a data set"):
        write_packs([PackInput(PLACE)], remote[0], 128)
    with pytest.raises(DataError, match="the packs in s3://output/a/others need their shards in object storage"):
        write_packs([PackInput(str(bench.path / "local" / "shards"))], "s3://output/a/others", 128)


def test_packing_killed_at_any_request_goes_on(write, proxy, bucket):
    write()
    place = "s3://output/a/packs"
    write_packs([PackInput(PLACE)], place, 128)
    expected = contents(place)
    requests = sum(method in ("PUT", "POST") and "/packs" in path for method, path, _ in proxy.requests)
    assert len(expected) == 5 and requests >= 6
    for number in range(requests - 1):
        for stored in bucket.objects.filter(Prefix="a/packs/"):
            stored.delete()
        failures = iter([None] * number + [403] * 100)
        proxy.fault = lambda request, failures=failures: next(failures) if request.command == "PUT" else None
        with pytest.raises(DataError, match="may not be written"):
            write_packs([PackInput(PLACE)], place, 128)
        proxy.fault = lambda request: None
        assert "manifest.json" not in contents(place)
        write_packs([PackInput(PLACE)], place, 128)
        assert contents(place) == expected
