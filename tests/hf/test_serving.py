"""`transformers serve` with an export, asked by the `openai` client: the answers of `generate()`, also to images."""

import base64
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from support.openai_server import Server, served

from neo_megatron.hf.modeling_neo import NEOChatModel
from neo_megatron.hf.processing_neo import NEOProcessor

openai = pytest.importorskip("openai", reason="openai is not installed: tools/environment.sh test adds it")


@pytest.fixture(scope="module", params=["environment", "5.23", "continuous batching"])
def server(request, exported, tmp_path_factory) -> Iterator[Server]:
    """The server of this version of transformers, of another one, and with the flag that NEO cannot have."""
    if request.param != "5.23" and Version(transformers.__version__) < Version("5.6"):
        pytest.skip(f"the server of transformers {transformers.__version__} does not load NEO: that of 5.6 does")
    directory = tmp_path_factory.mktemp("server")
    environment = {"HF_MODULES_CACHE": str(directory / "modules"), "HF_HUB_OFFLINE": "1"}
    if request.param == "5.23":
        overlay = os.environ.get("NEO_TEST_TRANSFORMERS_523")
        if not overlay:
            pytest.skip("NEO_TEST_TRANSFORMERS_523 names no directory with transformers 5.23 (tests/run.sh makes one)")
        environment["PYTHONPATH"] = os.pathsep.join([overlay, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", exported, "--trust-remote-code"]
    flags = ["--device", "cpu", "--host", "127.0.0.1", "--port", "0"]
    if request.param == "continuous batching":
        flags.append("--continuous-batching")
    with served([*command, *flags], directory / "log", environment) as running:
        yield running


def image(golden: Path, name: str) -> dict:
    content = base64.b64encode((golden / "images" / name).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{content}"}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": list(parts)}


@pytest.fixture(scope="module")
def chats(golden) -> list[list[dict]]:
    first, second = image(golden, "a.png"), image(golden, "b.png")
    return [
        [{"role": "user", "content": "Hi, what is this?"}],
        [user(first, text("What is this?"))],
        [user(second, text("What is this?"))],
        [{"role": "system", "content": "Be terse."}, user(first, text("and"), second, text("Same?"))],
        [user(first, text("Colour?")), {"role": "assistant", "content": "Red."}, {"role": "user", "content": "Sure?"}],
    ]


@pytest.fixture(scope="module")
def expected(exported, chats) -> list[tuple[str, int]]:
    """The answers of transformers in at most 8 tokens, and the lengths of the prompts."""
    processor = NEOProcessor.from_pretrained(exported)
    model = NEOChatModel.from_pretrained(exported, dtype=torch.float32).eval()
    answers = []
    for chat in chats:
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        length = inputs["input_ids"].shape[1]
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, length:]
        answers.append((processor.decode(tokens, skip_special_tokens=True), length))
    assert len({answer for answer, _ in answers}) == len(answers), "the images must matter"
    return answers


def test_answers_are_those_of_generate(server, exported, chats, expected):
    ask = server.client.chat.completions.create
    for chat, (answer, length) in zip(chats, expected, strict=True):
        complete = ask(model=str(exported), messages=chat, max_tokens=8)
        assert (complete.choices[0].message.content, complete.usage.prompt_tokens) == (answer, length)
        stream = ask(model=str(exported), messages=chat, max_tokens=8, stream=True)
        # The server keeps back the bytes of a character that is not complete.
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer.rstrip("\ufffd")


def test_other_ways_to_ask(server, exported, golden, chats, expected):
    """OpenAI's newer interface, a prompt without a template, and a stop string."""
    url, (answer, _) = image(golden, "a.png")["image_url"]["url"], expected[1]
    parts = [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "What is this?"}]
    response = server.client.responses.create(
        model=str(exported), input=[{"role": "user", "content": parts}], max_output_tokens=8, stream=False
    )
    assert response.output_text == answer
    prompt = "<|im_start|>user\nHi, what is this?<|im_end|>\n<|im_start|>assistant\n"
    written = server.client.completions.create(model=str(exported), prompt=prompt, max_tokens=8)
    assert written.choices[0].text == expected[0][0]
    part = answer[len(answer) // 2]
    stopped = server.client.chat.completions.create(model=str(exported), messages=chats[1], max_tokens=8, stop=[part])
    said = stopped.choices[0].message.content
    assert answer.startswith(said) and part in said and said != answer


REFUSED = {
    "a video": ({"type": "video_url", "video_url": {"url": "film.mp4"}}, {}, "NEO takes text and images"),
    "a broken image": (
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {},
        "the image number 1 is in none of the formats",
    ),
    "a tool": (
        text("?"),
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]},
        "NEO was trained without tools",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_request_that_neo_cannot_take_fails_and_the_log_says_why(server, exported, case):
    part, settings, sentence = REFUSED[case]
    with pytest.raises(openai.InternalServerError):
        server.client.chat.completions.create(model=str(exported), messages=[user(part)], max_tokens=2, **settings)
    assert server.says(sentence)


def test_continuous_batching_is_declined(server, exported, chats, request):
    """NEO would answer wrongly: its paged cache is causal and has one position for a token."""
    server.client.chat.completions.create(model=str(exported), messages=chats[1], max_tokens=1)
    said = "NEOChatModel does not support continuous batching" in server.log.read_text()
    assert said == ("continuous batching" in request.node.callspec.params["server"])


def test_a_process_that_is_no_server_is_left_as_it_is():
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    assert "neo_chat" not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
