"""Symbolic links in an image root are rejected and named, or trusted with ``follow_links``."""

import json
import os
from pathlib import Path

import pytest

from neo_megatron.data.prepare.media_paths import resolve_path
from neo_megatron.data.prepare.registry import Source, data_list
from neo_megatron.errors import DataError, Reason, RejectedSample


@pytest.fixture
def root(tmp_path, new_png) -> Path:
    """The usual layout of LLaVA: a directory of links to data sets on another disk."""
    for name in ("disk/train2017/1.png", "disk/secret.png", "data/vg/2.png", "data/3.png", "elsewhere/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(new_png())
    (tmp_path / "data" / "coco").mkdir()
    (tmp_path / "data" / "coco" / "train2017").symlink_to("../../disk/train2017")
    (tmp_path / "data" / "file.png").symlink_to(tmp_path / "disk" / "secret.png")
    (tmp_path / "disk" / "train2017" / "further").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "inner").symlink_to("vg")
    (tmp_path / "data" / "up").symlink_to("..")
    (tmp_path / "notes.json").write_text("[]")
    (tmp_path / "root_link").symlink_to("data")
    return tmp_path / "data"


def source(root: Path, follow: bool = True) -> Source:
    return Source("s", str(root.parent / "notes.json"), str(root), follow_links=follow)


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("coco/train2017/1.png", "disk/train2017/1.png"),
        ("./coco//train2017/1.png", "disk/train2017/1.png"),
        ("vg/../coco/train2017/1.png", "disk/train2017/1.png"),
        ("vg/../coco/../coco/train2017/1.png", "disk/train2017/1.png"),
        ("coco/train2017/further/4.png", "elsewhere/4.png"),
        ("coco/train2017/further/none.png", "elsewhere/none.png"),
        ("file.png", "disk/secret.png"),
        ("up/disk/secret.png", "disk/secret.png"),
        ("{root}/coco/train2017/1.png", "disk/train2017/1.png"),
    ],
)
def test_trusted_links_are_followed(root, path, target):
    path = path.format(root=root)
    assert resolve_path(path, source(root)) == os.path.realpath(root.parent / target)
    linked = Source("s", str(root.parent / "notes.json"), str(root.parent / "root_link"), follow_links=True)
    assert resolve_path(path.replace(str(root), linked.image_root), linked) == os.path.realpath(root.parent / target)
    with pytest.raises(RejectedSample) as raised:
        resolve_path(path, source(root, follow=False))
    assert raised.value.reason == Reason.OUTSIDE_ROOT
    assert "is a link to" in raised.value.sentence and "--follow-links" in raised.value.sentence


def test_the_sentence_names_the_link_and_where_it_leads(root):
    with pytest.raises(RejectedSample) as raised:
        resolve_path("coco/train2017/1.png", source(root, follow=False))
    assert f"{root}/coco/train2017 is a link to {root.parent}/disk/train2017" in raised.value.sentence


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize(
    "path",
    [
        "../disk/secret.png",
        "vg/../../disk/secret.png",
        "coco/train2017/../secret.png",
        "coco/train2017/further/../train2017/1.png",
        "coco/../../disk/train2017/1.png",
        "/etc/hostname",
        "{root}/../disk/secret.png",
        "{root}/coco/train2017/../secret.png",
        "{root}2/1.png",
        "..",
    ],
)
def test_paths_that_leave_the_root_without_a_link_are_always_rejected(root, path, follow):
    with pytest.raises(RejectedSample) as raised:
        resolve_path(path.format(root=root), source(root, follow))
    assert raised.value.reason == Reason.OUTSIDE_ROOT and "--follow-links" not in raised.value.sentence


@pytest.mark.parametrize("follow", [False, True])
def test_links_within_the_root_are_always_followed(root, follow):
    for path in ("inner/2.png", "up/data/3.png", "up/data/inner/2.png"):
        assert resolve_path(path, source(root, follow)) == os.path.realpath(root / path)


def test_links_next_to_the_annotations_are_checked(root):
    (root.parent / "out.png").symlink_to("/etc/hostname")
    notes = str(root.parent / "notes.json")
    assert resolve_path("out.png", Source("s", notes, follow_links=True)) == "/etc/hostname"
    with pytest.raises(RejectedSample, match="is a link to /etc/hostname"):
        resolve_path("out.png", Source("s", notes))


@pytest.mark.slow
def test_the_tool_follows_links_and_records_it(root, bench, new_sample, run_tool):
    notes = bench.annotations([new_sample("<image>q", "a", image="coco/train2017/1.png")], "llava.json")
    flags = (
        "preprocess_data.py",
        "--input",
        notes,
        "--image-root",
        root,
        "--tokenizer",
        bench.tokenizer,
        "--workers",
        1,
    )
    run_tool(*flags, "--output", bench.path / "strict")
    (reject,) = bench.rejects("strict")
    assert reject["kind"] == "path outside the root" and "--follow-links" in reject["reason"]
    done = run_tool(*flags, "--output", bench.path / "trusting", "--follow-links")
    assert done.returncode == 0, done.stderr
    assert bench.rejects("trusting") == []
    manifest = json.loads((bench.path / "trusting" / "manifest.json").read_text())
    assert manifest["counts"]["samples_kept"] == 1 and manifest["sources"][0]["follow_links"] is True


def test_a_registry_can_trust_links(root, tokenizer, run_tool):
    registry = root.parent / "r.yaml"
    entry = "{annotation_path: notes.json, data_path: data, follow_links: %s}"
    registry.write_text(f"a: {entry % 'true'}\nb: {entry % 'false'}\nc: {{annotation_path: notes.json}}\n")
    assert [s.follow_links for s in data_list(["a", "b", "c"], registry)] == [True, False, False]
    registry.write_text(f"a: {entry % 'maybe'}\n")
    with pytest.raises(DataError, match="follow_links must be true or false"):
        data_list(["a"], registry)
    flags = (
        "--registry",
        registry,
        "--datasets",
        "a",
        "--tokenizer",
        tokenizer,
        "--output",
        root / "o",
        "--follow-links",
    )
    assert "a registry has follow_links" in run_tool("preprocess_data.py", *flags).stderr
