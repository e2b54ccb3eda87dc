"""Prompts in the forms of the published kits, compared with what the kits' own functions made."""

import json
from fractions import Fraction

import pytest
from support.paths import GOLDEN

from neo_megatron.data.config import PreprocessConfig
from neo_megatron.data.conversation import Turn
from neo_megatron.data.prepare.video_text import text_of_clip
from neo_megatron.data.tags import as_literal, split_tags
from neo_megatron.data.video import Clip
from neo_megatron.inference.answering import Answerer
from neo_megatron.inference.prompt_forms import arranged
from neo_megatron.inference.prompts import new_prompt

CASES = {case["name"]: case for case in json.loads((GOLDEN / "u1" / "neo1_5_prompts.json").read_text())}
IMAGES = [name for name, case in CASES.items() if case["dataset"] in ("MMStar", "BLINK", "MUIRBench")]
# Kit -> form of its questions about images; about those of MUIRBench, whose places the kit of NEO 1.0 drops.
FORMS = {
    "NEO-ov": ("in-order", "referenced"),
    "NEO-ov spatial": ("numbered", "referenced"),
    "NEO 1.0": ("numbered", None),
}
# (case of a video, kit) -> form of its frames.
VIDEO_FORMS = {
    ("video with time stamps (Video-MME), 3 of 300 frames at 25 fps", "NEO-ov"): "timestamps",
    ("video with time stamps (Video-MME), 3 of 300 frames at 25 fps", "NEO-ov spatial"): "frame-timestamps",
    ("video without time stamps (MVBench), 3 frames", "NEO-ov"): "images",
    ("video without time stamps (MVBench), 3 frames", "NEO-ov spatial"): "frames",
    ("video without time stamps (MVBench), 3 frames", "NEO 1.0"): "frames",
    ("frames without time (VSI-Bench), 3 frames", "NEO-ov spatial"): "frames",
    ("frames without time (VSI-Bench), 3 frames", "NEO 1.0"): "frames",
}


def record_of(message: list[dict]) -> str:
    """The turn of a record with the texts and images of a message."""
    return "".join(as_literal(part["value"]) if part["type"] == "text" else "<image>" for part in message)


@pytest.mark.parametrize(
    ("name", "kit"), [(name, kit) for name in IMAGES for kit in FORMS if FORMS[kit]["MUIRBench" in name]]
)
def test_published_places_of_images(name, kit):
    case = CASES[name]
    form = FORMS[kit]["MUIRBench" in name]
    expected = case[f"prompt_{kit}"]
    if "the word frame" in name and kit == "NEO-ov":
        assert "<image>" not in expected, (
            "a fault of the kit: a path with this word gets no tag, so nothing can be asked"
        )
        expected = next(other for other in CASES.values() if other["dataset"] == case["dataset"])[f"prompt_{kit}"]
    turn = arranged(Turn("user", record_of(case["message"]), False), form)
    assert "".join(split_tags(turn.text)) == expected


def question_of(case: dict, kit: str) -> str:
    """The texts of a message after its frames, as docs/evaluation.md says what the kits do to them."""
    texts = [
        part for part in case["message"] if part["type"] == "text" and part.get("role") not in ("temporal", "timestamp")
    ]
    if kit == "NEO-ov spatial" and case["dataset"] == "Video-MME":
        texts = texts[-1:]
    question = "".join(part["value"] for part in texts if part.get("role") != "system").replace("Best option:(", "")
    if case["dataset"] == "Video-MME":
        question = question.replace("\nAnswer:", "")
        question += "\nAnswer with the option's letter from the given choices directly."
    return question


@pytest.mark.parametrize(("name", "kit"), VIDEO_FORMS)
def test_published_frames_of_videos(name, kit):
    case = CASES[name]
    times = [Fraction(3 * number) for number in (1, 2, 3)]
    frames = text_of_clip(Clip("v.mp4", tuple(times), Fraction(12), Fraction(12)), VIDEO_FORMS[name, kit])
    head = "".join(part["value"] for part in case["message"] if part.get("role") == "system")
    text = f"{frames}\n{head}" if kit != "NEO-ov" else f"{head}{frames}\n"
    assert text + question_of(case, kit) == case[f"prompt_{kit}"]


@pytest.mark.parametrize(
    ("text", "form", "expected"),
    [
        ("<image>\nWhat?", "in-order", "<image>\nWhat?"),
        ("<image>\nWhat?", "numbered", "<image>\nWhat?"),
        ("a <image>\nb <image>c", "in-order", "a <image>\nb <image>\nc"),
        ("<image>\n<image>\nWhich?", "numbered", "Image-1: <image>\nImage-2: <image>\nWhich?"),
        ("a <image> b <image>", "numbered", "Image-1: <image>\nImage-2: <image>\na <Image-1> b <Image-2>"),
        ("a <image>", "referenced", "<Image-1>: <image>\na <Image-1>"),
        ("a <image> b", "numbered", "<image>\na \n b"),
        (r"\<image> <image> \\<image> <video>", "in-order", "\\<image> <image>\n \\\\<image>\n <video>"),
        (r"\\<image><image>", "numbered", "Image-1: <image>\nImage-2: <image>\n\\"),
        ("no image", "numbered", "no image"),
        ("a <image>", "written", "a <image>"),
    ],
)
def test_forms_of_a_turn(text, form, expected):
    assert arranged(Turn("user", text, False), form) == Turn("user", expected, False)


def test_only_turns_of_users_change():
    for role in ("system", "assistant"):
        turn = Turn(role, "a <image>", True)
        assert arranged(turn, "numbered") is turn


def test_images_keep_their_order(golden):
    settings = PreprocessConfig(min_pixels=4096, max_pixels=65536, image_store="patches")
    images = [golden / "images" / f"{name}.png" for name in "ab"]
    written, numbered = (new_prompt("x <image> y <image>", images, settings, form) for form in ("written", "numbered"))
    assert written.grids == numbered.grids and numbered.turns[0].text.startswith(
        "Image-1: <image>\nImage-2: <image>\nx "
    )


@pytest.fixture(scope="module")
def asked(checkpoint):
    """The text of a prompt of a model that is asked in some way."""

    def decoded(question, **settings) -> str:
        answerer = Answerer(checkpoint, device="cpu", **settings)
        return answerer.tokenizer.decode(answerer.tokens([new_prompt(question, [], answerer.settings)])[0])

    return decoded


def test_nothing_of_thinking_is_in_a_prompt_by_default(asked):
    assert asked("Hi") == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_layout_u1_ends_with_an_empty_think_block(asked):
    turns = [Turn("user", "Hi", False), Turn("assistant", "Ho", True), Turn("user", "Hm", False)]
    block = "<think>\n\n</think>\n\n"
    assert asked(turns, chat_layout="u1") == (
        f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{block}Ho<|im_end|>\n"
        f"<|im_start|>user\nHm<|im_end|>\n<|im_start|>assistant\n{block}"
    )


def test_a_system_turn_comes_before_conversations_without_one(asked):
    head = "<|im_start|>system\nReason step by step.<|im_end|>\n"
    assert asked("Hi", system="Reason step by step.").startswith(f"{head}<|im_start|>user\n")
    own = asked([Turn("system", "Be brief.", False), Turn("user", "Hi", False)], system="Reason step by step.")
    assert own.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert "<|im_start|>system\nSay <image>.<|im_end|>" in asked("Hi", system="Say <image>.")


GENERATED = json.loads((GOLDEN / "u1" / "generate.json").read_text())


@pytest.mark.parametrize(
    "case", [case for cases in GENERATED.values() for case in cases], ids=lambda case: case["question"]
)
def test_prompts_of_the_published_chat(checkpoint, golden, case):
    answerer = Answerer(checkpoint, device="cpu", min_pixels=case["min_pixels"], max_pixels=case["max_pixels"])
    turns = [
        Turn(role, text, False)
        for pair in case["history"] or []
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    images = [golden / name for name in case["images"]]
    question = case["question"] if turns or "<image>" in case["question"] else f"<image>\n{case['question']}"
    prompt = answerer.prompt([*turns, Turn("user", question, False)], images)
    assert answerer.tokens([prompt])[0].tolist() == case["prompt_ids"]
