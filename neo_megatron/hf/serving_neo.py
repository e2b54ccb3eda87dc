"""Lets `transformers serve` load NEO: it looks for models in transformers alone, where remote code is not."""

import sys

SERVER = "transformers.cli.serving.model_manager"
"""The module that loads the server's models."""


def register_with_server(model_type: str, architecture: str) -> None:
    """If this process is the server, tells it how NEO is loaded, and that its prompts may have images.

    It takes the class from `transformers`, under the name in `architectures` of `config.json`, and looks for that name
    among those of transformers' own models of images and text. Other processes have no use for either.
    """
    server = sys.modules.get(SERVER)
    if server is None:
        return
    from transformers.models.auto import modeling_auto

    # `sys.modules["transformers"]` may be another object: transformers imports itself a second time.
    setattr(server.transformers, architecture, modeling_auto.AutoModelForImageTextToText)
    modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[model_type] = architecture
