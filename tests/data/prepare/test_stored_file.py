"""Files inside containers in place of paths: reading, identities, messages, and data: URIs."""

import base64
import pickle

import pytest

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.conversation import Turn
from neo_megatron.data.prepare import stored_file
from neo_megatron.data.prepare.media import load_media, read_media
from neo_megatron.data.prepare.records import Sample, check_sample
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.stored_file import StoredFile
from neo_megatron.errors import Reason, RejectedSample

TURN = Turn("user", "<image>", False)


@pytest.fixture
def container(tmp_path, new_png):
    """(an image, a file that has it at offset 100, the same image as a file)."""
    image = new_png()
    (tmp_path / "a.tar").write_bytes(b"x" * 100 + image + b"y" * 100)
    (tmp_path / "a.png").write_bytes(image)
    return image, StoredFile(str(tmp_path / "a.tar"), "0.png", None, 100, len(image)), str(tmp_path / "a.png")


@pytest.mark.parametrize(
    "settings", [PreprocessConfig(), PreprocessConfig(check="header"), PreprocessConfig(image_store="patches")]
)
def test_an_image_in_a_container_is_that_of_a_file(container, settings):
    data, stored, path = container
    expected = load_media(Sample((TURN,), (path,)), settings)
    for image in (stored, StoredFile("a.parquet", "image", data)):
        turns, images, grids = load_media(Sample((TURN,), (image,)), settings)
        assert (turns, images[0].tobytes(), grids) == (expected[0], expected[1][0].tobytes(), expected[2])


def test_identities_tell_members_apart_and_copies_alike(container):
    data, stored, path = container
    moved = StoredFile(stored.container, "1.png", None, 100, len(data))
    inside = StoredFile("a.parquet", "image", data)
    images = (stored, stored, moved, inside, StoredFile("b.parquet", "image", data), path)
    sample = Sample((Turn("user", "<image>" * len(images), False),), images)
    by_path, by_content = zip(*read_media(sample, PreprocessConfig()).identities, strict=True)
    assert len(set(by_content)) == 1
    assert by_path[0] == by_path[1] != by_path[2]
    assert by_path[3] == by_path[4] == by_content[0] and len(set(by_path)) == 4


@pytest.mark.parametrize(
    ("change", "reason", "sentence"),
    [
        ({"offset": 150}, Reason.UNREADABLE_IMAGE, r"the image '0\.png' in .*a\.tar is in none of the formats"),
        ({"length": 10_000_000}, Reason.UNREADABLE_IMAGE, r"the image '0\.png' in .*a\.tar is cut off"),
        ({"length": 10 << 30}, Reason.DECOMPRESSION_BOMB, r"the image '0\.png' in .*a\.tar has over 256 MiB"),
        (
            {"container": "/nowhere/a.tar"},
            Reason.MISSING_IMAGE,
            r"the image '0\.png' in /nowhere/a\.tar cannot be read",
        ),
    ],
)
def test_an_image_that_cannot_be_read_is_named_with_its_container(container, change, reason, sentence):
    stored = StoredFile(**{**vars(container[1]), **change})
    with pytest.raises(RejectedSample, match=sentence) as raised:
        load_media(Sample((TURN,), (stored,)), PreprocessConfig())
    assert raised.value.reason == reason


def test_a_video_in_a_container_that_is_none_is_named_with_it(container):
    sample = Sample((Turn("user", "<video>", False),), (), (container[1],))
    with pytest.raises(RejectedSample, match=r"the video '0\.png' in .*a\.tar cannot be used: it is in none of"):
        load_media(sample, PreprocessConfig())


def test_records_may_have_stored_files_where_paths_may_be(container, new_sample, tmp_path):
    _, stored, path = container
    (tmp_path / "a.json").write_text("[]")
    source = Source("a", str(tmp_path / "a.json"))
    sample = check_sample(new_sample("<image><image>", "b", images=[stored, "a.png"]), source)
    assert sample.images == (stored, path)
    with pytest.raises(RejectedSample, match="the sample has the key 'thumbnail_image': media"):
        check_sample(new_sample(thumbnail_image=stored), source)
    for value in ([{"bytes": stored}], [stored, None]):
        with pytest.raises(RejectedSample, match="'image' must be a path or a list of paths"):
            check_sample(new_sample("<image>", "b", image=value), source)


def test_its_text_has_no_bytes(container):
    data, stored, _ = container
    inside = StoredFile("a.parquet", "x" * 5000, data)
    assert len(repr([inside])) < 300 and "PNG" not in repr(inside) and pickle.loads(pickle.dumps(inside)) == inside
    assert repr(stored) == f"<'0.png' in {stored.container}>"


def uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_a_data_uri_gives_the_shards_of_a_file(bench, new_sample, new_png):
    bench.images("a.png")
    data = (bench.path / "images" / "a.png").read_bytes()
    bench.preprocess([new_sample("What?", "An image.", image="a.png")], "files")
    bench.preprocess([new_sample("What?", "An image.", image=uri(data))], "uris")
    for name in ("tokens.bin", "pictures.bin", "grids.npy"):
        assert (bench.path / "uris" / f"00000.{name}").read_bytes() == (
            bench.path / "files" / f"00000.{name}"
        ).read_bytes()


@pytest.mark.parametrize(
    ("address", "kind", "sentence"),
    [
        ("data:image/png;base64,@@@@", "unreadable picture", "is not base64"),
        ("data:image/png;base64,AAA", "unreadable picture", "is not base64"),
        ("data:image/png;base64,AA AA", "unreadable picture", "is not base64"),
        ("data:image/png;base64,AAÀA", "unreadable picture", "is not base64"),
        (uri(b"no image"), "unreadable picture", "the image 'data:image/png;base64' in"),
        (uri(b"x" * 3000), "decompression bomb", "has over 0 MiB"),
        (uri(b"x", "video/mp4"), "remote path", "is not a local file"),
        ("data:image/png,AAAA", "remote path", "is not a local file"),
        ("data:,", "remote path", "is not a local file"),
    ],
)
def test_other_data_uris_are_rejected(bench, new_sample, monkeypatch, address, kind, sentence):
    monkeypatch.setattr(stored_file, "MAX_FILE_BYTES", 2048)
    bench.preprocess([new_sample(), new_sample("What?", "b", image=address)])
    (reject,) = bench.rejects()
    assert reject["kind"] == kind and sentence in reject["reason"] and len(reject["reason"]) < 400


def test_a_data_uri_in_the_text_is_still_rejected(bench, new_sample, new_png):
    bench.preprocess([new_sample(), new_sample(f"<image>{uri(new_png())}", "b")])
    assert [reject["kind"] for reject in bench.rejects()] == ["inline media"]
