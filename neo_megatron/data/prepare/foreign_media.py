"""Finds media written into the text as other projects do, which are not read: paths and placeholders."""

import re
from collections.abc import Iterable

# Qwen-VL's <img>a.jpg</img>, Qwen-Audio's <audio>a.wav</audio>, MiniCPM's (<image>./</image>); text if escaped with \.
_INLINE = re.compile(r"(?<!\\)<(img|image|video|audio|speech)>[^<>\n]{1,4096}</\1>", re.IGNORECASE)
_DATA_URI = re.compile(r"data:(?:image|video|audio)/[\w.+-]+;base64,[A-Za-z0-9+/=]{64}")
# <|image_pad|>, <|vision_start|>, <img>, <ImageHere>, <image_placeholder>, <image1>, <start_of_image>, [IMG].
_PLACEHOLDER = re.compile(
    r"<\|?(?:start_of_|end_of_)?(?:image|img|im|vision|picture|video|audio|media)"
    r"(?:[ _-]?(?:here|pad|start|end|begin|bos|eos|patch|placeholder|context|content|soft|token|\d+))*\|?>"
    r"|\[(?:img|image|video|audio)(?:[ _-]?\d+)?\]",
    re.IGNORECASE,
)
# Tags of this project and of the chat template, which <im_...> of LLaVA resembles.
_NOT_FOREIGN = ("<image>", "<video>", "<|im_start|>", "<|im_end|>")


def inline_form(texts: Iterable[str]) -> str:
    """The first path or encoded file in the texts that is media of another project; "" without any."""
    for text in texts:
        for mark, form in (("</", _INLINE), (";base64,", _DATA_URI)):  # the mark is found many times faster
            if mark in text and (match := form.search(text)):
                return match[0]
    return ""


def placeholder(texts: Iterable[str]) -> str:
    """The first placeholder of another project in the texts; "" without any."""
    for text in texts:
        if "<" not in text and "[" not in text:
            continue
        for match in _PLACEHOLDER.finditer(text):
            if match[0] not in _NOT_FOREIGN:
                return match[0]
    return ""
