"""Annotations and images in object storage give the shards of local ones, whatever the server does."""

import dataclasses
import json
import sys
import tarfile
import threading
from pathlib import Path

import boto3
import pytest
from PIL import Image
from support.containers import write

from neo_megatron.cli import preprocess as cli
from neo_megatron.data.packs.mixture_schedule import read_schedule
from neo_megatron.data.prepare.annotation_slices import read_slice, slices
from neo_megatron.data.prepare.input_files import annotation_files, name_of_data_set
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import Source, data_list
from neo_megatron.data.prepare.schemas.options import read_prompts
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.errors import DataError, TooManyRejected
from neo_megatron.inference.prompts import prompt_of_sample
from neo_megatron.inference.questions import read_questions
from neo_megatron.paths import WrongPath
from neo_megatron.storage import object_reads
from neo_megatron.storage.open import open_source

READERS = ("jsonl", "json", "jsonl.gz", "json.zst", "parquet struct", "arrow file", "arrow stream", "tar")
# Files of shards without identities of files by their paths, which differ.
CONTENTS = ("tokens", "spans", "pictures", "grids")


@pytest.fixture(autouse=True)
def bucket(proxy):
    host, port = proxy.server
    bucket = boto3.resource("s3", endpoint_url=f"http://{host}:{port}").Bucket("input")
    bucket.create()
    bucket.objects.delete()
    return bucket


@pytest.fixture
def bench(bench, new_sample):
    """23 records with no, one or two images, in slices of 4."""
    bench.settings = dataclasses.replace(bench.settings, records_per_shard=4)
    bench.images(*(f"{number}.png" for number in range(5)))
    bench.records = []
    for number in range(23):
        images = [f"{(number + index) % 5}.png" for index in range(number % 3)]
        bench.records.append(new_sample("<image>" * len(images) + f"What {number}?", f"Bé {number}.", image=images))
    return bench


@pytest.fixture
def put(bucket):
    """Uploads a file or a directory; returns its address."""

    def run(path: Path, key: str) -> str:
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file():
                name = key if file == path else f"{key}/{file.relative_to(path)}"
                bucket.put_object(Key=name, Body=file.read_bytes())
        return f"s3://input/{key}"

    return run


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name.split(".")[1] in CONTENTS}


def shards(bench, source: Source, output: str, **flags) -> dict[str, bytes]:
    preprocess([source], bench.tokenizer, bench.path / output, flags.pop("settings", bench.settings), **flags)
    assert (bench.path / output / "rejects.jsonl").read_bytes() == b""
    return contents(bench.path / output)


@pytest.mark.parametrize("kind", READERS)
def test_every_kind_gives_the_shards_of_local_files(bench, put, kind, monkeypatch):
    """In blocks that records cross, with images in the bucket, and with two workers as with one."""
    monkeypatch.setattr(object_reads, "FIRST_BYTES", 1000)
    monkeypatch.setattr(object_reads, "BLOCK_BYTES", 3000)
    file = write(kind, bench.path / "train", bench.records, bench.path / "images")
    expected = shards(bench, Source("train", str(file), str(bench.path / "images")), "local")
    assert len(expected) == 6 * 7
    source = Source("train", put(file, f"a/{file.name}"), put(bench.path / "images", "a/images"))
    assert shards(bench, source, "remote") == expected
    assert shards(bench, source, "with two workers", workers=2) == expected
    (entry,) = ShardSet(bench.path / "remote").manifest["sources"]
    assert entry["annotations"] == f"s3://input/a/{file.name}" and entry["image_root"] == "s3://input/a/images"
    assert "version" not in entry


def requests_of(proxy, key: str) -> list[tuple[str, str | None]]:
    return [(method, part) for method, path, part in proxy.requests if path == f"/input/{key}"]


def test_neighbouring_reads_share_requests(bench, put, proxy):
    """A tar is read in blocks, not header by header; its first bytes tell its kind."""
    file = write("tar", bench.path / "train", bench.records, bench.path / "images")
    source = Source("train", put(file, "train.tar"))
    proxy.requests.clear()
    pieces = list(slices([source], 4))
    assert len([record for piece in pieces for record in read_slice(piece, source, 0)]) == 23
    parts = [part for method, part in requests_of(proxy, "train.tar") if method == "GET"]
    assert parts == [f"bytes=0-{file.stat().st_size - 1}"]


def test_what_follows_is_requested_in_advance(put, bench, proxy, monkeypatch):
    """As far as it is needed, at the same time, and each byte once."""
    monkeypatch.setattr(object_reads, "FIRST_BYTES", 100)
    monkeypatch.setattr(object_reads, "BLOCK_BYTES", 100)
    (bench.path / "a.bin").write_bytes(bytes(range(250)) * 4)
    address = put(bench.path / "a.bin", "a.bin")
    running, most, waiting = 0, 0, threading.Condition()

    def fault(request):
        nonlocal running, most
        start = (request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0]
        if int(start) < 300:  # fewer are requested in advance at first
            return
        with waiting:
            running += 1
            most = max(most, running)
            waiting.notify_all()
            waiting.wait_for(lambda: most > 2, timeout=20)
            running -= 1

    proxy.fault = fault
    with open_source(address) as file:
        file.will_read(750)
        assert b"".join(file.pread(30, offset) for offset in range(0, 720, 30)) == (bytes(range(250)) * 3)[:720]
        parts = sorted(proxy.parts("a.bin"))
        assert parts == [f"bytes={start}-{start + 99}" for start in range(0, 800, 100)] and most > 2
        assert file.pread(500, 900) == (bytes(range(250)) * 4)[900:] and file.pread(1, 1000) == b""


def test_blocks_that_are_kept_are_limited(put, bench, proxy, monkeypatch):
    monkeypatch.setattr(object_reads, "FIRST_BYTES", 10)
    monkeypatch.setattr(object_reads, "BLOCK_BYTES", 10)
    (bench.path / "a.bin").write_bytes(bytes(1000))
    with open_source(put(bench.path / "a.bin", "a.bin")) as file:
        for _ in range(2):
            for offset in range(0, 1000, 10):
                file.pread(10, offset)
    assert len(object_reads._reads()._blocks) == object_reads.MOST_BLOCKS
    assert len(proxy.parts("a.bin")) == 200


@pytest.mark.parametrize("fault", [500, 503, "cut", "stall"])
def test_a_server_that_recovers_changes_nothing(bench, put, proxy, settings, fault):
    settings(NEO_STORAGE_TIMEOUT=1 if fault == "stall" else 20)
    file = write("tar", bench.path / "train", bench.records, bench.path / "images")
    expected = shards(bench, Source("train", str(file)), "local")
    address = put(file, "train.tar")
    seen = set()

    def fails_once(request):
        key = request.command, request.path, request.headers.get("Range")
        if key in seen:
            return None
        seen.add(key)
        return fault

    proxy.fault = fails_once
    assert shards(bench, Source("train", address), "remote") == expected
    assert len(seen) > 1


def test_a_server_that_stays_away_ends_the_run_and_the_same_command_continues(bench, put, proxy, settings):
    settings(NEO_STORAGE_RETRY_SECONDS=0.1)
    file = write("jsonl", bench.path / "train", bench.records, bench.path / "images")
    expected = shards(bench, Source("train", str(file), str(bench.path / "images")), "local")
    source = Source("train", put(file, "train.jsonl"), put(bench.path / "images", "images"))
    answered = 0

    def fault(request):
        nonlocal answered
        answered += request.path.startswith("/input/images")
        return 503 if answered > 12 else None

    proxy.fault = fault
    with pytest.raises(DataError, match=r"s3://input/.* could not be read: the server answers 503.*the same command"):
        shards(bench, source, "remote")
    done = list((bench.path / "remote").glob("*.outcome.json"))
    assert 0 < len(done) < 6
    proxy.fault = lambda request: None
    assert shards(bench, source, "remote") == expected


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet struct", "arrow stream", "tar"])
def test_an_object_that_is_replaced_ends_the_run(bench, put, proxy, kind):
    """With an object of the same size, or of another one, or none, while slices are read."""
    images = put(bench.path / "images", "images")
    file = write(kind, bench.path / "train", bench.records, bench.path / "images")
    data = file.read_bytes()
    for number, other in enumerate([data[:-1] + bytes([data[-1] ^ 1]), data + data, data[: len(data) // 2], None]):
        source = Source("train", put(file, file.name), images)
        pieces = slices([source], 4)
        records = [record for record in read_slice(next(pieces), source, 0)]
        assert len(records) == 4
        if other is None:
            boto3.resource("s3", endpoint_url=proxy.url).Object("input", file.name).delete()
        else:
            boto3.resource("s3", endpoint_url=proxy.url).Object("input", file.name).put(Body=other)
        with pytest.raises(DataError, match="has changed since this run first read it"):
            list(pieces)
        with pytest.raises(DataError, match="has changed since this run first read it|is missing"):
            preprocess([source], bench.tokenizer, bench.path / f"remote{number}", bench.settings)
        assert not (bench.path / f"remote{number}" / "manifest.json").exists()


def test_an_unfinished_run_does_not_go_on_with_another_object(bench, put):
    file = bench.annotations(bench.records)
    address, images = put(file, "train.json"), put(bench.path / "images", "images")
    with pytest.raises(TooManyRejected):
        preprocess([Source("train", address)], bench.tokenizer, bench.path / "remote", bench.settings, max_rejected=0)
    plan = json.loads((bench.path / "remote" / "run.json").read_text())
    assert plan["sources"][0]["bytes"] == file.stat().st_size and len(plan["sources"][0]["etag"]) > 20
    bench.annotations(bench.records[:-1])
    put(file, "train.json")
    sentence = "unfinished run of the annotation file s3://input/train.json, which has changed since"
    with pytest.raises(DataError, match=sentence):
        preprocess([Source("train", address)], bench.tokenizer, bench.path / "remote", bench.settings)
    with pytest.raises(DataError, match="unfinished run with another --input"):
        source = Source("train", address, images)
        preprocess([source], bench.tokenizer, bench.path / "remote", bench.settings)


TREE = [
    "b.jsonl", "a.jsonl", "B.jsonl", "c.parquet", "sub/d.jsonl", "sub/deep/e.jsonl", ".hidden/f.jsonl", "x.y/g.jsonl",
    "[x].json", "..jsonl", ".g.jsonl",
]  # fmt: skip


@pytest.mark.parametrize(
    "pattern",
    ["*.jsonl", "**/*.jsonl", "?.jsonl", "[ab].jsonl", "*/*.jsonl", "*/deep/*", "sub/**/*.jsonl", "**/deep/*.jsonl",
     "[x].json", ".*.jsonl", "**", "*", "sub/*", "su?/*.jsonl", "**/**/e.jsonl", "none*", "*/none/*", "sub/d.jsonl/*"],
)  # fmt: skip
def test_globs_match_what_they_match_in_a_directory(bench, put, pattern):
    for name in TREE:
        (bench.path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        content = b"PAR1" + bytes(20) + b"\0\0\0\0PAR1" if name.endswith("parquet") else b"{}\n"
        (bench.path / "in" / name).write_bytes(content)
    put(bench.path / "in", "p")

    def found(base: str) -> list[str] | str:
        try:
            return [file.removeprefix(base) for file in annotation_files(f"{base}/{pattern}")]
        except DataError as error:
            return str(error).replace(base, "").partition("the directory")[0]  # which of several is not the same

    assert found("s3://input/p") == found(str(bench.path / "in"))


@pytest.mark.parametrize(
    "files",
    [
        ["00000.tar", "00000.parquet", "00000_stats.json", "00001.tar", "00001.parquet", "00001_stats.json"],
        ["README.md", ".gitattributes", "LICENSE", "data/1.parquet", "data/0.parquet"],
        ["train-0.jsonl", "test-0.jsonl"],
        ["a.jsonl", "b.parquet"],
        ["a.jsonl", "b.txt"],
        ["a/x.jsonl", "b/x.jsonl"],
        ["dataset_dict.json", "train/x.arrow"],
        ["state.json", "dataset_info.json", "b.arrow", "a.arrow"],
        ["state.json", "dataset_info.json"],
        ["README.md"],
    ],
)
def test_prefixes_are_read_as_directories_are(bench, put, files):
    state = {"_data_files": [{"filename": "b.arrow"}, {"filename": "a.arrow"}]} if "b.arrow" in files else {}
    for name in files:
        (bench.path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        heads = {"parquet": b"PAR1" + bytes(20), "tar": bytes(257) + b"ustar\0", "arrow": b"\xff" * 4 + bytes(20)}
        content = json.dumps(state).encode() if name == "state.json" else heads.get(name.rpartition(".")[2], b"{}\n")
        (bench.path / "in" / name).write_bytes(content)
    put(bench.path / "in", "p")

    def found(base: str) -> list[str] | str:
        try:
            return [file.removeprefix(base) for file in annotation_files(base)]
        except DataError as error:
            return str(error).replace(base, "").replace("does not exist", "is an empty directory")

    assert found("s3://input/p") == found(str(bench.path / "in"))


def test_names_of_data_sets_are_those_of_paths(bench, put):
    for name in ("laion/a.jsonl", "laion/b.jsonl"):
        (bench.path / name).parent.mkdir(exist_ok=True)
        (bench.path / name).write_text("{}\n")
    put(bench.path / "laion", "laion")
    for path in ("laion", "laion/*.jsonl", "laion/a.jsonl"):
        address, file = f"s3://input/{path}", str(bench.path / path)
        expected = name_of_data_set(file, annotation_files(file))
        assert name_of_data_set(address, annotation_files(address)) == expected in ("laion", "a")
    assert (
        annotation_files("s3://input/laion/") == annotation_files("s3://input/laion") == annotation_files("s3://input")
    )


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("s3://input/none.jsonl", "s3://input/none.jsonl does not exist: give a JSON or JSONL file"),
        ("s3://input/none/", "s3://input/none does not exist: give a JSON or JSONL file"),
        ("s3://input/none/*.tar", r"s3://input/none/\*.tar matches no file"),
        ("s3://nowhere/a.jsonl", "s3://nowhere does not exist; check its name"),
        ("s3://input/a/../../other/b.jsonl", "has . or .. in it; write the address without"),
        ("s3://key:secret@input/a.jsonl", r"s3://\*\*\*@input/a.jsonl has credentials in it"),
        ("s3://input/a.jsonl?X-Amz-Signature=abc", "has credentials in it"),
    ],
)
def test_wrong_addresses_end_in_a_sentence(address, sentence, put, bench):
    put(bench.annotations(bench.records, "b.jsonl"), "other/b.jsonl")
    with pytest.raises(DataError, match=sentence) as raised:
        for file in annotation_files(address, "--input"):
            Source("train", file)
    assert "secret" not in str(raised.value) and "abc" not in str(raised.value)


def test_hostile_paths_stay_below_the_image_root(bench, put, new_sample):
    put(bench.path / "images", "a/images")
    put(bench.path / "images", "a/secret")
    paths = {
        "0.png": "",
        "./x/../1.png": "",
        "s3://input/a/images/2.png": "",
        "../secret/0.png": "is outside s3://input/a/images; correct the path",
        "x/../../secret/0.png": "is outside",
        "/0.png": "is outside",
        "..": "is outside",
        "s3://input/a/secret/0.png": "is not below s3://input/a/images",
        "s3://input/a/images/../secret/0.png": "is outside",
        "msc://other/0.png": "is not below",
        "https://example.org/0.png": "is not below",
        "x.tar": "is an archive",
        "none.png": "the image s3://input/a/images/none.png does not exist",
        "x/": "is outside",
    }
    file = bench.annotations([new_sample("<image>", "a", image=path) for path in paths])
    source = Source("train", put(file, "a/train.json"), "s3://input/a/images/")
    preprocess([source], bench.tokenizer, bench.path / "shards", bench.settings)
    rejects = {entry["record"]: entry["reason"] for entry in bench.rejects()}
    for number, sentence in enumerate(paths.values()):
        assert (number in rejects) == bool(sentence) and sentence in rejects.get(number, ""), number
    assert len(ShardSet(bench.path / "shards")) == 3


def test_paths_count_from_the_directory_of_an_object(bench, put, new_sample):
    """Without an image root, as for a local file; absolute local paths are used as they are."""
    put(bench.path / "images", "a/images")
    records = [
        new_sample("<image>", "a", image=path) for path in ("images/0.png", str(bench.path / "images" / "1.png"))
    ]
    records.append(new_sample("<image>", "a", image="../a/images/0.png"))
    preprocess(
        [Source("train", put(bench.annotations(records), "a/train.json"))],
        bench.tokenizer,
        bench.path / "shards",
        bench.settings,
    )
    (reject,) = bench.rejects()
    assert "is outside s3://input/a" in reject["reason"] and len(ShardSet(bench.path / "shards")) == 2


def test_images_are_requested_before_they_are_needed(bench, put, proxy):
    """Each once and with one request, at the same time, however large an image is."""
    Image.new("RGB", (1300, 1200)).save(bench.path / "images" / "large.bmp")
    assert (bench.path / "images" / "large.bmp").stat().st_size > object_reads.AHEAD_BYTES
    records = [{**record, "image": f"{number}.png"} for number, record in enumerate(bench.records[1:2] * 3)]
    source = Source("train", put(bench.annotations(records), "train.json"), put(bench.path / "images", "images"))
    running, most, waiting = 0, 0, threading.Condition()

    def fault(request):
        nonlocal running, most
        if not request.path.startswith("/input/images"):
            return
        with waiting:
            running += 1
            most = max(most, running)
            waiting.notify_all()
            waiting.wait_for(lambda: most == 3, timeout=20)
            running -= 1

    proxy.fault = fault
    assert len(shards(bench, source, "shards")) == 7 and most == 3
    assert [len(requests_of(proxy, f"images/{number}.png")) for number in range(3)] == [1, 1, 1]
    proxy.fault = lambda request: None
    large = Source("train", put(bench.annotations([{**records[0], "image": "large.bmp"}]), "b"), source.image_root)
    preprocess([large], bench.tokenizer, bench.path / "large", bench.settings)
    (sample,) = ShardSet(bench.path / "large").fetch([0])
    assert sample.images[0].tobytes() == (bench.path / "images" / "large.bmp").read_bytes()


def test_registries_have_addresses_and_may_lie_at_one(bench, put, tmp_path):
    for name in ("web/b.jsonl", "web/a.jsonl", "docs.json"):
        put(bench.annotations(bench.records, Path(name).name), name)
    text = "web: {annotation_path: s3://input/web, data_path: s3://input/images}\n"
    (tmp_path / "registry.yaml").write_text(text + "local: {annotation_path: docs.json}\n")
    found = data_list(["web%50", "local"], tmp_path / "registry.yaml")
    assert [(it.annotations, it.image_root) for it in found] == [
        ("s3://input/web/a.jsonl", "s3://input/images"),
        ("s3://input/web/b.jsonl", "s3://input/images"),
        (str(tmp_path / "docs.json"), ""),
    ]
    (tmp_path / "meta.json").write_text(json.dumps({"web": {"root": "img/", "annotation": "web/a.jsonl"}}))
    (found,) = data_list(["web"], put(tmp_path / "meta.json", "meta.json"))
    assert (found.annotations, found.image_root) == ("s3://input/web/a.jsonl", "s3://input/img/")
    with pytest.raises(WrongPath, match="the registry s3://input/none.yaml does not exist: give a YAML file"):
        data_list(["web"], "s3://input/none.yaml")
    (tmp_path / "out.yaml").write_text("web: {annotation_path: ../../x.jsonl}\n")
    with pytest.raises(WrongPath, match="has . or .. in it"):
        data_list(["web"], put(tmp_path / "out.yaml", "out.yaml"))
    with pytest.raises(DataError, match="which has no links; leave out --follow-links"):
        Source("web", "s3://input/web/a.jsonl", "s3://input/images", follow_links=True)


def test_schedules_of_mixtures_may_lie_at_an_address(put, tmp_path):
    text = "- {from: 0, shares: {packs/web: 70, s3://other/packs: 30}}\n"
    (tmp_path / "mixture.yaml").write_text(text)
    schedule = read_schedule(put(tmp_path / "mixture.yaml", "a/mixture.yaml"))
    assert schedule.locations == ("s3://input/a/packs/web", "s3://other/packs")
    with pytest.raises(WrongPath, match="--mixture s3://input/none.yaml does not exist: give a .yaml file"):
        read_schedule("s3://input/none.yaml")


def test_a_wrong_key_or_option_is_found_where_the_object_lies(bench, put, tmp_path):
    (tmp_path / "prompts.txt").write_text("What?\n")
    assert read_prompts(put(tmp_path / "prompts.txt", "prompts.txt")) == ("What?",)
    with pytest.raises(DataError, match="s3://input/train.jsonl is one JSON array; rename it to .json"):
        Source("train", put(bench.annotations(bench.records), "train.jsonl"))
    (tmp_path / "a.zip").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(DataError, match="s3://input/a.zip is a ZIP archive; unpack it"):
        Source("train", put(tmp_path / "a.zip", "a.zip"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(DataError, match="s3://input/a.parquet is damaged Parquet"):
        Source("train", put(tmp_path / "a.parquet", "a.parquet"))


def test_videos_are_read_where_they_lie(bench, put, new_sample):
    """Loose, and in a tar; both have the frames of a local file."""
    frames = [Image.new("RGB", (64, 48), (80 * number, 0, 0)) for number in range(3)]
    frames[0].save(bench.path / "images" / "a.gif", save_all=True, append_images=frames[1:], duration=1000)
    record = new_sample("<video> What?", "Red.")
    file = bench.annotations([{**record, "video": "a.gif"}, {**record, "video": "none.gif"}])
    with tarfile.open(bench.path / "train.tar", "w") as tar:
        (bench.path / "0.json").write_text(json.dumps(record))
        tar.add(bench.path / "0.json", "0.json")
        tar.add(bench.path / "images" / "a.gif", "0.mp4")
    sources = {
        "local": Source("train", str(file), str(bench.path / "images")),
        "remote": Source("train", put(file, "train.json"), put(bench.path / "images", "images")),
        "tar": Source("train", put(bench.path / "train.tar", "train.tar")),
    }
    found = []
    for name, source in sources.items():
        preprocess([source], bench.tokenizer, bench.path / name, bench.settings)
        (sample,) = ShardSet(bench.path / name).fetch([0])
        found.append((sample.tokens.tolist(), [image.tobytes() for image in sample.images]))
    assert found[0] == found[1] == found[2] and len(found[0][1]) == 3
    assert "the video s3://input/images/none.gif does not exist" in bench.rejects("remote")[0]["reason"]


def test_profiles_of_the_library_are_used(bench, put, settings, tmp_path, proxy):
    """Under a name of its own: the library keeps the profiles that it has opened, for a process."""
    put(write("jsonl", bench.path / "train", bench.records, bench.path / "images"), "a/train.jsonl")
    put(bench.path / "images", "a/images")
    options = {"base_path": "input", "endpoint_url": proxy.url, "region_name": "us-east-1"}
    profile = {"storage_provider": {"type": "s3", "options": options}}
    (tmp_path / "msc.json").write_text(json.dumps({"profiles": {"inputs": profile}}))
    settings(MSC_CONFIG=tmp_path / "msc.json", AWS_ENDPOINT_URL=None)
    assert annotation_files("msc://inputs/a/*.jsonl") == ["msc://inputs/a/train.jsonl"]
    source = Source("train", "msc://inputs/a/train.jsonl", "msc://inputs/a/images")
    local = Source("train", str(bench.path / "train.jsonl"), str(bench.path / "images"))
    assert shards(bench, source, "msc") == shards(bench, local, "local")


def test_questions_are_read_from_addresses(bench, put):
    settings = dataclasses.replace(bench.settings, image_store="patches")
    file = write("tar", bench.path / "train", bench.records, bench.path / "images")
    lines = write("jsonl", bench.path / "lines", bench.records, bench.path / "images")
    images = put(bench.path / "images", "images")
    found = []
    for source in (
        Source("train", str(file)),
        Source("train", put(file, "train.tar")),
        Source("train", put(lines, "lines.jsonl"), images),
    ):
        listed = read_questions([source], settings, "every answer")
        assert not listed.rejects
        prompts = [prompt_of_sample(it.sample, it.turn, settings) for it in listed.questions]
        found.append([([turn.text for turn in it.turns], [array.tobytes() for array in it.images]) for it in prompts])
    assert len(found[0]) == 23 and found[0] == found[1] == found[2]


def test_the_command_reads_addresses(bench, put, monkeypatch, capsys):
    """As a user calls it: a prefix of tars with images in another prefix, and the names of shards and rejects."""
    put(write("jsonl", bench.path / "0", bench.records[:12], bench.path / "images"), "web/0.jsonl")
    put(write("jsonl", bench.path / "1", bench.records[12:], bench.path / "images"), "web/1.jsonl")
    put(bench.path / "images", "images")
    flags = ["--image-root", "s3://input/images", "--tokenizer", bench.tokenizer, "--min-pixels", "1024"]
    for name, paths in (
        ("prefix", ["s3://input/web"]),
        ("files", ["s3://input/web/0.jsonl", "s3://input/web/1.jsonl"]),
    ):
        output = bench.path / name
        command = ["preprocess", "--input", *paths, *flags, "--output", output, "--workers", "1"]
        monkeypatch.setattr(sys, "argv", list(map(str, command)))
        cli.main()
        assert "kept 23 samples" in capsys.readouterr().out
    assert contents(bench.path / "prefix") == contents(bench.path / "files")
    names = [
        {entry["name"] for entry in ShardSet(bench.path / name).manifest["sources"]} for name in ("prefix", "files")
    ]
    assert names == [{"web"}, {"0"}]


def test_a_ray_cluster_reads_addresses(bench, put, monkeypatch):
    pytest.importorskip("ray")
    file = write("tar", bench.path / "train", bench.records, bench.path / "images")
    expected = shards(bench, Source("train", str(file)), "local")
    assert shards(bench, Source("train", put(file, "train.tar")), "remote", workers=2, engine="ray") == expected
