"""Questions of the local tasks of test_cli.py; lmms-eval imports a copy of it, `utils.py` next to their YAML files."""

from PIL import Image

CHOICES = ["a dog", "a cat and a dog", "nothing"]


def visuals(doc):
    return [Image.open(path).convert("RGB") for path in doc["images"]]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def messages(doc):
    """The last image comes after the question."""
    parts = [{"type": "image", "url": visual} for visual in visuals(doc)]
    parts.insert(max(len(parts) - 1, 0), {"type": "text", "text": doc["question"]})
    return [{"role": "user", "content": parts}]


def choices(doc):
    return CHOICES
