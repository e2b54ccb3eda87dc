"""Photographs to measure with: 200 JPEGs of 640 x 480 to 1600 x 1200, and questions about them.

They are cut from the photographs that scikit-image and scikit-learn ship, with a little noise, so that a file is as
large as one from a camera (195 kB on average). The same bytes for the same versions of NumPy and Pillow.
"""

import json
import random
from pathlib import Path

import numpy as np
from PIL import Image

COUNT = 200
_SIZES = [(640, 480), (800, 600), (1024, 768), (1280, 960), (1600, 1200), (1280, 720), (1024, 683), (1600, 900)]
_QUESTIONS = [
    "What is shown in this image?",
    "Describe the image in detail.",
    "What colour is the object in the middle?",
    "How many people are visible?",
    "Is the photo taken indoors or outdoors? Explain your answer.",
    "Write a short caption for the image.",
    "What could happen next?",
]
_WORDS = [
    *("the", "a", "small", "large", "bright", "red", "blue", "old", "quiet", "street", "river", "table", "person"),
    *("cat", "coffee", "tower", "sky", "stands", "near", "beyond", "with", "and", "under", "light"),
]


def write_photos(directory: Path, count: int = COUNT) -> Path:
    """Writes ``images/*.jpg`` and ``annotations.jsonl``, whose path is returned; keeps what an earlier call wrote."""
    annotations = directory / "annotations.jsonl"
    if annotations.exists():
        return annotations
    (directory / "images").mkdir(parents=True, exist_ok=True)
    originals = _originals()
    pixels, words = np.random.default_rng(2024), random.Random(2024)
    lines = []
    for number in range(count):
        name = f"images/{number:04d}.jpg"
        photo = _cut(originals[number % len(originals)], pixels)
        photo.save(directory / name, quality=int(pixels.integers(80, 96)))
        lines.append(json.dumps({"image": name, "conversations": _conversation(words)}) + "\n")
    annotations.write_text("".join(lines))
    return annotations


def _originals() -> list[Image.Image]:
    import skimage
    import sklearn

    scikit_image = Path(skimage.__file__).parent / "data"
    scikit_learn = Path(sklearn.__file__).parent / "datasets" / "images"
    names = ["astronaut.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "hubble_deep_field.jpg", "ihc.png"]
    paths = [scikit_image / name for name in names] + [scikit_learn / "china.jpg", scikit_learn / "flower.jpg"]
    return [Image.open(path).convert("RGB") for path in paths if path.exists()]


def _cut(original: Image.Image, random_: np.random.Generator) -> Image.Image:
    width, height = _SIZES[int(random_.integers(len(_SIZES)))]
    if random_.random() < 0.3:
        width, height = height, width
    cut_width = int(min(original.width, original.height * width / height) * random_.uniform(0.6, 1))
    cut_height = int(cut_width * height / width)
    x = int(random_.integers(0, original.width - cut_width + 1))
    y = int(random_.integers(0, max(1, original.height - cut_height + 1)))
    photo = original.crop((x, y, x + cut_width, y + cut_height)).resize((width, height), Image.Resampling.LANCZOS)
    noisy = np.asarray(photo).astype(np.int16) + random_.normal(0, 4, (height, width, 3)).astype(np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _conversation(random_: random.Random) -> list[dict[str, str]]:
    turns = []
    for turn in range(random_.choice([1, 1, 1, 2, 3, 4])):
        question = ("<image>\n" if turn == 0 else "") + random_.choice(_QUESTIONS)
        answer = " ".join(sentence(random_) for _ in range(random_.choice([1, 2, 4, 8])))
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns


def sentence(random_: random.Random) -> str:
    """6 to 30 words without sense."""
    return " ".join(random_.choice(_WORDS) for _ in range(random_.randint(6, 30))).capitalize() + "."
