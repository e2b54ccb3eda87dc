"""How a task's texts and images become turns with tags."""

import pytest

from neo_megatron.data.conversation import Turn
from neo_megatron.errors import DataError
from neo_megatron.lmms_eval_plugin.conversations import messages_of, turns_and_images

FIRST, SECOND = "first.png", "second.png"


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def image(path: str) -> dict[str, str]:
    return {"type": "image", "url": path}


@pytest.mark.parametrize(
    ("content", "expected", "images"),
    [
        ("Hi", "Hi", []),
        ([text("Hi")], "Hi", []),
        ([image(FIRST), text("What?")], "<image>\nWhat?", [FIRST]),
        ([image(FIRST), image(SECOND), text("Same?")], "<image>\n<image>\nSame?", [FIRST, SECOND]),
        (
            [text("Is "), image(FIRST), text(" like "), image(SECOND), text("?")],
            "Is <image> like <image>?",
            [FIRST, SECOND],
        ),
        ([image(FIRST), text("and "), image(SECOND)], "<image>\nand <image>", [FIRST, SECOND]),
    ],
)
def test_an_image_stands_where_the_message_has_it(content, expected, images):
    assert turns_and_images([{"role": "user", "content": content}]) == ([Turn("user", expected, False)], images, 0)


def test_as_many_tags_as_images_are_their_places():
    """In front, or among the pieces: the text says where its images belong."""
    turns, images, stray = turns_and_images(messages_of("Is <image> like <image>?", [FIRST, SECOND]))
    assert (turns[0].text, images, stray) == ("Is <image> like <image>?", [FIRST, SECOND], 0)


@pytest.mark.parametrize(("visuals", "expected"), [(None, "A or B?"), ([FIRST, SECOND], "<image>\n<image>\nA or B?")])
def test_another_number_of_tags_is_left_over_from_elsewhere(visuals, expected):
    turns, images, stray = turns_and_images(messages_of("<image>A or B?", visuals))
    assert (turns[0].text, images, stray) == (expected, visuals or [], 1)


def test_turns_keep_their_order_and_the_system_prompt_of_the_command_line_wins():
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image(FIRST), text("What?")]},
        {"role": "assistant", "content": [text("A dog.")]},
        {"role": "user", "content": [text("And "), image(SECOND)]},
    ]
    roles = ["system", "user", "assistant", "user"]
    turns, images, _ = turns_and_images(conversation)
    assert [turn.role for turn in turns] == roles and turns[0].text == "Be brief." and images == [FIRST, SECOND]
    turns, _, _ = turns_and_images(conversation, "Think.")
    assert [turn.role for turn in turns] == roles and turns[0].text == "Think."
    assert turns_and_images(conversation[1:2], "Think.")[0][0] == Turn("system", "Think.", False)


@pytest.mark.parametrize(
    "part", [{"type": "video", "url": "clip.mp4"}, {"type": "audio", "url": "a.wav"}, image({"array": [0.0]})]
)
def test_only_images_and_text(part):
    with pytest.raises(DataError, match="answers questions about images and text"):
        turns_and_images([{"role": "user", "content": [part, text("What?")]}])


@pytest.mark.parametrize(
    ("words", "visuals", "expected", "stray"),
    [
        (r"Is \<image> a tag?", [FIRST], "<image>\n" + r"Is \<image> a tag?", 0),
        (r"Is \<image> a tag, in <image>?", [FIRST], r"Is \<image> a tag, in <image>?", 0),
        (r"<image>Is \<image> a tag?", None, r"Is \<image> a tag?", 1),
        (r"Is <video> a tag, or \<video>?", None, r"Is \<video> a tag, or \<video>?", 0),
    ],
)
def test_a_tag_can_be_a_word(words, visuals, expected, stray):
    turns, images, taken_out = turns_and_images(messages_of(words, visuals))
    assert (turns[0].text, images, taken_out) == (expected, visuals or [], stray)


def test_what_assistants_and_system_prompts_say_is_text():
    conversation = [
        {"role": "user", "content": [image(FIRST), text("What?")]},
        {"role": "assistant", "content": r"An <image>, or \<image>."},
    ]
    turns, images, stray = turns_and_images(conversation, "Mind <image>.")
    assert [turn.literal for turn in turns[::2]] == ["Mind <image>.", "An <image>, or <image>."]
    assert (images, stray) == ([FIRST], 0) and "".join(turn.text for turn in turns).count(r"\<image>") == 3
    with pytest.raises(DataError, match="an image that the assistant says"):
        turns_and_images([{"role": "assistant", "content": [image(FIRST)]}])
