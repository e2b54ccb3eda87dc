"""Keys of other projects are honoured, or reject the sample, or are reported; keys are never dropped silently."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.paths import TESTS

from neo_megatron.data.chat import ChatEncoder, load_tokenizer, special_ids
from neo_megatron.data.prepare.record_keys import ignored_keys
from neo_megatron.data.prepare.records import Sample, check_answers, check_sample
from neo_megatron.data.prepare.registry import Source
from neo_megatron.data.tags import split_tags
from neo_megatron.errors import Reason, RejectedSample

CASES = TESTS / "data" / "cases"


@pytest.fixture
def source(tmp_path):
    """An annotation file without images, because these checks do not open images."""
    (tmp_path / "train.json").write_text("[{}]")
    return Source("train", str(tmp_path / "train.json"))


def turns(*texts: str, **of_last) -> list[dict]:
    found = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    found[-1] |= of_last
    return found


def sample(**keys) -> dict:
    return {"conversations": turns("Hi", "Hello!"), **keys}


def rejected(written: dict, source: Source) -> RejectedSample:
    with pytest.raises(RejectedSample) as raised:
        check_sample(written, source)
    return raised.value


def case(name: str, source: Source) -> list[Sample | RejectedSample]:
    """The results for the records of a case."""
    found = []
    for line in (CASES / f"{name}.jsonl").read_text().splitlines():
        try:
            found.append(check_sample(json.loads(line), source))
        except RejectedSample as error:
            found.append(error)
    return found


def names(paths: tuple[str, ...]) -> list[str]:
    return [Path(path).name for path in paths]


@pytest.mark.parametrize("key", ["image", "images", "image_path", "img", "image_file"])
@pytest.mark.parametrize("value", ["a.jpg", ["a.jpg"]])
def test_keys_of_images_mean_the_same(source, key, value):
    checked = check_sample(sample(**{key: value}), source)
    assert names(checked.images) == ["a.jpg"] and checked.turns[0].text == "<image>\nHi"


@pytest.mark.parametrize("key", ["video", "videos", "video_path"])
def test_keys_of_videos_mean_the_same(source, key):
    assert names(check_sample(sample(**{key: ["a.mp4"]}), source).videos) == ["a.mp4"]


@pytest.mark.parametrize("value", ["", [], None, {}])
@pytest.mark.parametrize("key", ["image", "images", "videos", "audios", "tools", "system", "objects"])
def test_empty_values_are_ignored(source, key, value):
    checked = check_sample(sample(**{key: value}), source)
    assert checked == check_sample(sample(), source) and not checked.images


def test_two_keys_for_the_same_files_agree_or_reject(source):
    assert names(check_sample(sample(image="a.jpg", images=["a.jpg"]), source).images) == ["a.jpg"]
    assert names(check_sample(sample(image=None, images=["a.jpg"]), source).images) == ["a.jpg"]
    assert (
        "'image' and 'images' list different files" in rejected(sample(image="a.jpg", images="b.jpg"), source).sentence
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("audio", "a.wav"),
            ("audios", ["a.wav"]),
            ("speech", "a.wav"),
            ("imageList", ["a.jpg"]),
            ("image_name", "a"),
        ),
        *(("Images", ["a.jpg"]), ("image1", "a.jpg"), ("pixel_values", [[1]]), ("video_frames", ["a.jpg"])),
        *(("bbox", [[1, 2, 3, 4]]), ("objects", {"bbox": [[1, 2, 3, 4]]}), ("segmentation", "mask.png")),
        *(("tools", "[]"), ("tools", [{"name": "f"}]), ("functions", "[{}]"), ("tool_calls", [{}]), ("plugin", "x")),
        *(("system_instructions", "s"), ("mask", "User"), ("sample_weight", 0.5), ("loss_weights", [0, 1])),
        *(("kto_tag", False), ("chosen", {"value": "x"}), ("rejected", "x"), ("rejected_response", "x")),
    ],
)
def test_keys_that_change_what_is_learned_are_rejected(source, key, value):
    for written in (sample(**{key: value}), {"conversations": turns("Hi", "Hello!", **{key: value})}):
        error = rejected(written, source)
        assert error.reason == Reason.UNSUPPORTED_KEY and f"the key {key!r}" in error.sentence


@pytest.mark.parametrize("key", ["image", "images", "video", "system"])
def test_media_keys_of_a_turn_are_rejected(source, key):
    assert f"turn 0 has the key {key!r}" in rejected({"conversations": turns("Hi", **{key: "a"})}, source).sentence


@pytest.mark.parametrize(
    "key", ["image_id", "image_width", "video_duration", "num_tools", "train_split", "imageSource"]
)
def test_keys_that_describe_media_are_accepted(source, key):
    check_sample(sample(**{key: "x"}), source)
    assert ignored_keys(sample(**{key: "x"})) == [key]


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_prompt_is_the_first_turn(source, key):
    first = check_sample(sample(**{key: "You are a pirate; say <image>"}), source).turns[0]
    assert (first.role, first.literal, first.trained) == ("system", "You are a pirate; say <image>", False)


def test_equal_system_prompts_are_merged(source):
    written = {"system": "s", "conversations": [{"from": "system", "value": "s"}, *turns("Hi", "Hello!")]}
    assert [turn.role for turn in check_sample(written, source).turns] == ["system", "user", "assistant"]
    assert "differ" in rejected(written | {"system": "other"}, source).sentence
    assert "'system' of the sample must be a string" in rejected(sample(system=["s"]), source).sentence


@pytest.mark.parametrize("key", ["weight", "loss", "train", "trainable", "loss_weight", "loss_mask", "training"])
@pytest.mark.parametrize(("value", "trained"), [(0, False), (0.0, False), (False, False), (1, True), (True, True)])
def test_weights_of_turns_are_honoured(source, key, value, trained):
    checked = check_sample({"conversations": [*turns("a", "b", **{key: value}), *turns("c", "d")]}, source)
    assert [turn.trained for turn in checked.turns] == [False, trained, False, True]


@pytest.mark.parametrize("key", ["weight", "loss", "loss_mask", "train"])
@pytest.mark.parametrize("value", [0.5, 2, -1, "0", "false", [0, 1], float("nan")])
def test_unsupported_weights_are_rejected(source, key, value):
    for written in (sample(**{key: value}), {"conversations": turns("a", "b", **{key: value})}):
        assert repr(key) in rejected(written, source).sentence


def test_weights_that_cannot_be_honoured_are_rejected(source):
    assert "'weight' says" in rejected({"conversations": [*turns("a", weight=1), *turns("a", "b")]}, source).sentence
    both = {"conversations": turns("a", "b", is_input=True, train=True)}
    assert "both trained on and not: 'is_input', 'train'" in rejected(both, source).sentence
    assert rejected(sample(train=False), source).reason == Reason.NOTHING_TRAINED
    assert check_sample(sample(weight=1), source) == check_sample(sample(), source)


def test_ignored_keys_are_listed(source):
    written = {**sample(id=7, width=3, note="x", empty=None, url="u"), "images": []}
    written["conversations"][1] |= {"answers": ["x"], "name": "bot"}
    check_sample(written, source)
    assert ignored_keys(written) == ["note", "url", "conversations[].name"]


def test_formats_of_other_projects_are_rejected_with_a_remedy(source):
    messages = {"messages": [{"role": "user", "content": "Hi"}]}
    assert "its keys are 'messages'" in rejected(messages, source).sentence
    assert "rename 'role' to 'from'" in rejected({"conversations": messages["messages"]}, source).sentence


@pytest.mark.parametrize(
    "text",
    [
        "Image 1: <img>a.jpg</img>\nWhat is it?",
        "<image>a.jpg</image>",
        "(<image>./</image>)",
        "<audio>a.wav</audio>",
        "<video>a.mp4</video>",
        f"![](data:image/png;base64,{'A' * 80})",
    ],
)
def test_media_in_the_text_are_rejected(source, text):
    error = rejected({"conversations": turns(text, "ok"), "image": []}, source)
    assert error.reason == Reason.INLINE_MEDIA
    assert re.search("<img>a.jpg</img>|/</image>|<(image|audio|video)>a|data:image/png;base64,AAAA", error.sentence)
    check_sample({"conversations": turns("Hi", text.replace("<image>", r"\<image>"))}, source)  # answers are text


@pytest.mark.parametrize(
    "text",
    [
        *("<img>", "<|image_pad|>", "<|vision_start|>", "[IMG]", "<ImageHere>", "<image_placeholder>", "<image1>"),
        *("<image 1>", "<|image_1|>", "<start_of_image>", "<IMG_CONTEXT>", "<Image>", "<im_patch>", "[IMG_2]"),
    ],
)
def test_placeholders_of_other_projects_are_reported_without_tags(source, text):
    assert check_sample({"conversations": turns(f"{text} what?", "x"), "image": "a.jpg"}, source).placeholder == text
    with_tag = {"conversations": turns(f"<image>{text} what?", "x"), "image": "a.jpg"}
    assert not check_sample(with_tag, source).placeholder


def test_the_message_about_missing_tags_names_a_placeholder(source):
    error = rejected({"conversations": turns("<ImageHere> <ImageHere>", "x"), "image": ["a.jpg", "b.jpg"]}, source)
    assert "its text has '<ImageHere>', a placeholder of another project: write <image>" in error.sentence
    error = rejected({"conversations": turns("What is <image> in RSS?", "x")}, source)
    assert r"a <image> that is meant as text is written \<image>" in error.sentence


@pytest.mark.parametrize("text", ["<|im_start|>", "a < image", r"\<image>", "<imagine>", "[image of a cat]", "<html>"])
def test_other_text_is_not_a_placeholder(source, text):
    assert not check_sample({"conversations": turns(text, "x"), "image": "a.jpg"}, source).placeholder


@pytest.mark.parametrize("answer", ["", " \n\t", "\u3000", "\u200b"])
def test_blank_answers_are_rejected(source, answer):
    checked = check_sample({"system": "s", "conversations": [*turns("a", "b"), *turns("c", answer)]}, source)
    with pytest.raises(RejectedSample, match="turn 3 is an empty answer") as raised:
        check_answers(checked)
    assert raised.value.reason == Reason.EMPTY_ANSWER
    check_answers(check_sample({"conversations": [*turns("c", answer, train=0), *turns("a", "b")]}, source))


def test_recorded_cases_of_keys(source):
    images, path, videos = case("01_images_key", source)
    assert names(images.images) == names(path.images) == ["a.jpg"] and names(videos.videos) == ["a.mp4"]
    (inline,) = case("02_qwenvl_inline_img", source)
    assert "<img>a.jpg</img>" in inline.sentence
    (tools,) = case("03_top_level_system", source)
    assert "'tools'" in tools.sentence
    (weights,) = case("06_turn_weight_loss_train", source)
    assert [turn.trained for turn in weights.turns[1::2]] == [False, False, False, True]
    (empty,) = case("08_image_empty_string", source)
    assert not empty.images


def test_recorded_cases_of_tags(source):
    for name in ("04_tag_only_in_answer", "05_image_in_gpt_turn_trained"):
        (error,) = case(name, source)
        assert error.reason == Reason.IMAGE_COUNT
        assert "of turn 1 is in an assistant turn" in error.sentence and r"\<image>" in error.sentence
    first, second, third = case("09_literal_tag_in_text", source)
    assert first.turns[1].literal == "<rss><image><url>x</url></image></rss>" and not first.images
    assert second.turns[1].literal == "use <video>" and names(third.images) == ["a.jpg"]
    assert third.turns[1].literal == "![fig](<image>)"
    said = [turn.text for checked in (first, second, third) for turn in checked.turns if turn.role == "assistant"]
    assert all(split_tags(text) == ["".join(split_tags(text))] for text in said)  # no reader finds a place in them


def test_an_escaped_tag_in_the_answer_leaves_the_image_to_the_question(source):
    checked = check_sample({"image": "a.jpg", "conversations": turns("Parse", r"![fig](\<image>)")}, source)
    assert checked.turns[0].text == "<image>\nParse" and checked.turns[1].literal == "![fig](<image>)"


@pytest.fixture(scope="module")
def encoder(tokenizer):
    neo = load_tokenizer(tokenizer)
    return ChatEncoder(neo.backend_tokenizer.to_str(), special_ids(neo)), special_ids(neo), neo


words = st.lists(st.sampled_from(["<image>", "<video>", "\\", "a", "\n", "<img>"]), max_size=6).map("".join)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=3))
def test_image_tokens_are_never_targets(source_of_module, encoder, pairs):
    """For any text: there are as many images as tags of users, the rest is text, and only text is a target."""
    chat, ids, tokenizer = encoder
    conversation = [turn for pair in pairs for turn in turns(*pair)]
    try:
        checked = check_sample({"conversations": conversation, "image": ["a.jpg", "b.jpg"]}, source_of_module)
    except RejectedSample as error:
        assert error.reason in (Reason.IMAGE_COUNT, Reason.VIDEO_COUNT, Reason.INLINE_MEDIA)
        return
    (encoded,) = chat.encode([(checked.turns, [3, 5])])
    trained = [token for start, end in encoded.spans for token in encoded.tokens[start:end].tolist()]
    assert encoded.tokens.tolist().count(ids.image_context) == 8 and ids.image_context not in trained
    assert ids.image_start not in trained and ids.image_end not in trained
    answers = "".join(f"{turn.literal}<|im_end|>\n" for turn in checked.turns if turn.trained)
    assert tokenizer.decode(trained) == answers


@pytest.fixture(scope="module")
def source_of_module(tmp_path_factory):
    path = tmp_path_factory.mktemp("properties") / "train.json"
    path.write_text("[{}]")
    return Source("train", str(path))
