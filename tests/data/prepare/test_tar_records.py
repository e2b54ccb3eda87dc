"""Records of WebDataset tars: groups of members, published and other forms, and hostile tars."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from neo_megatron.data.prepare import tar_records
from neo_megatron.data.prepare.annotation_slices import read_slice, slices
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.stored_file import StoredFile
from neo_megatron.data.prepare.tar_records import split_name
from neo_megatron.errors import Reason, RejectedSample

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]
Entry = tuple[str, bytes] | tarfile.TarInfo


def tar(path: Path, entries: list[Entry], cut: int | None = None) -> Path:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                archive.addfile(entry)
            else:
                info = tarfile.TarInfo(entry[0])
                info.size = len(entry[1])
                archive.addfile(info, io.BytesIO(entry[1]))
    path.write_bytes(file.getvalue()[:cut])
    return path


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def records(path: Path, size: int = 3) -> tuple[list, list[str]]:
    """(records, why slices are broken)."""
    source = Source("tar", str(path))
    pieces = list(slices([source], size))
    read = [record for piece in pieces for _, record in read_slice(piece, source, 0)]
    return read, [piece.broken for piece in pieces if piece.broken]


def published(**keys) -> bytes:
    return json.dumps({"conversations": TURNS, **keys}).encode()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a.SEG.PNG", ("a", "seg.png")),
        ("dir.v1/a.b.json", ("dir.v1/a", "b.json")),
        ("/a/../b.txt", ("/a/../b", "txt")),
        ("dir/README", ("dir/README", "")),
        ("dir/.hidden.jpg", ("dir/.hidden.jpg", "")),
        ("dir.jpg/a", ("dir.jpg/a", "")),
        ("a.", ("a.", "")),
    ],
)
def test_keys_and_extensions_are_those_of_webdataset(name, expected):
    """As ``webdataset.tariterators.base_plus_ext``, which ignores members without both."""
    key, extension = split_name(name)
    assert (key, extension) == expected or (extension == "" and expected[1] == "")


def test_a_caption_record_has_its_members_by_kind_and_extension(tmp_path):
    entries = [
        ("x/000.jpg", b"one"),
        ("x/000.json", b'{"url": "u"}'),
        ("x/000.left.PNG", b"two"),
        ("x/000.txt", "Bé".encode()),
        ("x/000.cls", b"7\n"),
        ("x/000.npy", b"array"),
        ("x/000.mp4", b"film"),
        ("x/001.txt", b"only text"),
    ]
    (first, second), broken = records(tar(tmp_path / "a.tar", entries))
    assert not broken and second == {"__key__": "x/001", "txt": "only text"}
    assert list(first) == ["url", "image", "video", "txt", "cls", "npy"]
    assert (first["url"], first["txt"], first["cls"]) == ("u", "Bé", 7)
    assert [(image.name, image.read()) for image in first["image"]] == [
        ("x/000.jpg", b"one"),
        ("x/000.left.PNG", b"two"),
    ]
    assert first["npy"].read() == b"array" and str(first["npy"]) == f"'x/000.npy' in {tmp_path / 'a.tar'}"


@pytest.mark.parametrize("keys", [{}, {"image": []}, {"image": None}, {"images": ["a/0.left.png", "0.right.png"]}])
def test_a_published_record_gets_the_images_of_its_group(tmp_path, keys):
    entries = [("0.left.png", b"l"), ("0.right.png", b"r"), ("0.json", published(id=3, **keys)), ("0.txt", b"kept")]
    ((record,), _) = records(tar(tmp_path / "a.tar", entries))
    assert [image.read() for image in record.pop("image")] == [b"l", b"r"]
    assert record == {"conversations": TURNS, "id": 3, "txt": "kept"}


def test_images_are_in_the_order_in_which_they_are_named(tmp_path):
    entries = [("0.b.png", b"b"), ("0.a.png", b"a"), ("0.json", published(img_paths=["0.a.png", "0.b.png", "0.a.png"]))]
    ((record,), _) = records(tar(tmp_path / "a.tar", entries))
    assert [image.read() for image in record["image"]] == [b"a", b"b", b"a"] and "img_paths" not in record


REJECTED = {
    "link": ([special("0.png", tarfile.SYMTYPE), ("0.json", published())], "'0.png' is a symbolic link, not a file"),
    "hard link": ([special("0.png", tarfile.LNKTYPE), ("0.json", published())], "'0.png' is a hard link, not a file"),
    "device": ([("0.json", published()), special("0.png", tarfile.CHRTYPE)], "'0.png' is a device"),
    "fifo": ([("0.json", published()), special("0.png", tarfile.FIFOTYPE)], "'0.png' is a FIFO"),
    "twice": ([("0.png", b"a"), ("0.json", published()), ("0.PNG", b"b")], "'0.PNG' is in the record twice"),
    "no extension": ([("README", b"hello")], "'README' has no extension"),
    "missing image": (
        [("0.png", b"a"), ("0.json", published(image="1.png"))],
        "'image' names '1.png', which is not among",
    ),
    "missing video": ([("0.json", published(video="1.mp4"))], "'video' names '1.mp4', which is not among"),
    "unused image": ([("0.a.png", b""), ("0.b.png", b""), ("0.json", published(image="0.a.png"))], "'0.b.png', which"),
    "two lists": ([("0.png", b"a"), ("0.json", published(image="a", images="b"))], "list different files"),
    "same key": ([("0.id", b"a"), ("0.json", published(id=3))], "has the key 'id' and a member with this extension"),
    "broken json": ([("0.json", b'{"conversations":')], "'0.json' is not valid JSON"),
    "deep json": ([("0.json", b"[" * 100_000)], "'0.json' is not valid JSON"),
    "not utf-8": ([("0.txt", b"\xff\xfe"), ("0.json", published())], "'0.txt' is not valid UTF-8"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_a_record_is_rejected_with_the_name_of_its_member(tmp_path, case):
    entries, reason = REJECTED[case]
    read, broken = records(tar(tmp_path / "a.tar", [("a.json", published()), *entries, ("z.json", published())]))
    assert not broken and read[0] == read[2] == {"conversations": TURNS}
    assert isinstance(read[1], RejectedSample) and reason in read[1].sentence


def test_large_texts_and_crowded_keys_are_rejected_before_they_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_records, "MAX_RECORD_BYTES", 100)
    monkeypatch.setattr(tar_records, "MAX_MEMBERS", 3)
    entries = [("0.json", published(id="x" * 200)), *((f"1.{number}.png", b"") for number in range(4)), ("2.txt", b"a")]
    read, _ = records(tar(tmp_path / "a.tar", entries))
    assert "has over 0 MiB" in read[0].sentence and read[0].reason == Reason.OVER_LONG
    assert "is one of over 3 with the same key" in read[1].sentence and read[2]["txt"] == "a"


def test_a_key_that_comes_again_is_another_record_and_directories_are_none(tmp_path):
    entries = [
        special("d", tarfile.DIRTYPE),
        ("d/0.txt", b"a"),
        special("d/0", tarfile.DIRTYPE),
        ("d/0.cls", b"1"),
        ("d/1.txt", b"b"),
        ("d/0.txt", b"c"),
        special("e", tarfile.DIRTYPE),
    ]
    read, broken = records(tar(tmp_path / "a.tar", entries), size=1)
    assert [(record["__key__"], record["txt"]) for record in read] == [("d/0", "a"), ("d/1", "b"), ("d/0", "c")]
    assert not broken and read[0]["cls"] == 1


def test_the_last_record_of_a_tar_that_breaks_off_counts_as_broken(tmp_path):
    entries = [(f"{number}.{name}", b"x" * 600) for number in range(3) for name in ("png", "txt")]
    for cut, intact in ((512 * 17, 2), (512 * 15 + 7, 2), (512 * 13, 1), (512 * 5, 0)):
        read, broken = records(tar(tmp_path / "a.tar", entries, cut), size=2)
        assert len(read) == intact and "breaks off" in broken[0], cut


def test_a_hostile_tar_is_accounted_for(bench, new_png):
    """Kept and rejected samples are those read, and no member is extracted or followed."""
    image = new_png()
    entries: list[Entry] = []
    for number in range(4):
        entries += [(f"../../{number}.png", image), (f"../../{number}.json", published(system="Brief."))]
    for case in ("link", "device", "twice", "no extension"):
        for entry in REJECTED[case][0]:
            is_special = isinstance(entry, tarfile.TarInfo)
            entries.append(entry.replace(name=case + entry.name) if is_special else (case + entry[0], entry[1]))
    entries += [("b/5.png", image[:60]), ("b/5.json", published()), ("b/6.mp4", b"film"), ("b/6.json", published())]
    entries += [("/etc/7.png", image), ("/etc/7.json", published()), ("b/8.png", image), ("b/8.txt", b"a caption")]
    path = tar(bench.path / "train.tar", entries)
    path.write_bytes(path.read_bytes() + b"\1" * 512)
    shards = bench.preprocess(path)
    counts, rejects = shards.manifest["counts"], bench.rejects()
    assert counts["samples_read"] == 12 + 1 and counts["samples_kept"] == 5
    assert [reject["record"] for reject in rejects] == [4, 5, 6, 7, 8, 9, 11, 12]
    kinds = [reject["kind"] for reject in rejects]
    assert kinds[4:] == ["unreadable picture", "unreadable video", "empty conversation", "unreadable record"]
    assert f"the image 'b/5.png' in {path} cannot be" in rejects[4]["reason"]
    assert sorted(file.name for file in bench.path.iterdir()) == ["images", "shards", "train.tar"]


def test_values_are_stored_files_only_where_the_tar_has_members(tmp_path):
    text = published(image={"bytes": "x", "path": "y"}, offset=0, container="/etc/passwd")
    ((record,), _) = records(tar(tmp_path / "a.tar", [("0.json", text)]))
    assert not any(isinstance(value, StoredFile) for value in record.values())
