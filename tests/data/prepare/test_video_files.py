"""Videos in tars, Parquet and Arrow give the frames of the same videos in files of their own."""

import io
import json
import tarfile

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.conversation import Turn
from neo_megatron.data.prepare.media import load_media, read_media
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.records import Sample
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.prepare.stored_file import StoredFile
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.errors import RejectedSample

TURN = Turn("user", "<video>", False)


@pytest.fixture
def clip(tmp_path) -> bytes:
    """An animation of three seconds, which is read as a video."""
    frames = [Image.new("RGB", (64, 48), (80 * number, 0, 0)) for number in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=1000)
    return (tmp_path / "a.gif").read_bytes()


def media(video, **settings):
    return read_media(Sample((TURN,), (), (video,)), PreprocessConfig(min_pixels=1024, **settings))


def test_frames_and_content_are_those_of_a_file(tmp_path, clip):
    (tmp_path / "a.bin").write_bytes(b"x" * 100 + clip + b"y" * 100)
    stored = StoredFile(str(tmp_path / "a.bin"), "a.gif", None, 100, len(clip))
    expected = media(str(tmp_path / "a.gif"))
    assert len(expected.images) == 3
    for video in (stored, StoredFile("a.parquet", "video", clip)):
        found = media(video)
        assert [it.tobytes() for it in found.images] == [it.tobytes() for it in expected.images]
        assert found.turns == expected.turns and found.identities[0][1] == expected.identities[0][1]
    assert media(stored).identities[0][0] != expected.identities[0][0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"length": 3}, r"the video 'a\.gif' in .*a\.bin cannot be used: it is in none of"),
        ({"offset": 50}, "it is in none of the formats"),
        ({"length": 10 << 30}, "it has over 8 GiB; cut it into clips"),
        ({"container": "/nowhere/a.bin"}, r"the video 'a\.gif' in /nowhere/a\.bin cannot be opened"),
    ],
)
def test_a_video_that_cannot_be_read_is_named_with_its_container(tmp_path, clip, change, sentence):
    (tmp_path / "a.bin").write_bytes(b"x" * 100 + clip)
    stored = StoredFile(str(tmp_path / "a.bin"), "a.gif", None, 100, len(clip))
    with pytest.raises(RejectedSample, match=sentence):
        load_media(Sample((TURN,), (), (StoredFile(**{**vars(stored), **change}),)), PreprocessConfig())


def test_records_of_tars_and_parquet_have_videos(bench, new_sample, clip):
    record = new_sample("<video> What?", "Red.")
    (bench.path / "images").mkdir()
    (bench.path / "images" / "a.gif").write_bytes(clip)
    expected = bench.preprocess([{**record, "video": "a.gif"}], "file").fetch([0])[0]
    with tarfile.open(bench.path / "train.tar", "w") as tar:
        for name, data in (("0.json", json.dumps({**record, "video": "0.mp4"}).encode()), ("0.mp4", clip)):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    table = pyarrow.table({"video": [clip], "conversations": [record["conversations"]]})
    pyarrow.parquet.write_table(table, bench.path / "train.parquet")
    for name in ("train.tar", "train.parquet"):
        preprocess([Source("train", str(bench.path / name))], bench.tokenizer, bench.path / name[-3:], bench.settings)
        (found,) = ShardSet(bench.path / name[-3:]).fetch([0])
        assert len(found.images) == 3 and found.tokens.tolist() == expected.tokens.tolist()
        assert [it.tobytes() for it in found.images] == [it.tobytes() for it in expected.images]
