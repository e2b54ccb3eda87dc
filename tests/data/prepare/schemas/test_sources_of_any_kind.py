"""Records of any schema in files of any kind: the shards are those of the same records as JSON and loose files."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.schemas.choose import choose_schemas


def tar(path: Path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return str(path)


def parquet(path: Path, columns: dict[str, list]) -> str:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


@pytest.fixture
def loose(bench, new_png):
    """Two images as loose files, and their bytes."""
    (bench.path / "images").mkdir()
    images = {name: new_png(40, 60, seed) for seed, name in enumerate(("a.png", "b.png"))}
    for name, data in images.items():
        (bench.path / "images" / name).write_bytes(data)
    return images


@pytest.fixture
def same_shards(bench, directory_bytes):
    """Checks a file against records that are written as JSON; gives the counts of the file's manifest."""

    def check(file: str, schema: str, records: list[dict]) -> dict:
        source = Source("train", file)
        assert [chosen.schema.name for chosen in choose_schemas([source])] == [schema]
        manifest = preprocess([source], bench.tokenizer, bench.path / "here", bench.settings)
        bench.preprocess(records, "there")
        here, there = (
            {name: data for name, data in directory_bytes(bench.path / name).items() if name[:5].isdigit()}
            for name in ("here", "there")
        )
        # Identities by path differ: a member of a container is another file.
        assert here.keys() == there.keys()
        assert {name for name in here if here[name] != there[name]} <= {"00000.media.npy"}
        return manifest["counts"]

    return check


def test_tars_of_img2dataset(bench, loose, same_shards):
    members = {}
    for name, data in loose.items():
        key = Path(name).stem
        meta = {"caption": f"an {key}", "url": "u", "key": key, "status": "success", "width": 60, "similarity": 0.3}
        members |= {name: data, f"{key}.txt": meta["caption"].encode(), f"{key}.json": json.dumps(meta).encode()}
    records = [{"image": name, "caption": f"an {Path(name).stem}"} for name in loose]
    counts = same_shards(tar(bench.path / "0.tar", members), "caption", records)
    assert counts["samples_kept"] == 2 and counts["ignored_keys"] == {"similarity": 2}


def test_messages_in_a_tar(bench, loose, same_shards):
    turns = [{"role": "user", "content": "<image>Hi"}, {"role": "assistant", "content": "Hello"}]
    record = {"messages": turns, "images": ["a.png"]}
    file = tar(bench.path / "0.tar", {"a.png": loose["a.png"], "a.json": json.dumps(record).encode()})
    assert same_shards(file, "messages", [record])["samples_kept"] == 1


def test_the_cauldron_in_parquet(bench, loose, same_shards):
    texts = [{"user": "What?", "assistant": "That.", "source": "s"}]
    stored = [{"bytes": loose[name], "path": None} for name in ("a.png", "b.png")]
    file = parquet(bench.path / "0.parquet", {"images": [stored], "texts": [texts]})
    assert same_shards(file, "messages", [{"images": ["a.png", "b.png"], "texts": texts}])["samples_kept"] == 1


def test_pages_of_obelics_in_parquet(bench, loose, same_shards):
    stored = [None, {"bytes": loose["a.png"], "path": None}, None]
    file = parquet(bench.path / "0.parquet", {"images": [stored], "texts": [["One", None, "two"]]})
    record = {"images": [None, "a.png", None], "texts": ["One", None, "two"]}
    assert same_shards(file, "interleaved", [record])["samples_kept"] == 1
