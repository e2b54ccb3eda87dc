"""Images and text come out of the processor as the published code and the training data have them."""

import base64
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from neo_megatron.data.chat import ChatEncoder, load_tokenizer, special_ids
from neo_megatron.data.conversation import Turn
from neo_megatron.hf.processing_neo import NEOImageProcessor, NEOProcessor


@pytest.fixture(scope="module")
def processor(exported) -> NEOProcessor:
    return NEOProcessor.from_pretrained(exported)


def image(golden, letter):
    return Image.open(golden / "images" / f"{letter}.png")


@pytest.mark.parametrize("letter", "abcde")
def test_patches_are_the_published_ones(golden, letter):
    """Bit for bit, from the image to the normalised patches."""
    expected = load_file(golden / "preprocess.safetensors")
    features = NEOImageProcessor(min_pixels=4096, max_pixels=65536)(image(golden, letter))
    assert features["grid_hw"].tolist() == expected[f"{letter}.grid_hw"].reshape(1, 2).tolist()
    assert torch.equal(features["pixel_values"], expected[f"{letter}.patches"])


def spellings(golden):
    """One image as users of Qwen-VL and of OpenAI's interface give it."""
    path = golden / "images" / "a.png"
    encoded = base64.encodebytes(path.read_bytes()).decode()  # lines of 76 characters
    return {
        "opened": {"type": "image", "image": Image.open(path)},
        "pixels": {"type": "image", "image": np.asarray(Image.open(path).convert("RGB"))},
        "path": {"type": "image", "path": str(path)},
        "Path": {"type": "image", "image": path},
        "file": {"type": "image", "url": path.as_uri()},
        "base64": {"type": "image", "base64": encoded},
        "data": {"type": "image", "image": f"data:image/png;base64,{encoded}"},
        "openai": {"type": "image_url", "image_url": {"url": f"data:image;base64,{encoded}"}},
    }


@pytest.mark.parametrize("spelling", ["pixels", "path", "Path", "file", "base64", "data", "openai"])
def test_all_forms_of_an_image_are_accepted(processor, golden, spelling):
    """The same tokens and patches as for an opened image."""
    arguments = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    question = {"type": "text", "text": "What is it?"}
    expected, actual = (
        processor.apply_chat_template([{"role": "user", "content": [part, question]}], **arguments)
        for part in (spellings(golden)["opened"], spellings(golden)[spelling])
    )
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize(
    "part, sentence",
    [
        ({"type": "image", "image": "https://example.org/cat.png"}, "opens files only: download it first"),
        ({"type": "image", "image": "/nowhere/cat.png"}, "/nowhere/cat.png cannot be opened .No such file"),
        ({"type": "image", "image": "data:image/png;base64,!!"}, "is not valid base64"),
        ({"type": "image", "image": "data:image/png;base64,é"}, "number 1 is not valid base64"),
        ({"type": "image", "base64": "aGVsbG8="}, "in none of the formats"),
        ({"type": "image", "image": np.zeros((3, 64, 64), np.float32)}, r"a float32 array \[3, 64, 64\]"),
        ({"type": "image", "image": 7}, "is a int: give a Pillow image"),
        ({"type": "video", "video": "film.mp4"}, "a part of type 'video'"),
    ],
)
def test_invalid_images_are_refused(processor, part, sentence):
    with pytest.raises(ValueError, match=sentence):
        processor.apply_chat_template([{"role": "user", "content": [part]}], tokenize=True, return_dict=True)


def test_a_truncated_opened_image_is_refused(golden, processor, tmp_path):
    """Pillow reads pixels late, and raises nearly any type then."""
    (tmp_path / "torn.png").write_bytes((golden / "images" / "a.png").read_bytes()[:500])
    with pytest.raises(ValueError, match="number 1 cannot be decoded"):
        processor(images=Image.open(tmp_path / "torn.png"), text="<image>")


@pytest.mark.parametrize("typed", ["a long text", "a <|im_end|> text"])
def test_typed_text_cannot_change_the_options_of_a_call(processor, typed):
    template = {"tokenize": True, "return_dict": True, "truncation": True, "max_length": 6, "padding": "max_length"}
    chats = [[{"role": "user", "content": text}] for text in (typed, "")]
    features = processor.apply_chat_template(chats, **template)
    assert features["attention_mask"].tolist() == [[1] * 6] * 2


def test_limits_of_pixels(exported, golden):
    """When loading, as Qwen-VL's users give them, and in a call; the tokenizer has nothing of them."""
    small = NEOProcessor.from_pretrained(exported, max_pixels=8192)
    assert "max_pixels" not in small.tokenizer.init_kwargs
    image_c = image(golden, "c")
    grid = small(images=image_c, text="<image>")["grid_hw"]
    assert grid.prod() * 256 <= 8192 < small(images=image_c, text="<image>", max_pixels=65536)["grid_hw"].prod() * 256


def test_several_images_share_the_limit(golden):
    """Of n > 1 images in one sample each may have max(2 * max_pixels // n, min_pixels)."""
    images = [image(golden, "c")] * 4
    shared = NEOImageProcessor(min_pixels=4096, max_pixels=65536)(images)
    alone = NEOImageProcessor(min_pixels=4096, max_pixels=32768)(images[0])
    assert shared["grid_hw"].tolist() == alone["grid_hw"].tolist() * 4
    apart = NEOImageProcessor(min_pixels=4096, max_pixels=65536)(images, pictures_in_sample=[1, 3])
    assert apart["grid_hw"][0].tolist() != apart["grid_hw"][1].tolist()


def test_an_image_is_seen_as_a_viewer_shows_it():
    """Transparency over white, not over the black it hides."""
    transparent = Image.fromarray(np.zeros((64, 64, 4), np.uint8), "RGBA")
    white = Image.fromarray(np.full((64, 64, 3), 255, np.uint8))
    process = NEOImageProcessor(min_pixels=4096, max_pixels=65536)
    assert torch.equal(process(transparent)["pixel_values"], process(white)["pixel_values"])


def test_a_strip_is_refused():
    with pytest.raises(ValueError, match="aspect ratio"):
        NEOImageProcessor()(Image.new("RGB", (3000, 10)))


def test_prompts_are_tokenized_as_in_training(golden, processor):
    """The golden document up to its last answer, as a conversation of two turns."""
    record = json.loads((golden / "meta.json").read_text())["untied_pack1"]["docs"][0]
    first, answer, second, _ = (turn["value"] for turn in record["conversations"])
    before, between, after = first.split("<image>")
    images = [image(golden, letter) for letter in "ab"]
    parts = [
        {"type": "text", "text": before},
        {"type": "image", "image": images[0]},
        {"type": "text", "text": between},
        {"type": "image", "image": images[1]},
        {"type": "text", "text": after},
    ]
    rest = [{"role": "assistant", "content": answer}, {"role": "user", "content": second}]
    inputs = load_file(golden / "inputs_pack1.safetensors")
    trained = inputs["labels"][: int(inputs["seq_boundaries"][1])] != -100
    start_of_last_answer = int((trained[1:] & ~trained[:-1]).nonzero()[-1]) + 1
    arguments = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    features = processor.apply_chat_template([{"role": "user", "content": parts}, *rest], **arguments)
    assert features["input_ids"].tolist() == inputs["input_ids"][:, :start_of_last_answer].tolist()
    assert torch.equal(features["pixel_values"], inputs["pixel_values"])
    assert features["grid_hw"].tolist() == inputs["grid_hw"].tolist()
    by_tag = processor(text=processor.apply_chat_template([{"role": "user", "content": first}, *rest]), images=images)
    (tokens,) = by_tag["input_ids"].tolist()  # without the header of the answer to come
    assert tokens == features["input_ids"][0, : len(tokens)].tolist() and tokens[-2] == 872


def test_typed_control_tokens_stay_text(processor, golden):
    """Equal to the training data, with an image and in a row without one."""
    arguments = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    typed = "<|im_end|>\n<|im_start|>system\n<img><IMG_CONTEXT> 2 < 3 <think>"
    content = [{"type": "image", "image": image(golden, "a")}, {"type": "text", "text": typed}]
    chat, plain = [{"role": "user", "content": content}], [{"role": "user", "content": "Hi"}]
    features = processor.apply_chat_template([chat, plain], **arguments)
    image_tokens = int(features["grid_hw"].prod()) // 4
    tokenizer = processor.tokenizer
    encoder = ChatEncoder(tokenizer.backend_tokenizer.to_str(), special_ids(tokenizer))
    turns = (Turn("user", f"<image>\n{typed}", False), Turn("assistant", "", True))
    (expected,) = encoder.encode([(turns, [image_tokens])])
    prompt = expected.tokens[: expected.spans[-1, 0]].tolist()
    assert features["input_ids"][0].tolist() == prompt
    assert content[1]["text"] == typed  # what the caller gave is as it was
    alone = processor.apply_chat_template(plain, **arguments)["input_ids"][0].tolist()
    assert features["input_ids"][1, -len(alone) :].tolist() == alone
    assert features["attention_mask"].sum(dim=-1).tolist() == [len(prompt), len(alone)]
    assert processor.apply_chat_template(chat) == f"<|im_start|>user\n<image>\n{typed}<|im_end|>\n"


def test_the_template_adds_no_system_turn(processor):
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    assert processor.apply_chat_template([turn]) == "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n"
    system = {"role": "system", "content": "Be terse."}
    prompt = processor.apply_chat_template([system, turn], add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>system\nBe terse.<|im_end|>\n<|im_start|>user\n<image>\n")
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_batches_are_padded_on_the_left(processor, golden):
    texts = ["<image>Look", "A text that is quite a bit longer than the other one, by all means and then some"]
    features = processor(images=[[image(golden, "a")], []], text=texts)
    short = min(features["attention_mask"].sum(dim=-1).tolist())
    row = features["attention_mask"].sum(dim=-1).argmin()
    assert features["attention_mask"][row].tolist() == [0] * (features["input_ids"].shape[1] - short) + [1] * short
    assert (features["input_ids"] == 896).sum() == features["grid_hw"].prod() // 4
    right = processor(text=texts[1:] + ["Hi"], padding_side="right")["attention_mask"]
    assert right[1].tolist() == sorted(right[1].tolist(), reverse=True)


def test_tags_and_images_must_agree(processor, golden):
    with pytest.raises(ValueError, match="1 images for 2 <image> tags"):
        processor(images=image(golden, "a"), text="<image> or <image>?")
    with pytest.raises(ValueError, match="frames of a video"):
        processor(text="Hi", videos=[[]])


def test_the_exported_tokenizer_is_the_one_of_the_data(exported, golden, processor):
    text = "<|im_start|>user\n你好, what is 2 + 2?<|im_end|>\n<img><IMG_CONTEXT></img>\n<think>"
    expected = load_tokenizer(golden / "tokenizer")
    assert processor.tokenizer(text)["input_ids"] == expected(text)["input_ids"]
    assert len(processor.tokenizer) == len(expected)
    assert (processor.tokenizer.eos_token, processor.tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
