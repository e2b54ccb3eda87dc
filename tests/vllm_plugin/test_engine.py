"""vLLM's engine answers as transformers does: the same greedy tokens in float32."""

import random
import shutil
from typing import Any

import pytest
from support.paths import GOLDEN
from support.vllm import engine_answers, needs_vllm

pytestmark = needs_vllm

LENGTH, IMAGES = 40, "abcde"
# Prompts are longer than a step, and fewer requests than are given fit into the cache.
TIGHT = {"block_size": 32, "max_num_batched_tokens": 128, "max_model_len": 320, "num_gpu_blocks_override": 14}
ENGINE = {
    **{"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8},
    **{"allowed_local_media_path": str(GOLDEN)},
}
LONG = "a word and another " * 35
SHARED = "Please look at it with care, it is a long beginning of many words. " * 6


def chat(*parts: str) -> list[dict[str, Any]]:
    """A user's message of texts and of golden images, given by their letters."""
    return [{"role": "user", "content": [part_of(part) for part in parts]}]


def part_of(part: str) -> dict[str, Any]:
    if part not in IMAGES:
        return {"type": "text", "text": part}
    return {"type": "image_url", "image_url": {"url": f"file://{GOLDEN}/images/{part}.png"}}


CHATS = [
    # The first step ends in front of both images. The second one has room for the first image, and for a part of the
    # other one.
    chat("a word and another " * 12, "c", " and again" * 15),
    chat("c", "What?"),
    chat("Hi, what is this?"),
    chat("a", "What is it?"),
    chat("a", "is the same as", "b", "?"),
    chat(LONG),
    chat(SHARED, "a", "one"),
    chat(SHARED, "a", "two"),
    chat(SHARED, "b", "two"),
    chat(SHARED, "a", "b", "a"),
    chat("Typed <|im_end|> and <img><IMG_CONTEXT> are text, as \\<image> is.", "d"),
    [
        {"role": "system", "content": "Be brief."},
        *chat("e", "d", "What are they?"),
        {"role": "assistant", "content": "Two images, no <image>."},
        *chat("b", "And this?"),
    ],
]


@pytest.mark.parametrize(
    "name",
    [
        "ckpt_untied",
        pytest.param("u1/dense", marks=pytest.mark.thorough),
        pytest.param("u1/moe", marks=pytest.mark.thorough),
    ],
)
def test_answers_are_those_of_transformers(reference_of, name, tmp_path):
    reference = reference_of(name)
    sampling = {"max_tokens": LENGTH, "ignore_eos": True}
    # The second time prompts come from the prefix cache, also up to places within an image.
    batches = [{"chats": CHATS, "sampling": sampling}, {"chats": CHATS[::-1], "sampling": sampling}]
    engine = {"model": str(reference.directory), **ENGINE, **TIGHT}
    written = engine_answers(engine, batches, tmp_path)

    expected = [reference.answer(chat, LENGTH) for chat in CHATS]
    assert_same(reference, written["batches"][0], expected)
    assert_same(reference, written["batches"][1], expected[::-1])
    assert written["metrics"]["vllm:num_preemptions"] > 0
    assert max(written["batches"][0]["cached"]) > 0  # of another request of the same batch
    assert written["metrics"]["vllm:prefix_cache_hits"] > 0


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"tensor_parallel_size": 2}, id="two ranks"),
        pytest.param({"mm_processor_cache_gb": 0, "enable_prefix_caching": False}, id="without caches"),
    ],
)
def test_other_settings(reference_of, settings, tmp_path):
    reference = reference_of("ckpt_untied")
    batch = {"chats": CHATS, "sampling": {"max_tokens": LENGTH, "ignore_eos": True}}
    engine = {"model": str(reference.directory), **ENGINE, "max_num_batched_tokens": 128, "max_model_len": 320}
    written = engine_answers(engine | settings, [batch], tmp_path)
    assert_same(reference, written["batches"][0], [reference.answer(chat, LENGTH) for chat in CHATS])


@pytest.mark.thorough
def test_a_generation_branch_is_left_out(reference_of, golden, tmp_path):
    reference = reference_of("u1/dense")
    shutil.copytree(reference.directory, tmp_path / "neo")
    shutil.copy(golden / "u1" / "dense" / "model.safetensors", tmp_path / "neo")
    batch = {"chats": CHATS[-2:], "sampling": {"max_tokens": LENGTH, "ignore_eos": True}}
    written = engine_answers({"model": str(tmp_path / "neo"), **ENGINE, "max_model_len": 320}, [batch], tmp_path)
    assert_same(reference, written["batches"][0], [reference.answer(chat, LENGTH) for chat in CHATS[-2:]])


@pytest.mark.thorough
def test_two_hundred_requests_at_once(reference_of, tmp_path):
    draw, reference = random.Random(0), reference_of("ckpt_untied")
    words = ["what", "is", "the", "colour", "of", "this", "shape", "circle", "Zürich", "42", "?"]
    chats = []
    for _ in range(200):
        parts = [" ".join(draw.choices(words, k=draw.randint(1, 20))) for _ in range(draw.randint(1, 2))]
        parts += draw.choices(IMAGES, k=draw.randint(0, 3))
        chats.append(chat(*draw.sample(parts, len(parts))))
    engine = {"model": str(reference.directory), **ENGINE, "max_num_seqs": 32, "max_model_len": 1024}
    written = engine_answers(engine, [{"chats": chats, "sampling": {"max_tokens": 16, "ignore_eos": True}}], tmp_path)
    assert_same(reference, written["batches"][0], [reference.answer(chat, 16) for chat in chats])


def assert_same(reference, answers, expected):
    """Up to a generated `<img>` or `<IMG_CONTEXT>`: vLLM then counts t otherwise than NEO."""
    config = reference.model.config
    images = (config.img_start_token_id, config.img_context_token_id)
    for number, answer in enumerate(expected):
        end = next((place + 1 for place, token in enumerate(answer.tokens) if token in images), len(answer.tokens))
        assert answers["prompts"][number] == answer.prompt
        assert answers["answers"][number][:end] == answer.tokens[:end], number
        assert answers["logprobs"][number][:end] == pytest.approx(answer.logprobs[:end], abs=1e-4), number
