"""NEO as a model of lmms-eval: `lmms-eval --model neo --model_args pretrained=DIR --tasks ...`.

lmms-eval finds it through the entry point of its group `lmms_eval.models` in setup.py.
"""

from typing import Any


def manifest() -> Any:
    """The entry that lmms-eval's registry loads; only lmms-eval calls it, so that the package works without it."""
    from lmms_eval.models.registry_v2 import ModelManifest

    models = f"{__name__}.models"
    return ModelManifest("neo", simple_class_path=f"{models}.NeoSimple", chat_class_path=f"{models}.NeoChat")
