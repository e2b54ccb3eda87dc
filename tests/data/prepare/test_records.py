"""Records: roles, tags and images, and paths that stay inside their root."""

import copy
import os

import pytest

from neo_megatron.data.conversation import Turn
from neo_megatron.data.prepare.records import check_sample, parse_record
from neo_megatron.data.prepare.registry import Source
from neo_megatron.errors import Reason, RejectedSample


@pytest.fixture
def source(tmp_path, new_png):
    """Annotations in ``notes/``, images in ``root/``, and an image outside both."""
    for path in ("root/a.png", "root/sub/b.png", "outside.png", "notes/near.png"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(new_png())
    (tmp_path / "notes" / "train.json").write_text("[]")
    (tmp_path / "root" / "link.png").symlink_to(tmp_path / "outside.png")
    (tmp_path / "root" / "inner.png").symlink_to("sub/b.png")
    (tmp_path / "root" / "away").symlink_to(tmp_path)
    (tmp_path / "root" / "sub" / "away").symlink_to(tmp_path / "notes")
    return Source("train", str(tmp_path / "notes" / "train.json"), str(tmp_path / "root"))


def reason(sample: object, source: Source) -> Reason:
    with pytest.raises(RejectedSample) as raised:
        check_sample(sample, source)
    assert "\n" not in raised.value.sentence
    return raised.value.reason


def turns(*pairs: tuple[str, str], **keys) -> dict:
    return {"conversations": [{"from": role, "value": text} for role, text in pairs], **keys}


def test_both_spellings_of_roles_are_accepted(source):
    pairs = [("system", "Be brief."), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")]
    checked = check_sample(turns(*pairs), source)
    assert [turn.role for turn in checked.turns] == ["system", "user", "assistant", "user", "assistant"]
    assert [turn.trained for turn in checked.turns] == [False, False, True, False, True]


def test_input_turns_are_not_trained(source):
    sample = turns(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"))
    sample["conversations"][1]["is_input"] = True
    assert [turn.trained for turn in check_sample(sample, source).turns] == [False, False, False, True]
    sample["conversations"][3]["is_input"] = True
    assert reason(sample, source) == Reason.NOTHING_TRAINED


@pytest.mark.parametrize("image", ["a.png", ["a.png"]])
def test_single_image_without_a_tag_goes_to_the_first_human_turn(source, image):
    sample = turns(
        ("system", "s"), ("human", "What?"), ("gpt", "That."), ("human", "And?"), ("gpt", "This."), image=image
    )
    before = copy.deepcopy(sample)
    for _ in range(2):  # a record can be read twice, because it is not changed
        checked = check_sample(sample, source)
        assert checked.turns[1] == Turn("user", "<image>\nWhat?", False)
        assert checked.turns[3].text == "And?"
    assert sample == before


def test_tag_in_a_later_turn_stays_where_it_is(source):
    sample = turns(("human", "Ready?"), ("gpt", "Yes."), ("human", "So <image> what?"), ("gpt", "That."), image="a.png")
    checked = check_sample(sample, source)
    assert [turn.text for turn in checked.turns] == ["Ready?", "Yes.", "So <image> what?", "That."]


def test_several_images_keep_their_order(source, tmp_path):
    checked = check_sample(turns(("human", "<image><image>"), ("gpt", "ok"), image=["sub/b.png", "a.png"]), source)
    assert checked.images == (str(tmp_path / "root/sub/b.png"), str(tmp_path / "root/a.png"))


@pytest.mark.parametrize(
    ("text", "image"),
    [
        ("<image> <image>", "a.png"),
        ("<image>", ["a.png", "a.png"]),
        ("no tag", ["a.png", "a.png"]),
        ("<image>", None),
        ("<image>", []),
    ],
)
def test_images_and_tags_must_agree(source, text, image):
    assert reason(turns(("human", text), ("gpt", "ok"), image=image), source) == Reason.IMAGE_COUNT


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (turns(("robot", "a"), ("gpt", "b")), Reason.UNKNOWN_ROLE),
        (turns((None, "a"), ("gpt", "b")), Reason.UNKNOWN_ROLE),
        (turns(([], "a"), ("gpt", "b")), Reason.UNKNOWN_ROLE),
        (turns(), Reason.EMPTY_CONVERSATION),
        ({}, Reason.EMPTY_CONVERSATION),
        ({"conversations": None}, Reason.EMPTY_CONVERSATION),
        (turns(("human", "a")), Reason.NOTHING_TRAINED),
        (turns(("human", "a"), ("gpt", None)), Reason.MALFORMED),
        (turns(("human", "a"), ("gpt", "half \ud800 pair")), Reason.MALFORMED),
        ({"conversations": "Hi"}, Reason.MALFORMED),
        ({"conversations": ["Hi"]}, Reason.MALFORMED),
        ({"conversations": [{"from": "gpt", "value": "a", "is_input": "no"}]}, Reason.MALFORMED),
        (turns(("human", "<video> <video>"), ("gpt", "b"), video="clip.mp4"), Reason.VIDEO_COUNT),
        (turns(("human", "<video>"), ("gpt", "b")), Reason.VIDEO_COUNT),
        (turns(("human", "a"), ("gpt", "b"), video=["a.mp4", "b.mp4"]), Reason.VIDEO_COUNT),
        (turns(("human", "a"), ("gpt", "b"), video={"path": "a.mp4"}), Reason.MALFORMED),
        (turns(("human", "a"), ("gpt", "b"), video="rtsp://example.org/a.mp4"), Reason.REMOTE_PATH),
        (turns(("human", "a"), ("gpt", "b"), video="../a.mp4"), Reason.OUTSIDE_ROOT),
        (turns(("human", "a"), ("gpt", "b"), image=7), Reason.MALFORMED),
        (turns(("human", "a"), ("gpt", "b"), image=["a.png", None]), Reason.MALFORMED),
        (turns(("human", "a"), ("gpt", "b"), image="a\0.png"), Reason.MALFORMED),
        (turns(("human", "a"), ("gpt", "b"), image="\ud800.png"), Reason.MALFORMED),
        (turns(("human", "a"), ("gpt", "b"), image="https://example.org/a.png"), Reason.REMOTE_PATH),
        (turns(("human", "a"), ("gpt", "b"), video="data:image/png;base64,AAAA"), Reason.REMOTE_PATH),
        (turns(("human", "a"), ("gpt", "b"), image="s3://bucket/a.png"), Reason.REMOTE_PATH),
        (turns(("human", "a"), ("gpt", "b"), image="data:image/png;base64,A A="), Reason.UNREADABLE_IMAGE),
        (turns(("human", "a"), ("gpt", "b"), image="part.tar/a.png"), Reason.ARCHIVE_PATH),
        (turns(("human", "a"), ("gpt", "b"), image="sub/part.tar.gz/x/a.png"), Reason.ARCHIVE_PATH),
        (turns(("human", "a"), ("gpt", "b"), image="a.ZIP"), Reason.ARCHIVE_PATH),
        (turns(("human", "a"), ("gpt", "b"), image="x.zip/y.tgz/a.png"), Reason.ARCHIVE_PATH),
        (turns(("human", "a"), ("gpt", "b"), image="../outside.png"), Reason.OUTSIDE_ROOT),
        (turns(("human", "a"), ("gpt", "b"), image=".."), Reason.OUTSIDE_ROOT),
        (turns(("human", "a"), ("gpt", "b"), image="away/outside.png"), Reason.OUTSIDE_ROOT),
        (turns(("human", "a"), ("gpt", "b"), image="sub/away/../a.png"), Reason.OUTSIDE_ROOT),
        (turns(("human", "a"), ("gpt", "b"), image="sub/../../outside.png"), Reason.OUTSIDE_ROOT),
        (turns(("human", "a"), ("gpt", "b"), image="/etc/passwd"), Reason.OUTSIDE_ROOT),
        (turns(("human", "a"), ("gpt", "b"), image="link.png"), Reason.OUTSIDE_ROOT),
        ("text", Reason.MALFORMED),
        ([], Reason.MALFORMED),
        (None, Reason.MALFORMED),
    ],
)
def test_bad_samples_are_rejected_with_their_reason(source, sample, expected):
    assert reason(sample, source) == expected


def test_a_sibling_directory_with_the_roots_prefix_is_outside(source, tmp_path):
    (tmp_path / "root2").mkdir()
    assert reason(turns(("human", "a"), ("gpt", "b"), image="../root2/a.png"), source) == Reason.OUTSIDE_ROOT


@pytest.mark.parametrize("path", ["inner.png", "sub/../sub/b.png", "{root}/sub/b.png"])
def test_paths_that_stay_inside_are_followed(source, tmp_path, path):
    path = path.format(root=tmp_path / "root")
    checked = check_sample(turns(("human", "a"), ("gpt", "b"), image=path), source)
    assert checked.images == (str(tmp_path / "root/sub/b.png"),)


def test_a_relative_root_is_relative_to_the_working_directory(source, tmp_path, monkeypatch):
    sample = turns(("human", "a"), ("gpt", "b"), image="a.png")
    for directory in ("one", "two"):
        (tmp_path / directory / "root").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / directory)
        checked = check_sample(sample, Source("train", source.annotations, "root"))
        assert checked.images == (str(tmp_path / directory / "root" / "a.png"),)


def test_a_directory_named_as_an_archive_is_a_directory(source, tmp_path, new_png):
    (tmp_path / "root" / "part.tar" / "x").mkdir(parents=True)
    (tmp_path / "root" / "part.tar" / "x" / "a.png").write_bytes(new_png())
    checked = check_sample(turns(("human", "a"), ("gpt", "b"), image="part.tar/x/a.png"), source)
    assert checked.images == (str(tmp_path / "root/part.tar/x/a.png"),)


def test_a_link_that_is_created_later_is_detected(source, tmp_path):
    """Directories are cached but files are not: each is checked when it is used."""
    sample = turns(("human", "a"), ("gpt", "b"), image="a.png")
    assert check_sample(sample, source).images == (str(tmp_path / "root/a.png"),)
    (tmp_path / "root" / "a.png").unlink()
    (tmp_path / "root" / "a.png").symlink_to(tmp_path / "outside.png")
    assert reason(sample, source) == Reason.OUTSIDE_ROOT


def test_single_video_without_a_tag_goes_to_the_first_human_turn(source, tmp_path):
    sample = turns(("system", "s"), ("human", "What?"), ("gpt", "That."), video="clip.mp4", image="a.png")
    checked = check_sample(sample, source)
    assert checked.turns[1] == Turn("user", "<image>\n<video>\nWhat?", False)
    assert (checked.images, checked.videos) == ((str(tmp_path / "root/a.png"),), (str(tmp_path / "root/clip.mp4"),))


def test_without_a_root_paths_are_absolute_or_next_to_the_annotations(source, tmp_path):
    source = Source("train", source.annotations)
    for path, found in (("near.png", "notes/near.png"), (str(tmp_path / "outside.png"), "outside.png")):
        checked = check_sample(turns(("human", "a"), ("gpt", "b"), image=path), source)
        assert checked.images == (os.path.realpath(tmp_path / found),)
    assert reason(turns(("human", "a"), ("gpt", "b"), image="../outside.png"), source) == Reason.OUTSIDE_ROOT


@pytest.mark.parametrize(
    "line", [b"{", b"nested too deeply", b"[" * 100000, b"\xff\xfe", b'{"a": 1} {"b": 2}', None, b"9" * 5000]
)
def test_broken_lines_are_broken_json(line):
    with pytest.raises(RejectedSample) as raised:
        list(parse_record(line))
    assert raised.value.reason == Reason.BROKEN_JSON


def test_list_packed_records_have_elements():
    assert list(parse_record(b'[{"a": 1}, {"b": 2}]')) == [(0, {"a": 1}), (1, {"b": 2})]
    assert list(parse_record(b'{"a": 1}')) == [(None, {"a": 1})]
    with pytest.raises(RejectedSample, match="empty"):
        list(parse_record(b"[]"))
