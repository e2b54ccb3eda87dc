"""Text with `<image>` tags and pictures -> what the model takes, by the code that made the training data.

transformers 4.57 copies the files that this one imports and not what those import, so all of them are named here.
"""

import base64
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ImagesKwargs

from .errors_neo import RejectedSample
from .pictures_neo import (
    decode,
    decode_opened,
    normalise,
    patches_from_image,
    picture_grid,
    pixel_limit,
    read_picture,
)

IMAGE_TAG = "<image>"
MERGE_SIZE = 2

# Marks control tokens that a user typed, until they are tokenized as text: a character that no text has (Unicode keeps
# it for such use).
TYPED = "\ufdd0"

# What a picture may be given as: Pillow's, 8-bit RGB `[height, width, 3]`, a path, `file://` or `data:` with base64.
Picture = Image.Image | np.ndarray | str | os.PathLike
# Keys under which a part of a message may have its picture, as in Qwen-VL's and OpenAI's conversations.
PICTURE_KEYS = ("image", "url", "path", "base64", "image_url")


class NEOImagesKwargs(ImagesKwargs, total=False):
    """What `from_pretrained` of transformers 5 takes over from its arguments."""

    min_pixels: int
    max_pixels: int


class NEOImageProcessor(ImageProcessingMixin):
    """Resizes to multiples of 32 pixels within the limits, normalises by ImageNet's statistics, cuts 16x16 patches.

    Args:
        min_pixels, max_pixels: limits of the area of a resized picture.
    """

    model_input_names = ["pixel_values", "grid_hw"]
    valid_kwargs = NEOImagesKwargs

    def __init__(self, min_pixels: int = 65536, max_pixels: int = 4194304, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels

    def __call__(
        self,
        images: Picture | Sequence[Picture],
        pictures_in_sample: Sequence[int] | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Patches of all pictures behind one another.

        Args:
            min_pixels, max_pixels: in place of the processor's own.
            pictures_in_sample: number of pictures of every sample, in order; several share twice the limit of one.
                By default all of ``images`` are one sample.

        Returns:
            ``pixel_values`` float32 `[patches, 768]`, row-major in each picture, and ``grid_hw`` `[pictures, 2]`.

        Raises:
            ValueError: a picture that cannot be read, without colours, or more than 200 times as long as wide.
        """
        images = [images] if isinstance(images, Picture) else list(images)
        low, high = min_pixels or self.min_pixels, max_pixels or self.max_pixels
        counts = [len(images)] if pictures_in_sample is None else pictures_in_sample
        together = [count for count in counts for _ in range(count)]
        pictures = [
            _patches(image, low, pixel_limit(low, high, count), f"number {number}")
            for number, (image, count) in enumerate(zip(images, together, strict=True), start=1)
        ]
        patches, grids = zip(*pictures, strict=True)
        return BatchFeature({"pixel_values": torch.from_numpy(np.concatenate(patches)), "grid_hw": torch.tensor(grids)})

    preprocess = __call__


def _patches(picture: Picture, min_pixels: int, max_pixels: int, name: str) -> tuple[np.ndarray, tuple[int, int]]:
    try:
        image = _upright(picture, name)
        grid = picture_grid(image, name, min_pixels, max_pixels)
    except RejectedSample as rejected:
        raise ValueError(rejected.sentence) from rejected
    return row_major(normalise(patches_from_image(image, grid)), *grid), grid


def _upright(picture: Picture, name: str) -> Image.Image:
    """The RGB picture, as the training data would have it."""
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise ValueError(
                f"the picture {name} is a {picture.dtype} array {list(picture.shape)}: give uint8 [height, width, 3]"
            )
        picture = Image.fromarray(picture)
    if isinstance(picture, Image.Image):
        return decode_opened(picture, name)
    if not isinstance(picture, (str, os.PathLike)):
        raise ValueError(f"the picture {name} is a {type(picture).__name__}: give a Pillow image or the path of a file")
    place = os.fspath(picture)
    if place.startswith("data:"):
        try:
            return decode(base64.b64decode("".join(place.partition(",")[2].split()), validate=True), name)
        except ValueError as error:  # a letter that base64 has not, or a number of them
            raise ValueError(f"the picture {name} is no base64 ({error})") from error
    if place.startswith(("http://", "https://")):
        raise ValueError(f"the picture {place} is far away, and the processor opens no addresses: download it first")
    if place.startswith("file://"):
        place = unquote(urlsplit(place).path)
    return decode(read_picture(place), place)


def row_major(cells: np.ndarray, grid_h: int, grid_w: int) -> np.ndarray:
    """`[cells, 4, 768]`, the patches of a cell together, -> `[grid_h * grid_w, 768]`, row by row of the picture."""
    blocks = cells.reshape(grid_h // MERGE_SIZE, grid_w // MERGE_SIZE, MERGE_SIZE, MERGE_SIZE, -1)
    return blocks.transpose(0, 2, 1, 3, 4).reshape(grid_h * grid_w, -1)


class NEOProcessor(ProcessorMixin):
    """Tokenizer and image processor in one; `apply_chat_template` takes conversations with pictures."""

    attributes = ["image_processor", "tokenizer"]
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        image_grid_thw: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_grid_thw = image_grid_thw

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> "NEOProcessor":
        """Loads both parts directly: the AutoImageProcessor of transformers 5 wants torchvision, NEO does not.

        Args:
            min_pixels, max_pixels: limits of a resized picture in place of the checkpoint's.
            image_grid_thw: return the grids of images as Qwen-VL's processors do, `image_grid_thw [images, 3]` in place
                of `grid_hw`: by them TRL's GRPO tells which patches are whose.
        """
        grids = {"image_grid_thw": kwargs.pop("image_grid_thw", False)}
        limits = {key: kwargs.pop(key) for key in ("min_pixels", "max_pixels") if key in kwargs}
        tokenizer = AutoTokenizer.from_pretrained(pretrained_model_name_or_path, **kwargs)
        image_processor = NEOImageProcessor.from_pretrained(pretrained_model_name_or_path, **kwargs, **limits)
        return cls(image_processor, tokenizer, chat_template=tokenizer.chat_template, **grids)

    def apply_chat_template(self, conversation: list[Any], chat_template: str | None = None, **kwargs: Any) -> Any:
        """As in transformers, for one conversation or several; contents are lists of parts or plain strings.

        A part is ``{"type": "text", "text": ...}`` or ``{"type": "image", "image": ...}``, its picture given in any
        form of `Picture`, or under the key "url", "path" or "base64", or as OpenAI's "image_url". Where tokens are
        asked for, a control token in a content is tokenized as the text it is, as in the training data.

        Raises:
            ValueError: a part of another type.
        """
        several = bool(conversation) and isinstance(conversation[0], (list, tuple))
        chats = [[_in_parts(message) for message in chat] for chat in (conversation if several else [conversation])]
        if kwargs.get("tokenize"):
            for part in (part for chat in chats for message in chat for part in message["content"] if "text" in part):
                part["text"] = self._controls.sub(lambda found: f"{found[0][0]}{TYPED}{found[0][1:]}", part["text"])
        return super().apply_chat_template(chats if several else chats[0], chat_template, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_grid_thw" if self.image_grid_thw else "grid_hw"]

    def __call__(
        self,
        images: Picture | Sequence[Any] | None = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        padding: bool | str = True,
        padding_side: str = "left",
        return_tensors: str | None = "pt",
        return_mm_token_type_ids: bool = False,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tensors for `forward` and `generate`.

        Args:
            images: pictures in the order of the tags of all texts; nested lists are flattened.
            text: one or several prompts, every picture's place marked by `<image>`.
            min_pixels, max_pixels: limits of a resized picture in place of the image processor's.
            kwargs: of the tokenizer.
            videos, audio, return_mm_token_type_ids: transformers passes them to every processor; not for NEO.

        Raises:
            ValueError: tags and pictures differ in number; a video or a sound; another kind of tensor is asked for.
        """
        if videos is not None or audio is not None:
            raise ValueError("NEO takes pictures and text: give the frames of a video as pictures")
        if return_tensors not in ("pt", None):
            raise ValueError(f"return_tensors={return_tensors!r}: NEO's processor makes PyTorch tensors, say 'pt'")
        texts = [text] if isinstance(text, str) else list(text or [])
        pictures = list(_flat(images))
        tags = [prompt.count(IMAGE_TAG) for prompt in texts]
        if sum(tags) != len(pictures):
            raise ValueError(
                f"{len(pictures)} pictures for {sum(tags)} {IMAGE_TAG} tags: give one picture for each tag"
            )
        features: dict[str, Any] = {}
        if pictures:
            features = self.image_processor(pictures, tags, min_pixels, max_pixels)
            sizes = iter((features["grid_hw"] // MERGE_SIZE).prod(dim=-1).tolist())
            texts = [_with_places(prompt, sizes) for prompt in texts]
            if self.image_grid_thw:
                features["image_grid_thw"] = torch.nn.functional.pad(features.pop("grid_hw"), (1, 0), value=1)
        kwargs.setdefault("add_special_tokens", False)
        kwargs |= {"padding": padding, "padding_side": padding_side, "return_tensors": "pt"}
        if any(TYPED in prompt for prompt in texts):
            tokens = self._with_typed_controls(texts, **kwargs)
        else:
            tokens = self.tokenizer(texts, **kwargs)
        return BatchFeature({**tokens, **features})

    @property
    def _controls(self) -> re.Pattern[str]:
        """Finds the tokens that a user's text must not be taken for."""
        tokens = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))

    def _with_typed_controls(
        self, prompts: list[str], add_special_tokens: bool, truncation: bool = False, **padding: Any
    ) -> BatchFeature:
        """Control tokens of the template by their id, and all between them with no control token recognised.

        Raises:
            TypeError: an argument of the tokenizer that means nothing for prompts in pieces.
        """
        rows = []
        for prompt in prompts:
            pieces, controls = self._controls.split(prompt), self._controls.findall(prompt)
            texts = self.tokenizer(
                [piece.replace(TYPED, "") for piece in pieces],
                add_special_tokens=add_special_tokens,
                split_special_tokens=True,
            )["input_ids"]
            row = texts[0]
            for control, text in zip(controls, texts[1:], strict=True):
                row = [*row, self.tokenizer.convert_tokens_to_ids(control), *text]
            rows.append(row[: padding.get("max_length")] if truncation else row)
        return self.tokenizer.pad({"input_ids": rows}, **padding)


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    """A message in the one form that the template and both versions of transformers know."""
    content = message["content"]
    if isinstance(content, str):  # transformers 4.57 looks for pictures in a plain string and fails
        content = [{"type": "text", "text": content}]
    return {**message, "content": [_part(part) for part in content]}


def _part(part: dict[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return dict(part)
    if part["type"] not in ("image", "image_url"):
        raise ValueError(f"a part of type {part['type']!r} in a conversation: NEO takes text and pictures")
    for key in PICTURE_KEYS:
        if key in part:
            picture = part[key]["url"] if isinstance(part[key], dict) else part[key]
            return {"type": "image", "image": f"data:image;base64,{picture}" if key == "base64" else picture}
    return {"type": "image"}


def _flat(images: Any) -> Iterator[Picture]:
    if isinstance(images, (list, tuple)):
        for item in images:
            yield from _flat(item)
    elif images is not None:
        yield images


def _with_places(prompt: str, sizes: Iterator[int]) -> str:
    first, *others = prompt.split(IMAGE_TAG)
    return first + "".join(f"<img>{'<IMG_CONTEXT>' * next(sizes)}</img>{other}" for other in others)
