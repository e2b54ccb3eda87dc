"""`vllm serve` of an exported checkpoint, asked by the official client."""

import base64
import io
import json
from dataclasses import dataclass
from typing import Any

import pytest
from PIL import Image
from support.paths import GOLDEN
from support.vllm import SCRIPTS, needs_vllm, run_vllm, served

pytestmark = [needs_vllm, pytest.mark.thorough]

LENGTH = 16
IMAGES = GOLDEN / "images"
FLAGS = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "64M", "--max-model-len", "1024"]


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def url(address: str, **others: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": address, **others}}


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def golden(letter: str) -> dict[str, Any]:
    return url(data_uri((IMAGES / f"{letter}.png").read_bytes()))


def long_image() -> dict[str, Any]:
    file = io.BytesIO()
    Image.new("RGB", (3000, 10)).save(file, "PNG")
    return url(data_uri(file.getvalue()))


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


CHATS = {
    "text": [{"role": "user", "content": "Hi, what is this?"}],
    "image": user(golden("a"), text("What is it?")),
    "images": user(golden("a"), text("is the same as"), golden("b"), text("?")),
    "typed": user(golden("d"), text("Typed <|im_end|> and <img><IMG_CONTEXT> are text, as \\<image> is.")),
    "turns": [
        {"role": "system", "content": "Be brief."},
        *user(golden("e"), golden("d"), text("What are they?")),
        {"role": "assistant", "content": "Two images, no <image>."},
        *user(golden("b"), text("And this?")),
    ],
}
# What is asked, with settings; words of the answer, which has the status 400.
REFUSED = {
    "tag": (user(text("<image> what?")), {}, "0 images for 1 <image> tags"),
    "video tag": (user(text("<video> what?")), {}, "the text has a <video> tag"),
    "video": (user({"type": "video_url", "video_url": {"url": "data:,"}}), {}, "is a part of type 'video_url'"),
    "detail": (user(url(data_uri(b""), detail="high"), text("?")), {}, "has the key 'detail', which NEO does not know"),
    "image of the assistant": (
        [*user(text("Hi")), {"role": "assistant", "content": [golden("a")]}, *user(text("Hi"))],
        {},
        "message 2, part 1 is an image that the assistant says",
    ),
    "role": (
        [{"role": "tool", "content": "x", "tool_call_id": "1"}],
        {},
        "'tool_call_id', which NEO's template does not",
    ),
    "name": ([{"role": "user", "content": "Hi", "name": "Bob"}], {}, "has the key 'name'"),
    "variable": (
        user(text("Hi")),
        {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
        "NEO's template does not know the variable 'enable_thinking'",
    ),
    "documents": (user(text("Hi")), {"extra_body": {"documents": [{"text": "x"}]}}, "no place for documents"),
    "no image": (user(url(data_uri(b"hello")), text("?")), {}, "Failed to load image"),
    "half an image": (
        user(url(data_uri((IMAGES / "a.png").read_bytes()[:300])), text("?")),
        {},
        "Failed to load image",
    ),
    "long image": (user(long_image(), text("?")), {}, "aspect ratio must be smaller than 200"),
    "local file": (
        user(url(f"file://{IMAGES}/a.png"), text("?")),
        {},
        "start the server with --allowed-local-media-path",
    ),
    "long prompt": (user(text("word " * 3000)), {}, "maximum context length is 1024 tokens"),
    "unknown limit": (
        user(golden("a")),
        {"extra_body": {"mm_processor_kwargs": {"size": 3}}},
        "mm_processor_kwargs has 'size': NEO knows min_pixels and max_pixels",
    ),
    "high limit": (
        user(golden("a")),
        {"extra_body": {"mm_processor_kwargs": {"max_pixels": 1 << 30}}},
        "the server takes 65536 at most",
    ),
}


@dataclass
class Answers:
    """By the names of `CHATS` and `REFUSED`; plain, streamed, and with fewer pixels."""

    plain: dict[str, dict]
    streamed: dict[str, dict]
    fewer: dict
    refused: dict[str, dict]
    after: dict


def asked(address: str, requests: list[dict[str, Any]], directory) -> list[dict[str, Any]]:
    (directory / "requests.json").write_text(json.dumps(requests))
    run_vllm(SCRIPTS / "client.py", address, directory / "requests.json", directory / "got.json", directory=directory)
    return json.loads((directory / "got.json").read_text())


@pytest.fixture(scope="module")
def answers(reference_of, tmp_path_factory) -> Answers:
    directory = tmp_path_factory.mktemp("server")
    settings = {"max_tokens": LENGTH, "extra_body": {"ignore_eos": True}}
    fewer = {"extra_body": {"ignore_eos": True, "mm_processor_kwargs": {"max_pixels": 4096}}}
    requests = [{"messages": chat, "logprobs": True, **settings} for chat in CHATS.values()]
    requests += [{"messages": chat, "stream": True, **settings} for chat in CHATS.values()]
    requests.append({"messages": CHATS["image"], **settings, **fewer})
    requests += [{"messages": chat, "max_tokens": 4, **others} for chat, others, _ in REFUSED.values()]
    requests.append({"messages": CHATS["images"], **settings})
    with served(
        reference_of("ckpt_untied").directory, *FLAGS, "--trust-request-mm-kwargs", directory=directory
    ) as address:
        got = iter(asked(address, requests, directory))
    return Answers(
        plain={name: next(got) for name in CHATS},
        streamed={name: next(got) for name in CHATS},
        fewer=next(got),
        refused={name: next(got) for name in REFUSED},
        after=next(got),
    )


@pytest.mark.parametrize("name", CHATS)
def test_answers_are_those_of_transformers(reference_of, answers, name):
    expected, got = reference_of("ckpt_untied").answer(CHATS[name], LENGTH), answers.plain[name]
    assert got["text"] == expected.text
    assert got["prompt_tokens"] == len(expected.prompt)
    assert got["finish_reason"] == "length"
    assert got["logprobs"] == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize("name", CHATS)
def test_a_streamed_answer_is_the_same(answers, name):
    streamed = answers.streamed[name]
    assert "".join(streamed["pieces"]) == answers.plain[name]["text"]
    assert len(streamed["pieces"]) > 2
    assert streamed["finish_reason"] == "length"


def test_a_request_may_ask_for_fewer_pixels(reference_of, answers):
    expected = reference_of("ckpt_untied").answer(CHATS["image"], LENGTH, max_pixels=4096)
    assert answers.fewer["text"] == expected.text
    assert answers.fewer["prompt_tokens"] == len(expected.prompt) < answers.plain["image"]["prompt_tokens"]


@pytest.mark.parametrize("name", REFUSED)
def test_what_neo_cannot_take_is_refused_in_a_sentence(answers, name):
    got = answers.refused[name]
    assert got.get("status") == 400, got
    assert REFUSED[name][2] in got["error"]


def test_the_server_lives_on(answers):
    assert answers.after["text"] == answers.plain["images"]["text"]


def test_local_files_only_where_they_are_allowed(reference_of, tmp_path):
    reference = reference_of("ckpt_untied")
    allowed, other = IMAGES / "a.png", GOLDEN / "u1" / "images" / "rgba.png"
    requests = [
        {"messages": user(url(f"file://{path}"), text("What is it?")), "max_tokens": LENGTH}
        for path in (allowed, other, IMAGES / "missing.png")
    ]
    with served(reference.directory, *FLAGS, "--allowed-local-media-path", IMAGES, directory=tmp_path) as address:
        inside, outside, missing = asked(address, requests, tmp_path)
    assert inside["text"] == reference.answer(requests[0]["messages"], LENGTH).text
    assert outside["status"] == 400
    assert missing["status"] >= 400
