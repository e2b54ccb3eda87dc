"""Inputs and outputs of the processor: nested images, lists, undecoded images, saving, TRL."""

import base64
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from support.processes import run_python
from transformers import AutoImageProcessor, AutoProcessor

from neo_megatron.hf.processing_neo import NEOImageProcessor, NEOProcessor

QUESTION = {"type": "text", "text": "What is it?"}


@pytest.fixture(scope="module")
def processor(exported) -> NEOProcessor:
    return NEOProcessor.from_pretrained(exported)


@pytest.fixture(scope="module")
def images(golden) -> list[Image.Image]:
    return [Image.open(golden / "images" / f"{letter}.png") for letter in "abd"]


def same(actual, expected):
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_nested_images_belong_to_their_texts(processor, images):
    a, b, d = images
    texts = ["<image><image>", "Hi", "<image>"]
    nested = processor(images=[[a, b], None, [d]], text=texts)
    same(nested, processor(images=[[a, b], [], (d,)], text=texts))
    same(nested, processor(images=[a, b, d], text=texts))


@pytest.mark.parametrize(
    "nesting, texts, sentence",
    [
        ([[0], [1, 2]], ["<image><image>", "<image>"], "1 images for 2 <image> tags in text 1"),
        ([[0, 1], []], ["<image>", "<image>"], "2 images for 1 <image> tags in text 1"),
        ([[0], None], ["<image>", "<image>"], "0 images for 1 <image> tags in text 2"),
        ([[0, 1]], ["<image>", "<image>"], "images has 1 lists for 2 texts"),
        ([0, [1]], ["<image>", "<image>"], "mixes lists with images"),
        ([0], ["<image>", "<image>"], "1 images for 2 <image> tags"),
        ([0], [r"\<image>"], r"1 images for 0 <image> tags: .* written \\<image>"),
    ],
)
def test_a_text_without_its_images_is_named(processor, images, nesting, texts, sentence):
    given = [
        [images[number] for number in entry]
        if isinstance(entry, list)
        else images[entry]
        if entry is not None
        else None
        for entry in nesting
    ]
    with pytest.raises(ValueError, match=sentence):
        processor(images=given, text=texts)


def test_lists_are_returned_without_return_tensors(processor, images):
    """Rows of their own length, or padded where that is said."""
    texts = ["<image> is what?", "Hi"]
    tensors = processor(images=[images[:1], []], text=texts)
    lists = processor(images=[images[:1], []], text=texts, return_tensors=None)
    assert type(lists["input_ids"]) is list and type(lists["grid_hw"]) is list
    for row, ids in enumerate(lists["input_ids"]):
        assert ids == tensors["input_ids"][row][tensors["attention_mask"][row].bool()].tolist()
        assert lists["attention_mask"][row] == [1] * len(ids)
    assert lists["grid_hw"] == tensors["grid_hw"].tolist()
    assert np.array_equal(np.array(lists["pixel_values"]), tensors["pixel_values"])
    padded = processor(images=[images[:1], []], text=texts, return_tensors=None, padding=True)
    assert padded["input_ids"] == tensors["input_ids"].tolist()
    by_sample = processor.image_processor([images[:1], images[1:]])
    same(by_sample, processor.image_processor(images, pictures_in_sample=[1, 2]))


def test_padding_as_tokenizers_do(processor):
    texts = ["Hi", "What is it that you see?"]
    tokenizer = processor.tokenizer
    for settings in (
        {"padding": True, "padding_side": "left"},
        {"padding": "longest", "padding_side": "right", "pad_to_multiple_of": 8},
        {"padding": "max_length", "max_length": 20, "padding_side": "left"},
        {"padding": "max_length", "max_length": 4, "truncation": True, "padding_side": "right"},
    ):
        expected = tokenizer(texts, return_tensors="pt", **settings)
        same(processor(text=texts, **settings), {key: expected[key] for key in ("input_ids", "attention_mask")})
    assert "attention_mask" not in processor(text=texts, return_attention_mask=False, padding=True)
    with pytest.raises(ValueError, match="differ in length: pass padding=True"):
        processor(text=texts, padding=False, return_tensors="pt")
    with pytest.raises(ValueError, match="padding='longer'"):
        processor(text=texts, padding="longer")
    with pytest.raises(ValueError, match="return_tensors='tf'"):
        processor(text=texts, return_tensors="tf")


def test_truncation_never_cuts_an_image(processor, images):
    with pytest.raises(ValueError, match="text 1 has .* max_length=8 would cut off tokens of its images"):
        processor(images=images[:1], text="<image> is what?", truncation=True, max_length=8)
    tokens = processor(images=images[:1], text="<image> is what?")["input_ids"]
    cut = processor(images=images[:1], text="<image> is what?", truncation=True, max_length=tokens.shape[1] - 1)
    assert cut["input_ids"].tolist() == tokens[:, :-1].tolist()


def undecoded(golden):
    path = golden / "images" / "a.png"
    data = path.read_bytes()
    return {
        "bytes": {"bytes": data, "path": None},
        "bytes and name": {"bytes": data, "path": "elsewhere.png"},
        "path": {"bytes": None, "path": str(path)},
        "path alone": {"path": str(path)},
        "raw": data,
        "base64": base64.b64encode(data).decode(),
        "base64 in lines": base64.encodebytes(data).decode(),
    }


@pytest.mark.parametrize("form", ["bytes", "bytes and name", "path", "path alone", "raw", "base64", "base64 in lines"])
def test_an_undecoded_image(processor, golden, images, form):
    """As datasets' Image(decode=False) gives it, or a service."""
    image = undecoded(golden)[form]
    expected = processor(images=images[:1], text="<image>")
    same(processor(images=image, text="<image>"), expected)
    same(processor(images=[[image]], text=["<image>"]), expected)
    chat = [{"role": "user", "content": [{"type": "image", "image": image}, QUESTION]}]
    features = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    assert torch.equal(features["pixel_values"], expected["pixel_values"])


@pytest.mark.parametrize(
    "image, sentence",
    [
        ("cats", "'cats' is neither the path of a file that exists nor an image in base64"),
        ("images/cat", "neither the path of a file that exists nor"),
        ("QUJD" * 4000, "neither the path of a file that exists nor"),
        ("cat.png", "cat.png cannot be opened .No such file"),
        ({"bytes": None, "path": None}, "give {'bytes': ..., 'path': ...}"),
        ({"array": [0.0]}, "the keys 'array'"),
        ({"bytes": b"no image", "path": None}, "number 1 is in none of the formats"),
        (b"no image", "in none of the formats"),
        (None, "1 <image> tags"),
    ],
)
def test_invalid_images_are_named(processor, image, sentence):
    with pytest.raises(ValueError, match=sentence):
        processor(images=[image], text="<image>")


def test_a_file_may_be_called_anything(processor, images, tmp_path, monkeypatch):
    """Also what reads like base64."""
    monkeypatch.chdir(tmp_path)
    images[0].save("cats", "PNG")
    same(processor(images="cats", text="<image>"), processor(images=images[0], text="<image>"))


def test_arguments_are_known_or_named(processor, images):
    with pytest.raises(TypeError, match="'max_pixel'; it knows .*max_pixels"):
        processor(text="Hi", max_pixel=4096)
    with pytest.raises(TypeError, match="'do_resize'"):
        processor.image_processor(images, do_resize=False)
    grouped = {"images_kwargs": {"max_pixels": 8192}, "text_kwargs": {"padding_side": "right"}}
    same(
        processor(images=images[0], text="<image>", common_kwargs={"return_tensors": "pt"}, **grouped),
        processor(images=images[0], text="<image>", max_pixels=8192),
    )
    with pytest.raises(TypeError, match="'size'"):
        processor(images=images[0], text="<image>", images_kwargs={"size": 4})


def test_names_of_the_image_token(processor, images):
    """By which trainers and engines find the tokens of images."""
    assert (processor.image_token, processor.image_token_id) == ("<IMG_CONTEXT>", 896)
    features = processor(images=images[0], text="<image>!", return_mm_token_type_ids=True)
    assert features["mm_token_type_ids"].tolist() == (features["input_ids"] == 896).long().tolist()


def test_grids_as_qwen_names_them(exported, images):
    other = NEOProcessor.from_pretrained(exported, image_grid_thw=True)
    features, expected = (
        other(images=images, text="<image>" * 3),
        NEOProcessor.from_pretrained(exported)(images=images, text="<image>" * 3),
    )
    assert features.pop("image_grid_thw").tolist() == [[1, *grid] for grid in expected.pop("grid_hw").tolist()]
    same(features, expected)


LOADS = """
import sys
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor
alone = AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
both = AutoProcessor.from_pretrained(sys.argv[2], trust_remote_code=True)
for one in (alone, both.image_processor):
    assert (one.min_pixels, one.max_pixels, one.image_grid_thw) == (4096, 8192, True), one
    assert one([Image.open(sys.argv[3])])["image_grid_thw"].shape == (1, 3)
assert "neo_megatron" not in sys.modules
print("loaded", both(text="<|im_start|>")["input_ids"].tolist())
"""


def test_a_saved_processor_loads_alone(exported, golden, tmp_path):
    """From this package's classes and from a checkpoint's, in a process that has neither."""
    limits = {"min_pixels": 4096, "max_pixels": 8192, "image_grid_thw": True}
    package = NEOProcessor.from_pretrained(exported, **limits)
    remote = AutoProcessor.from_pretrained(exported, trust_remote_code=True, **limits)
    for name, processor in (("package", package), ("remote", remote)):
        alone, both = tmp_path / name / "alone", tmp_path / name / "both"
        processor.image_processor.save_pretrained(alone)
        processor.save_pretrained(both)
        again = NEOImageProcessor.from_pretrained(alone)
        assert (again.max_pixels, NEOProcessor.from_pretrained(both).image_processor.max_pixels) == (8192, 8192)
        (tmp_path / "loads.py").write_text(LOADS)
        environment = {"HF_MODULES_CACHE": str(tmp_path / name / "modules"), "HF_HUB_OFFLINE": "1"}
        environment["PYTHONPATH"] = str(Path(transformers.__file__).parents[1])
        arguments = (tmp_path / "loads.py", alone, both, golden / "images" / "a.png")
        done = run_python(*arguments, environment=environment)
        assert done.returncode == 0 and "loaded [[871]]" in done.stdout, done.stdout[-3000:]
    made = NEOImageProcessor(min_pixels=4096)
    made.save_pretrained(tmp_path / "made")
    assert AutoImageProcessor.from_pretrained(tmp_path / "made", trust_remote_code=True).min_pixels == 4096


def test_rows_as_trl_takes_them(processor, images):
    """TRL's GRPO pads rows itself, of prompts without further words and of conversations with images."""
    texts = ["What is it?", "Hi"]
    rows = processor(text=texts)["input_ids"]
    assert rows == processor.tokenizer(texts)["input_ids"]
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": images[0]}, QUESTION]}],
        [{"role": "user", "content": [QUESTION]}],
    ]
    rows = processor.apply_chat_template(
        conversation=chats, tools=None, chat_template=None, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    tensors = processor(images=[images[:1], None], text=texts, padding=True, return_tensors="pt")
    for ids, padded, seen in zip(rows["input_ids"], tensors["input_ids"], tensors["attention_mask"], strict=True):
        assert ids == padded[seen.bool()].tolist()
    assert torch.equal(torch.tensor(np.array(rows["pixel_values"])), tensors["pixel_values"])
    batch = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=False,
        processor_kwargs={
            "padding": True,
            "padding_side": "right",
            "pad_to_multiple_of": None,
            "truncation": True,
            "max_length": 1024,
            "add_special_tokens": False,
        },
    )
    assert batch["attention_mask"][1].tolist() == sorted(batch["attention_mask"][1].tolist(), reverse=True)
