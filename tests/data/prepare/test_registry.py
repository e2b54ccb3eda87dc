"""Data sets of a registry with settings of their own: their shards are those of a run with these as flags."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.manifest import read_manifest, write_manifest
from neo_megatron.data.prepare.preprocess import preprocess
from neo_megatron.data.prepare.registry import data_list
from neo_megatron.data.prepare.schemas.options import SchemaOptions
from neo_megatron.data.shards.reader import ShardSet
from neo_megatron.data.verify import verify
from neo_megatron.errors import DataError

OWN = {
    "min_pixels": 512 * 512,
    "max_pixels": 512 * 512,
    "video_min_pixels": 64 * 64,
    "video_max_pixels": 64 * 64,
    "video_text": "timestamps",
    "video_fps": 2.0,
    "max_frames": 3,
}


def write_registry(folder: Path, **data_sets: dict) -> Path:
    (folder / "registry.yaml").write_text(json.dumps(data_sets))  # which is YAML too
    return folder / "registry.yaml"


@pytest.fixture
def registry(bench, new_sample, new_png) -> Path:
    """Two data sets of the same records, the second with settings of its own."""
    bench.images("a.png")
    (bench.path / "images" / "b.png").write_bytes(new_png(300, 400))
    records = [
        new_sample("<image>", "One.", image="b.png"),
        new_sample("<image><image><image>", "Three.", images=["a.png", "b.png", "b.png"]),
        new_sample("Why?", "Because."),
    ]
    bench.annotations(records)
    entry = {"annotation_path": "train.json", "data_path": "images"}
    return write_registry(bench.path, plain=entry, spatial=entry | OWN)


def shards_of(bench, registry, name, settings, output="shards"):
    preprocess(data_list([name], registry), bench.tokenizer, bench.path / output, settings)
    return ShardSet(bench.path / output)


@pytest.mark.parametrize("store", ["encoded", "reference", "patches"])
def test_a_data_set_has_pixel_limits_of_its_own(bench, registry, store, directory_bytes):
    settings = replace(bench.settings, image_store=store)
    preprocess(data_list(["plain", "spatial"], registry), bench.tokenizer, bench.path / "both", settings)
    shards_of(bench, registry, "plain", settings, "first")
    shards_of(bench, registry, "plain", replace(settings, **OWN), "second")
    both, first, second = (ShardSet(bench.path / name) for name in ("both", "first", "second"))
    for number, alone in enumerate((first, second)):
        shard, expected = both.shard(number), alone.shard(0)
        assert shard.grids.tolist() == expected.grids.tolist()
        for sample in range(3):
            assert shard.tokens[sample].tolist() == expected.tokens[sample].tolist()
    areas = both.shard(1).grids.prod(axis=1) * 256
    assert (abs(areas / (512 * 512) - 1) < 0.2).all() and len(areas) == 4
    assert (both.shard(0).grids.prod(axis=1) * 256 <= 256 * 256).all()
    sources = both.manifest["sources"]
    assert OWN.items() <= sources[1].items() and not OWN.keys() & sources[0].keys()
    assert not verify(bench.path / "both").damage


def test_frames_and_their_text_too(bench, new_sample):
    write_video = pytest.importorskip("data.test_video").write_video
    (bench.path / "images").mkdir()
    write_video(bench.path / "images" / "a.mp4", frames=40, size=(256, 256))
    bench.annotations([new_sample("<video>", "Grey.", video="a.mp4")])
    entry = {"annotation_path": "train.json", "data_path": "images"}
    registry = write_registry(bench.path, plain=entry, videos=entry | OWN)
    own = shards_of(bench, registry, "videos", bench.settings, "own").shard(0)
    flags = shards_of(bench, registry, "plain", replace(bench.settings, **OWN), "flags").shard(0)
    assert own.tokens[0].tolist() == flags.tokens[0].tolist()
    assert own.grids.tolist() == flags.grids.tolist() == [[4, 4]] * 3
    assert not verify(bench.path / "own").damage


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"min_pixels": "many"}, "min_pixels is 'many', not an integer"),
        ({"max_pixels": 1.5}, "max_pixels is 1.5, not an integer"),
        ({"min_pixels": True}, "min_pixels is True, not an integer"),
        ({"video_fps": "fast"}, "video_fps is 'fast', not a finite number"),
        ({"video_text": "times"}, "video_text is 'times', not frames or timestamps"),
        ({"max_document_tokens": 10.5}, "max_document_tokens must be an integer"),
        ({"max_document_tokens": 1}, "--max-document-tokens must be from 2"),
        ({"caption_prompts": ["a"]}, "schema, image_placeholder, transform and caption_prompts must be strings"),
        ({"caption_prompts": "p.txt"}, "caption_prompts goes with schema: caption"),
    ],
)
def test_options_of_another_type_are_rejected(bench, own, sentence):
    bench.annotations([])
    registry = write_registry(bench.path, web={"annotation_path": "train.json"} | own)
    with pytest.raises(DataError, match=rf"data set web in .*registry\.yaml: {re.escape(sentence)}"):
        data_list(["web"], registry)


@pytest.mark.parametrize(
    ("own", "sentence"),
    [
        ({"min_pixels": 0}, "--min-pixels is 0: it must be above 0"),
        ({"min_pixels": 65537}, "--min-pixels is 65537: it must be above 0 and at most --max-pixels 65536"),
        ({"video_max_pixels": 1000}, "--video-min-pixels is 1024: it must be at most --video-max-pixels 1000"),
        ({"video_min_pixels": -1}, "must be at least 1, or 0"),
        ({"max_frames": 0}, "--max-frames must be at least 1"),
    ],
)
def test_settings_that_do_not_fit_the_flags_are_rejected_before_any_work(bench, new_sample, own, sentence):
    bench.annotations([new_sample()])
    registry = write_registry(bench.path, web={"annotation_path": "train.json"} | own)
    with pytest.raises(DataError, match=f"data set web, which has {next(iter(own))} .*{sentence}"):
        shards_of(bench, registry, "web", bench.settings)
    assert not (bench.path / "shards").exists()


def test_the_message_about_a_wrong_key_names_all_keys(bench):
    bench.annotations([])
    registry = write_registry(bench.path, web={"annotation_path": "train.json", "pixels": 1})
    with pytest.raises(DataError) as raised:
        data_list(["web"], registry)
    known = "data_path follow_links schema columns image_placeholder transform caption_prompts max_document_tokens"
    assert all(key in str(raised.value) for key in (*known.split(), *OWN))


def test_other_settings_of_a_data_set_are_another_run(bench, registry, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("neo_megatron.data.prepare.preprocess._join_outcomes", killed)
        shards_of(bench, registry, "spatial", bench.settings)
    entry = {"annotation_path": "train.json", "data_path": "images"}
    write_registry(bench.path, spatial=entry | OWN | {"max_frames": 4})
    with pytest.raises(DataError, match="unfinished run with another .*other options of a data set in the registry"):
        shards_of(bench, registry, "spatial", bench.settings)
    write_registry(bench.path, spatial=entry | OWN)
    assert len(shards_of(bench, registry, "spatial", bench.settings)) == 3


def test_a_manifest_with_impossible_settings_of_a_source_is_damaged(bench, registry):
    shards_of(bench, registry, "spatial", bench.settings)
    manifest = read_manifest(bench.path / "shards", "neo-shards", 3)
    del manifest["sha256"]
    for value, sentence in ((1 << 20, "cannot be used: --min-pixels is 1048576"), ("a", "min_pixels is 'a'")):
        manifest["sources"][0]["min_pixels"] = value
        write_manifest(bench.path / "shards", manifest)
        with pytest.raises(DataError, match=rf"manifest\.json is damaged \(sources\[0\]\.?\s?{sentence}"):
            ShardSet(bench.path / "shards")


def test_prompts_and_the_length_of_documents_may_differ(bench, samples_of):
    """Paths of prompts count from the registry; data sets without their own have those of the flags."""
    bench.images("a.png")
    bench.annotations([{"image": "a.png", "caption": "A cat."}], "caption.json")
    bench.annotations([{"text": " ".join(map(str, range(60)))}], "text.json")
    (bench.path / "prompts.txt").write_text("What is it?\n")
    caption = {"annotation_path": "caption.json", "data_path": "images", "schema": "caption"}
    text = {"annotation_path": "text.json", "schema": "text"}
    registry = write_registry(
        bench.path,
        asked=caption | {"caption_prompts": "prompts.txt"},
        shared=caption,
        short=text | {"max_document_tokens": 20},
        long=text,
    )
    shared = SchemaOptions(prompts=("Describe it.",), max_document_tokens=50)
    sources = data_list(["asked", "shared", "short", "long"], registry, shared)
    assert [source.schema.prompts for source in sources[:2]] == [("What is it?",), ("Describe it.",)]
    preprocess(sources, bench.tokenizer, bench.path / "shards", bench.settings)
    shards = ShardSet(bench.path / "shards")
    longest = [int(max(shards.shard(number).tokens.lengths)) for number in (2, 3)]
    assert longest == [20, 50]
    assert shards.manifest["sources"][2]["max_document_tokens"] == 20
    assert PreprocessConfig(**shards.manifest["settings"]) == bench.settings
