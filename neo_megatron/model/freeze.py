"""Freezes the parameters that a training stage does not train, by explicit module names.

Stage 1 teaches a language model to see and touches little of what it knows: all of the patch embedding and of the
pre-buffer train, and of the post-LLM only the list in `attention_forms.py`. Stages 2 and 3 train everything. Source:
NEO (arXiv 2510.14979), 3.3.
"""

from collections.abc import Iterator

import torch
from torch.nn import Parameter

from neo_megatron.errors import ConfigError
from neo_megatron.model.transformer_config import NeoConfig


def freeze_for_stage(model: torch.nn.Module, stage: int) -> None:
    """Sets ``requires_grad`` of every parameter of this pipeline stage's part of the model.

    Args:
        model: a `NeoModel`; its layers know their number in the complete model.
        stage: 1, 2 or 3.

    Raises:
        LookupError: a module that stage 1 is to train does not exist (its name has changed).
    """
    if stage in (2, 3):
        model.requires_grad_(True)
        return
    if stage != 1:
        raise ConfigError(f"--training-stage {stage}: stages are 1, 2 and 3")
    config: NeoConfig = model.config
    model.requires_grad_(False)
    if model.pre_process:
        _unfreeze(model, "patch_embedding")
    for layer in model.decoder.layers:
        if layer.layer_number <= config.sizes.pre_buffer_layers:
            layer.requires_grad_(True)
        else:
            for name in config.sizes.form.trained_in_stage_1:
                _unfreeze(layer, name)


def _unfreeze(parent: torch.nn.Module, name: str) -> None:
    parameters = [value for key, value in parent.named_parameters() if key == name or key.startswith(name + ".")]
    if not parameters:
        raise LookupError(
            f"stage 1 trains {name!r}, but {type(parent).__name__} has no such parameters: "
            "attention_forms.py and the model disagree about names"
        )
    for parameter in parameters:
        parameter.requires_grad_(True)


def module_names(model: torch.nn.Module) -> Iterator[tuple[str, Parameter]]:
    """Every parameter of this rank under the name that users give, which several share.

    Layers have no numbers: their names begin with `pre_buffer` or `post_llm`. The last pipeline stage's copy of tied
    word embeddings has the name of the embeddings.
    """
    sizes = model.config.sizes
    for name, parameter in model.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, index, rest = name.split(".", 3)
            number = model.decoder.layers[int(index)].layer_number
            name = f"{'pre_buffer' if number <= sizes.pre_buffer_layers else 'post_llm'}.{rest}"
        elif name == "output_layer.weight" and sizes.tie_word_embeddings:
            name = "embedding.word_embeddings.weight"
        yield name, parameter


def describe_trainable(model: torch.nn.Module) -> str:
    """Counts of trained and of all parameters on this rank by `module_names`."""
    rows: dict[str, list[int]] = {}
    for name, parameter in module_names(model):
        row = rows.setdefault(name, [0, 0])
        row[0] += parameter.numel() if parameter.requires_grad else 0
        row[1] += parameter.numel()
    total = [sum(column) for column in zip(*rows.values(), strict=True)]
    lines = [f"  {trained:>14,} of {all_:>14,}  {name}" for name, (trained, all_) in rows.items()]
    return "\n".join(["trainable parameters on this rank:", *lines, f"  {total[0]:>14,} of {total[1]:>14,}  all"])
