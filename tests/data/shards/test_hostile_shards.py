"""Shards and packs changed by an attacker or a bad disk: one sentence, never a traceback or wrong data.

Each mutation is tried in a process with limited memory, which is killed if it hangs. `-m thorough` tries all of them.
"""

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.hostile_directories import Mutation, Unpickled, mutations, rewrite, some_of
from torch.utils.data import DataLoader

from neo_megatron.command_line import sentence_of
from neo_megatron.data.dataset import GlobalBatch, PackDataset
from neo_megatron.data.manifest import write_manifest
from neo_megatron.data.packs.index import PackIndex
from neo_megatron.data.packs.writer import PackInput, write_packs
from neo_megatron.data.shards.mixture import Mixture
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.data.verify import verify
from neo_megatron.errors import DataError
from neo_megatron.inspection.page import page
from neo_megatron.inspection.statistics import count, count_packs
from neo_megatron.storage.open import open_directory

_MEMORY = 1 << 30  # bytes above what the process had; the data have some thousand
_SECONDS = 60  # of one mutation, which takes a tenth of one


def texts(directory: Path) -> list[Any]:
    """The samples of a directory of shards."""
    shards = ShardSet(directory)
    stored = shards.fetch(range(len(shards)))
    places = [shards.describe(number) for number in range(len(shards))]
    assert all(isinstance(file, str) for file, _ in places)
    return [
        (one.tokens.tolist(), one.spans.tolist(), one.grids.tolist(), [image.tobytes() for image in one.images])
        for one in stored
    ]


def items(directory: Path) -> list[Any]:
    """The items that a training run reads from packs, as `run/loaders.py` does, without the ids of padding."""
    found = []
    for images, batch in (("patches", None), ("check", GlobalBatch(4, 2, 1)), ("none", None)):
        dataset = PackDataset(directory, None, seed=1, images=images, global_batch=batch)
        assert dataset.packs.sequence_length == 64, "as the training checks"
        for number in range(len(dataset)):
            item = dataset[number]
            item["tokens"] = item["tokens"][item["document"] >= 0]
            found.append({key: value.tolist() if hasattr(value, "tolist") else value for key, value in item.items()})
            dataset.describe(number)
        dataset.largest(0, 1)
    return found


def attempt(step: Callable[[Path], Any], directory: Path) -> tuple[str, Any]:
    """("read", what), or ("said", a sentence), or ("failed", a traceback)."""
    try:
        return "read", step(directory)
    except DataError as error:
        return "said", str(error)
    except AssertionError as error:
        return "said", str(error)
    except Exception:
        return "failed", traceback.format_exc()


class Room:
    """Valid directories of shards and packs, and copies of them to change."""

    def __init__(self, bench: Any, sample: Callable[..., dict], store: str) -> None:
        bench.images("a.png", "b.png")
        records = [
            sample("<image>", "one", image="a.png"),
            [sample("two", "three"), sample("four", "five", image="b.png")],
            sample("<image> and <image>", "six", image=["b.png", "a.png"]),
            sample("<image>", "gone", image="missing.png"),
            sample("seven", "eight", "nine", "ten"),
            sample("much " * 100, "over-long"),
            sample("<image>", "eleven", image="a.png"),
        ]
        bench.preprocess(records, settings=replace(bench.settings, records_per_shard=4, image_store=store))
        bench.pack(64)
        self.sound, self.copy = bench.path, bench.path / "copy"
        self.texts, self.items = texts(self.sound / "shards"), items(self.sound / "packs")

    def try_shards(self, mutation: Mutation) -> str:
        """ "" or what is wrong with how the mutation was met."""
        self._copy()
        shards, packs = self.copy / "shards", self.copy / "packs"
        mutation.apply(shards)
        _adopt(packs, shards)
        found, read = attempt(verify, shards), attempt(texts, shards)
        others = [
            attempt(items, packs),
            attempt(verify, packs),
            attempt(_pack, shards),
            attempt(_inspect_shards, shards),
        ]
        return self._judge(mutation, shards, found, [(read, self.texts), (others[0], self.items)], others[1:])

    def try_packs(self, mutation: Mutation) -> str:
        """As `try_shards`."""
        self._copy()
        packs = self.copy / "packs"
        mutation.apply(packs)
        found, read = attempt(verify, packs), attempt(items, packs)
        return self._judge(mutation, packs, found, [(read, self.items)], [attempt(_inspect_packs, packs)])

    def _copy(self) -> None:
        shutil.rmtree(self.copy, ignore_errors=True)
        for name in ("shards", "packs"):
            shutil.copytree(self.sound / name, self.copy / name)

    def _judge(
        self, mutation: Mutation, directory: Path, found: tuple[str, Any], reads: list, others: list[tuple[str, Any]]
    ) -> str:
        for outcome, text in (found, *(read for read, _ in reads), *others):
            if outcome == "failed":
                return text
            if outcome == "said" and (len(text) > 1 << 14 or "\n" in text):
                return f"not one sentence: {text[:500]}"
        if found[0] == "said" and str(directory.parent) not in found[1]:
            return f"no file is named: {found[1]}"
        if Path(Unpickled.path).exists():
            return "it was unpickled"
        if found[0] == "said" or found[1].damage:
            return ""
        for (outcome, value), sound in reads:
            if outcome == "said":
                return f"verified as sound, but {value}"
            # Other numbers with their checksums are another data set, where they make sense; a key must not.
            if value != sound and (not mutation.true_checksums or mutation.kind.startswith("key")):
                return "verified as sound, but other things are read"
        return ""


def _adopt(packs: Path, shards: Path) -> None:
    """Makes packs refer to other shards as those they were packed from."""
    manifest = json.loads((packs / "manifest.json").read_text())
    del manifest["sha256"]
    if os.path.isfile(shards / "manifest.json") and os.path.getsize(shards / "manifest.json") < 1 << 24:
        manifest["data"][0]["sha256"] = hashlib.sha256((shards / "manifest.json").read_bytes()).hexdigest()
        write_manifest(packs, manifest)


def _pack(shards: Path) -> None:
    shutil.rmtree(shards.parent / "again", ignore_errors=True)
    write_packs([PackInput(str(shards))], shards.parent / "again", 64)


def _inspect_shards(shards: Path) -> None:
    page("title", "", count(Mixture([str(shards)])), None, "")


def _inspect_packs(packs: Path) -> None:
    index = PackIndex.open(packs)
    page("title", "", count_packs(index, open_directory(packs)), index.manifest, "")


def try_all(attempts: list[tuple[str, Callable[[], str]]]) -> list[str]:
    """Makes all attempts in processes with limited memory; returns the failures."""
    wrong: list[str] = []
    while attempts:
        receiver, sender = os.pipe()
        child = os.fork()
        if not child:
            os.close(receiver)
            _be_limited()
            with open(sender, "w") as out:
                for name, run in attempts:
                    signal.alarm(_SECONDS)
                    try:
                        text = run()
                    except BaseException:
                        text = traceback.format_exc()
                    out.write(json.dumps([name, text]) + "\n")
                    out.flush()
            os._exit(0)
        os.close(sender)
        with open(receiver) as lines:
            done = [json.loads(line) for line in lines]
        _, status = os.waitpid(child, 0)
        wrong += [f"{name}: {text}" for name, text in done if text]
        attempts = attempts[len(done) :]
        if attempts:
            wrong.append(f"{attempts[0][0]}: ended with status {status} (14: it hung)")
            attempts = attempts[1:]
    return wrong


def _be_limited() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY, used + _MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)


@pytest.fixture(scope="module", params=["encoded", "patches"])
def room(request, tmp_path_factory, new_bench, new_sample) -> Room:
    return Room(new_bench(tmp_path_factory.mktemp(request.param)), new_sample, request.param)


def check(room: Room, each: int | None, monkeypatch) -> None:
    monkeypatch.setattr(Unpickled, "path", str(room.sound / "unpickled"))
    attempts = []
    for kind, run in (("shards", room.try_shards), ("packs", room.try_packs)):
        found = mutations(room.sound / kind)
        assert len(found) >= 250
        chosen = found if each is None else some_of(found, each)
        attempts += [(f"{kind}: {one.name}", lambda run=run, one=one: run(one)) for one in chosen]
    wrong = try_all(attempts)
    assert not wrong, f"{len(wrong)} of {len(attempts)}:\n" + "\n".join(wrong[:200])
    print(f"{len(attempts)} mutations")


@pytest.mark.parametrize("room", ["encoded"], indirect=True)
def test_a_selection_of_mutations(room, monkeypatch):
    check(room, 1, monkeypatch)


@pytest.mark.thorough
def test_all_mutations(room, monkeypatch):
    check(room, None, monkeypatch)


@pytest.mark.parametrize("room", ["encoded"], indirect=True)
def test_the_tool_reports_a_name_that_is_not_unicode_and_a_fifo(room, run_tool, tmp_path):
    """A file name need not be valid Unicode; a manifest stores it with escapes."""
    shards = tmp_path / "shards"
    shutil.copytree(room.sound / "shards", shards)
    manifest = json.loads((shards / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["sources"][0]["annotations"] = "odd\udcff.json"
    write_manifest(shards, manifest)
    tokens = bytearray((shards / "00000.tokens.bin").read_bytes())
    tokens[3] = 1
    rewrite(shards, "00000.tokens.bin", bytes(tokens))
    done = run_tool("verify_data.py", "--data", shards, "--workers", 1)
    assert done.returncode == 1 and "odd\\udcff.json, record 0): it has the token" in done.stdout
    (shards / "00000.tokens.bin").unlink()
    os.mkfifo(shards / "00000.tokens.bin")
    done = run_tool("verify_data.py", "--data", shards, "--workers", 1)
    assert done.returncode == 1 and "00000.tokens.bin is not a regular file" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("room", ["encoded"], indirect=True)
def test_a_damaged_file_is_a_data_error_of_a_loader_worker(room, tmp_path):
    for name in ("shards", "packs"):
        shutil.copytree(room.sound / name, tmp_path / name)
    spans = tmp_path / "shards" / "00000.spans.idx"
    content = bytearray(spans.read_bytes())
    content[18] += 1  # the number of sequences
    spans.write_bytes(content)
    loader = DataLoader(PackDataset(tmp_path / "packs", None, seed=0), batch_size=None, num_workers=1)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert re.fullmatch(r"\S*00000\.spans\.idx is damaged: .*; preprocess again", sentence_of(caught.value))
